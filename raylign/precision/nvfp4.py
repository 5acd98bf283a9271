"""NVFP4: E2M1 values, an E4M3 scale for 16 neighbours, an fp32 scale for the tensor. 0.5625 bytes per value.

    S = 448 * 6 / amax(tensor)                          encode scale of the tensor, at most the largest fp32
    s = e4m3(min(amax(block) * S / 6, 448))             block scale
    q = E2M1(clamp(x * S / s, -6, 6))                   x_hat = q * s / S

Products are taken in fp32 in the order of NVIDIA's reference (TransformerEngine, `reference_nvfp4.py`: S * (1 / 6)
first, 1 / (s / S) as a factor), so scales and codes agree with it bit by bit. A block shares its scale among 1 x 16
values, or among 16 x 16 as in NVIDIA's training recipe (arXiv 2509.25149), which makes W and its transpose quantise
alike. Hadamard transforms and stochastic rounding belong to training and are not used.

Deviation: an infinite maximum gives NaN scales, so an overflow shows as NaN; the reference makes it finite.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raylign.precision import e2m1
from raylign.precision.blocks import from_blocks, padded_size, sample_amax, to_blocks

BLOCK = 16
_E4M3_MAX = 448.0
_FP32_MAX = torch.finfo(torch.float32).max
LARGEST = _E4M3_MAX * e2m1.LARGEST
"""The largest magnitude that block scales and codes alone can hold, 2688."""


def scales(blocks: torch.Tensor, amax: torch.Tensor, tile_rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Block scales s (E4M3, (..., n)) and the decode scale 1 / S (fp32, as `amax`) of blocks (..., n, 16).

    `amax` broadcasts against (..., n). With `tile_rows` 16 the rows of blocks (O, n, 16) share in sixteens.
    """
    encode_scale = (LARGEST / amax).clamp(max=_FP32_MAX)
    block_amax = blocks.abs().amax(dim=-1)
    if tile_rows > 1:
        block_amax = _amax_of_rows(block_amax, tile_rows)
    scale = (block_amax * (encode_scale * (1.0 / e2m1.LARGEST))).clamp(max=_E4M3_MAX)
    return scale.to(torch.float8_e4m3fn), 1.0 / encode_scale


def quantize_weight(weight_OI: torch.Tensor, tile_rows: int = 1) -> dict[str, torch.Tensor]:
    """`codes` (O, I16 / 2) uint8, `scales` (O, I16 / 16) E4M3, `tensor_scale` () fp32; I16 is I padded to sixteens.

    With 16 x 16 tiles a scale is stored for each of its rows all the same: that is how the units read it.
    """
    blocks = to_blocks(weight_OI, BLOCK)
    scale, tensor_scale = scales(blocks, weight_OI.abs().amax().float(), tile_rows)
    codes = e2m1.encode(_scaled(blocks, scale, tensor_scale))
    return {"codes": e2m1.pack(codes.flatten(-2)), "scales": scale, "tensor_scale": tensor_scale}


def dequantize_weight(tensors: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """The weight (O, I = `size`) in fp32 that packed tensors stand for."""
    values = e2m1.decode(e2m1.unpack(tensors["codes"])).unflatten(-1, (-1, BLOCK))
    step = tensors["scales"].float() * tensors["tensor_scale"]
    return from_blocks(values * step.unsqueeze(-1), size)


def quantize_activations(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `quantize_weight` for (B, ..., K); `tensor_scale` is (B, 1, ..., 1), one for each sample.

    Deviation from common practice, which takes one fp32 scale over the batch: a sample would then be rounded
    differently beside other neighbours, and a draft would depend on how its chunk was cut.
    """
    blocks = to_blocks(value, BLOCK)
    scale, tensor_scale = scales(blocks, sample_amax(value))
    codes = e2m1.encode(_scaled(blocks, scale, tensor_scale))
    return {"codes": e2m1.pack(codes.flatten(-2)), "scales": scale, "tensor_scale": tensor_scale}


def round_activations(value: torch.Tensor) -> torch.Tensor:
    """What (B, ..., K) is after a trip through NVFP4, in its own dtype: `quantize_activations` without the packing."""
    blocks = to_blocks(value, BLOCK)
    scale, tensor_scale = scales(blocks, sample_amax(value))
    step = (scale.float() * tensor_scale).unsqueeze(-1)
    rounded = e2m1.round_to_grid(_scaled(blocks, scale, tensor_scale)) * step
    return from_blocks(rounded, value.shape[-1]).to(value.dtype)


def normalize_samples(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, ..., K) with every sample scaled to the magnitude `LARGEST`, fp32, and the scales back (B, 1, ..., 1).

    For kernels that know one scale per tensor: of such values it is 1, and block scales and codes are those of each
    sample's own. A sample with a NaN or an infinity becomes zeros with a scale back of NaN, so it spoils no neighbour.
    """
    amax = sample_amax(value)
    encode_scale = (LARGEST / amax).clamp(max=_FP32_MAX)
    is_finite = torch.isfinite(amax)
    scaled = torch.where(is_finite, value.float() * encode_scale, 0.0)
    return scaled.clamp(-LARGEST, LARGEST), torch.where(is_finite, 1.0 / encode_scale, torch.nan)


def _scaled(blocks: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """x * S / s. A scale that underflowed to zero gives a huge factor; what it makes of x decodes to zero."""
    factor = (1.0 / (scale.float() * tensor_scale)).clamp(max=_FP32_MAX)
    return blocks * factor.unsqueeze(-1)


def _amax_of_rows(block_amax_On: torch.Tensor, rows: int) -> torch.Tensor:
    """Each row's maxima replaced by those of its `rows` neighbours; the last tile may be shorter."""
    num_rows = block_amax_On.shape[0]
    missing = padded_size(num_rows, rows) - num_rows
    filled = torch.nn.functional.pad(block_amax_On, (0, 0, 0, missing))
    tiles = filled.unflatten(0, (-1, rows)).amax(dim=1)
    return tiles.repeat_interleave(rows, dim=0)[:num_rows]
