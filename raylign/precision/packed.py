"""A weight in a quantised format: plain tensors by name, the same bytes whichever backend multiplies by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from raylign.errors import NumericsError, ShapeError
from raylign.precision import Format, fp8, mxfp4, nvfp4

WeightTile = Literal["1x16", "16x16"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised weight.

    shape: (out features, in features) of the weight. tensors: what the format's module says, row-major; a backend's
    `arrange` reorders and pads them for its units.
    """

    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class FormatMaths:
    """One format's functions: `pack(weight, tile)`, `unpack(tensors, in features)`, `round_activations(value)`."""

    pack: Callable[[torch.Tensor, WeightTile], dict[str, torch.Tensor]]
    unpack: Callable[[Mapping[str, torch.Tensor], int], torch.Tensor]
    round_activations: Callable[[torch.Tensor], torch.Tensor]


FORMATS: dict[Format, FormatMaths] = {
    "fp8": FormatMaths(lambda weight, _: fp8.quantize(weight), lambda t, _: fp8.dequantize(t), fp8.round_activations),
    "nvfp4": FormatMaths(
        lambda weight, tile: nvfp4.quantize_weight(weight, tile_rows=16 if tile == "16x16" else 1),
        nvfp4.dequantize_weight,
        nvfp4.round_activations,
    ),
    "mxfp4": FormatMaths(lambda weight, _: mxfp4.quantize(weight), mxfp4.dequantize, mxfp4.round_activations),
}


def pack_weight(format_name: Format, weight_OI: torch.Tensor, tile: WeightTile = "1x16") -> Packed:
    """Quantise a weight (out features, in features) of any float dtype, on its own device.

    Raises ShapeError for what is no matrix, NumericsError if the weight holds a NaN or an infinity: one would spread
    over its block or tensor and show only in the pictures.
    """
    if weight_OI.dim() != 2 or not weight_OI.is_floating_point() or weight_OI.numel() == 0:
        raise ShapeError(
            f"a weight to quantise must be a floating-point matrix (out, in), got {weight_OI.dtype} of shape "
            f"{tuple(weight_OI.shape)}; keep this layer in high precision"
        )
    num_bad = int((~torch.isfinite(weight_OI)).sum())
    if num_bad:
        raise NumericsError(
            f"{num_bad} of {weight_OI.numel()} values of a {tuple(weight_OI.shape)} weight are NaN or infinite and "
            f"cannot be quantised to {format_name}; training diverged: resume an earlier checkpoint at a lower "
            "learning rate"
        )
    rows, columns = weight_OI.shape
    return Packed(format_name, (rows, columns), FORMATS[format_name].pack(weight_OI.detach(), tile))


def unpack_weight(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out features, in features) that `packed`, not rearranged, stands for, in `dtype`."""
    return FORMATS[packed.format].unpack(packed.tensors, packed.shape[1]).to(dtype)
