"""E2M1, the four-bit float of NVFP4 and MXFP4: a sign and the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6.

A code is `sign * 8 + index of the magnitude`. Two codes share a byte, the earlier value in the low half, as the
tensor cores read them (OCP Microscaling Formats v1.0, section 5.3.3).
"""

from __future__ import annotations

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0


def round_to_grid(value: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 number to each element, fp32; beyond 6 it saturates, NaN stays NaN.

    The grid is spaced 0.5 below 2, 1 below 4 and 2 up to 6, so rounding halves to even multiples of the spacing is
    rounding ties to the even code: 0.25 to 0, 0.75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4.
    """
    magnitude = value.float().abs().clamp(max=LARGEST)
    spacing = 0.5 + 0.5 * (magnitude >= 2.0) + (magnitude >= 4.0)
    return torch.copysign((magnitude / spacing).round() * spacing, value)


def encode(value: torch.Tensor) -> torch.Tensor:
    """Codes 0 to 15 (uint8) of the nearest E2M1 numbers. NaN has no code: mark it in the block's scale."""
    nearest = round_to_grid(value).abs()
    index = torch.where(nearest < 2.0, 2.0 * nearest, torch.where(nearest < 4.0, nearest + 2.0, nearest / 2.0 + 4.0))
    return index.nan_to_num(0.0).to(torch.uint8) + 8 * (value < 0).to(torch.uint8)


def decode(code: torch.Tensor) -> torch.Tensor:
    """The numbers (fp32) of codes 0 to 15."""
    values = torch.tensor((*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)), device=code.device)
    return values[code.int()]


def pack(code: torch.Tensor) -> torch.Tensor:
    """Codes (..., K), K even, as bytes (..., K / 2)."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(byte: torch.Tensor) -> torch.Tensor:
    """Bytes (..., K / 2) as codes (..., K)."""
    return torch.stack((byte & 0xF, byte >> 4), dim=-1).flatten(-2)
