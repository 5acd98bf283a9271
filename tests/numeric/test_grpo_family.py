"""The policy-gradient family of pictures against numbers worked out by hand, and the facts its files claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.algorithms import AlgorithmUnion, LossSetting, make_algorithm
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.grpo_guard import GrpoGuardConfig
from learner.algorithms.mix_grpo import MixGrpoConfig
from learner.batching import MicroBatch, StepData, cut
from learner.losses import clipped_policy_loss, gaussian_kl, guarded_policy_loss
from learner.policies import PolicySet
from learner.step_ratio import StepScores, draw_steps, score_step, trainable_steps
from raylign.errors import ShapeError
from raylign.samplers import Sampler
from raylign.samplers.cps import CpsConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.window import WindowConfig
from raylign.types import LatentTrajectory, Needs
from tests.picture_samplers import draw_with, sampler_for
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, flow_sde


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# Log-ratio -.3 + bias .5 = .2; times std .5 is .1, so rho = e^.1 = 1.10517; the step is .25 long.
@pytest.mark.parametrize(
    ("adv", "clip_range", "expected"),
    [
        (2.0, 0.2, -2 * math.exp(0.1) / 0.25),  # inside the clip range
        (2.0, 0.05, -2 * 1.05 / 0.25),  # moved enough: clipped
        (-2.0, 0.05, 2 * math.exp(0.1) / 0.25),  # worse, and more likely now: not
    ],
)
def test_guards_loss_of_one_item(adv: float, clip_range: float, expected: float) -> None:
    loss_N, ratio_N = guarded_policy_loss(one(-1.3), one(-1.0), one(adv), clip_range, one(0.5), one(0.5), -0.25)
    assert ratio_N.item() == pytest.approx(math.exp(0.1))
    assert loss_N.item() == pytest.approx(expected)


def test_guards_exponent_is_the_noise_times_the_shift() -> None:
    # (log p - log p_old + bias) std = mean z (mu - mu_old), with x' = mu_old + std z.
    torch.manual_seed(3)
    old, shift, noise = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    std_N = torch.tensor([0.2, 0.7], dtype=torch.float64)
    std = std_N.view(-1, 1, 1, 1)
    mean, drawn = old + 0.1 * shift, old + std * noise

    def logprob(center: torch.Tensor) -> torch.Tensor:
        return (-((drawn - center) ** 2) / (2 * std**2)).mean(dim=(1, 2, 3))

    _, ratio_N = guarded_policy_loss(
        logprob(mean), logprob(old), torch.ones(2), 0.5, gaussian_kl(mean, old, std_N), std_N, -0.1
    )
    torch.testing.assert_close(ratio_N.log(), (noise * 0.1 * shift).mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("std", [0.7, 0.22])
def test_the_bias_of_log_ratios_is_what_guard_removes(std: float) -> None:
    # A shift of rms m gives E[log p - log p_old] = -m² / 2 std²; drawn for 200 latents of 4096 dims.
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(200, 1, 64, 64, generator=generator, dtype=torch.float64)
    m = 0.02
    shift = m * torch.randn(1, 1, 64, 64, generator=generator, dtype=torch.float64)
    log_ratio_N = (-((std * noise - shift) ** 2) + (std * noise) ** 2).mean(dim=(1, 2, 3)) / (2 * std**2)
    expected = -float((shift**2).mean()) / (2 * std**2)
    error = m / (std * 64 * math.sqrt(200))
    assert log_ratio_N.mean().item() == pytest.approx(expected, abs=4 * error)
    _, plain_N = clipped_policy_loss(log_ratio_N, torch.zeros(200), torch.ones(200), 0.1)
    bias_N = torch.full((200,), -expected, dtype=torch.float64)
    std_N = torch.full((200,), std, dtype=torch.float64)
    _, guarded_N = guarded_policy_loss(log_ratio_N, torch.zeros(200), torch.ones(200), 0.1, bias_N, std_N, -0.1)
    assert abs(guarded_N.log().mean().item()) < 4 * error * std
    assert guarded_N.log().std() == pytest.approx(float(plain_N.log().std()) * std)


def batches(config: AlgorithmUnion, sampler: Sampler, policy: ToyPolicy) -> tuple[Any, list[MicroBatch]]:
    """The micro-batches of three groups at the learner step's first update."""
    algorithm = make_algorithm(config, LossSetting(sampler))
    groups = draw_groups(policy, sampler, config.needs)
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    data = StepData(groups, algorithm.credit(groups), items, [algorithm.shares(g) for g in groups], config.needs)
    (batch,) = cut(data, num_epochs=1, num_updates=1, rank=0, num_ranks=1, micro_batch_size=4)
    return algorithm, list(batch.micro_batches())


def moved(policy: ToyPolicy, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def test_the_three_kl_spaces_of_a_step_are_related_by_its_length_and_std() -> None:
    sampler, policy = flow_sde(5), ToyPolicy()
    config = FlowGrpoConfig()
    _, found = batches(config, sampler, policy)
    policies = PolicySet(policy, "fp32", config.needs)
    moved(policy)
    for batch in found[:4]:
        scores = score_step(policies, batch, sampler, 1.0, config.needs)
        step = batch.only_step()
        sigma, following = sampler.sigmas_S1[step : step + 2].tolist()
        assert scores.delta_sigma == pytest.approx(following - sigma)
        exact, coded, velocity = (scores.kl(s) for s in ("exact_gaussian", "mean_over_std2_no_dt", "velocity_mse"))
        torch.testing.assert_close(coded, exact * (sigma - following))
        # mu = x (...) + v (1 + s² (1 - sigma) / 2 sigma) dt, so KL = k² |dv|² / 2 std² with that k.
        std = float(scores.learner.transition.std_B[0])
        k = (1 + std**2 / (sigma - following) * (1 - sigma) / (2 * sigma)) * (following - sigma)
        torch.testing.assert_close(exact, velocity * k**2 / (2 * std**2), rtol=1e-3, atol=0)
        assert (exact > 0).all()


def test_kl_is_zero_at_the_reference_and_its_weight_scales_its_share() -> None:
    sampler, policy = flow_sde(4), ToyPolicy()
    light, heavy = FlowGrpoConfig(kl_weight=0.1), FlowGrpoConfig(kl_weight=0.3)
    algorithm, (batch, *_) = batches(light, sampler, policy)
    policies = PolicySet(policy, "fp32", light.needs)
    assert (algorithm.loss(policies, batch).metrics["loss/kl"] == 0).all()
    moved(policy)
    few = algorithm.loss(policies, batch)
    many = make_algorithm(heavy, LossSetting(sampler)).loss(policies, batch)
    assert (few.metrics["loss/kl"] > 0).all()
    torch.testing.assert_close(few.loss_N - few.metrics["loss/policy"], 0.1 * few.metrics["loss/kl"])
    torch.testing.assert_close(many.loss_N - few.loss_N, 0.2 * few.metrics["loss/kl"], rtol=1e-3, atol=1e-7)


def test_a_squared_density_scores_the_distance_alone() -> None:
    squared, gaussian = (draw_with(CpsConfig(num_steps=4, density=density)) for density in ("squared", "gaussian"))
    policy, config = ToyPolicy(), FlowGrpoConfig(kl_weight=0)
    _, (batch, *_) = batches(config, squared, policy)
    policies = PolicySet(policy, "fp32", config.needs)
    moved(policy)
    short = score_step(policies, batch, squared, 1.0, config.needs)
    full = score_step(policies, batch, gaussian, 1.0, config.needs)
    std = float(full.learner.transition.std_B[0])
    constant = -math.log(std) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(full.learner_logprob_N, short.learner_logprob_N / (2 * std**2) + constant)
    assert (short.learner_logprob_N != short.rollout_logprob_N).all()


def test_guard_asks_the_policy_of_the_steps_beginning_once_the_weights_have_moved() -> None:
    sampler, policy, config = flow_sde(4), ToyPolicy(), GrpoGuardConfig()
    algorithm, (batch, *_) = batches(config, sampler, policy)
    policies = PolicySet(policy, "fp32", config.needs)
    assert (score_step(policies, batch, sampler, 1.0, config.needs).drift() == 0).all()
    before = score_step(policies, batch, sampler, 1.0, config.needs).learner.transition.mean_BCHW.detach()
    moved(policy)
    scores = score_step(policies, replace(batch, on_policy=False), sampler, 1.0, config.needs)
    mean, std_N = scores.learner.transition.mean_BCHW, scores.learner.transition.std_B
    torch.testing.assert_close(scores.drift(), gaussian_kl(mean, before, std_N))
    assert (scores.drift() > 0).all()
    assert algorithm.decay("old", 3, 1) == 0.0
    assert algorithm.decay("reference", 3, 1) == 1.0


def test_reinforce_has_the_score_functions_loss_and_no_clip() -> None:
    sampler = sampler_for(DdpoConfig())
    policy, config = ToyPolicy(), DdpoConfig(variant="reinforce", kl_weight=0.01)
    algorithm, (batch, *_) = batches(config, sampler, policy)
    policies = PolicySet(policy, "fp32", config.needs)
    moved(policy)
    losses = algorithm.loss(policies, batch)
    scores: StepScores = score_step(policies, batch, sampler, 1.0, config.needs)
    torch.testing.assert_close(losses.metrics["loss/policy"], -batch.adv_N * scores.learner_logprob_N.detach())
    torch.testing.assert_close(
        losses.loss_N, losses.metrics["loss/policy"] + 0.01 * scores.kl("exact_gaussian"), rtol=1e-4, atol=1e-6
    )
    assert config.smallest_clip is None


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (FlowGrpoConfig(), [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # int(.99 * 10): the last step is dropped
        (DdpoConfig(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_the_last_step_is_trained_by_ddpo_alone(config: AlgorithmUnion, steps: list[int]) -> None:
    algorithm, found = batches(config, flow_sde(10), ToyPolicy())
    assert sorted({batch.only_step() for batch in found}) == steps
    assert algorithm.shares(draw_groups(ToyPolicy(), flow_sde(10), config.needs)[0])[0] == len(steps)


def test_only_steps_that_added_noise_are_trained_wherever_the_window_is() -> None:
    sampler = draw_with(FlowSdeConfig(num_steps=6, window=WindowConfig(size=2, advance_every=1), shared_noise=True))
    algorithm = make_algorithm(MixGrpoConfig(), LossSetting(sampler))
    for step in (1, 2, 3, 4, 5):
        (group,) = draw_groups(ToyPolicy(), sampler, Needs.STEPS, num_groups=1, learner_step=step)
        first = (step - 1) % 4  # places 0, 1, 2, 3 and over again: the last step, 5, is out of reach
        assert algorithm.items(group, RUN_SEED, step)[0].tolist() == [first, first + 1]
        assert algorithm.shares(group).tolist() == [2.0] * 4


def test_dance_trains_a_share_of_the_steps_that_all_samples_have_in_common() -> None:
    config = DanceGrpoConfig()
    sampler = sampler_for(config, 16)
    algorithm = make_algorithm(config, LossSetting(sampler))
    (group,) = draw_groups(ToyPolicy(), sampler, config.needs, num_groups=1)
    chosen = [algorithm.items(group, RUN_SEED, step) for step in range(1, 40)]
    for items in chosen:
        assert items.shape == (4, 9)  # int(.6 * 15)
        assert (items == items[0]).all()
        assert 15 not in items
    assert {step for items in chosen for step in items[0].tolist()} == set(range(15))
    assert len({tuple(items[0].tolist()) for items in chosen}) > 20


def test_siblings_that_best_of_n_leaves_out_have_no_gradient() -> None:
    config = DanceGrpoConfig(train_best_worst=2)
    _, found = batches(config, sampler_for(config), ToyPolicy())
    assert len(found) == 3 * 2  # groups, and int(.6 * 4) steps of each
    for batch in found:
        assert batch.valid_N.sum() == 2
        assert (batch.adv_N[~batch.valid_N] == 0).all()
        best = max(range(4), key=lambda sibling: by_sibling(0, sibling))
        assert batch.valid_N[best]
        assert batch.adv_N[best] == batch.adv_N.max() > 0


def test_steps_are_drawn_in_order_by_key() -> None:
    steps = [2, 3, 5, 7]
    assert draw_steps(steps, 4, RUN_SEED, 1).tolist() == steps
    drawn = [draw_steps(steps, 2, RUN_SEED, step).tolist() for step in range(30)]
    assert drawn == [draw_steps(steps, 2, RUN_SEED, step).tolist() for step in range(30)]
    assert all(pair == sorted(pair) for pair in drawn)
    assert {step for pair in drawn for step in pair} == set(steps)


def test_without_a_record_the_samplers_own_steps_are_trained() -> None:
    sampler = sampler_for(DdpoConfig(), 4)  # its last step, to 0, adds no noise
    bare = LatentTrajectory(torch.zeros(1, 2, 4, 4), sampler.sigmas_S1)
    assert trainable_steps(bare, sampler, 4) == [0, 1, 2]
    assert trainable_steps(bare, sampler, 2) == [0, 1]


def test_a_step_without_noise_or_without_a_relative_cannot_be_scored() -> None:
    sampler, policy, config = sampler_for(DdpoConfig(), 4), ToyPolicy(), DdpoConfig()
    _, (batch, *_) = batches(config, sampler, policy)
    policies = PolicySet(policy, "fp32", config.needs)
    with pytest.raises(ShapeError, match="deterministic step"):
        score_step(policies, replace(batch, item_N=torch.full((4,), 3)), sampler, 1.0, config.needs)
    with pytest.raises(ShapeError, match="one sampler step per micro-batch"):
        score_step(policies, replace(batch, item_N=torch.arange(4)), sampler, 1.0, config.needs)
    with pytest.raises(ShapeError, match="must record STEPS and LOGPROBS"):
        score_step(policies, replace(batch, states_NS1CHW=None), sampler, 1.0, config.needs)
    scores = score_step(policies, batch, sampler, 1.0, config.needs)
    for ask in (lambda: scores.kl("exact_gaussian"), scores.norm_ratio, scores.drift):
        with pytest.raises(ShapeError, match="was not scored by the"):
            ask()
