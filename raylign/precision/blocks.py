"""Blocks along the last axis: every quantised format shares one scale among neighbours there."""

from __future__ import annotations

import torch
from torch.nn import functional


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple


def to_blocks(value: torch.Tensor, block: int) -> torch.Tensor:
    """(..., K) as fp32 blocks (..., ceil(K / block), block); zeros fill the last one and change no block's maximum."""
    missing = padded_size(value.shape[-1], block) - value.shape[-1]
    filled = functional.pad(value.float(), (0, missing)) if missing else value.float()
    return filled.unflatten(-1, (-1, block))


def from_blocks(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Blocks (..., n, block) as (..., size), without what filled the last one."""
    return blocks.flatten(-2)[..., :size]


def sample_amax(value: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each sample, (B, 1, ...) for (B, ...): samples are the first axis. fp32.

    One sample's NaN or infinity shows in its own maximum only.
    """
    if value.dim() < 2:
        return value.abs().amax().float()
    return value.abs().amax(dim=tuple(range(1, value.dim())), keepdim=True).float()
