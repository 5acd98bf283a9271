"""Losses of the forward-process family against numbers worked out by hand, and the facts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from learner.forward_losses import (
    AdvMode,
    AwmWeighting,
    NftWeighting,
    awm_logprob,
    centres,
    crd_loss,
    denoising_error,
    nft_loss,
    rewarded_kl_weight,
    shaped_advantage,
)

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


# x0 = .2, eps = 1.8, t = 1/4: x_t = .6, v* = 1.6. v+ = .6 and v- = .2 (v_old = .4) miss it by 1 and 1.4:
# .8 * 1 + .2 * 1.96 = 1.192, times w(t).
@pytest.mark.parametrize(("weighting", "weight"), [("uniform", 1.0), ("t", 0.25), ("one_minus_t", 0.75)])
def test_the_nft_loss_under_other_weightings_of_levels(weighting: NftWeighting, weight: float) -> None:
    loss_N = nft_loss(latent(0.6), latent(0.4), latent(0.6), latent(0.2), one(0.25), one(0.8), 1.0, weighting)
    assert loss_N.item() == pytest.approx(1.192 * weight, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [-9.0, -0.5, 0.0, 2.0]),
        ("positive_only", [0.0, 0.0, 0.0, 2.0]),
        ("negative_only", [-9.0, -0.5, 0.0, 0.0]),
        ("one_only", [0.0, 0.0, 0.0, 1.0]),
        ("binary", [-1.0, -1.0, 0.0, 1.0]),
    ],
)
def test_which_advantages_count(mode: AdvMode, expected: list[float]) -> None:
    assert shaped_advantage(torch.tensor([-9.0, -0.5, 0.0, 2.0]), mode).tolist() == expected


def test_the_denoising_error_plain_and_by_its_own_size() -> None:
    # Gaps 1 and 3: mean square 5, mean gap 2.
    velocity, target = latent(1.0, 3.0), latent(0.0, 0.0)
    assert denoising_error(velocity, target, adaptive=False).item() == 5.0
    assert denoising_error(velocity, target, adaptive=True).item() == 2.5
    # The floor: a gap of 1e-7 is divided by 1e-5.
    assert denoising_error(latent(1e-7), latent(0.0), adaptive=True).item() == pytest.approx(1e-9)


def test_no_gradient_goes_through_the_errors_own_size() -> None:
    # d/dv of (v - v*)² / w at v = 3: 2 * 3 / 3; through w it would be 1.
    velocity = latent(3.0).requires_grad_()
    denoising_error(velocity, latent(0.0), adaptive=True).sum().backward()
    assert velocity.grad is not None
    assert velocity.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", -0.0016),
        ("t", -0.0008),
        ("t2", -0.0004),
        ("huber", -0.5 * (0.04 - 1e-5)),  # sqrt(.0016) = .04
        ("ghuber", -2 * (0.2 - 10**-2.5)),  # .0016^.25 = .2, and 1e-10^.25 = 10^-2.5
    ],
)
def test_the_pseudo_logprob_of_an_error_of_0016_at_level_half(weighting: AwmWeighting, expected: float) -> None:
    error_N = torch.tensor([0.0016], dtype=torch.float64)
    assert awm_logprob(error_N, one(0.5), weighting, 0.25).item() == pytest.approx(expected, rel=1e-6)
    assert awm_logprob(0 * error_N, one(0.5), weighting, 0.25).item() == pytest.approx(0.0, abs=1e-15)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_uniform_centres_are_means_of_what_is_present() -> None:
    implicit, target = doubles(1, 2, 6, 100), doubles(0.4, 0.5, 0.9, 0.1)
    present = torch.tensor([True, True, True, False])
    assert centres(implicit, target, present, -1.0).tolist() == pytest.approx([3, 0.6, 3, 0.6])
    assert centres(implicit, target, ~(present | True), -1.0).tolist() == [0, 0, 0, 0]


def test_a_temperature_weighs_the_better_in_one_centre_and_the_worse_in_the_other() -> None:
    # R differs by T ln 3: weights 1/4 and 3/4, then 3/4 and 1/4.
    step = 0.25 * math.log(3)
    found = centres(doubles(0, 4), doubles(0.2, 0.2 + step), torch.tensor([True, True]), 0.25)
    assert found.tolist() == pytest.approx([3, 0.2 + 0.75 * step, 1, 0.2 + 0.25 * step])


def test_temperature_zero_centres_on_the_better_half_and_on_the_worse() -> None:
    present = torch.tensor([True, True, True])
    found = centres(doubles(1, 2, 6), doubles(0.4, 0.5, 0.9), present, 0.0)
    assert found.tolist() == pytest.approx([6, 0.9, 1, 0.4])
    # Nobody is worse than 1/2: that centre is everyone's.
    found = centres(doubles(1, 2, 6), doubles(0.5, 0.5, 0.8), present, 0.0)
    assert found.tolist() == pytest.approx([6, 0.8, 3, 0.6])


def test_centres_of_many_sets_are_those_of_each() -> None:
    torch.manual_seed(2)
    implicit, target = torch.randn(3, 2, 5, dtype=torch.float64), torch.rand(3, 2, 5, dtype=torch.float64)
    present = torch.rand(3, 2, 5) > 0.3
    for temperature in (-1.0, 0.0, 0.5):
        every = centres(implicit, target, present, temperature)
        for p in range(3):
            for k in range(2):
                alone = centres(implicit[p, k], target[p, k], present[p, k], temperature)
                torch.testing.assert_close(every[p, k], alone)


def test_the_crd_loss_of_one_sample() -> None:
    # r 2 against 1 at beta 1/2, R .8 against .5: (.5 - .3)² = .04; against 3 and .7 it is (-.5 - .1)² = .36.
    both, same = doubles(1, 0.5, 3, 0.7)[None], doubles(1, 0.5, 1, 0.5)[None]
    assert crd_loss(doubles(2), doubles(0.8), same, 0.5, "mse").item() == pytest.approx(0.04)
    assert crd_loss(doubles(2), doubles(0.8), both, 0.5, "mse").item() == pytest.approx(0.2)
    # Cross-entropy log(1 + e^.5) - .5 sigmoid(.3) = .974077 - .5 * .574443.
    assert crd_loss(doubles(2), doubles(0.8), same, 0.5, "bce").item() == pytest.approx(0.686856, rel=1e-5)


def test_a_detached_uniform_mean_changes_no_gradient_of_the_squared_loss() -> None:
    torch.manual_seed(3)
    target, present = torch.rand(6, dtype=torch.float64), torch.ones(6, dtype=torch.bool)
    grads: list[torch.Tensor] = []
    for detached in (True, False):
        implicit = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
        if detached:
            centres_NF = centres(implicit.detach(), target, present, -1.0).expand(6, -1)
            crd_loss(implicit, target, centres_NF, 0.7, "mse").sum().backward()
        else:
            ((0.7 * (implicit - implicit.mean()) - (target - target.mean())) ** 2).sum().backward()
        assert implicit.grad is not None
        grads.append(implicit.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-14, atol=1e-15)


def test_the_kl_weight_rises_with_the_reward_between_its_bounds() -> None:
    reward_N = torch.tensor([-1.0, 0.0, 0.5, 1.0, 7.0])
    assert rewarded_kl_weight(reward_N, 1e-4, 0.1).tolist() == pytest.approx([1e-4, 1e-4, 0.05005, 0.1, 0.1])


# The velocity of one bad sample under gradient descent; v* = 0 and v_old = 1 there.
def nft(velocity: torch.Tensor) -> torch.Tensor:
    return nft_loss(velocity, latent(1.0), latent(0.5), latent(0.5), one(1.0), one(0.0), 1.0, "uniform")


def crd(velocity: torch.Tensor) -> torch.Tensor:
    implicit_N = 1.0 - denoising_error(velocity, latent(0.0), adaptive=False)
    return crd_loss(implicit_N, doubles(0.0), doubles(0.0, 0.5, 0.0, 0.5)[None], 1.0, "mse")


def awm(weighting: AwmWeighting, old_weight: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(velocity: torch.Tensor) -> torch.Tensor:
        error_N = denoising_error(velocity, latent(0.0), adaptive=False)
        penalty_N = ((velocity - latent(1.0)) ** 2).mean(dim=(1, 2, 3))
        return awm_logprob(error_N, one(0.5), weighting, 0.25) + old_weight * penalty_N  # A = -1

    return loss


@pytest.mark.parametrize("loss", [nft, crd, awm("ghuber", 1.0), awm("t", 1.0)])
def test_a_bad_sample_pushes_to_a_point_and_no_further(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert pushed(loss, 400) == pytest.approx(pushed(loss, 800), abs=1e-3)
    assert pushed(loss, 800) > 1.05  # but it does push


@pytest.mark.parametrize("weighting", ["ghuber", "t"])
def test_without_its_penalty_advantage_weighted_matching_pushes_without_end(weighting: AwmWeighting) -> None:
    assert pushed(awm(weighting, 0.0), 800) > 1.5 * pushed(awm(weighting, 0.0), 400) > 3


def pushed(loss: Callable[[torch.Tensor], torch.Tensor], num_steps: int) -> float:
    velocity = latent(1.0).requires_grad_()
    optimiser = torch.optim.SGD([velocity], lr=0.05)
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss(velocity).sum().backward()
        optimiser.step()
    return velocity.item()
