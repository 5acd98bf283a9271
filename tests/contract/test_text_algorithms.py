"""What every row of the TEXT_ALGORITHMS table promises."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from learner.algorithms import TEXT_ALGORITHMS, AlgorithmConfig
from learner.batching import TokenBatch
from learner.learner import Learner, LearnerConfig
from raylign.models.tokens import BUDGET_HEAD
from raylign.samplers.entropy_bounded import Budget
from raylign.types import Needs, RolloutGroup
from tests.text_groups import draw_text_groups, policies_for, rewarded, sampler_for, text_algorithm, token_batches
from tests.tiny_models import RUN_SEED, breakdown, by_sibling, train_step
from tests.toy_text import FIRST_LETTER_ID, ToyTextPolicy

ROWS = pytest.mark.parametrize("config_cls", TEXT_ALGORITHMS)
WITH_RATIO = pytest.mark.parametrize("config_cls", [cls for cls in TEXT_ALGORITHMS if cls().uses_ratio])
NO_DRAWS = {"trajectory", "just_grpo"}
"""Algorithms whose canvases the rollout alone decides."""


def tag(config_cls: type[Any]) -> str:
    return config_cls.model_fields["type"].default


@functools.cache
def drawn(one_by_one: bool = False, budget: Budget = "fixed") -> tuple[RolloutGroup, ...]:
    config_cls = next(cls for cls in TEXT_ALGORITHMS if (tag(cls) == "just_grpo") == one_by_one)
    policy = ToyTextPolicy(budget_head=budget == "learned")
    return tuple(draw_text_groups(policy, sampler_for(config_cls(), budget=budget)))


def groups_for(
    config_cls: type[Any],
    reward: Callable[[int, int], float | None] = by_sibling,
    budget: Budget = "fixed",
) -> list[RolloutGroup]:
    """Three groups of four, drawn by the policy of `ToyTextPolicy()`, scored by `reward`."""
    return [
        group.with_rewards([breakdown(reward(index, sibling)) for sibling in range(group.group_size)])
        for index, group in enumerate(drawn(tag(config_cls) == "just_grpo", budget))
    ]


def failing(group: int, sibling: int) -> float | None:
    return None if (group, sibling) == (1, 2) else by_sibling(group, sibling)


def gradient(policy: ToyTextPolicy, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The gradient of `loss`, or the one that has been accumulated."""
    parameters = policy.trainable_parameters()
    if loss is not None:
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def learner_of(config: Any, policy: ToyTextPolicy, budget: Budget = "fixed", size: int = 4, **options: Any) -> Learner:
    sampler = sampler_for(config, policy.canvas_length, budget)
    return Learner(LearnerConfig(**options), config, policy, sampler, 1.0, size, RUN_SEED)


def first_gradient(config: Any, groups: Sequence[RolloutGroup], budget: Budget = "fixed") -> dict[str, torch.Tensor]:
    """The gradient of a learner's first update."""
    policy = ToyTextPolicy(budget_head=budget == "learned")
    learner = learner_of(config, policy, budget)
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    return gradient(policy)


@ROWS
def test_its_type_names_it_in_the_configuration(config_cls: type[Any]) -> None:
    parsed = TypeAdapter(AlgorithmConfig).validate_python({"type": tag(config_cls)})
    assert isinstance(parsed, config_cls)
    assert isinstance(text_algorithm(parsed, ToyTextPolicy()), TEXT_ALGORITHMS[config_cls])


@ROWS
def test_needs_are_known_from_the_configuration_alone(config_cls: type[Any]) -> None:
    for kl_weight in (0.0, 0.1):
        config = config_cls(kl_weight=kl_weight)
        algorithm = text_algorithm(config, ToyTextPolicy())
        assert algorithm.needs == config.needs
        assert algorithm.rollout_policy == config.rollout_policy == "current"
        stays_near_the_reference = kl_weight > 0 and getattr(config, "kl_to", "reference") == "reference"
        assert (Needs.REFERENCE in config.needs) == stays_near_the_reference
        assert (Needs.OLD in config.needs) == config.uses_ratio
        assert ("loss/kl" in algorithm.metrics) == (kl_weight > 0)


@ROWS
def test_better_siblings_get_more_credit_and_failures_none(config_cls: type[Any]) -> None:
    algorithm = text_algorithm(config_cls(), ToyTextPolicy())
    groups = groups_for(config_cls, lambda group, sibling: None if (group, sibling) == (1, 3) else float(sibling))
    credit = algorithm.credit(groups)
    assert [one.valid_G.tolist() for one in credit] == [[True] * 4, [True, True, True, False], [True] * 4]
    assert credit[1].adv_G[3] == 0
    for one in credit:
        assert torch.isfinite(one.adv_G).all()
        assert (one.adv_G[one.valid_G].diff() > 0).all()


@ROWS
@pytest.mark.parametrize("budget", ["fixed", "learned"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_a_loss_reports_what_it_declares_one_number_per_row(
    config_cls: type[Any], kl_weight: float, budget: Budget
) -> None:
    policy = ToyTextPolicy(budget_head=budget == "learned")
    algorithm = text_algorithm(config_cls(kl_weight=kl_weight), policy, budget)
    assert ("loss/budget" in algorithm.metrics) == (budget == "learned")
    for batch in token_batches(algorithm, groups_for(config_cls, failing, budget)):
        losses = algorithm.loss(policies_for(algorithm, policy), batch)
        assert losses.loss_N.shape == (len(batch.keys),)
        assert losses.loss_N.requires_grad
        assert torch.isfinite(losses.loss_N).all()
        assert set(losses.metrics) == set(algorithm.metrics)
        for value in losses.metrics.values():
            assert value.shape == losses.loss_N.shape
            assert not value.requires_grad
            assert torch.isfinite(value).all()


@ROWS
def test_what_a_failed_sample_holds_does_not_matter(config_cls: type[Any]) -> None:
    groups = groups_for(config_cls, failing)
    tokens = groups[1].tokens.tokens_GL.clone()
    tokens[2] = FIRST_LETTER_ID
    logprob = groups[1].tokens.rollout_logprob_GL.clone()
    logprob[2] = math.nan
    spoilt = replace(groups[1], trajectory=replace(groups[1].tokens, tokens_GL=tokens, rollout_logprob_GL=logprob))
    clean = first_gradient(config_cls(), groups)
    assert max(value.abs().max() for value in clean.values()) > 1e-4
    for name, value in first_gradient(config_cls(), [groups[0], spoilt, groups[2]]).items():
        assert torch.equal(value, clean[name])


@ROWS
def test_no_difference_in_reward_is_no_push(config_cls: type[Any]) -> None:
    for value in first_gradient(config_cls(), groups_for(config_cls, lambda group, sibling: 0.3)).values():
        assert value.abs().max() < 1e-6


@ROWS
def test_an_items_loss_depends_neither_on_its_micro_batch_nor_on_the_order_of_rows(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(config_cls(kl_weight=0.1), policy)
    policies = policies_for(algorithm, policy)
    with torch.no_grad():  # so that ratios and distances are not those of equal policies
        policy.trainable_parameters()["logits"].mul_(1.1)
    groups = groups_for(config_cls)

    def losses(some: Sequence[RolloutGroup], size: int) -> dict[object, float]:
        found: dict[object, float] = {}
        for batch in token_batches(algorithm, some, size, on_policy=False):
            values = algorithm.loss(policies, batch).loss_N.tolist()
            found |= dict(zip(zip(batch.keys, batch.item_N.tolist(), strict=True), values, strict=True))
        return found

    whole = losses(groups, 12)
    for some, size in ((groups, 1), (groups, 5), (groups[::-1], 5)):
        assert losses(some, size) == pytest.approx(whole, rel=1e-4, abs=1e-5)


@ROWS
def test_global_randomness_is_neither_read_nor_moved(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(config_cls(), policy)
    policies = policies_for(algorithm, policy)
    batch = token_batches(algorithm, groups_for(config_cls))[0]
    found: list[dict[str, torch.Tensor]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(gradient(policy, algorithm.loss(policies, batch).loss_N.sum()))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@WITH_RATIO
def test_before_the_first_update_the_ratio_is_exactly_1(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(config_cls(), policy)
    policies = policies_for(algorithm, policy)
    for batch in token_batches(algorithm, groups_for(config_cls), on_policy=False):
        metrics = algorithm.loss(policies, batch).metrics
        assert metrics["ratio/mean"].tolist() == [1.0] * len(batch.keys)
        assert metrics["ratio/deviation_max"].tolist() == [0.0] * len(batch.keys)
        assert metrics["ratio/clip_fraction"].tolist() == [0.0] * len(batch.keys)
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.1)
    moved = algorithm.loss(policies, token_batches(algorithm, groups_for(config_cls), on_policy=False)[0])
    assert moved.metrics["ratio/deviation_max"].max() > 1e-3


@ROWS
def test_not_asking_the_old_policy_while_it_is_the_current_one_changes_no_bit(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(config_cls(), policy)
    policies = policies_for(algorithm, policy)
    batches = token_batches(algorithm, groups_for(config_cls))
    assert all(batch.on_policy for batch in batches)
    for batch in batches:
        short = algorithm.loss(policies, batch)
        full = algorithm.loss(policies, replace(batch, on_policy=False))
        assert torch.equal(short.loss_N, full.loss_N)
        assert all(torch.equal(short.metrics[name], full.metrics[name]) for name in algorithm.metrics)
        one, other = gradient(policy, short.loss_N.sum()), gradient(policy, full.loss_N.sum())
        assert all(torch.equal(one[name], other[name]) for name in one)


@WITH_RATIO
def test_on_policy_the_clip_does_nothing(config_cls: type[Any]) -> None:
    groups = groups_for(config_cls)
    names = [name for name in config_cls.model_fields if name.startswith("clip_")]
    if not names:
        pytest.skip("it does not clip")
    narrow = first_gradient(config_cls(**dict.fromkeys(names, 1e-6)), groups)
    wide = first_gradient(config_cls(**dict.fromkeys(names, 0.99)), groups)
    for name, value in narrow.items():
        torch.testing.assert_close(value, wide[name])


@ROWS
def test_each_epoch_draws_canvases_of_its_own(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(config_cls(), policy, epochs=2)
    policies = policies_for(algorithm, policy)
    batches = token_batches(algorithm, groups_for(config_cls), 12, epochs=2)
    per_epoch = [[batch for batch in batches if batch.epoch == epoch] for epoch in (0, 1)]
    assert len(per_epoch[0]) == len(per_epoch[1]) > 0

    def push(some: list[TokenBatch]) -> torch.Tensor:
        loss = torch.stack([algorithm.loss(policies, batch).loss_N.sum() for batch in some]).sum()
        return gradient(policy, loss)["logits"]

    first, second = (push(some) for some in per_epoch)
    assert torch.equal(first, push(per_epoch[0]))
    assert torch.allclose(first, second, rtol=1e-3) == (tag(config_cls) in NO_DRAWS)


@ROWS
def test_items_and_shares_fit_the_samples(config_cls: type[Any]) -> None:
    algorithm = text_algorithm(config_cls(), ToyTextPolicy())
    for group in groups_for(config_cls):
        items = algorithm.items(group, RUN_SEED, 1)
        assert items.shape[0] == group.group_size
        assert (items[:, 0] == 0).all()  # the budget's loss is that of item 0
        assert torch.equal(items, algorithm.items(group, RUN_SEED, 1))
        shares = algorithm.shares(group)
        assert shares.shape == (group.group_size,)
        assert (shares > 0).all()


@ROWS
def test_only_the_budget_head_learns_from_budgets_and_moves_to_those_that_paid(config_cls: type[Any]) -> None:
    # Every answer is as good, so the network has nothing to learn; the fewer calls the better, so budgets have.
    groups = groups_for(config_cls, lambda group, sibling: 1.0, "learned")
    assert all(len(group.tokens.nfe_G.unique()) > 1 for group in groups) or tag(config_cls) == "just_grpo"
    nfe = [torch.argsort(group.tokens.log_gamma_G, descending=True) for group in groups]  # type: ignore[arg-type]
    slower = [
        replace(group, trajectory=replace(group.tokens, nfe_G=1 + order.argsort()))
        for group, order in zip(groups, nfe, strict=True)
    ]
    for name, value in first_gradient(config_cls(), slower, "learned").items():
        if not name.startswith(BUDGET_HEAD):
            assert value.abs().max() < 1e-6
        elif name.endswith("bias"):
            # The largest budgets took the fewest calls, so descent raises the mean.
            assert value.item() < -1e-3
        else:
            assert value.abs().max() > 1e-4


@ROWS
def test_a_budget_counts_once_per_sample_however_many_items_it_has(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy(budget_head=True)
    algorithm = text_algorithm(config_cls(), policy, "learned")
    groups = groups_for(config_cls, budget="learned")
    found: dict[object, float] = {}
    for batch in token_batches(algorithm, groups):
        for key, value in zip(
            batch.keys, algorithm.loss(policies_for(algorithm, policy), batch).metrics["loss/budget"], strict=True
        ):
            found[key] = found.get(key, 0.0) + float(value)
    for index, group in enumerate(groups):
        # r (1 - .25 NFE / L), less the group's mean; log gamma has mean log .5 and deviation .5.
        nfe = group.tokens.nfe_G.tolist()
        worth = [by_sibling(index, sibling) * (1 - 0.25 * nfe[sibling] / 8) for sibling in range(4)]
        assert group.tokens.log_gamma_G is not None
        for sibling, log_gamma in enumerate(group.tokens.log_gamma_G.tolist()):
            credit = worth[sibling] - sum(worth) / 4
            expected = credit * (log_gamma - math.log(0.5)) ** 2 / (2 * 0.5**2)
            assert found[group.rollouts[sibling].key] == pytest.approx(expected, abs=1e-5)


@ROWS
def test_a_few_steps_raise_the_reward(config_cls: type[Any]) -> None:
    config = config_cls()
    policy, rollout = (ToyTextPolicy(4, "abc", seed=seed, sharpness=0.5) for seed in (5, 6))
    learner = learner_of(config, policy, size=32, lr=2e-2, epochs_per_step=2)
    means: list[float] = []
    for step in range(1, 9):
        rollout.load_weights(learner.publish(step - 1))
        groups = draw_abc(rollout, config, step)
        means.append(sum(one.total or 0.0 for group in groups for one in group.rollouts) / 32)
        assert all(result.finite for result in train_step(learner, groups, step))
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.1, means


def draw_abc(policy: ToyTextPolicy, config: Any, step: int) -> list[RolloutGroup]:
    """Four groups of eight, rewarded for each "a" they write."""
    sampler = sampler_for(config, policy.canvas_length)
    drawn = draw_text_groups(policy, sampler, group_size=8, num_groups=4, first_sequence=4 * step, words=("ab", "c"))
    return rewarded(drawn, lambda tokens_L: float((tokens_L == FIRST_LETTER_ID).float().mean()))
