"""Losses against numbers worked out by hand, and the facts that follow from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from learner.advantages import group_advantages, r_from_advantage
from learner.losses import clipped_policy_loss, gaussian_kl, nft_loss, norm_ratio, reference_kl, velocity_mse

SHAPE = (3, 2, 4, 4)


def latent(*values: float) -> torch.Tensor:
    """One item whose latent has one channel and one row."""
    return torch.tensor(values).view(1, 1, 1, -1)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


# One pixel: x_t = 1, t = 1/2, x0 = .2, v_old = .4, v = .6.
# beta 1:  v+ = .6, x0+ = .7, error .5²/.5 = .5;  v- = .2, x0- = .9, error .7²/.7 = .7
# beta .5: v+ = .5, x0+ = .75, error .55;         v- = .3, x0- = .85, error .65
@pytest.mark.parametrize(
    ("beta", "r", "expected"),
    [(1.0, 1.0, 0.5), (1.0, 0.0, 0.7), (1.0, 0.8, 0.54), (0.5, 1.0, 1.1), (0.5, 0.8, 1.14)],
)
def test_the_nft_loss_of_one_pixel(beta: float, r: float, expected: float) -> None:
    loss_N = nft_loss(latent(0.6), latent(0.4), latent(1.0), latent(0.2), one(0.5), one(r), beta)
    assert loss_N.item() == pytest.approx(expected, rel=1e-6)


def test_the_nft_loss_averages_squares_and_normalises_by_the_mean_gap() -> None:
    # x̂0 = (1, 3) against x0 = (0, 0): mean square 5, mean gap 2.
    velocity = latent(0.0, 0.0)
    loss_N = nft_loss(velocity, velocity, latent(1.0, 3.0), latent(0.0, 0.0), one(1.0), one(0.3), 1.0)
    assert loss_N.item() == pytest.approx(2.5)
    assert loss_N.dtype == torch.float64


def test_the_nft_gradient_of_one_pixel_does_not_pass_through_the_normaliser() -> None:
    # dL/dv = r 2 gap+ (-t) / w+ + (1 - r) 2 gap- t / w- = -.8 + .2; through the normaliser it would be halved.
    velocity = latent(0.6).requires_grad_()
    nft_loss(velocity, latent(0.4), latent(1.0), latent(0.2), one(0.5), one(0.8), 1.0).sum().backward()
    assert velocity.grad is not None
    assert velocity.grad.item() == pytest.approx(-0.6, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_nft_gradient_at_the_old_policy_is_the_flow_matching_direction_times_2r_minus_1(beta: float) -> None:
    torch.manual_seed(1)
    state, final, old = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    sigma_N, r_N = torch.tensor([0.2, 0.6, 0.9]), torch.tensor([0.5, 0.0, 0.9])
    velocity = old.clone().requires_grad_()
    nft_loss(velocity, old, state, final, sigma_N, r_N, beta).sum().backward()
    t = sigma_N.view(-1, 1, 1, 1)
    gap = (state - t * old - final).double()
    weight = gap.abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = (2 * r_N.view(-1, 1, 1, 1) - 1) * -2 * t * gap / (weight * gap[0].numel())
    assert velocity.grad is not None
    torch.testing.assert_close(velocity.grad.double(), expected, rtol=1e-5, atol=1e-8)
    # An average sample (r = 1/2) says nothing there: both branches pull equally hard in opposite directions.
    assert velocity.grad[0].abs().max() < 1e-8


def test_the_loss_of_an_average_sample_is_symmetric_about_the_old_policy() -> None:
    torch.manual_seed(1)
    state, final, old, change = (torch.randn(SHAPE) for _ in range(4))
    arguments = (state, final, torch.full((3,), 0.5), torch.full((3,), 0.5), 1.0)
    up = nft_loss(old + change, old, *arguments)
    down = nft_loss(old - change, old, *arguments)
    torch.testing.assert_close(up, down, rtol=1e-5, atol=0)


def test_the_nft_loss_of_a_bad_sample_is_bounded_below() -> None:
    # The reflection about v_old keeps even r = 0 a squared error; a plain negated loss would go to minus infinity.
    far = torch.full(SHAPE, 1e3)
    loss_N = nft_loss(
        far, torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE), torch.ones(3), torch.zeros(3), 1.0
    )
    assert (loss_N > 0).all()


def test_a_perfect_prediction_has_a_finite_nft_gradient() -> None:
    velocity = torch.zeros(SHAPE, requires_grad=True)
    zeros = torch.zeros(SHAPE)
    loss_N = nft_loss(velocity, zeros, zeros, zeros, torch.ones(3), torch.ones(3), 1.0)
    loss_N.sum().backward()
    assert velocity.grad is not None
    assert loss_N.sum() == 0
    assert torch.isfinite(velocity.grad).all()


@pytest.mark.parametrize(
    ("adv", "ratio", "expected", "gradient"),
    [
        (2.0, 1.2, -2.2, 0.0),  # better than before, and moved enough: clipped
        (2.0, 0.8, -1.6, -1.6),  # better, but less likely now: full gradient back
        (-2.0, 1.2, 2.4, 2.4),  # worse, and more likely now: full gradient
        (-2.0, 0.8, 1.8, 0.0),  # worse, and moved enough: clipped
        (2.0, 1.0, -2.0, -2.0),
    ],
)
def test_the_clipped_surrogate(adv: float, ratio: float, expected: float, gradient: float) -> None:
    learner_logprob_N = (one(-1.0) + math.log(ratio)).requires_grad_()
    loss_N, ratio_N = clipped_policy_loss(learner_logprob_N, one(-1.0), one(adv), clip_range=0.1)
    loss_N.sum().backward()
    assert ratio_N.item() == pytest.approx(ratio, rel=1e-6)
    assert loss_N.item() == pytest.approx(expected, rel=1e-6)
    assert learner_logprob_N.grad is not None
    assert learner_logprob_N.grad.item() == pytest.approx(gradient, rel=1e-6)


def test_reference_distances_in_their_three_spaces() -> None:
    # Gaps .3 and .1: mean square .05. std .5 over a step of .2: s² = .25 / .2 = 1.25.
    mean, ref_mean, std_N = latent(0.3, 0.1), latent(0.0, 0.0), one(0.5)
    velocity, ref_velocity = latent(1.0, 2.0), latent(0.0, 0.0)
    arguments = (mean, ref_mean, std_N, velocity, ref_velocity, -0.2)
    assert reference_kl("exact_gaussian", *arguments).item() == pytest.approx(0.05 / (2 * 0.25))
    assert reference_kl("mean_over_std2_no_dt", *arguments).item() == pytest.approx(0.05 / (2 * 1.25))
    assert reference_kl("velocity_mse", *arguments).item() == pytest.approx(2.5)
    assert velocity_mse(velocity, ref_velocity).item() == pytest.approx(2.5)


def test_the_exact_kl_is_that_of_the_two_distributions() -> None:
    mean, ref_mean, std_N = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.1, 0.5, 2.0])
    std = std_N.view(-1, 1, 1, 1)
    expected = kl_divergence(Normal(mean, std), Normal(ref_mean, std)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, ref_mean, std_N), expected)


def test_the_norm_ratio() -> None:
    assert norm_ratio(latent(3.0, 4.0), latent(0.0, 2.0)).item() == pytest.approx(2.5)


def test_r_maps_advantages_to_a_probability() -> None:
    adv_N = torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0])
    assert r_from_advantage(adv_N, 5.0).tolist() == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0])


rewards = st.lists(st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=1, max_size=6), min_size=1, max_size=5)


@given(rewards, st.sampled_from(["global", "group"]))
def test_advantages_sum_to_zero_in_every_group(values: list[list[float | None]], std: str) -> None:
    for advantage, group in zip(group_advantages(values, std), values, strict=True):  # type: ignore[arg-type]
        largest = max(1.0, float(advantage.adv_G.abs().max()))
        assert float(advantage.adv_G.double().sum()) == pytest.approx(0.0, abs=1e-5 * largest)
        assert advantage.valid_G.tolist() == [value is not None for value in group]
        assert (advantage.adv_G[~advantage.valid_G] == 0).all()
