"""What every row of the IMAGE_ALGORITHMS table promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from learner.algorithms import IMAGE_ALGORITHMS, Algorithm, AlgorithmConfig, LossSetting, make_algorithm
from learner.algorithms.awm import AwmConfig
from learner.algorithms.crd import CrdConfig
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.flow_grpo_fast import FlowGrpoFastConfig
from learner.algorithms.forward_base import ForwardAlgorithm
from learner.algorithms.mix_grpo import MixGrpoConfig
from learner.batching import MicroBatch, StepData, cut
from learner.learner import Learner, LearnerConfig
from learner.parallel import RankGroup
from learner.policies import PolicySet
from learner.survey import surveyed_batches
from raylign.errors import ConfigError
from raylign.samplers import Sampler, num_steps
from raylign.types import Needs, RolloutGroup
from tests.picture_samplers import sampler_for
from tests.tiny_models import RUN_SEED, ToyPolicy, breakdown, by_sibling, draw_groups, train_step

ROWS = pytest.mark.parametrize("config_cls", IMAGE_ALGORITHMS)
FEW_LEVELS: dict[type, dict[str, Any]] = {
    # Levels enough to test with; and CRD's guided anchor is no place where nothing is left to learn.
    CrdConfig: {"num_train_times": 4, "kl_guidance": 1.0},
    AwmConfig: {"num_train_times": 3},
}
CHOOSY = {CrdConfig, AwmConfig, FlowGrpoFastConfig, MixGrpoConfig, DanceGrpoConfig}
"""Train levels or steps of their own choice."""


def make(config_cls: type, **options: Any) -> tuple[Algorithm[Any], AlgorithmConfig, Sampler]:
    config = config_cls(**{**FEW_LEVELS.get(config_cls, {}), **options})
    return make_algorithm(config, LossSetting(sampler_for(config))), config, sampler_for(config)


def failing(group: int, sibling: int) -> float | None:
    return None if (group, sibling) == (1, 2) else by_sibling(group, sibling)


def micro_batches(
    algorithm: Algorithm[Any], policies: PolicySet, groups: Sequence[RolloutGroup], size: int = 4
) -> list[MicroBatch]:
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    shares = [algorithm.shares(group) for group in groups]
    data = StepData(groups, algorithm.credit(groups), items, shares, algorithm.needs)
    (batch,) = cut(data, num_epochs=1, num_updates=1, rank=0, num_ranks=1, micro_batch_size=size)
    return list(surveyed_batches(algorithm, policies, batch, RankGroup.single()))


@ROWS
def test_its_type_names_it_in_the_configuration(config_cls: type) -> None:
    tag = config_cls.model_fields["type"].default
    parsed = TypeAdapter(AlgorithmConfig).validate_python({"type": tag})
    assert isinstance(parsed, config_cls)
    assert isinstance(make(config_cls)[0], IMAGE_ALGORITHMS[config_cls])


@ROWS
def test_needs_are_known_from_the_configuration_alone(config_cls: type) -> None:
    algorithm, config, _ = make(config_cls)
    assert algorithm.needs == config.needs
    assert algorithm.rollout_policy == config.rollout_policy
    assert Needs.FINAL in config.needs or Needs.STEPS in config.needs
    assert (Needs.OLD in config.needs) or config.rollout_policy == "current"
    assert Needs.REFERENCE in config_cls(kl_weight=0.1).needs
    assert Needs.REFERENCE not in config_cls(kl_weight=0).needs


@ROWS
def test_credit_is_one_advantage_per_group_and_failures_have_none(config_cls: type) -> None:
    algorithm, config, sampler = make(config_cls)
    groups = draw_groups(ToyPolicy(), sampler, config.needs, reward=failing)
    credit = algorithm.credit(groups)
    assert len(credit) == len(groups)
    for index, (group, advantage) in enumerate(zip(groups, credit, strict=True)):
        assert advantage.adv_G.shape == advantage.valid_G.shape == (group.group_size,)
        assert torch.isfinite(advantage.adv_G).all()
        assert advantage.valid_G.tolist() == [(index, sibling) != (1, 2) for sibling in range(4)]
    assert credit[1].adv_G[2] == 0


@ROWS
def test_better_siblings_get_more_credit(config_cls: type) -> None:
    algorithm, config, sampler = make(config_cls)
    groups = draw_groups(ToyPolicy(), sampler, config.needs, reward=lambda group, sibling: float(sibling))
    for advantage in algorithm.credit(groups):
        assert (advantage.adv_G.diff() > 0).all()


@ROWS
def test_trained_steps_are_keyed_and_in_range(config_cls: type) -> None:
    algorithm, config, sampler = make(config_cls)
    (group,) = draw_groups(ToyPolicy(), sampler, config.needs, num_groups=1, group_size=12)
    items = algorithm.items(group, RUN_SEED, 1)
    assert items.shape[0] == 12
    num_levels = len(algorithm.levels.sigmas) if isinstance(algorithm, ForwardAlgorithm) else num_steps(sampler)
    assert 1 <= items.shape[1] <= num_levels
    assert ((items >= 0) & (items < num_levels)).all()
    for row in items.tolist():
        assert len(set(row)) == len(row)
    torch.manual_seed(99)  # global state must not matter, nor who else is in the batch
    assert torch.equal(algorithm.items(group, RUN_SEED, 1), items)
    some = replace(group, rollouts=group.rollouts[5:7])
    assert torch.equal(algorithm.items(some, RUN_SEED, 1), items[5:7])
    assert algorithm.shares(group).tolist() == [items.shape[1]] * 12


@pytest.mark.parametrize("config_cls", [one for one in IMAGE_ALGORITHMS if one not in CHOOSY])
def test_the_default_trains_all_but_the_last_hundredth_of_the_steps(config_cls: type) -> None:
    config = config_cls()
    for count, trained in ((2, 1), (5, 4), (10, 9), (25, 24)):
        sampler = sampler_for(config, count)
        (group,) = draw_groups(ToyPolicy(), sampler, config.needs, num_groups=1, group_size=1)
        assert make_algorithm(config, LossSetting(sampler)).items(group, RUN_SEED, 1).shape == (1, trained)


@ROWS
def test_a_loss_reports_what_it_declares_one_number_per_item(config_cls: type) -> None:
    for options in ({"kl_weight": 0.1}, {"kl_weight": 0}):
        algorithm, config, sampler = make(config_cls, **options)
        policy = ToyPolicy()
        policies = PolicySet(policy, "fp32", config.needs)
        for batch in micro_batches(algorithm, policies, draw_groups(policy, sampler, config.needs, reward=failing)):
            losses = algorithm.loss(policies, batch)
            assert losses.loss_N.shape == (len(batch.keys),)
            assert losses.loss_N.requires_grad
            assert set(losses.metrics) == set(algorithm.metrics)
            for value in losses.metrics.values():
                assert value.shape == losses.loss_N.shape
                assert not value.requires_grad
            assert torch.isfinite(losses.loss_N[batch.valid_N]).all()


@ROWS
def test_an_items_loss_does_not_depend_on_its_micro_batch(config_cls: type) -> None:
    algorithm, config, sampler = make(config_cls)
    policy = ToyPolicy()
    policies = PolicySet(policy, "fp32", config.needs)
    groups = draw_groups(policy, sampler, config.needs)

    def losses(size: int) -> dict[tuple[object, int], float]:
        found: dict[tuple[object, int], float] = {}
        for batch in micro_batches(algorithm, policies, groups, size):
            values = algorithm.loss(policies, batch).loss_N.tolist()
            for key, step, value in zip(batch.keys, batch.item_N.tolist(), values, strict=True):
                found[key, step] = value
        return found

    whole = losses(12)
    assert losses(1) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert losses(5) == pytest.approx(whole, rel=1e-4, abs=1e-6)


@ROWS
def test_no_difference_in_reward_is_no_push(config_cls: type) -> None:
    # At the old policy and the reference, equal rewards leave nothing to learn.
    _, config, sampler = make(config_cls)
    policy = ToyPolicy()
    learner = Learner(LearnerConfig(), config, policy, sampler, 1.0, 4, RUN_SEED)
    learner.begin_step(draw_groups(policy, sampler, config.needs, reward=lambda group, sibling: 0.1), 1)
    learner.forward_backward(0)
    for parameter in policy.trainable_parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-6


@ROWS
def test_a_few_steps_raise_the_reward(config_cls: type) -> None:
    _, config, sampler = make(config_cls)
    policy = ToyPolicy()
    learner = Learner(LearnerConfig(lr=1e-2), config, policy, sampler, 1.0, 8, RUN_SEED)
    rollout = ToyPolicy(seed=1)
    means: list[float] = []
    for step in range(1, 26):
        rollout.load_weights(learner.publish(step - 1))
        drawn = draw_groups(rollout, sampler, config.needs, num_groups=4, group_size=8, first_sequence=4 * step)
        brightness = [group.latents.final_GCHW.mean(dim=(1, 2, 3)).tolist() for group in drawn]
        groups = [
            group.with_rewards([breakdown(value) for value in values])
            for group, values in zip(drawn, brightness, strict=True)
        ]
        results = train_step(learner, groups, step)
        assert all(result.finite for result in results)
        means.append(sum(map(sum, brightness)) / 32)
    first, last = sum(means[:5]) / 5, sum(means[-5:]) / 5
    assert last > first + 0.05, means


@ROWS
def test_asking_for_more_steps_than_there_are_is_refused(config_cls: type) -> None:
    (key,) = [name for name in config_cls.model_fields if name.startswith("num_train_")]
    with pytest.raises(ConfigError, match=f"algorithm.{key} is 9999"):
        make(config_cls, **{key: 9999})
    algorithm, config, sampler = make(config_cls, **{key: 2})
    (group,) = draw_groups(ToyPolicy(), sampler, config.needs, num_groups=1, group_size=1)
    assert algorithm.items(group, RUN_SEED, 1).shape == (1, 2)
