"""Samples older than the step's weights: the two corrections of policy ratios, by hand and as identities; and what is
told by age."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.ages import AGES, bucket, bucket_means, by_age, names_by_age
from learner.algorithms import LossSetting, make_algorithm
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.flow_grpo_fast import FlowGrpoFastConfig
from learner.algorithms.grpo_guard import GrpoGuardConfig
from learner.algorithms.mix_grpo import MixGrpoConfig
from learner.learner import Learner, LearnerConfig
from learner.step_ratio import Guess, StepScores, score_step
from raylign.errors import ShapeError
from raylign.samplers import num_steps
from raylign.samplers.base import Transition
from raylign.types import RolloutGroup
from tests.picture_samplers import sampler_for
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, flow_sde, train_step

FAMILY = [FlowGrpoConfig, FlowGrpoFastConfig, GrpoGuardConfig, MixGrpoConfig, DanceGrpoConfig, DdpoConfig]


def scores(rollout: float, old: float, learner: float) -> StepScores:
    """One step's log-probs under the policy that drew it, that of the step's beginning, and the one being trained."""
    guess = Guess(torch.zeros(1, 1, 1, 1), Transition(torch.zeros(1, 1, 1, 1), torch.ones(1)))
    logprobs = [torch.tensor([value], dtype=torch.float64) for value in (learner, rollout, old)]
    return StepScores(guess, logprobs[0].requires_grad_(), logprobs[1], -0.1, None, guess, logprobs[2])


# eps = .03, A = ±2. The step's first policy finds the sample e^.1 = 1.10517 times likelier than the one that drew it.
#   clip       rho = e^(learner - rollout)
#   decoupled  rho = e^(learner - old), times the weight 1.10517
@pytest.mark.parametrize(
    ("learner", "adv", "clip", "clip_slope", "decoupled", "decoupled_slope"),
    [
        # At the step's beginning: rho is 1.10517 to the one and 1 to the other. Only the second has a gradient.
        (-0.90, 2.0, -2 * 1.03, 0.0, -2 * math.exp(0.1), -2 * math.exp(0.1)),
        (-0.90, -2.0, 2 * math.exp(0.1), 2 * math.exp(0.1), 2 * math.exp(0.1), 2 * math.exp(0.1)),
        # Moved on by .05: e^.05 = 1.05127 is outside of 1 ± .03, so both are clipped where A is positive.
        (-0.85, 2.0, -2 * 1.03, 0.0, -2 * 1.03 * math.exp(0.1), 0.0),
        # Moved back by .08 to e^.02 of the drawing policy: inside about that one, outside (e^-.08 = .923) about the
        # other, on the side that a positive advantage does not clip.
        (-0.98, 2.0, -2 * math.exp(0.02), -2 * math.exp(0.02), -2 * math.exp(0.02), -2 * math.exp(0.02)),
        (-0.98, -2.0, 2 * math.exp(0.02), 2 * math.exp(0.02), 2 * 0.97 * math.exp(0.1), 0.0),
    ],
)
def test_both_corrections_of_one_item(
    learner: float, adv: float, clip: float, clip_slope: float, decoupled: float, decoupled_slope: float
) -> None:
    for kind, expected, slope in (("clip", clip, clip_slope), ("decoupled", decoupled, decoupled_slope)):
        config = FlowGrpoConfig.model_validate({"clip_range": 0.03, "kl_weight": 0, "staleness_correction": kind})
        algorithm: Any = make_algorithm(config, LossSetting(flow_sde()))
        item = scores(-1.0, -0.9, learner)
        loss_N, _ = algorithm.policy_loss(item, torch.tensor([adv], dtype=torch.float64))
        loss_N = loss_N * (item.age_weight(2.0) if kind == "decoupled" else 1.0)
        assert loss_N.item() == pytest.approx(expected)
        (gradient_N,) = torch.autograd.grad(loss_N.sum(), item.learner_logprob_N)
        assert gradient_N.item() == pytest.approx(slope)
        assert item.away().item() == pytest.approx(abs(math.exp(learner + 1.0) - 1))


@pytest.mark.parametrize(("old", "weight"), [(-0.9, math.exp(0.1)), (-1.2, math.exp(-0.2)), (0.0, 2.0)])
def test_a_weight_is_cut_above_and_not_below(old: float, weight: float) -> None:
    assert scores(-1.0, old, old).age_weight(2.0).item() == pytest.approx(weight)


def test_no_weight_without_the_policy_of_the_steps_beginning() -> None:
    with pytest.raises(ShapeError, match="was not scored by the old policy"):
        replace(scores(-1.0, -0.9, -0.9), old=None).age_weight(2.0)


def make_learner(config: Any, num_epochs: int = 1) -> Learner:
    settings = LearnerConfig(lr=1e-2, epochs_per_step=num_epochs)
    return Learner(settings, config, ToyPolicy(), sampler_for(config), 1.0, 4, RUN_SEED)


def drawn_by(config: Any, policy: ToyPolicy, version: int = 0) -> list[RolloutGroup]:
    groups = draw_groups(policy, sampler_for(config), config.needs)
    return [aged(group, version) for group in groups]


def aged(group: RolloutGroup, version: int) -> RolloutGroup:
    return replace(group, rollouts=tuple(replace(r, min_version=version, max_version=version) for r in group.rollouts))


def older_policy(by: float = 0.02) -> ToyPolicy:
    policy, generator = ToyPolicy(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("config_cls", FAMILY)
def test_at_age_0_both_are_the_plain_method_bit_for_bit(config_cls: Callable[..., Any]) -> None:
    # Two epochs, so that the second is away from the step's beginning, and its ratios are not 1.
    weights: set[str] = set()
    for correction in (None, "clip", "decoupled"):
        config = config_cls(staleness_correction=correction)
        learner = make_learner(config, num_epochs=2)
        _, second = train_step(learner, drawn_by(config, ToyPolicy()), 1)
        assert second.metrics["ratio/deviation_max"] > 1e-6
        if correction is not None:
            assert second.metrics["behaviour/deviation/age_0"] == second.metrics["behaviour/deviation"] > 0
        if correction == "decoupled":
            assert second.metrics["behaviour/weight"] == second.metrics["behaviour/weight_max"] == 1.0
        weights.add(learner.weights_sha256())
    assert len(weights) == 1


def gradient(learner: Learner, groups: list[RolloutGroup], step: int) -> torch.Tensor:
    learner.begin_step(groups, step)
    learner.forward_backward(0)
    found = [parameter.grad for parameter in learner.policy.trainable_parameters().values()]
    return torch.cat([one.flatten().clone() for one in found if one is not None])


def test_the_decoupled_gradient_of_old_samples_is_reinforces_weighted_by_the_ratio() -> None:
    # At a step's beginning rho to its own policy is 1, so nothing is clipped: -mean of w A d log p.
    config = FlowGrpoConfig(kl_weight=0, staleness_correction="decoupled")
    learner, sampler = make_learner(config), sampler_for(config)
    groups = drawn_by(config, older_policy())
    found = gradient(learner, groups, 3)
    policy = ToyPolicy()
    terms: list[torch.Tensor] = []
    weights: list[float] = []
    for group, advantage in zip(groups, learner.algorithm.credit(groups), strict=True):
        states, rollout = group.latents.states_GS1CHW, group.latents.rollout_logprob_GS
        assert states is not None
        assert rollout is not None
        for step in range(num_steps(sampler) - 1):
            sigma_B = sampler.sigmas_S1[step].expand(group.group_size)
            velocity = policy.predict(states[:, step], sigma_B, group.conditioning.repeat(group.group_size))
            logprob = sampler.transition(velocity, states[:, step], step).logprob(states[:, step + 1])
            weight = (logprob - rollout[:, step]).exp().detach().clamp_max(config.weight_cap)
            weights += weight.tolist()
            terms.append(-advantage.adv_G * weight * logprob)
    torch.cat(terms).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert max(weights) - min(weights) > 1e-3, "the samples were old enough to tell"


def test_clipping_about_the_drawing_policy_loses_gradients_that_decoupling_keeps() -> None:
    groups = drawn_by(FlowGrpoConfig(), older_policy())
    lost: dict[str, float] = {}
    for correction in ("clip", "decoupled"):
        config = FlowGrpoConfig.model_validate({"kl_weight": 0, "staleness_correction": correction})
        learner = make_learner(config)
        learner.begin_step(groups, 3)
        algorithm: Any = learner.algorithm
        slopes: list[torch.Tensor] = []
        for batch in learner._batches[0].micro_batches():
            item = score_step(learner.policies, batch, sampler_for(config), 1.0, config.needs)
            loss_N, _ = algorithm.policy_loss(item, batch.adv_N)
            slopes.append(torch.autograd.grad(loss_N.sum(), item.learner_logprob_N)[0])
        lost[correction] = (torch.cat(slopes) == 0).float().mean().item()
    assert lost["decoupled"] == 0.0
    assert lost["clip"] > 0.3, "left behind on the side that the advantage does not want"


@pytest.mark.parametrize("correction", ["clip", "decoupled"])
def test_ratios_are_told_by_age(correction: str) -> None:
    config = FlowGrpoConfig.model_validate({"staleness_correction": correction})
    fresh, _, _ = drawn_by(config, ToyPolicy(), version=7)
    _, *old = drawn_by(config, older_policy(), version=5)
    (result,) = train_step(make_learner(config), [fresh, *old], 8)
    metrics = result.metrics
    told = {name.removeprefix("behaviour/deviation/") for name in metrics if name.startswith("behaviour/deviation/")}
    assert told == {"age_0", "age_2"}
    assert metrics["behaviour/deviation/age_0"] == 0.0
    assert metrics["behaviour/deviation/age_2"] > 1e-3
    # One group of three is fresh, and every sample has as many items.
    assert metrics["behaviour/deviation"] == pytest.approx(2 / 3 * metrics["behaviour/deviation/age_2"])
    assert metrics["ratio/clip_fraction"] == pytest.approx(2 / 3 * metrics["ratio/clip_fraction/age_2"])
    assert (metrics["ratio/clip_fraction/age_2"] > 0) == (correction == "clip")


def test_nothing_is_told_by_age_unless_a_correction_is_named() -> None:
    (result,) = train_step(make_learner(FlowGrpoConfig()), drawn_by(FlowGrpoConfig(), ToyPolicy()), 1)
    assert not [name for name in result.metrics if "age_" in name or "behaviour" in name]


def test_bucket_means_by_hand() -> None:
    # Values 1, 2, 3, 10 at ages 0, 0, 4, 9: means 1.5, 3 and 10.
    values = {"x": torch.tensor([1.0, 2.0, 3.0, 10.0])}
    told = by_age(values, torch.tensor([0, 0, 4, 9]))
    assert set(told) == set(names_by_age(("x",)))
    sums = {name: float(value_N.sum()) for name, value_N in told.items()}
    assert bucket_means({**sums, "loss": 4.0}) == {"x/age_0": 1.5, "x/age_4": 3.0, "x/age_5_up": 10.0}
    assert [bucket(age) for age in (0, 4, 5, 9)] == ["age_0", "age_4", AGES[-1], AGES[-1]]
