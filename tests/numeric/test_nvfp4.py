"""NVFP4 against numbers worked out by hand, its identities, and what is published about its error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raylign.precision import e2m1, nvfp4


def _gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _through(weight: torch.Tensor, tile_rows: int = 1) -> torch.Tensor:
    return nvfp4.dequantize_weight(nvfp4.quantize_weight(weight, tile_rows), weight.shape[1])


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_block_worked_out_by_hand() -> None:
    """amax 12, so S = 448 * 6 / 12 = 224.

    Block 0 holds the 12: s = 12 * 224 / 6 = 448, so one code is worth 448 / 224 = 2.
    Block 1 has amax 3: s = 3 * 224 / 6 = 112, one code is worth 0.5.
    Block 2 has amax 1.1: s = 1.1 * 224 / 6 = 41.07, between 40 and 44 of E4M3; a code is worth 40 / 224.
    """
    weight = torch.zeros(1, 48)
    weight[0, :5] = torch.tensor([12.0, 0.9, -1.0, 5.0, 7.0])  # in units of 2: 6, .45, -.5, 2.5 (tie), 3.5 (tie)
    weight[0, 16:19] = torch.tensor([3.0, 0.125, 0.375])  # in units of .5: 6, .25 (tie), .75 (tie)
    weight[0, 32:34] = torch.tensor([1.1, 0.55])  # in units of .17857: 6.16, 3.08
    packed = nvfp4.quantize_weight(weight)
    assert packed["scales"].float().tolist() == [[448.0, 112.0, 40.0]]
    assert packed["tensor_scale"].item() == pytest.approx(1 / 224)
    codes = e2m1.unpack(packed["codes"])[0]
    assert codes[:5].tolist() == [7, 1, 9, 4, 6]
    assert codes[16:19].tolist() == [7, 0, 2]
    assert codes[32:34].tolist() == [7, 5]
    got = nvfp4.dequantize_weight(packed, 48)[0]
    assert torch.allclose(got[:5], torch.tensor([12.0, 1.0, -1.0, 4.0, 8.0]))
    assert torch.allclose(got[16:19], torch.tensor([3.0, 0.0, 0.5]))
    assert torch.allclose(got[32:34], torch.tensor([6 * 40 / 224, 3 * 40 / 224]))


def test_the_first_code_of_a_byte_is_in_its_low_half() -> None:
    weight = torch.zeros(1, 16)
    weight[0, :2] = torch.tensor([6.0, -0.5])
    assert nvfp4.quantize_weight(weight)["codes"][0, 0].item() == 7 + 16 * 9


def test_a_two_dimensional_tile_shares_the_largest_value_of_sixteen_rows() -> None:
    weight = torch.zeros(20, 16)
    weight[3, 0] = 6.0
    weight[7, 1] = 1.6  # alone in its row: exact at 1 x 16, 1.5 in the tile's units of 1
    weight[18, 2] = 1.6  # in the second tile, which is short
    one, two = nvfp4.quantize_weight(weight, 1), nvfp4.quantize_weight(weight, 16)
    assert two["scales"][:16, 0].float().tolist() == [448.0] * 16
    assert one["scales"][7, 0] == two["scales"][18, 0], "a tile of one non-zero value is a row of its own"
    got = nvfp4.dequantize_weight(two, 16)
    assert got[7, 1].item() == pytest.approx(1.5)
    assert got[18, 2].item() == pytest.approx(1.6, rel=0.07)


def test_published_errors_on_gaussian_data() -> None:
    weight, value = _gaussian(256, 512), _gaussian(1, 128, 512)
    exact = value @ weight.T
    got = nvfp4.round_activations(value) @ _through(weight).T
    assert _error(_through(weight), weight) == pytest.approx(0.095, abs=0.002)
    assert _error(got, exact) == pytest.approx(0.134, abs=0.003)
    tiled = nvfp4.round_activations(value) @ _through(weight, 16).T
    assert _error(tiled, exact) == pytest.approx(0.146, abs=0.003)


@pytest.mark.parametrize("tile_rows", [1, 16])
def test_quantising_twice_is_quantising_once(tile_rows: int) -> None:
    once = _through(_gaussian(40, 70), tile_rows)
    assert torch.equal(_through(once, tile_rows), once)


@pytest.mark.parametrize("exponent", [-30, -12, 0, 12, 30])
def test_the_scale_of_the_tensor_does_not_change_the_codes(exponent: int) -> None:
    weight = _gaussian(8, 64)
    scaled = weight * 2.0 ** round(exponent * 3.3219)  # a power of two near 10^exponent rounds nothing
    one, other = nvfp4.quantize_weight(weight), nvfp4.quantize_weight(scaled)
    assert torch.equal(one["codes"], other["codes"])
    assert torch.equal(one["scales"].float(), other["scales"].float())
    assert torch.isfinite(nvfp4.dequantize_weight(other, 64)).all()


def test_a_block_far_below_the_largest_goes_to_zero_and_nothing_else_does() -> None:
    """Its scale, amax / 12 * 448, is under half of E4M3's smallest number 2^-9 when amax < 12 / 448 / 1024."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16] = 12.0, 2e-5
    packed = nvfp4.quantize_weight(weight)
    assert packed["scales"][0, 1].float().item() == 0.0
    assert nvfp4.dequantize_weight(packed, 32)[0].tolist()[:17] == [12.0] + [0.0] * 16
    weight[0, 16] = 12 / 448 / 512  # the smallest scale that is kept: 2^-9
    assert nvfp4.quantize_weight(weight)["scales"][0, 1].float().item() == 2.0**-9


@pytest.mark.parametrize("shape", [(3, 17), (16, 16), (1, 1), (5, 31)])
def test_zeros_stay_zeros_at_odd_sizes(shape: tuple[int, int]) -> None:
    assert torch.equal(_through(torch.zeros(shape)), torch.zeros(shape))


def test_what_fills_the_last_block_changes_no_value() -> None:
    weight = _gaussian(4, 21)
    filled = torch.cat((weight, torch.zeros(4, 11)), dim=1)
    assert torch.equal(_through(weight), _through(filled)[:, :21])


@pytest.mark.parametrize("shape", [(5, 33), (2, 7, 48), (2, 3, 4, 16), (40,)])
def test_rounding_activations_is_packing_and_unpacking_them(shape: tuple[int, ...]) -> None:
    value = _gaussian(*shape)
    tensors = nvfp4.quantize_activations(value)
    values = e2m1.decode(e2m1.unpack(tensors["codes"])).unflatten(-1, (-1, 16))
    step = tensors["scales"].float() * tensors["tensor_scale"]
    unpacked = (values * step.unsqueeze(-1)).flatten(-2)[..., : shape[-1]]
    assert torch.equal(nvfp4.round_activations(value), unpacked)
    assert nvfp4.round_activations(value.bfloat16()).dtype == torch.bfloat16


def test_a_sample_is_rounded_as_if_it_were_alone() -> None:
    value = _gaussian(3, 5, 40) * torch.tensor([1.0, 1e3, 1e-3]).view(3, 1, 1)
    together = nvfp4.round_activations(value)
    for index in range(3):
        assert torch.equal(together[index], nvfp4.round_activations(value[index : index + 1])[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_sample_shows_and_spoils_no_other(bad: float) -> None:
    value = _gaussian(3, 5, 40)
    clean = nvfp4.round_activations(value)
    value[1, 2, 3] = bad
    rounded = nvfp4.round_activations(value)
    assert torch.isnan(rounded[1]).all()
    assert torch.equal(rounded[[0, 2]], clean[[0, 2]])


def test_samples_scaled_alike_quantise_as_with_their_own_scale() -> None:
    """What kernels with one scale per tensor rely on: of values up to 448 * 6 that scale is 1."""
    value = _gaussian(3, 4, 32) * torch.tensor([1.0, 50.0, 1e-4]).view(3, 1, 1)
    value[2, 0, 0] = float("nan")
    scaled, back = nvfp4.normalize_samples(value)
    assert scaled[:2].abs().flatten(1).amax(dim=1).tolist() == pytest.approx([2688.0, 2688.0])
    assert torch.isfinite(scaled).all()
    assert torch.isnan(back).flatten().tolist() == [False, False, True]
    got = _through(scaled[:2].flatten(0, 1)).unflatten(0, (2, 4)) * back[:2]
    assert torch.allclose(got, nvfp4.round_activations(value)[:2], rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.03, 0.1])
def test_a_low_rank_change_of_a_weight_shows_in_its_codes(fraction: float) -> None:
    """Q(W + D) - Q(W) projects on D with gain 0.97 to 1.0, for rank-32 D of 0.3 to 10 % of |W|: rounding is unbiased.

    Over 2^20 values the noise, 10 times the change at 0.3 %, moves the gain by about 10 / 2^10 = 0.01.
    """
    weight = _gaussian(1024, 1024)
    change = _gaussian(1024, 32) @ _gaussian(32, 1024)
    change *= fraction * weight.norm() / change.norm()
    seen = _through(weight + change) - _through(weight)
    gain = float((seen * change).sum() / change.square().sum())
    assert 0.97 < gain < 1.02


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    st.sampled_from([1, 16]),
)
def test_no_value_is_further_off_than_its_block_allows(values: list[float], tile_rows: int) -> None:
    """|x_hat - x| <= amax(block) / 6 (half the widest gap, 2 codes, and E4M3's 1 / 16) + what an underflow loses."""
    weight = torch.tensor([values])
    error = (_through(weight, tile_rows) - weight).abs()
    blocks = torch.nn.functional.pad(weight, (0, -len(values) % 16)).abs().unflatten(1, (-1, 16)).amax(dim=-1)
    bound = blocks.repeat_interleave(16, dim=1)[:, : len(values)] * (1 / 6 + 1 / 16)
    assert bool((error <= bound + weight.abs().max() / 448 / 512).all())


def test_torchao_agrees_bit_by_bit() -> None:
    """Another implementation of the format. Its smallest block scale is 2^-6, so blocks must not be tiny."""
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = _gaussian(128, 256)
    tensor = module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=weight.abs().amax() / (448 * 6))
    packed = nvfp4.quantize_weight(weight)
    assert torch.equal(tensor.scale.float(), packed["scales"].float())
    assert torch.equal(tensor.qdata, packed["codes"])
