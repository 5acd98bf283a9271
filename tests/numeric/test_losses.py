"""Losses against numbers worked out by hand, and the facts that follow from their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from learner.advantages import group_advantages, r_from_advantage
from learner.losses import clipped_policy_loss, gaussian_kl, norm_ratio, reference_kl, velocity_mse

SHAPE = (3, 2, 4, 4)


def latent(*values: float) -> torch.Tensor:
    """One item whose latent has one channel and one row."""
    return torch.tensor(values).view(1, 1, 1, -1)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


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
