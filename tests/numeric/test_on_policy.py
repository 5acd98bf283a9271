"""Identities that hold on policy, on real modules: a ratio is exactly 1, the surrogate's gradient is REINFORCE's."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from learner.algorithms import AlgorithmUnion
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.flow_grpo_fast import FlowGrpoFastConfig
from learner.algorithms.grpo_guard import GrpoGuardConfig
from learner.algorithms.mix_grpo import MixGrpoConfig
from learner.learner import Learner, LearnerConfig
from raylign.models import load_policy
from raylign.precision import Precision
from raylign.samplers import Sampler, num_steps
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.cps import CpsConfig
from raylign.samplers.dance_sde import DanceSdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.types import RolloutGroup
from tests.picture_samplers import ANYWHERE, SLIDING, draw_with, sampler_for
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, flow_sde, sd3_config, train_step

WINDOWED: dict[str, Any] = {"window": SLIDING, "shared_noise": True}
STOCHASTIC: dict[str, SdeSamplerConfig] = {
    "flow_sde": FlowSdeConfig(num_steps=5, **WINDOWED),
    "dance_sde": DanceSdeConfig(num_steps=5, **WINDOWED),
    "cps_squared": CpsConfig(num_steps=5, **WINDOWED),
    "cps_gaussian": CpsConfig(num_steps=5, density="gaussian", **WINDOWED),
    "gddim": GddimConfig(num_steps=5, **WINDOWED),
    "gddim_decaying": GddimConfig(num_steps=5, eta=1.5, eta_end=0.2, window=ANYWHERE, shared_noise=True),
}
FAMILY = [FlowGrpoConfig, FlowGrpoFastConfig, GrpoGuardConfig, MixGrpoConfig, DanceGrpoConfig, DdpoConfig]
ROWS = pytest.mark.parametrize("config_cls", FAMILY)


def make_learner(
    policy: Any,
    sampler: Sampler,
    config: AlgorithmUnion,
    chunk_size: int = 4,
    guidance_scale: float = 1.0,
    num_epochs: int = 1,
) -> Learner:
    settings = LearnerConfig(lr=1e-2, epochs_per_step=num_epochs)
    return Learner(settings, config, policy, sampler, guidance_scale, chunk_size, RUN_SEED)


def assert_ratio_1(metrics: Any) -> None:
    assert metrics["ratio/mean"] == 1.0
    assert metrics["ratio/deviation_max"] == 0.0
    assert metrics["ratio/clip_fraction"] == 0.0
    assert metrics["grad/norm"] > 0


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
        assert_ratio_1(result.metrics)
    assert result.metrics["loss/kl"] > 0


@ROWS
@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize(("guidance_scale", "latents"), [(1.0, "fp32"), (5.0, "bf16")])
def test_every_policy_ratio_is_exactly_1_with_every_sampler_and_window(
    config_cls: type, name: str, guidance_scale: float, latents: Precision
) -> None:
    sampler_config = STOCHASTIC[name]
    squared = isinstance(sampler_config, CpsConfig) and sampler_config.density == "squared"
    if config_cls is GrpoGuardConfig and squared:
        pytest.skip("refused: its bias is a Gaussian's")
    sampler, config = draw_with(sampler_config), config_cls(kl_weight=0.1, kl_space="velocity_mse")
    rollout, policy = ToyPolicy(), ToyPolicy()
    learner = make_learner(policy, sampler, config, 4, guidance_scale)
    trained: set[tuple[int, ...]] = set()
    for step in (1, 2):
        rollout.load_weights(learner.publish(step - 1))
        groups = draw_groups(
            rollout, sampler, config.needs, guidance_scale=guidance_scale, latents=latents, learner_step=step
        )
        trained.add(tuple(learner.algorithm.items(groups[0], RUN_SEED, step)[0].tolist()))
        (result,) = train_step(learner, groups, step)
        assert_ratio_1(result.metrics)
    assert name == "gddim_decaying" or len(trained) == 2, "the window has moved"


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


@ROWS
def test_after_an_update_the_ratio_of_the_same_samples_is_not_1(config_cls: type) -> None:
    config = config_cls()
    sampler, policy = sampler_for(config), ToyPolicy()
    learner = make_learner(policy, sampler, config)
    groups = draw_groups(policy, sampler, config.needs)
    train_step(learner, groups, 1)
    (result,) = train_step(learner, groups, 2)
    assert result.metrics["ratio/deviation_max"] > 1e-5
    assert result.metrics["ratio/clip_fraction"] > 0


@ROWS
def test_a_second_pass_over_the_same_samples_is_off_policy(config_cls: type) -> None:
    config = config_cls()
    sampler, policy = sampler_for(config), ToyPolicy()
    learner = make_learner(policy, sampler, config, num_epochs=2)
    first, second = train_step(learner, draw_groups(policy, sampler, config.needs), 1)
    assert_ratio_1(first.metrics)
    assert second.metrics["ratio/deviation_max"] > 1e-5


@pytest.mark.parametrize(
    "config",
    [
        FlowGrpoConfig(kl_weight=0),
        DdpoConfig(),
        DdpoConfig(variant="reinforce"),
        MixGrpoConfig(),
        DanceGrpoConfig(train_fraction=1.0),
    ],
    ids=["flow_grpo", "ddpo", "reinforce", "mix_grpo", "dance_grpo"],
)
def test_on_policy_the_surrogate_gradient_is_reinforces(config: AlgorithmUnion) -> None:
    sampler, policy = sampler_for(config), ToyPolicy()  # type: ignore[arg-type]  # they are for pictures
    learner = make_learner(policy, sampler, config)
    groups = draw_groups(policy, sampler, config.needs)
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    surrogate = gradient(policy)
    expected = reinforce_gradient(policy, sampler, groups, learner)
    torch.testing.assert_close(surrogate, expected, rtol=1e-3, atol=1e-6)
    assert surrogate.abs().max() > 1e-4


def test_on_policy_guards_gradient_is_reinforces_weighted_by_step() -> None:
    # d rho = std d log p where rho = 1, as the bias has no slope there; and the loss is divided by -dt.
    sampler, policy, config = flow_sde(5), ToyPolicy(), GrpoGuardConfig()
    learner = make_learner(policy, sampler, config)
    groups = draw_groups(policy, sampler, config.needs)
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    surrogate = gradient(policy)
    expected = reinforce_gradient(policy, sampler, groups, learner, guarded=True)
    torch.testing.assert_close(surrogate, expected, rtol=1e-3, atol=1e-6)


def reinforce_gradient(
    policy: ToyPolicy, sampler: Sampler, groups: list[RolloutGroup], learner: Learner, guarded: bool = False
) -> torch.Tensor:
    """The gradient of -mean A log p over all samples and all steps that added noise but the last, written out."""
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    terms: list[torch.Tensor] = []
    for group, advantage in zip(groups, learner.algorithm.credit(groups), strict=True):
        states, stochastic_S = group.latents.states_GS1CHW, group.latents.stochastic_S
        assert states is not None
        assert stochastic_S is not None
        conditioning = group.conditioning.repeat(group.group_size)
        for step in range(num_steps(sampler) - 1):
            if not stochastic_S[step]:
                continue
            sigma_B = sampler.sigmas_S1[step].expand(group.group_size)
            velocity = policy.predict(states[:, step], sigma_B, conditioning)
            transition = sampler.transition(velocity, states[:, step], step)
            weight = transition.std_B / (sampler.sigmas_S1[step] - sampler.sigmas_S1[step + 1]) if guarded else 1.0
            terms.append(-advantage.adv_G * transition.logprob(states[:, step + 1]) * weight)
    torch.cat(terms).mean().backward()
    return gradient(policy)


def gradient(policy: ToyPolicy) -> torch.Tensor:
    grads = [parameter.grad for parameter in policy.trainable_parameters().values()]
    return torch.cat([grad.flatten().clone() for grad in grads if grad is not None])
