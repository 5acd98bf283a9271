"""Losses of texts, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from learner.advantages import relative_advantages
from learner.algorithms.token_base import ratio_metrics
from learner.algorithms.unigrpo import sweep
from learner.algorithms.wd1 import Wd1Config, signed_weights
from learner.token_losses import (
    budget_loss,
    clipped_ratio_loss,
    coupled_logprob,
    kl_penalty,
    masked_mean,
    masked_sum,
    paired_elbo,
    sandwich_lower,
    sandwich_upper,
)
from tests.text_groups import draw_text_groups, text_algorithm
from tests.tiny_models import breakdown
from tests.toy_text import ToyTextPolicy


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_the_clip_bounds_a_gain_and_not_a_loss() -> None:
    # rho = 1.5 in every row; clip range .2, so rho A is cut to 1.2 where A > 0 and kept at -1.5 where A < 0.
    learner = torch.full((2,), math.log(1.5), requires_grad=True)
    loss_N, ratio_N = clipped_ratio_loss(learner, torch.zeros(2), tensor(1.0, -1.0), 0.2, 0.2)
    assert ratio_N.tolist() == pytest.approx([1.5, 1.5])
    assert loss_N.tolist() == pytest.approx([-1.2, 1.5])
    loss_N.sum().backward()
    assert learner.grad is not None
    assert learner.grad.tolist() == pytest.approx([0.0, 1.5])


def test_the_three_distances() -> None:
    # d = log 2: -d, d²/2 and e^d - d - 1 = 1 - log 2.
    learner, ref = tensor(-2.0), tensor(-2.0 + math.log(2))
    found = [float(kl_penalty(learner, ref, name)) for name in ("k1", "k2", "k3")]
    assert found == pytest.approx([-0.693147, 0.240227, 0.306853], abs=1e-5)


def test_a_distance_to_oneself_is_nothing_and_does_not_push() -> None:
    learner = tensor(-1.0, -3.0).requires_grad_()
    for name in ("k2", "k3"):
        kl = kl_penalty(learner, learner.detach(), name)
        assert kl.tolist() == [0.0, 0.0]
        (grad,) = torch.autograd.grad(kl.sum(), learner)
        assert grad.tolist() == [0.0, 0.0]


def test_a_budget_that_paid_pulls_the_mean() -> None:
    # x = 1, mean .5, std .5, A = 2: 2 (.5)² / (2 .25) = 1; gradient A (mean - x) / std² = -4, so descent raises it.
    mean = tensor(0.5, 0.5).requires_grad_()
    loss_N = budget_loss(tensor(1.0, 1.0), mean, 0.5, tensor(2.0, -2.0))
    assert loss_N.tolist() == pytest.approx([1.0, -1.0])
    loss_N.sum().backward()
    assert mean.grad is not None
    assert mean.grad.tolist() == pytest.approx([-4.0, 4.0])
    normal = torch.distributions.Normal(0.5, 0.5).log_prob(tensor(1.0)) - torch.distributions.Normal(1.0, 0.5).log_prob(
        tensor(1.0)
    )
    assert float(-2 * normal) == pytest.approx(1.0)


def test_masked_sums_do_not_see_what_is_not_marked() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [math.nan] * 3])
    mask = torch.tensor([[True, True, False], [False] * 3])
    assert masked_sum(values, mask).tolist() == [3.0, 0.0]
    assert masked_mean(values, mask).tolist() == [1.5, 0.0]


def test_a_coupled_score() -> None:
    # Position 0 is in M, r = .25: (-1 - .5 / .25) / 2 = -1.5. Position 1 is not: (-1 - .6 / .75) / 2 = -.9.
    score = coupled_logprob(
        torch.tensor([[-1.0, -1.0]]), torch.tensor([[-0.5, 0.0]]), torch.tensor([[0.0, -0.6]]), tensor(0.25)
    )
    assert score.tolist() == [pytest.approx([-1.5, -0.9])]


def test_a_paired_elbo() -> None:
    # L = 3. n = 1: (4 / 2) (-1 / 1 - 5 / 2) = -7. n = 0, an empty half: (4 / 2) (-6 / 3) = -4.
    part = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rest = torch.tensor([[0.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    assert paired_elbo(part, rest, torch.tensor([1, 0])).tolist() == pytest.approx([-7.0, -4.0])
    assert paired_elbo(rest, part, torch.tensor([2, 3])).tolist() == pytest.approx([-7.0, -4.0])


def test_the_sandwich_of_two_canvases() -> None:
    # Two counted tokens. Canvas 1 masks {0} (t = 1/2) with p = .5; canvas 2 masks both (t = 1) with p = .25, .5.
    # LB: mean(log .5, mean(log .25, log .5)). UB, b = 1: mean(log((.5/.5 + .25)/2), log(.5/2)); b = 2: squares, halved.
    logprob = torch.tensor([[[0.5, 1.0, 0.9]], [[0.25, 0.5, 0.9]]]).log()
    masked = torch.tensor([[[True, False, False]], [[True, True, False]]])
    counted = torch.tensor([[True, True, False]])
    assert float(sandwich_lower(logprob, masked)) == pytest.approx(-0.866434, abs=1e-5)
    assert float(sandwich_upper(logprob, masked, counted, 1.0)) == pytest.approx(
        (math.log(0.625) + math.log(0.25)) / 2, abs=1e-5
    )
    squared = (math.log((0.25 / 0.5 + 0.0625) / 2) + math.log(0.25 / 2)) / 2 / 2
    assert float(sandwich_upper(logprob, masked, counted, 2.0)) == pytest.approx(squared, abs=1e-5)


def test_the_upper_bound_keeps_tokens_whose_power_underflows() -> None:
    logprob = torch.tensor([[[-200.0, -1.0, -1.0]]], requires_grad=True)
    masked = torch.tensor([[[True, False, False]]])
    upper = sandwich_upper(logprob, masked, torch.tensor([[True, True, True]]), 1.5)
    assert upper.tolist() == pytest.approx([-200 + math.log(3) / 1.5])
    upper.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [[pytest.approx([1.0, 0.0, 0.0])]]


def test_ratio_metrics_are_those_of_counted_tokens() -> None:
    ratio = torch.tensor([[1.0, 1.5, 9.0], [0.9, 1.0, 1.1]])
    counted = torch.tensor([[True, True, False], [True, True, True]])
    found = ratio_metrics(ratio, 0.2, 0.2, counted)
    assert found["ratio/mean"].tolist() == pytest.approx([1.25, 1.0])
    assert found["ratio/deviation_max"].tolist() == pytest.approx([0.5, 0.1])
    assert found["ratio/clip_fraction"].tolist() == pytest.approx([0.5, 0.0])
    assert ratio_metrics(tensor(0.7, 1.1), 0.2, 0.2)["ratio/clip_fraction"].tolist() == [1.0, 0.0]


def test_signed_weights() -> None:
    # A = ±.5: softmax(A) = .731059, .268941; twice their difference is .924234. A failed sample changes nothing.
    adv, valid = tensor(0.5, 0.0, -0.5), torch.tensor([True, False, True])
    assert signed_weights(adv, valid).tolist() == pytest.approx([0.924234, 0.0, -0.924234], abs=1e-5)
    assert signed_weights(adv, valid, positive_only=True).tolist() == pytest.approx([1.462117, 0, 0.537883], abs=1e-5)


def test_wd1_weighs_a_group_or_the_whole_step() -> None:
    policy = ToyTextPolicy()
    groups = [
        group.with_rewards([breakdown(value) for value in rewards])
        for group, rewards in zip(draw_text_groups(policy, num_groups=2, group_size=2), ((0, 1), (0, 3)), strict=True)
    ]
    alone = text_algorithm(Wd1Config(), policy).credit(groups)
    together = text_algorithm(Wd1Config(softmax_over="step"), policy).credit(groups)
    positive = text_algorithm(Wd1Config(variant="psr"), policy).credit(groups)
    assert [one.adv_G.tolist() for one in alone] == [
        pytest.approx([-2 * math.tanh(0.5), 2 * math.tanh(0.5)]),
        pytest.approx([-2 * math.tanh(1.5), 2 * math.tanh(1.5)]),
    ]
    total = 2 * math.cosh(0.5) + 2 * math.cosh(1.5)
    assert together[0].adv_G.tolist() == pytest.approx([-8 * math.sinh(0.5) / total, 8 * math.sinh(0.5) / total])
    assert sum(float(one.adv_G.sum()) for one in positive) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("baseline", "std", "expected"),
    [
        # Rewards 1, 2, 6: mean 3, means of the others 4, 3.5, 1.5; deviations sqrt(14/3) and sqrt(7).
        ("mean", "none", (-2.0, -1.0, 3.0)),
        ("leave_one_out", "none", (-3.0, -1.5, 4.5)),
        ("mean", "population", (-0.925777, -0.462889, 1.388666)),
        ("mean", "sample", (-0.755900, -0.377950, 1.133850)),
        ("leave_one_out", "population", (-1.388666, -0.694333, 2.082999)),
    ],
)
def test_relative_advantages(baseline: str, std: str, expected: tuple[float, ...]) -> None:
    (found,) = relative_advantages([[1.0, 2.0, None, 6.0]], baseline, std)  # type: ignore[arg-type]
    assert found.valid_G.tolist() == [True, True, False, True]
    assert found.adv_G.tolist() == pytest.approx([expected[0], expected[1], 0.0, expected[2]], abs=1e-4)


@pytest.mark.parametrize("std", ["none", "population", "sample"])
def test_a_lone_or_equal_reward_has_no_advantage(std: str) -> None:
    for rewards in ([0.7], [0.1, 0.1, 0.1], [None, 5.0]):
        for baseline in ("mean", "leave_one_out"):
            (found,) = relative_advantages([rewards], baseline, std)  # type: ignore[arg-type]
            assert not found.adv_G.any()


def test_the_sweep_of_noise_levels() -> None:
    assert [sweep(epoch, 5) for epoch in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert sweep(0, 1) == 0.0
