"""The reference backend: every format on every device, in plain torch. It emulates: exact and small, not fast."""

from __future__ import annotations

import torch
from torch.nn import functional

from raylign.precision import Format
from raylign.precision.packed import FORMATS, Packed, WeightTile, pack_weight, unpack_weight


class ReferenceQuantizer:
    """A Quantizer that unpacks the weight, rounds the activations and multiplies in their dtype."""

    backend = "reference"
    is_native = False

    def __init__(self, format_name: Format, weight_tile: WeightTile = "1x16", activations: bool = True) -> None:
        self.format: Format = format_name
        self._weight_tile: WeightTile = weight_tile
        self._activations = activations

    def pack(self, weight_OI: torch.Tensor) -> Packed:
        """See Quantizer."""
        return pack_weight(self.format, weight_OI, self._weight_tile)

    def arrange(self, packed: Packed) -> Packed:
        """The same: plain torch reads the plain layout."""
        return packed

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """See Quantizer."""
        return unpack_weight(packed, dtype)

    def linear(
        self, value: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_hat @ w_hat^T + bias. `weight` may be w_hat itself, unpacked once for many calls."""
        weight_OI = self.unpack(weight, value.dtype) if isinstance(weight, Packed) else weight
        rounded = FORMATS[self.format].round_activations(value) if self._activations else value
        return functional.linear(rounded, weight_OI, bias)
