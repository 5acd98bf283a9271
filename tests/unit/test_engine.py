"""The engine: keyed samples whatever the batch around them, chunks from the configuration, failures as values."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from raylign.errors import ConfigError, WeightError
from raylign.samplers import FlowSchedule, make_sampler, make_token_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.types import Needs, Prompt, RolloutStatus, SampleKey
from rollout.engine import (
    ChunkRequest,
    EvalPoint,
    RolloutEngine,
    SamplerSetup,
    Slot,
    TokenSetup,
    chunk_requests,
    join_parts,
)
from rollout.images import denoise, sampler_at
from rollout.prompts import GroupTask
from tests.fakes import TwoNumberPolicy
from tests.toy_text import ToyTextPolicy

ONE, TWO = GroupTask(Prompt("1", "one"), 0, 0), GroupTask(Prompt("2", "number two"), 0, 1)


def _engine(run_seed: int = 0, guidance_scale: float = 1.0) -> RolloutEngine:
    policy = TwoNumberPolicy()
    setups: dict[Slot, SamplerSetup] = {
        "rollout": SamplerSetup(
            make_sampler(FlowSdeConfig(num_steps=4), FlowSchedule(1.0)), guidance_scale, Needs.STEPS | Needs.LOGPROBS
        ),
        "eval": SamplerSetup(make_sampler(EulerOdeConfig(num_steps=3), FlowSchedule(1.0)), 1.0, Needs.FINAL),
    }
    engine = RolloutEngine(policy, setups, run_seed)
    engine.pull(policy.export_weights(7), "rollout")
    engine.pull(policy.export_weights(7), "eval")
    return engine


def test_a_sample_is_the_same_alone_and_among_others() -> None:
    together = _engine().generate(ChunkRequest((ONE, TWO), (0, 1, 2)))[1]
    alone = _engine().generate(ChunkRequest((TWO,), (1,)))[0]
    assert torch.equal(together.latents.final_GCHW[1], alone.latents.final_GCHW[0])
    assert together.rollouts[1].key == alone.rollouts[0].key
    other_seed = _engine(run_seed=1).generate(ChunkRequest((TWO,), (1,)))[0]
    assert not torch.equal(alone.latents.final_GCHW, other_seed.latents.final_GCHW)


def test_what_the_algorithm_needs_is_recorded_and_scores_as_it_was_sampled() -> None:
    engine = _engine()
    (group,) = engine.generate(ChunkRequest((ONE,), (0, 1)))
    states, logprobs = group.latents.states_GS1CHW, group.latents.rollout_logprob_GS
    assert states is not None
    assert logprobs is not None
    assert states.shape == (2, 5, 1, 2, 3)
    assert torch.equal(states[:, -1], group.latents.final_GCHW)
    sampler = make_sampler(FlowSdeConfig(num_steps=4), FlowSchedule(1.0))
    conditioning = group.conditioning.repeat(2)
    for step in range(4):
        velocity = engine.policy.predict(states[:, step], sampler.sigmas_S1[step].expand(2), conditioning)
        again = sampler.transition(velocity, states[:, step], step).logprob(states[:, step + 1])
        assert torch.equal(again, logprobs[:, step])


def test_evaluation_has_its_own_sampler_and_records_only_the_end() -> None:
    (group,) = _engine().generate(ChunkRequest((ONE,), (0,), "eval"))
    assert group.latents.states_GS1CHW is None
    assert group.latents.rollout_logprob_GS is None
    assert len(group.latents.sigmas_S1) == 4


def test_a_state_that_is_not_finite_fails_its_sample_only() -> None:
    engine = _engine()

    class Spoiled(TwoNumberPolicy):
        def predict(self, state_BCHW, sigma_B, conditioning):  # type: ignore[no-untyped-def]
            velocity = super().predict(state_BCHW, sigma_B, conditioning).clone()
            velocity[1] = torch.nan
            return velocity

    spoiled = Spoiled()
    engine = RolloutEngine(spoiled, engine._setups, 0)
    engine.pull(spoiled.export_weights(0))
    (group,) = engine.generate(ChunkRequest((ONE,), (0, 1, 2)))
    assert [r.status for r in group.rollouts] == [
        RolloutStatus.OK,
        RolloutStatus.GENERATION_FAILED,
        RolloutStatus.OK,
    ]
    assert torch.isfinite(group.latents.final_GCHW[[0, 2]]).all()


def test_prompts_are_encoded_once() -> None:
    engine = _engine()
    for _ in range(3):
        engine.generate(ChunkRequest((ONE, TWO), (0,)))
    assert engine.policy.num_encoded == 2  # type: ignore[attr-defined]


def test_a_chunk_tells_what_it_took_and_a_pull_too() -> None:
    before_s = time.time()
    engine = _engine()
    one, two = engine.generate(ChunkRequest((ONE, TWO), (0, 1)))
    after_s = time.time()
    assert one.work == two.work
    pull = engine.pull(engine.policy.export_weights(8)).work
    assert pull is not None
    assert [work.phase for work in (*one.work, pull)] == ["sample", "decode", "pull"]
    assert {work.who for work in (*one.work, pull)} == {f"{socket.gethostname()}:{os.getpid()}"}
    sample, decode = one.work
    assert before_s <= sample.start_s <= decode.start_s <= pull.start_s
    assert sample.start_s + sample.seconds == pytest.approx(decode.start_s, abs=1e-6)
    assert decode.start_s + decode.seconds <= after_s + 1e-6
    # Both groups' shares of the batch are the batch.
    assert one.seconds["sample"] + two.seconds["sample"] == pytest.approx(sample.seconds)
    (again,) = engine.generate(ChunkRequest((ONE,), (2, 3)))
    assert again.work[0].start_s >= pull.start_s + pull.seconds - 1e-6
    assert join_parts([one, again, one]).work == (*one.work, *again.work)
    assert one.without_outputs().work == (), "the learner is told none of it"


def test_versions_are_recorded_and_weights_swap_between_batches() -> None:
    engine = _engine()
    before = engine.generate(ChunkRequest((ONE,), (0,)))[0]
    with torch.no_grad():
        engine.policy.trainable_parameters()["scale"].fill_(0.9)
    engine.pull(engine.policy.export_weights(8))
    after = engine.generate(ChunkRequest((ONE,), (0,)))[0]
    assert (before.min_version, after.min_version) == (7, 8)
    assert not torch.equal(before.latents.final_GCHW, after.latents.final_GCHW)
    # The evaluation slot still holds version 7 and gives way to the rollout slot again.
    assert engine.generate(ChunkRequest((ONE,), (0,), "eval"))[0].min_version == 7
    again = engine.generate(ChunkRequest((ONE,), (0,)))[0]
    assert torch.equal(again.latents.final_GCHW, after.latents.final_GCHW)


def test_a_torn_snapshot_is_refused_and_the_old_weights_stay() -> None:
    engine = _engine()
    before = engine.generate(ChunkRequest((ONE,), (0,)))[0]
    good = engine.policy.export_weights(8)
    array = good.arrays["float32"].copy()
    array[0] += 1
    with pytest.raises(WeightError, match="scale is torn"):
        engine.pull(replace(good, arrays={"float32": array}))
    after = engine.generate(ChunkRequest((ONE,), (0,)))[0]
    assert after.min_version == 7
    assert torch.equal(before.latents.final_GCHW, after.latents.final_GCHW)


def test_generating_before_any_pull_is_an_error() -> None:
    engine = RolloutEngine(TwoNumberPolicy(), _engine()._setups, 0)
    with pytest.raises(WeightError, match="pull a snapshot"):
        engine.generate(ChunkRequest((ONE,), (0,)))


def test_guidance_extrapolates_from_the_unconditional_velocity() -> None:
    plain = _engine().generate(ChunkRequest((TWO,), (0,)))[0]
    guided = _engine(guidance_scale=3.0).generate(ChunkRequest((TWO,), (0,)))[0]
    assert guided.conditioning.negative is not None
    # The fake's velocity is linear in the prompt, so guidance 3 is a prompt three times as long.
    engine = _engine()
    triple = GroupTask(Prompt("2", TWO.prompt.text * 3), 0, 1)
    expected = engine.generate(ChunkRequest((triple,), (0,)))[0]
    assert torch.allclose(guided.latents.final_GCHW, expected.latents.final_GCHW, atol=1e-5)
    assert not torch.allclose(guided.latents.final_GCHW, plain.latents.final_GCHW, atol=1e-2)


@pytest.mark.parametrize(
    ("group_size", "chunk_size", "expected"),
    [
        (2, 2, [(2, 1), (2, 1), (2, 1)]),
        (2, 4, [(2, 2), (2, 1)]),
        (4, 2, [(2, 1)] * 6),
    ],
)
def test_chunks_come_from_sizes_alone(group_size: int, chunk_size: int, expected: list[tuple[int, int]]) -> None:
    tasks = [GroupTask(Prompt(str(n), "p"), 0, n) for n in range(3)]
    requests = chunk_requests(tasks, group_size, chunk_size)
    assert [(len(r.sample_indices), len(r.tasks)) for r in requests] == expected


@pytest.mark.parametrize(("group_size", "chunk_size"), [(4, 6), (4, 3)])
def test_sizes_that_do_not_fit_are_refused(group_size: int, chunk_size: int) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        chunk_requests([ONE], group_size, chunk_size)


def test_parts_join_into_the_group_they_were_cut_from() -> None:
    engine = _engine()
    (whole,) = engine.generate(ChunkRequest((ONE,), (0, 1, 2, 3)))
    parts = [engine.generate(request)[0] for request in chunk_requests([ONE], 4, 2)]
    joined = join_parts(parts)
    assert [r.key for r in joined.rollouts] == [r.key for r in whole.rollouts]
    assert torch.equal(joined.latents.final_GCHW, whole.latents.final_GCHW)
    assert joined.images_GHWC is not None
    assert whole.images_GHWC is not None
    assert np.array_equal(joined.images_GHWC, whole.images_GHWC)


def _final(engine: RolloutEngine[TwoNumberPolicy], point: EvalPoint, slot: Slot = "eval") -> torch.Tensor:
    return engine.generate(ChunkRequest((TWO,), (0, 1), slot, point))[0].latents.final_GCHW


def test_an_evaluation_can_be_drawn_at_any_stochasticity_with_the_same_first_noise() -> None:
    engine = _engine()
    ode = _final(engine, EvalPoint())
    # Two sums in another order are equal up to rounding.
    torch.testing.assert_close(_final(engine, EvalPoint(eta=0.0)), ode, rtol=0, atol=1e-6)
    noisy, noisier = _final(engine, EvalPoint(eta=0.1)), _final(engine, EvalPoint(eta=1.5))
    assert not torch.allclose(noisy, ode, atol=1e-2)
    assert not torch.equal(noisier, noisy)
    assert torch.equal(_final(engine, EvalPoint(eta=0.1)), noisy)
    assert torch.equal(_final(engine, EvalPoint()), ode), "the slot's own sampler is left as it was"


def test_steps_alone_are_those_of_the_slots_own_sampler() -> None:
    engine = _engine()
    (group,) = engine.generate(ChunkRequest((ONE,), (0,), "eval", EvalPoint(num_steps=7)))
    sampler = make_sampler(EulerOdeConfig(num_steps=7), FlowSchedule(1.0))
    assert torch.equal(group.latents.sigmas_S1, sampler.sigmas_S1)
    assert group.latents.stochastic_S is not None
    assert not group.latents.stochastic_S.any()
    (group,) = engine.generate(ChunkRequest((ONE,), (0,), "eval", EvalPoint(eta=1.0, num_steps=5)))
    assert group.latents.stochastic_S is not None
    assert group.latents.stochastic_S.tolist() == [True] * 4 + [False]


def test_states_of_bf16_latents_take_half_the_bytes_and_are_what_was_scored() -> None:
    needs = Needs.STEPS | Needs.LOGPROBS
    sampler = make_sampler(FlowSdeConfig(num_steps=4), FlowSchedule(1.0))
    policy, keys = TwoNumberPolicy(), [SampleKey(0, "p", 0, index) for index in range(3)]
    told = policy.encode("ab", False).repeat(3)
    exact, rounded = (
        denoise(policy, SamplerSetup(sampler, 1.0, needs, latents), told, keys) for latents in ("fp32", "bf16")
    )
    states, halved = exact.states_GS1CHW, rounded.states_GS1CHW
    assert states is not None
    assert halved is not None
    assert halved.dtype == torch.bfloat16
    assert halved.nbytes * 2 == states.nbytes
    assert torch.equal(halved[:, 0], states[:, 0].bfloat16())
    assert torch.equal(rounded.final_GCHW, halved[:, -1].float())
    state, after = halved[:, 1].float(), halved[:, 2].float()
    with torch.no_grad():
        velocity = policy.predict(state, sampler.sigmas_S1[1].expand(3), told)
    logprob = sampler.transition(velocity, state, 1).logprob(after)
    assert rounded.rollout_logprob_GS is not None
    assert torch.equal(logprob, rounded.rollout_logprob_GS[:, 1])


def test_stochasticity_changes_neither_guidance_nor_noise_levels() -> None:
    given = EulerOdeConfig(num_steps=6, guidance_scale=3.0, shift=2.0, halve_last_level=True)
    config = sampler_at(given, EvalPoint(eta=0.7))
    assert isinstance(config, GddimConfig)
    assert (config.eta, config.num_steps, config.guidance_scale, config.shift) == (0.7, 6, 3.0, 2.0)
    levels = [make_sampler(one, FlowSchedule(1.0)).sigmas_S1 for one in (given, config)]
    assert torch.equal(*levels)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (EvalPoint(eta=-0.5), "stochasticity cannot be negative"),
        (EvalPoint(eta=1.0, num_steps=1), "num_steps: Input should be greater than or equal to 2"),
        (EvalPoint(num_steps=0), "num_steps: Input should be greater than or equal to 1"),
        (EvalPoint(gamma=0.1), "gamma 0.1. was asked of an image sampler"),
    ],
)
def test_a_point_that_pictures_cannot_be_drawn_at_is_refused(point: EvalPoint, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _final(_engine(), point)


def test_texts_have_no_stochasticity() -> None:
    policy = ToyTextPolicy()
    setup = TokenSetup(make_token_sampler(LowConfidenceConfig(num_steps=4), policy.canvas_length), Needs.FINAL)
    engine = RolloutEngine(policy, {"rollout": setup}, 0)
    engine.pull(policy.export_weights(0))
    task = GroupTask(Prompt("abc", "abc"), 0, 0)
    for point in (EvalPoint(eta=1.0), EvalPoint(num_steps=4)):
        with pytest.raises(ConfigError, match="are for pictures"):
            engine.generate(ChunkRequest((task,), (0,), point=point))
