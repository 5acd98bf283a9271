"""BGPO's linear bound: equal to the ELBO objective on policy, below it elsewhere, and streamed one sample at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from learner.algorithms.bgpo import Bgpo, BgpoConfig, draw_sample, stratified_counts
from learner.batching import TokenBatch
from learner.noising import Scorer
from learner.policies import PolicySet
from learner.token_losses import linear_bound_loss
from raylign.models.tokens import response_mask
from raylign.types import RolloutGroup
from tests.text_groups import draw_text_groups, entropy_bounded, policies_for, text_algorithm, token_batches
from tests.toy_text import EOS_ID, ToyTextPolicy

NO_CLIP = 1e9
LENGTH = 8


def bgpo(policy: ToyTextPolicy, **options: Any) -> Bgpo:
    algorithm = text_algorithm(BgpoConfig(**options), policy)
    assert isinstance(algorithm, Bgpo)
    return algorithm


def test_the_bound_by_hand() -> None:
    gap = torch.tensor([0.1, 0.5, -0.5, 0.1, -0.5, 2.0])
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    loss, ratio = linear_bound_loss(gap, adv, 0.2, 0.2, 3.0)
    # Better answers are linear, 1 + d, and clipped above at 1.2; worse ones exp(d), clipped below at .8, and at most 3.
    assert ratio.tolist() == pytest.approx([1.1, 1.5, 0.5, math.exp(0.1), math.exp(-0.5), math.exp(2.0)])
    assert loss.tolist() == pytest.approx([-1.1, -1.2, -0.5, math.exp(0.1), 0.8, 3.0])
    unlimited, _ = linear_bound_loss(gap, adv, 0.2, 0.2, None)
    assert unlimited.tolist() == pytest.approx([-1.1, -1.2, -0.5, math.exp(0.1), 0.8, math.exp(2.0)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_is_a_number_with_a_gradient_where_a_logarithm_of_1_plus_d_is_none(sign: float) -> None:
    gap = torch.tensor([-1.0, -1.5, -40.0, 500.0], requires_grad=True)
    for dual_clip in (3.0, None):
        loss, ratio = linear_bound_loss(gap, torch.full((4,), sign), 0.2, 0.2, dual_clip)
        (grad,) = torch.autograd.grad(loss.sum(), gap)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(ratio).all()
        assert torch.isfinite(grad).all()
    if sign > 0:
        # The linear bound goes on pulling an answer up however unlikely it has become.
        assert loss.tolist() == pytest.approx([0.0, 0.5, 39.0, -1.2])
        assert grad.tolist() == [-1.0, -1.0, -1.0, 0.0]


def test_the_mean_of_bounds_is_below_the_objective_and_touches_it_at_0() -> None:
    gaps = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    for adv in (2.0, -2.0):
        objective = adv * torch.exp(gaps.mean(dim=1))
        bound = -linear_bound_loss(gaps.flatten(), torch.full((1200,), adv), NO_CLIP, NO_CLIP, None)[0]
        assert (bound.view(200, 6).mean(dim=1) <= objective + 1e-6).all()
        gap = torch.zeros(6, requires_grad=True)
        streamed = -linear_bound_loss(gap, torch.full((6,), adv), 0.2, 0.2, 3.0)[0].mean()
        exact = adv * torch.exp(gap.mean())
        assert streamed.item() == exact.item() == adv
        torch.testing.assert_close(torch.autograd.grad(streamed, gap)[0], torch.autograd.grad(exact, gap)[0])


def test_levels_are_stratified_and_each_alone_is_uniform() -> None:
    items, total = torch.arange(4), 4
    found = torch.stack([stratified_counts(torch.full((4,), k), torch.full((4,), 8), items, total) for k in range(8)])
    # From a start of 1 mask: 1, 3, 5, 7; from 8: 8, 2, 4, 6.
    assert found[0].tolist() == [1, 3, 5, 7]
    assert found[7].tolist() == [8, 2, 4, 6]
    assert all(sorted(column.tolist()) == list(range(1, 9)) for column in found.T)
    # More samples than positions: levels repeat.
    three = stratified_counts(torch.zeros(7, dtype=torch.int64), torch.full((7,), 3), torch.arange(7), 7)
    assert three.tolist() == [1, 1, 1, 2, 2, 3, 3]


def batches(algorithm: Bgpo, groups: list[RolloutGroup], **options: Any) -> list[TokenBatch]:
    return token_batches(algorithm, groups, size=64, **options)


def test_samples_mask_the_answer_alone_and_weigh_it_by_its_level() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, entropy_bounded(gamma=1.5, stop_at_eos=True))
    algorithm = bgpo(policy, num_samples=8)
    masks: list[torch.Tensor] = []
    parts = batches(algorithm, groups)
    counted = response_mask(parts[0].tokens.tokens_GL, EOS_ID)
    for batch in parts:
        canvas, weight = draw_sample(batch, counted, 8)
        assert not (canvas.selected_NL & ~counted).any()
        assert not (canvas.visible_NL & ~counted).any()
        assert torch.equal(canvas.visible_NL | canvas.selected_NL, counted)
        torch.testing.assert_close(weight * canvas.selected_NL.sum(dim=1), counted.sum(dim=1).float())
        masks.append(canvas.selected_NL)
    assert len(masks) == 8
    # A full answer's eight samples take each of its eight levels once.
    full = counted.all(dim=1).nonzero().squeeze(1)
    levels = torch.stack(masks).sum(dim=2)[:, full]
    assert len(full) > 0
    assert all(sorted(column.tolist()) == list(range(1, 9)) for column in levels.T)


def elbo_gap(policies: PolicySet, policy: ToyTextPolicy, batch: TokenBatch, total: int) -> torch.Tensor:
    """d of each row's sample with gradient, from the scorer's answers alone."""
    scorer = Scorer(policies, batch, policy.vocabulary)
    canvas, weight = draw_sample(batch, scorer.counted_NL, total)
    rollout = scorer.rollout(canvas)
    return (scorer.learner(canvas) - rollout).sum(dim=1) * weight / LENGTH


@pytest.mark.parametrize("moved", [False, True])
def test_streaming_gives_the_gradient_of_all_samples_at_once(moved: bool) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, num_groups=2)
    algorithm = bgpo(policy, num_samples=5)
    policies = policies_for(algorithm, policy)
    if moved:
        with torch.no_grad():
            policy.trainable_parameters()["logits"].mul_(1.2)
    for batch in token_batches(algorithm, groups, size=3, on_policy=False):
        (algorithm.loss(policies, batch).loss_N.sum() / 8).backward()
    streamed = gradient(policy)
    parts = batches(algorithm, groups, on_policy=False)
    gap_SN = torch.stack([elbo_gap(policies, policy, batch, 5) for batch in parts])
    adv = parts[0].adv_N
    if moved:
        assert gap_SN.abs().max() > 0.02
        ratio = torch.where(adv >= 0, 1 + gap_SN, gap_SN.exp())
        at_once = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean(dim=0).mean()
    else:
        # On policy it is the gradient of the objective whose ratio is exp of the mean over samples.
        assert torch.equal(gap_SN, torch.zeros_like(gap_SN))
        at_once = -(adv * gap_SN.mean(dim=0).exp()).mean()
    at_once.backward()
    torch.testing.assert_close(streamed, gradient(policy), rtol=1e-4, atol=1e-7)
    assert streamed.abs().max() > 1e-4


def test_the_ratio_is_exactly_1_in_every_sample_and_epoch_before_an_update() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = bgpo(policy, num_samples=3)
    policies = policies_for(algorithm, policy)
    found = batches(algorithm, groups, epochs=2, on_policy=False)
    for batch in found:
        losses = algorithm.loss(policies, batch)
        assert float(losses.metrics["ratio/deviation_max"].max()) == 0.0
        torch.testing.assert_close(losses.loss_N, -batch.adv_N / 3)
    canvases = [draw_sample(batch, response_mask(batch.tokens.tokens_GL, EOS_ID), 3)[0] for batch in found]
    assert not torch.equal(canvases[0].selected_NL, canvases[3].selected_NL)


def test_a_samples_noise_does_not_depend_on_its_micro_batch() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = bgpo(policy, num_samples=2)
    policies = policies_for(algorithm, policy)
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.1)

    def losses(size: int) -> dict[tuple[object, int], float]:
        found: dict[tuple[object, int], float] = {}
        for batch in token_batches(algorithm, groups, size, on_policy=False):
            values = algorithm.loss(policies, batch).loss_N.tolist()
            found |= {(k, i): v for k, i, v in zip(batch.keys, batch.item_N.tolist(), values, strict=True)}
        return found

    together = losses(12)
    assert len(together) == 24
    torch.manual_seed(8)
    assert losses(1) == pytest.approx(together, rel=1e-4, abs=1e-6)
    assert losses(5) == pytest.approx(together, rel=1e-4, abs=1e-6)


def gradient(policy: ToyTextPolicy) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    for parameter in policy.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)
