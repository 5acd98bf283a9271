"""E2M1's grid, ties and packing; blocks of the last axis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylign.precision import e2m1
from raylign.precision.blocks import from_blocks, padded_size, sample_amax, to_blocks

# Value, nearest grid number, code: the grid itself, each tie (to the even code), just beside it, and beyond the end.
TABLE = [
    (0.0, 0.0, 0), (0.5, 0.5, 1), (1.0, 1.0, 2), (1.5, 1.5, 3), (2.0, 2.0, 4), (3.0, 3.0, 5), (4.0, 4.0, 6),
    (6.0, 6.0, 7), (0.25, 0.0, 0), (0.75, 1.0, 2), (1.25, 1.0, 2), (1.75, 2.0, 4), (2.5, 2.0, 4), (3.5, 4.0, 6),
    (5.0, 4.0, 6), (0.26, 0.5, 1), (0.74, 0.5, 1), (2.51, 3.0, 5), (3.49, 3.0, 5), (5.01, 6.0, 7), (1e30, 6.0, 7),
]  # fmt: skip


@pytest.mark.parametrize(("value", "nearest", "code"), TABLE)
def test_the_grid_and_its_ties(value: float, nearest: float, code: int) -> None:
    both = torch.tensor([value, -value])
    assert e2m1.round_to_grid(both).tolist() == [nearest, -nearest]
    assert e2m1.encode(both).tolist() == [code, code + 8 if value > 0 else code]


def test_every_code_decodes_to_itself() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode(codes)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert e2m1.encode(values).tolist() == [*range(8), 0, *range(9, 16)], "minus zero is written as zero"


def test_nan_stays_nan_on_the_grid() -> None:
    assert torch.isnan(e2m1.round_to_grid(torch.tensor([float("nan"), 1.0]))).tolist() == [True, False]


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40))
def test_two_codes_share_a_byte(codes: list[int]) -> None:
    even = torch.tensor(codes[: len(codes) // 2 * 2], dtype=torch.uint8)
    packed = e2m1.pack(even)
    assert packed.shape[0] == len(even) // 2
    assert packed[0].item() == even[0] + 16 * even[1]
    assert torch.equal(e2m1.unpack(packed), even)


@given(st.floats(-10, 10, width=32))
def test_no_grid_number_is_nearer(value: float) -> None:
    nearest = e2m1.round_to_grid(torch.tensor([value])).item()
    grid = [sign * magnitude for magnitude in e2m1.MAGNITUDES for sign in (1, -1)]
    assert abs(nearest - value) == min(abs(number - value) for number in grid)


@pytest.mark.parametrize(("size", "num_blocks"), [(1, 1), (16, 1), (17, 2), (40, 3)])
def test_blocks_are_filled_with_zeros(size: int, num_blocks: int) -> None:
    value = torch.arange(1.0, 2 * size + 1).view(2, size)
    blocks = to_blocks(value, 16)
    assert blocks.shape == (2, num_blocks, 16)
    assert blocks.sum() == value.sum()
    assert torch.equal(from_blocks(blocks, size), value)
    assert padded_size(size, 16) == 16 * num_blocks


def test_the_largest_of_each_sample() -> None:
    value = torch.tensor([[[1.0, -3.0], [2.0, 0.0]], [[float("nan"), 9.0], [0.0, 0.0]]])
    amax = sample_amax(value)
    assert amax.shape == (2, 1, 1)
    assert amax[0].item() == 3.0
    assert torch.isnan(amax[1])
    assert sample_amax(torch.tensor([1.0, -4.0])).item() == 4.0
