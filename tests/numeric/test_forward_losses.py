"""Losses of the forward-process family against numbers worked out by hand, and the facts that follow from them."""

from __future__ import annotations

import pytest
import torch

from learner.forward_losses import nft_loss

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
