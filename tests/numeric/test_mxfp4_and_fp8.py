"""MXFP4 and FP8 against numbers worked out by hand, and their identities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raylign.precision import e2m1, fp8, mxfp4

Round = Callable[[torch.Tensor], torch.Tensor]
ROUNDS: dict[str, Round] = {"mxfp4": mxfp4.round_activations, "fp8": fp8.round_activations}


def _gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_block_of_mxfp4_worked_out_by_hand() -> None:
    """amax 7.9: floor(log2) = 2, so the scale is 2^0 and 7.9 saturates at 6. amax 0.4: floor(log2) = -2, 2^-4."""
    value = torch.zeros(1, 64)
    value[0, :4] = torch.tensor([7.9, 2.5, -0.25, 0.3])
    value[0, 32:34] = torch.tensor([0.4, 0.1])  # in units of 1 / 16: 6.4, 1.6
    packed = mxfp4.quantize(value)
    assert packed["scales"].view(torch.uint8).tolist() == [[127, 123]]
    codes = e2m1.unpack(packed["codes"])[0]
    assert codes[:4].tolist() == [7, 4, 8, 1]
    assert codes[32:34].tolist() == [7, 3]
    got = mxfp4.dequantize(packed, 64)[0]
    assert got[:4].tolist() == [6.0, 2.0, 0.0, 0.5]
    assert got[32:34].tolist() == [6 / 16, 1.5 / 16]


@pytest.mark.parametrize(
    ("amax", "byte"),
    [(0.0, 0), (1e-42, 0), (2.0**-126, 0), (2.0**-124, 1), (1.0, 125), (3.99, 126), (4.0, 127), (3e38, 252)],
)
def test_the_shared_exponent_at_every_magnitude(amax: float, byte: int) -> None:
    """floor(log2 amax) - 2 + 127, at least 0: 3e38 < 2^128, so 127 - 2 + 127 = 252."""
    value = torch.full((1, 32), amax)
    assert mxfp4.quantize(value)["scales"].view(torch.uint8).item() == byte
    assert torch.isfinite(mxfp4.round_activations(value)).all()


def test_a_row_of_fp8_worked_out_by_hand() -> None:
    """amax 4.48 gives the scale 0.01; 1.23 is 123 codes, and E4M3 knows 120 and 128 there. 1.24 is the tie: even."""
    packed = fp8.quantize(torch.tensor([[4.48, 1.23, -0.16], [0.0, 0.0, 0.0]]))
    assert packed["scales"][0].item() == pytest.approx(0.01)
    assert packed["codes"][0].float().tolist() == [448.0, 120.0, -16.0]
    assert fp8.dequantize(packed)[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("name", "error"), [("mxfp4", 0.115), ("fp8", 0.0263)])
def test_errors_on_gaussian_data(name: str, error: float) -> None:
    value = _gaussian(256, 512)
    assert _error(ROUNDS[name](value), value) == pytest.approx(error, abs=0.001)


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 50), (40,), (1, 1)])
def test_quantising_twice_is_quantising_once(name: str, shape: tuple[int, ...]) -> None:
    once = ROUNDS[name](_gaussian(*shape))
    assert once.shape == shape
    assert torch.allclose(ROUNDS[name](once), once, rtol=1e-6)


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("amax", [1e-30, 1e30, 3e38])
def test_extreme_magnitudes_keep_the_relative_error(name: str, amax: float) -> None:
    value = _gaussian(4, 64)
    value = value / value.abs().amax() * amax
    assert _error(ROUNDS[name](value), value) < 0.14


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_value_shows_and_stays_in_its_sample(name: str, bad: float) -> None:
    value = _gaussian(3, 2, 64)
    clean = ROUNDS[name](value)
    value[1, 0, 5] = bad
    rounded = ROUNDS[name](value)
    assert torch.isnan(rounded[1, 0, 5])
    assert torch.equal(rounded[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("name", ROUNDS)
def test_a_sample_is_rounded_as_if_it_were_alone(name: str) -> None:
    value = _gaussian(3, 5, 40)
    assert torch.equal(ROUNDS[name](value)[1], ROUNDS[name](value[1:2])[0])


def test_torchao_agrees_bit_by_bit() -> None:
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    value = _gaussian(64, 128)
    scales, codes = module.to_mx(value, torch.float4_e2m1fn_x2, 32)
    packed = mxfp4.quantize(value)
    assert torch.equal(scales.view(torch.uint8).flatten(), packed["scales"].view(torch.uint8).flatten())
    assert torch.equal(codes.view(torch.uint8), packed["codes"])
