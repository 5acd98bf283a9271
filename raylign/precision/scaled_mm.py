"""The torch backend: `torch.nn.functional.scaled_mm` on the device's FP8 and FP4 units.

Operands reach the units as cuBLAS wants them: sizes padded to whole tiles, block scales in 128 x 4 tiles of
32 x 4 x 4 (cuBLAS documentation, "1D block scaling factors layout"). NVFP4's fp32 scales, one per sample and one per
weight, multiply the product afterwards: the units' own tensor scale could not differ between samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from raylign.precision import Format, fp8, mxfp4, nvfp4
from raylign.precision.blocks import padded_size
from raylign.precision.packed import Packed, WeightTile, pack_weight, unpack_weight

Operand = Mapping[str, torch.Tensor]
Multiply = Callable[..., torch.Tensor]
"""`torch.nn.functional.scaled_mm`, or what stands for it where a device has no units."""

_ROWS = 16
_SCALE_ROWS, _SCALE_COLUMNS = 128, 4
# What the inner dimension must be a multiple of: 16 bytes, so 16 FP8 or 32 FP4 values.
_INNER: dict[Format, int] = {"fp8": 16, "nvfp4": 32, "mxfp4": 32}


class ScaledMmQuantizer:
    """A Quantizer on the device's units. Outputs are bf16 inside, then cast to what the layer's caller computes in."""

    is_native = True

    def __init__(
        self,
        format_name: Format,
        weight_tile: WeightTile = "1x16",
        backend: str = "torch",
        quantize_nvfp4: Callable[[torch.Tensor], Operand] | None = None,
        multiply: Multiply = functional.scaled_mm,
    ) -> None:
        """`quantize_nvfp4` gives activations (B, ..., K) as `codes`, swizzled `scales` and `tensor_scale`."""
        self.format: Format = format_name
        self.backend = backend
        self._weight_tile: WeightTile = weight_tile
        self._quantize_nvfp4 = quantize_nvfp4 or nvfp4_operand
        self._multiply = multiply

    def pack(self, weight_OI: torch.Tensor) -> Packed:
        """See Quantizer."""
        return pack_weight(self.format, weight_OI, self._weight_tile)

    def arrange(self, packed: Packed) -> Packed:
        """Pad to whole tiles and swizzle the block scales."""
        num_rows = padded_size(packed.shape[0], _ROWS)
        inner = padded_size(packed.shape[1], _INNER[self.format])
        codes, scales = packed.tensors["codes"], packed.tensors["scales"]
        tensors = dict(packed.tensors)
        if self.format == "fp8":
            tensors["codes"] = _fill(codes, num_rows, inner)
            tensors["scales"] = functional.pad(scales, (0, 0, 0, num_rows - scales.shape[0]), value=1.0)
        else:
            tensors["codes"] = _fill(codes, num_rows, inner // 2)
            tensors["scales"] = swizzle(_fill(scales, num_rows, scales.shape[1]))
        return Packed(packed.format, packed.shape, tensors)

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """See Quantizer."""
        return unpack_weight(packed, dtype)

    def linear(
        self, value: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See Quantizer."""
        packed = cast("Packed", weight)
        size, inner = value.shape[-1], padded_size(value.shape[-1], _INNER[self.format])
        filled = functional.pad(value, (0, inner - size)) if inner > size else value
        filled = filled if filled.dim() > 1 else filled.unsqueeze(0)
        product = _PRODUCTS[self.format](self, filled, packed.tensors)[:, : packed.shape[0]]
        product = product if bias is None else product + bias
        return product.reshape(*value.shape[:-1], packed.shape[0]).to(_result_dtype(value))

    def _fp8(self, value: torch.Tensor, weight: Operand) -> torch.Tensor:
        rows = fp8.quantize(value.flatten(0, -2))
        by_row = ScalingType.RowWise
        return self._multiply(
            rows["codes"], weight["codes"].t(), rows["scales"], by_row, weight["scales"].t(), by_row
        )  # fmt: skip

    def _nvfp4(self, value: torch.Tensor, weight: Operand) -> torch.Tensor:
        operand = self._quantize_nvfp4(value)
        product = self._multiply_blocks(operand, weight, ScalingType.BlockWise1x16)
        sample_scale = operand["tensor_scale"].expand(*value.shape[:-1], 1).reshape(-1, 1)
        return product.float() * (sample_scale * weight["tensor_scale"])

    def _mxfp4(self, value: torch.Tensor, weight: Operand) -> torch.Tensor:
        tensors = mxfp4.quantize(value.flatten(0, -2))
        operand = {"codes": tensors["codes"], "scales": swizzle(tensors["scales"])}
        return self._multiply_blocks(operand, weight, ScalingType.BlockWise1x32)

    def _multiply_blocks(self, operand: Operand, weight: Operand, blocks: ScalingType) -> torch.Tensor:
        swizzled = SwizzleType.SWIZZLE_32_4_4
        return self._multiply(
            operand["codes"].view(torch.float4_e2m1fn_x2),
            weight["codes"].view(torch.float4_e2m1fn_x2).t(),
            operand["scales"], blocks, weight["scales"], blocks, swizzled, swizzled,
        )  # fmt: skip


_PRODUCTS: dict[Format, Callable[[ScaledMmQuantizer, torch.Tensor, Operand], torch.Tensor]] = {
    "fp8": ScaledMmQuantizer._fp8,  # pyright: ignore[reportPrivateUsage]
    "nvfp4": ScaledMmQuantizer._nvfp4,  # pyright: ignore[reportPrivateUsage]
    "mxfp4": ScaledMmQuantizer._mxfp4,  # pyright: ignore[reportPrivateUsage]
}


def nvfp4_operand(value: torch.Tensor) -> Operand:
    """Activations (B, ..., K) as the units read them: `codes` (M, K / 2), swizzled `scales`, `tensor_scale`."""
    tensors = nvfp4.quantize_activations(value)
    return {
        "codes": tensors["codes"].flatten(0, -2),
        "scales": swizzle(tensors["scales"].flatten(0, -2)),
        "tensor_scale": tensors["tensor_scale"],
    }


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """Scales (R, n), one byte each, as the units read them: flat, R filled up to 128 and n to 4.

    Row r, column c lies in tile (r // 128, c // 4) at byte 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4.
    """
    rows, columns = scales.shape
    filled = _fill(scales, padded_size(rows, _SCALE_ROWS), padded_size(columns, _SCALE_COLUMNS)).view(torch.uint8)
    tiles = filled.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, _SCALE_COLUMNS))
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def _fill(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix of one-byte elements, with zeros up to (rows, columns)."""
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return functional.pad(matrix.view(torch.uint8), missing).view(matrix.dtype)


def _result_dtype(value: torch.Tensor) -> torch.dtype:
    """What `nn.Linear` would return here."""
    kind = value.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
