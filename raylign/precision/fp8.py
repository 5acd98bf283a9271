"""FP8 E4M3 with one fp32 scale per row: each output of a weight, each token of an activation.

    scale = amax(row) / 448        q = e4m3(x / scale)        x_hat = q * scale

The layout that Ada, Hopper and later tensor cores take as row-wise scaling. Rows stand alone, so nothing crosses from
sample to sample; a row with a NaN or an infinity becomes NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_E4M3_MAX = 448.0
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """`codes` (..., K) E4M3 and `scales` (..., 1) fp32 of (..., K). A row of zeros gets the smallest normal scale."""
    value = value.float()
    scale = (value.abs().amax(dim=-1, keepdim=True) / _E4M3_MAX).clamp(min=_SMALLEST_NORMAL)
    return {"codes": (value / scale).to(torch.float8_e4m3fn), "scales": scale}


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The values (..., K) in fp32 that packed tensors stand for."""
    return tensors["codes"].float() * tensors["scales"]


def round_activations(value: torch.Tensor) -> torch.Tensor:
    """What (..., K) is after a trip through FP8, in its own dtype."""
    return dequantize(quantize(value)).to(value.dtype)
