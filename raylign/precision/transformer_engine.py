"""The Transformer Engine backend: NVFP4 with NVIDIA's block-scaling kernels.

It is the arithmetic of TE's `NVFP4BlockScaling` recipe without the parts for training (Hadamard transforms, stochastic
rounding). `DelayedScaling` is never used: given E2M1 it computes in E5M2. TE scales by the maximum of the whole batch;
samples are scaled alike before it (`nvfp4.normalize_samples`), and a row of that maximum is added so that the batch's
scale is 1 to the last bit: each sample is rounded as it would be alone.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch.nn import functional

from raylign.precision import Format, nvfp4
from raylign.precision.blocks import padded_size
from raylign.precision.packed import Packed, WeightTile, pack_weight, unpack_weight

_TILE = 16


class TransformerEngineQuantizer:
    """A Quantizer over TE's quantised tensors: `arrange` gives one, under the name `weight`."""

    format: Format = "nvfp4"
    backend = "transformer_engine"
    is_native = True

    def __init__(self, weight_tile: WeightTile = "1x16", library: Any | None = None) -> None:
        """`library` is `transformer_engine.pytorch`, imported when not given."""
        te: Any = library if library is not None else importlib.import_module("transformer_engine.pytorch")
        self._gemm = te.cpp_extensions.general_gemm
        self._weight_tile: WeightTile = weight_tile
        self._quantize_weight = te.NVFP4Quantizer(
            rowwise=True, columnwise=False, with_2d_quantization=weight_tile == "16x16"
        )
        self._quantize_activations = te.NVFP4Quantizer(rowwise=True, columnwise=False)

    def pack(self, weight_OI: torch.Tensor) -> Packed:
        """See Quantizer."""
        return pack_weight(self.format, weight_OI, self._weight_tile)

    def arrange(self, packed: Packed) -> Packed:
        """TE's own tensor. Quantising what was quantised changes nothing, so its values are those of `packed`."""
        weight = _fill_tiles(unpack_weight(packed, torch.float32))
        return Packed(packed.format, packed.shape, {"weight": self._quantize_weight(weight)})

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """See Quantizer."""
        return unpack_weight(packed, dtype)

    def linear(
        self, value: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See Quantizer."""
        packed = cast("Packed", weight)
        samples = value if value.dim() > 1 else value.unsqueeze(0)
        scaled, sample_scale = nvfp4.normalize_samples(samples)
        rows = scaled.flatten(0, -2)
        anchored = functional.pad(rows, (0, 0, 0, 1), value=nvfp4.LARGEST)
        operand = self._quantize_activations(_fill_tiles(anchored))
        product, *_ = self._gemm(packed.tensors["weight"], operand, out_dtype=torch.bfloat16, layout="TN")
        product = product[: rows.shape[0], : packed.shape[0]].float()
        product = product * sample_scale.expand(*samples.shape[:-1], 1).reshape(-1, 1)
        product = product if bias is None else product + bias
        return product.reshape(*value.shape[:-1], packed.shape[0]).to(value.dtype)


def _fill_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """Zeros up to multiples of 16 rows and columns, which TE's kernels need."""
    rows, columns = matrix.shape
    return functional.pad(matrix, (0, padded_size(columns, _TILE) - columns, 0, padded_size(rows, _TILE) - rows))
