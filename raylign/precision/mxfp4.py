"""MXFP4: E2M1 values, a power of two (E8M0) for 32 neighbours. 0.53125 bytes per value.

    e = floor(log2 amax(block)) - 2        2 is the exponent of 4, E2M1's largest power of two
    q = E2M1(clamp(x / 2^e, -6, 6))        x_hat = q * 2^e

OCP Microscaling Formats v1.0, sections 5.3.3 and 6.3. The scale is the byte e + 127, at least 0; byte 255 is NaN, which
a block with a NaN or an infinity gets. Each block stands alone, so nothing crosses from sample to sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raylign.precision import e2m1
from raylign.precision.blocks import from_blocks, to_blocks

BLOCK = 32
_NAN_BYTE = 255
_E2M1_EXPONENT = 2


def scales(blocks: torch.Tensor) -> torch.Tensor:
    """E8M0 scales (..., n), as uint8, of fp32 blocks (..., n, 32).

    The exponent bits of an fp32 number are floor(log2) + 127; those of subnormal numbers are 0, as their scale is.
    """
    amax = blocks.abs().amax(dim=-1)
    exponent = (amax.view(torch.int32) >> 23) & 0xFF
    scale = (exponent - _E2M1_EXPONENT).clamp(min=0)
    return torch.where(exponent == _NAN_BYTE, _NAN_BYTE, scale).to(torch.uint8)


def quantize(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """`codes` (..., K32 / 2) uint8 and `scales` (..., K32 / 32) E8M0 of (..., K); K32 is K padded to 32s."""
    blocks = to_blocks(value, BLOCK)
    scale = scales(blocks)
    codes = e2m1.encode(blocks / _number(scale).unsqueeze(-1))
    return {"codes": e2m1.pack(codes.flatten(-2)), "scales": scale.view(torch.float8_e8m0fnu)}


def dequantize(tensors: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """The values (..., `size`) in fp32 that packed tensors stand for."""
    values = e2m1.decode(e2m1.unpack(tensors["codes"])).unflatten(-1, (-1, BLOCK))
    return from_blocks(values * _number(tensors["scales"]).unsqueeze(-1), size)


def round_activations(value: torch.Tensor) -> torch.Tensor:
    """What (..., K) is after a trip through MXFP4, in its own dtype."""
    blocks = to_blocks(value, BLOCK)
    step = _number(scales(blocks)).unsqueeze(-1)
    return from_blocks(e2m1.round_to_grid(blocks / step) * step, value.shape[-1]).to(value.dtype)


def _number(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.float8_e8m0fnu).float()
