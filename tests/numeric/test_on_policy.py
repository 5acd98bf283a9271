"""Identities that hold on policy, on real modules: a ratio is exactly 1, the surrogate's gradient is REINFORCE's."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.learner import Learner, LearnerConfig
from raylign.models import load_policy
from raylign.models.base import DenoisingPolicy
from raylign.samplers.flow_sde import FlowSde
from raylign.types import RolloutGroup
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, flow_sde, sd3_config, train_step


def make_learner(
    policy: DenoisingPolicy,
    sampler: FlowSde,
    config: FlowGrpoConfig,
    chunk_size: int = 4,
    guidance_scale: float = 1.0,
    lr: float = 1e-2,
) -> Learner:
    return Learner(LearnerConfig(lr=lr), config, policy, sampler, guidance_scale, chunk_size, RUN_SEED)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_on_policy_the_ratio_is_exactly_1(tuning: Literal["lora", "full"], guidance_scale: float) -> None:
    # Rollout and learner are separate networks, as in a run; the second round has weights that have moved.
    sampler, config = flow_sde(5), FlowGrpoConfig()
    rollout = load_policy(sd3_config(tuning), "rollout", seed=3)
    learner = make_learner(load_policy(sd3_config(tuning), "learner", seed=3), sampler, config, 4, guidance_scale)
    for step in (1, 2):
        rollout.load_weights(learner.publish(step - 1))
        groups = draw_groups(rollout, sampler, config.needs, guidance_scale=guidance_scale)
        (result,) = train_step(learner, groups, step)
        assert result.metrics["ratio/mean"] == 1.0
        assert result.metrics["ratio/deviation_max"] == 0.0
        assert result.metrics["ratio/clip_fraction"] == 0.0
        assert result.metrics["grad/norm"] > 0
    assert result.metrics["loss/kl"] > 0


@pytest.mark.parametrize("chunk_size", [2, 4, 8])
def test_the_ratio_is_exactly_1_for_any_chunk_and_with_failed_siblings(chunk_size: int) -> None:
    # A chunk is an even part of a group, a group, or several; failed rows must keep its shape.
    def reward(group: int, sibling: int) -> float | None:
        return None if (group + sibling) % 3 == 0 else by_sibling(group, sibling)

    sampler, config = flow_sde(4), FlowGrpoConfig()
    policy = load_policy(sd3_config(), "rollout", seed=3)
    learner = make_learner(policy, sampler, config, chunk_size)
    groups = draw_groups(policy, sampler, config.needs, num_groups=4, chunk_size=chunk_size, reward=reward)
    (result,) = train_step(learner, groups, 1)
    assert result.metrics["batch/valid_samples"] == 10
    assert result.metrics["ratio/deviation_max"] == 0.0


def test_after_an_update_the_ratio_of_the_same_samples_is_not_1() -> None:
    sampler, config = flow_sde(4), FlowGrpoConfig()
    policy = ToyPolicy()
    learner = make_learner(policy, sampler, config)
    groups = draw_groups(policy, sampler, config.needs)
    train_step(learner, groups, 1)
    (result,) = train_step(learner, groups, 2)
    assert result.metrics["ratio/deviation_max"] > 1e-4
    assert result.metrics["ratio/clip_fraction"] > 0


def test_on_policy_the_surrogate_gradient_is_reinforces() -> None:
    sampler, config = flow_sde(5), FlowGrpoConfig(kl_weight=0)
    policy = ToyPolicy()
    learner = make_learner(policy, sampler, config)
    groups = draw_groups(policy, sampler, config.needs)
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    surrogate = gradient(policy)
    torch.testing.assert_close(surrogate, reinforce_gradient(policy, sampler, groups, learner), rtol=1e-4, atol=1e-7)
    assert surrogate.abs().max() > 1e-4


def reinforce_gradient(
    policy: ToyPolicy, sampler: FlowSde, groups: list[RolloutGroup], learner: Learner
) -> torch.Tensor:
    """The gradient of -mean A log p over all samples and all steps but the last, written out."""
    parameters = policy.trainable_parameters().values()
    for parameter in parameters:
        parameter.grad = None
    terms: list[torch.Tensor] = []
    for group, advantage in zip(groups, learner.algorithm.credit(groups), strict=True):
        states = group.latents.states_GS1CHW
        assert states is not None
        conditioning = group.conditioning.repeat(group.group_size)
        for step in range(len(sampler.sigmas_S1) - 2):
            sigma_B = sampler.sigmas_S1[step].expand(group.group_size)
            velocity = policy.predict(states[:, step], sigma_B, conditioning)
            logprob = sampler.transition(velocity, states[:, step], step).logprob(states[:, step + 1])
            terms.append(-advantage.adv_G * logprob)
    torch.cat(terms).mean().backward()
    return gradient(policy)


def gradient(policy: ToyPolicy) -> torch.Tensor:
    grads = [parameter.grad for parameter in policy.trainable_parameters().values()]
    return torch.cat([grad.flatten().clone() for grad in grads if grad is not None])
