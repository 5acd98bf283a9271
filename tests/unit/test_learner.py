"""The learner's verbs: what each changes, what it refuses, and that a loaded state goes on exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from learner.algorithms import AlgorithmConfig
from learner.algorithms.awm import AwmConfig
from learner.algorithms.crd import CrdConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.nft import NftConfig
from learner.decay import DecaySchedule
from learner.learner import Learner, LearnerConfig, Which
from learner.noise_levels import TrainTimes
from learner.state import LearnerState, policy_tensors
from raylign.errors import CheckpointError, ConfigError, NumericsError, RewardError, WeightError
from raylign.models import load_policy
from raylign.models.swapping import clone_tensors
from raylign.samplers import Sampler
from raylign.types import Needs, RolloutGroup
from raylign.weight_delta import apply_delta
from raylign.weights import WeightSnapshot
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, euler, flow_sde, sd3_config, train_step

NFT = NftConfig(old_decay=DecaySchedule(slope=0.1))
GRPO = FlowGrpoConfig()
CRD = CrdConfig(num_train_times=3, old_decay=DecaySchedule(slope=0.1), sampling_decay=DecaySchedule(slope=0.2))
AWM = AwmConfig(num_train_times=3, times=TrainTimes(draw="stratified"), old_decay=DecaySchedule(slope=0.1))
ALGORITHMS = pytest.mark.parametrize("algorithm", [NFT, CRD, AWM, GRPO], ids=["nft", "crd", "awm", "flow_grpo"])


def sampler_for(algorithm: AlgorithmConfig) -> Sampler:
    return flow_sde() if Needs.LOGPROBS in algorithm.needs else euler()


def make(algorithm: AlgorithmConfig = NFT, **config: object) -> Learner:
    sampler = sampler_for(algorithm)
    return Learner(LearnerConfig(**config), algorithm, ToyPolicy(), sampler, 1.0, 4, RUN_SEED)  # type: ignore[arg-type]


def groups_for(algorithm: AlgorithmConfig, first: int = 0) -> list[RolloutGroup]:
    sampler = sampler_for(algorithm)
    return draw_groups(ToyPolicy(), sampler, algorithm.needs, num_groups=4, first_sequence=first)


def poisoned(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The same groups, one with a text encoding so large that the network's answer to it is not finite."""
    told = groups[0].conditioning
    return [replace(groups[0], conditioning=replace(told, pooled_PD=told.need_pooled() * math.inf)), *groups[1:]]


@ALGORITHMS
def test_forward_backward_reads_weights_and_optimise_moves_them(algorithm: AlgorithmConfig) -> None:
    learner = make(algorithm)
    started = learner.weights_sha256()
    learner.begin_step(groups_for(algorithm), 1)
    learner.forward_backward(0)
    assert learner.weights_sha256() == started
    result = learner.optimise(0)
    assert result.finite
    assert learner.weights_sha256() != started
    assert learner.num_optimiser_steps == 1
    assert result.metrics["batch/num_items"] == 16 * 3


@ALGORITHMS
def test_a_step_repeats_bit_for_bit(algorithm: AlgorithmConfig) -> None:
    hashes = set()
    for _ in range(2):
        learner = make(algorithm)
        torch.manual_seed(len(hashes))  # global state must not matter
        train_step(learner, groups_for(algorithm), 1)
        hashes.add(learner.weights_sha256())
    assert len(hashes) == 1


@ALGORITHMS
def test_each_update_trains_its_own_share(algorithm: AlgorithmConfig) -> None:
    learner = make(algorithm, updates_per_step=2)
    results = train_step(learner, groups_for(algorithm), 1)
    assert [result.metrics["batch/num_items"] for result in results] == [8 * 3, 8 * 3]
    assert learner.num_optimiser_steps == 2


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    learner = make()
    train_step(learner, groups_for(NFT), 1)
    before = learner.state_dict()
    (result,) = train_step(learner, poisoned(groups_for(NFT)), 2)
    assert not result.finite
    assert not math.isfinite(result.metrics["loss"])
    after = learner.state_dict()
    assert after.values == before.values
    for name, tensor in before.tensors.items():
        if not name.startswith("old/"):
            assert torch.equal(after.tensors[name], tensor), name
    (result,) = train_step(learner, groups_for(NFT), 3)
    assert result.finite


def test_a_refused_update_does_not_stop_the_next_one_of_the_step() -> None:
    learner = make(updates_per_step=2)
    refused, taken = train_step(learner, poisoned(groups_for(NFT)), 1)
    assert (refused.finite, taken.finite) == (False, True)
    assert learner.num_optimiser_steps == 1


def test_gradients_are_clipped_to_the_norm() -> None:
    loose, tight = make(grad_clip=1e6), make(grad_clip=1e-3)
    for learner in (loose, tight):
        learner.begin_step(groups_for(NFT), 1)
        learner.forward_backward(0)
        norm = learner.optimise(0).metrics["grad/norm"]
        grads = [p.grad for p in learner.policy.trainable_parameters().values() if p.grad is not None]
        after = float(torch.cat([grad.flatten() for grad in grads]).norm())
        assert after == pytest.approx(min(norm, learner.config.grad_clip), rel=1e-3)
        assert norm > 1e-2


def test_the_learning_rate_warms_up_in_optimiser_steps() -> None:
    learner = make(lr=1e-3, warmup_steps=4, updates_per_step=2)
    rates = [r.metrics["learner/lr"] for step in (1, 2, 3) for r in train_step(learner, groups_for(NFT), step)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_a_step_without_any_reward_is_refused() -> None:
    groups = draw_groups(ToyPolicy(), euler(), NFT.needs, reward=lambda group, sibling: None)
    with pytest.raises(RewardError, match="step 7: none of the 3 groups"):
        make().begin_step(groups, 7)


def test_an_update_whose_samples_all_failed_changes_nothing() -> None:
    groups = draw_groups(
        ToyPolicy(), flow_sde(), GRPO.needs, num_groups=4, reward=lambda g, s: by_sibling(g, s) if g > 1 else None
    )
    learner = make(GRPO, updates_per_step=2)
    skipped, taken = train_step(learner, groups, 1)
    assert skipped.finite
    assert skipped.metrics["batch/num_items"] == 0
    assert taken.metrics["batch/num_items"] == 8 * 3
    assert learner.num_optimiser_steps == 1


@ALGORITHMS
def test_what_a_failed_sample_holds_does_not_matter(algorithm: AlgorithmConfig) -> None:
    hashes = set()
    for value in (0.0, math.nan, 1e30):
        sampler = sampler_for(algorithm)
        groups = draw_groups(
            ToyPolicy(),
            sampler,
            algorithm.needs,
            num_groups=4,
            reward=lambda g, s: None if (g, s) == (1, 2) else by_sibling(g, s),
        )
        trajectory = groups[1].latents
        for tensor in (trajectory.final_GCHW, trajectory.states_GS1CHW, trajectory.rollout_logprob_GS):
            if tensor is not None:
                tensor[2] = value
        learner = make(algorithm)
        (result,) = train_step(learner, groups, 1)
        assert result.finite
        hashes.add(learner.weights_sha256())
    assert len(hashes) == 1


def test_a_valid_sample_that_is_nan_stops_the_step() -> None:
    groups = groups_for(NFT)
    groups[2].latents.final_GCHW[1] = math.nan
    learner = make()
    learner.begin_step(groups, 1)
    with pytest.raises(NumericsError, match="final_GCHW of sample"):
        learner.forward_backward(0)


def test_the_old_policy_follows_once_per_step_by_the_schedule() -> None:
    learner = make(updates_per_step=2)
    old = learner.policies.relatives["old"]
    for step in (1, 2):
        before = {name: tensor.clone() for name, tensor in old.items()}
        learner.begin_step(groups_for(NFT), step)
        for update in range(2):
            learner.forward_backward(update)
            learner.optimise(update)
        metrics = learner.end_step(step)
        decay = 0.1 * 2 * step  # two optimiser steps per learner step
        assert metrics == {"learner/old_decay": pytest.approx(decay)}
        for name, parameter in learner.policy.trainable_parameters().items():
            torch.testing.assert_close(old[name], decay * before[name] + (1 - decay) * parameter.detach())


def test_crd_has_two_relatives_that_follow_each_by_its_schedule_after_the_updates() -> None:
    learner = make(CRD, updates_per_step=2)
    relatives = learner.policies.relatives
    for step in (1, 2):
        before = {name: {key: t.clone() for key, t in relatives[name].items()} for name in ("old", "sampling")}
        learner.begin_step(groups_for(CRD), step)
        for update in range(2):
            learner.forward_backward(update)
            learner.optimise(update)
        assert all(torch.equal(before["old"][key], tensor) for key, tensor in relatives["old"].items())
        metrics = learner.end_step(step)
        assert metrics == pytest.approx(
            {"learner/old_decay": 0.2 * step, "learner/sampling_decay": min(0.4 * step, 0.5)}
        )
        for name, decay in (("old", 0.2 * step), ("sampling", min(0.4 * step, 0.5))):
            for key, parameter in learner.policy.trainable_parameters().items():
                expected = decay * before[name][key] + (1 - decay) * parameter.detach()
                torch.testing.assert_close(relatives[name][key], expected)  # type: ignore[index]
    assert learner.publish(2).sha256 not in (learner.weights_sha256(), learner.publish(2, "eval").sha256)


def test_nft_publishes_its_old_policy_and_flow_grpo_its_current_one() -> None:
    nft, grpo = make(NFT), make(GRPO)
    for learner, algorithm in ((nft, NFT), (grpo, GRPO)):
        train_step(learner, groups_for(algorithm), 1)
        train_step(learner, groups_for(algorithm), 2)
        assert learner.publish(2, "current").sha256 == learner.weights_sha256()
        assert learner.publish(2).version == 2
    assert grpo.publish(2).sha256 == grpo.weights_sha256()
    assert nft.publish(2).sha256 != nft.weights_sha256()
    follower = ToyPolicy(seed=9)
    follower.load_weights(nft.publish(2))
    for name, tensor in clone_tensors(follower).items():
        assert torch.equal(tensor, nft.policies.relatives["old"][name])


def test_changes_are_published_from_the_second_time_on_and_lead_to_the_whole() -> None:
    learner = make(GRPO, lr=1e-6, publish="delta")
    first, held, kind = learner.publish_changes(0)
    assert (first, kind, held.kind) == (None, "full", "full")
    train_step(learner, groups_for(GRPO), 1)
    delta, whole, kind = learner.publish_changes(1)
    assert delta is not None
    assert kind == delta.kind == "delta"
    assert whole.sha256 == learner.publish(1).sha256 != held.sha256
    assert apply_delta(held, delta).sha256 == whole.sha256


def test_each_published_policy_has_changes_of_its_own() -> None:
    learner = make(NFT, lr=1e-6, ema_decay=0.9)
    both: list[Which] = ["rollout", "eval"]
    bases: dict[Which, WeightSnapshot] = {which: learner.publish_changes(0, which)[1] for which in both}
    train_step(learner, groups_for(NFT), 1)
    for which, base in bases.items():
        delta, whole, _ = learner.publish_changes(1, which)
        assert delta is not None
        assert apply_delta(base, delta).sha256 == whole.sha256 == learner.publish(1, which).sha256


def test_changes_that_are_as_large_as_the_weights_are_not_sent() -> None:
    learner = make(GRPO, lr=10.0)
    learner.publish_changes(0)
    train_step(learner, groups_for(GRPO), 1)
    delta, whole, kind = learner.publish_changes(1)
    assert (delta, kind, whole.version) == (None, "full", 1)


def test_a_published_snapshot_does_not_move_with_the_weights() -> None:
    learner = make(GRPO)
    snapshot = learner.publish(0)
    train_step(learner, groups_for(GRPO), 1)
    fresh = ToyPolicy(seed=9)
    fresh.load_weights(snapshot)
    assert fresh.export_weights(0).sha256 == ToyPolicy().export_weights(0).sha256


def test_the_learner_answers_for_either_policy_as_a_rollout_would() -> None:
    learner = make(NFT)
    for step in (1, 2):
        train_step(learner, groups_for(NFT), step)
    told = learner.policy.encode("word", False).repeat(2)
    state, sigma = torch.randn(2, 2, 4, 4), torch.tensor([0.2, 0.9])
    for which in ("rollout", "current"):
        rollout = ToyPolicy(seed=9)
        rollout.load_weights(learner.publish(2, which))
        with torch.no_grad():
            assert torch.equal(learner.predict(state, sigma, told, which), rollout.predict(state, sigma, told))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_checkpointed_activations_give_the_same_step(tuning: str, precision: str) -> None:
    updates: list[torch.Tensor] = []
    for recompute in (False, True):
        policy = load_policy(sd3_config(tuning), "learner", seed=3)  # type: ignore[arg-type]
        rollout = load_policy(sd3_config(tuning), "rollout", seed=3)  # type: ignore[arg-type]
        config = LearnerConfig(gradient_checkpointing=recompute, precision=precision)  # type: ignore[arg-type]
        learner = Learner(config, NFT, policy, euler(), 1.0, 4, RUN_SEED)
        learner.begin_step(draw_groups(rollout, euler(), NFT.needs, num_groups=1), 1)
        learner.forward_backward(0)
        updates.append(torch.cat([p.grad.flatten().clone() for p in policy.trainable_parameters().values()]))  # type: ignore[union-attr]
    assert updates[0].abs().max() > 0
    assert torch.equal(updates[0], updates[1])


@ALGORITHMS
def test_a_loaded_state_goes_on_bit_for_bit(algorithm: AlgorithmConfig) -> None:
    learner = make(algorithm, updates_per_step=2, warmup_steps=3, ema_decay=0.9)
    for step in (1, 2):
        train_step(learner, groups_for(algorithm, step), step)
    state = learner.state_dict()
    uninterrupted = train_step(learner, groups_for(algorithm, 3), 3)
    resumed = make(algorithm, updates_per_step=2, warmup_steps=3, ema_decay=0.9)
    resumed.load_state_dict(state)
    assert train_step(resumed, groups_for(algorithm, 3), 3) == uninterrupted
    assert resumed.weights_sha256() == learner.weights_sha256()
    assert resumed.publish(3).sha256 == learner.publish(3).sha256
    for name, tensor in learner.state_dict().tensors.items():
        assert torch.equal(resumed.state_dict().tensors[name], tensor), name


def test_a_state_is_a_copy_that_holds_the_policy_under_its_own_names() -> None:
    learner = make()
    state = learner.state_dict()
    started = {name: tensor.clone() for name, tensor in policy_tensors(state).items()}
    train_step(learner, groups_for(NFT), 1)
    assert started.keys() == learner.policy.trainable_parameters().keys()
    for name, tensor in policy_tensors(state).items():
        assert torch.equal(tensor, started[name])
        assert not torch.equal(tensor, learner.policy.trainable_parameters()[name])


def test_a_state_from_before_the_first_step_can_be_loaded_over_a_later_one() -> None:
    learner = make()
    start = learner.state_dict()
    first = train_step(learner, groups_for(NFT), 1)
    learner.load_state_dict(start)
    assert learner.num_optimiser_steps == 0
    assert train_step(learner, groups_for(NFT), 1) == first


def test_a_foreign_state_is_refused_with_nothing_loaded() -> None:
    learner = make(NFT)
    train_step(learner, groups_for(NFT), 1)
    good = learner.state_dict()
    before = learner.weights_sha256()
    without_old = {name: tensor + 1 for name, tensor in good.tensors.items() if not name.startswith("old/")}
    with pytest.raises(WeightError, match=r"section 'old', lacks inward\.bias"):
        learner.load_state_dict(LearnerState(without_old, good.values))
    without_moments = {name: tensor + 1 for name, tensor in good.tensors.items() if "exp_avg/" not in name}
    with pytest.raises(WeightError, match=r"section 'adam/exp_avg', lacks"):
        learner.load_state_dict(LearnerState(without_moments, good.values))
    with pytest.raises(CheckpointError, match="num_optimiser_steps 0"):
        learner.load_state_dict(LearnerState(good.tensors, {"num_optimiser_steps": 0}))
    assert learner.weights_sha256() == before


@pytest.mark.parametrize("bad", [{"lr": 0}, {"num_ranks": 0}, {"precision": "fp8"}, {"betas": [0.9]}, {"lrr": 1e-4}])
def test_a_learner_configuration_that_means_nothing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LearnerConfig.model_validate(bad)


@ALGORITHMS
def test_adjusting_scales_the_rate_and_the_kl_from_the_next_step_on(algorithm: AlgorithmConfig) -> None:
    def second_step(lr_scale: float, kl_scale: float) -> tuple[dict[str, float], str]:
        learner = make(algorithm, lr=1e-2)
        train_step(learner, groups_for(algorithm), 1)
        learner.adjust(lr_scale, kl_scale)
        learner.begin_step(groups_for(algorithm, first=4), 2)
        learner.forward_backward(0)
        metrics = dict(learner.optimise(0).metrics)
        return metrics, learner.weights_sha256()

    plain, slow, near = second_step(1.0, 1.0), second_step(0.25, 1.0), second_step(1.0, 3.0)
    assert (plain[0]["learner/lr"], slow[0]["learner/lr"], near[0]["learner/lr"]) == (1e-2, 0.25e-2, 1e-2)
    assert len({plain[1], slow[1], near[1]}) == 3
    # The same policy is asked, so the distances are the same, and the penalty is 3 times what it was.
    assert near[0]["loss/kl"] == plain[0]["loss/kl"] == slow[0]["loss/kl"] > 0
    if algorithm is not CRD:  # its weight differs from sample to sample
        weight = getattr(algorithm, "kl_weight")  # noqa: B009  # not every algorithm has one
        gained = near[0]["loss"] - plain[0]["loss"]
        assert gained == pytest.approx(2 * weight * plain[0]["loss/kl"], rel=1e-4, abs=1e-9)


def test_a_kl_that_is_not_there_cannot_be_raised() -> None:
    learner = make(NftConfig(kl_weight=0.0))
    with pytest.raises(ConfigError, match=r"'nft' has none.*set algorithm\.kl_weight above 0"):
        learner.adjust(1.0, 2.0)
    learner.adjust(0.5, 1.0)
