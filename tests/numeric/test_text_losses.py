"""Losses of texts: numbers worked by hand, and second derivations of whole algorithms in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from learner.advantages import relative_advantages
from learner.algorithms.coupled_grpo import CoupledGrpoConfig
from learner.algorithms.d1 import D1Config
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
from raylign.keys import generator
from raylign.models.tokens import TokenPrompts
from raylign.types import RolloutGroup
from tests.text_groups import draw_text_groups, policies_for, text_algorithm, token_batches
from tests.tiny_models import breakdown
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy


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


def row_logprobs(
    policy: ToyTextPolicy, group: RolloutGroup, row: int, masked: list[bool], hidden: list[bool] | None = None
) -> torch.Tensor:
    """Log-prob of every token of one response with some positions masked, computed for it alone: (L,)."""
    tokens = group.tokens.tokens_GL[row]
    prompt = group.conditioning.ids_PL[0]
    if hidden is not None:
        prompt = torch.tensor([MASK_ID if hide else int(one) for one, hide in zip(prompt, hidden, strict=True)])
    canvas = torch.tensor([MASK_ID if hide else int(one) for one, hide in zip(tokens, masked, strict=True)])
    logits = policy.predict(canvas[None], TokenPrompts(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool)))
    return torch.stack([torch.log_softmax(logits.logits_BLV[0, k], dim=0)[int(one)] for k, one in enumerate(tokens)])


def num_counted(group: RolloutGroup, row: int) -> int:
    tokens = group.tokens.tokens_GL[row].tolist()
    return tokens.index(EOS_ID) + 1 if EOS_ID in tokens else len(tokens)


def d1_scores(policy: ToyTextPolicy, group: RolloutGroup, row: int) -> torch.Tensor:
    key = group.rollouts[row].key
    length = group.conditioning.ids_PL.shape[1]
    hidden = [bool(u < 0.15) for u in torch.rand(length, generator=generator(*key, "prompt_mask", 0, 0))]
    return row_logprobs(policy, group, row, [True] * 8, hidden)


def coupled_scores(policy: ToyTextPolicy, group: RolloutGroup, row: int) -> torch.Tensor:
    key = group.rollouts[row].key
    shared = generator(key.run_seed, key.prompt_id, key.visit, "coupled_rate", 0)
    rate = 0.2 + 0.6 * float(torch.rand((), generator=shared, dtype=torch.float64))
    part = [bool(u < rate) for u in torch.rand(8, generator=generator(*key, "coupled_mask", 0, 0))]
    rest = [not one for one in part]
    full, first, second = (row_logprobs(policy, group, row, masked) for masked in ([True] * 8, part, rest))
    scores = [full[k] + (first[k] / rate if part[k] else second[k] / (1 - rate)) for k in range(8)]
    return torch.stack(scores) / 2


SECOND = {D1Config: d1_scores, CoupledGrpoConfig: coupled_scores}


@pytest.mark.parametrize("config_cls", SECOND)
def test_a_second_derivation_gives_the_same_loss(config_cls: type[D1Config | CoupledGrpoConfig]) -> None:
    policy, before, config = ToyTextPolicy(), ToyTextPolicy(), config_cls()
    groups = draw_text_groups(before)
    algorithm = text_algorithm(config, policy)
    policies = policies_for(algorithm, policy)
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.3)
    credit = algorithm.credit(groups)
    (batch,) = token_batches(algorithm, groups, 12, on_policy=False)
    found = algorithm.loss(policies, batch).loss_N.tolist()
    clipped = 0
    for place in range(12):
        group, row = groups[place // 4], place % 4
        adv = float(credit[place // 4].adv_G[row])
        expected = 0.0
        with torch.no_grad():
            now, then = (SECOND[config_cls](one, group, row) for one in (policy, before))
        for k in range(num_counted(group, row)):
            ratio, gap = math.exp(now[k] - then[k]), float(then[k] - now[k])
            bounded = min(max(ratio, 0.5), 1.5)
            clipped += ratio != bounded
            expected += -min(ratio * adv, bounded * adv) + config.kl_weight * (math.exp(gap) - gap - 1)
        assert found[place] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert clipped > 0


@pytest.mark.parametrize("config_cls", SECOND)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(config_cls: type[D1Config | CoupledGrpoConfig]) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = text_algorithm(config_cls(), policy)
    (batch,) = token_batches(algorithm, groups, 12)
    surrogate = algorithm.loss(policies_for(algorithm, policy), replace(batch, on_policy=False)).loss_N.sum()
    plain = torch.zeros(())
    for group, credit in zip(groups, algorithm.credit(groups), strict=True):
        for row in range(4):
            plain = plain - credit.adv_G[row] * SECOND[config_cls](policy, group, row)[: num_counted(group, row)].sum()
    parameters = list(policy.trainable_parameters().values())
    pairs = zip(torch.autograd.grad(surrogate, parameters), torch.autograd.grad(plain, parameters), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert other.abs().max() > 1e-2
