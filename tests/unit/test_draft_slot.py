"""The draft slot: its sampler and precision, the weights it sees, and that it touches nobody else's bits."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.parallel import RankGroup
from raylign.config import parse_config
from raylign.errors import ConfigError, NumericsError
from raylign.models.tiny_text import TinyTextConfig
from raylign.precision import RolloutPrecision
from raylign.precision.linear import QuantizedLinear
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs, Prompt, RolloutStatus, SampleKey
from raylign.weights import WeightSnapshot
from rollout.drawn import Slot
from rollout.engine import ChunkRequest, LowPrecision, RolloutEngine, SamplerSetup
from rollout.images import denoise
from rollout.prompts import GroupTask
from services.assembly import build_engine, build_learner
from services.config import RunConfig
from services.parity import FORMAT_GAPS, parity_gap
from services.pull_metrics import pull_metrics
from tests.tiny_models import sd3_config
from tests.tiny_text_models import text_config

TASK = GroupTask(Prompt("p", "one cat"), 0, 0, learner_step=1)
FOUR = (0, 1, 2, 3)


def _config(explore: dict[str, Any] | None = None, **rollout: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": sd3_config(),
        "placement": "in_process",
        "group_size": 2,
        "sampler": {"type": "euler_ode", "num_steps": 4},
        "rollout": {**({} if explore is None else {"explore": {"pool_size": 4, "num_steps": 2, **explore}}), **rollout},
    }
    return parse_config(RunConfig, values, "the test")


def _engine(config: RunConfig) -> RolloutEngine[Any]:
    """With the weights of a learner that has learnt something: its adapter's B is not zero."""
    engine, snapshot = build_engine(config), _learnt(3)
    engine.pull(snapshot, "rollout")
    engine.pull(_learnt(9), "eval")
    return engine


@functools.cache
def _learnt(version: int) -> WeightSnapshot:
    """Weights of a version, each of its own random values."""
    policy = build_learner(_config(), RankGroup.single()).policy
    tensors = {
        name: 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version + index))
        for index, (name, parameter) in enumerate(policy.trainable_parameters().items())
    }
    return policy.export_weights(version, tensors)


def _final(engine: RolloutEngine[Any], slot: Slot, indices: tuple[int, ...] = FOUR) -> torch.Tensor:
    (group,) = engine.generate(ChunkRequest((TASK,), indices, slot))
    return group.latents.final_GCHW


def test_without_a_format_drafts_are_rollouts_of_fewer_steps_and_record_the_end_alone() -> None:
    engine = _engine(_config({}))
    assert engine.precision_report == {}
    (draft,) = engine.generate(ChunkRequest((TASK,), FOUR, "draft"))
    assert len(draft.latents.sigmas_S1) == 3
    assert draft.latents.states_GS1CHW is None
    assert draft.min_version == 3
    shorter = EulerOdeConfig(num_steps=2)
    two_steps = _engine(_config().model_copy(update={"sampler": shorter}))
    assert torch.equal(draft.latents.final_GCHW, _final(two_steps, "rollout"))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4", "mxfp4"])
def test_a_format_changes_drafts_and_no_other_bit(precision: RolloutPrecision) -> None:
    plain, low = _engine(_config({})), _engine(_config({"precision": precision}))
    for slot in ("rollout", "eval"):
        assert torch.equal(_final(plain, slot), _final(low, slot)), f"{slot} is drawn with the network itself"
    exact, rough = _final(plain, "draft"), _final(low, "draft")
    gap = (rough - exact).norm() / exact.norm()
    assert 0 < gap < 0.05
    assert torch.equal(_final(plain, "rollout"), _final(low, "rollout")), "drafts leave no trace"
    assert list(low.precision_report) == ["draft"]
    assert low.precision_report["draft"].startswith(f"{precision}, emulated")


def test_drafts_follow_the_rollout_weights_whatever_was_drawn_in_between() -> None:
    config = _config({"precision": "nvfp4"})
    engine = _engine(config)
    draft = _final(engine, "draft")
    _final(engine, "eval")
    assert torch.equal(_final(engine, "draft"), draft), "evaluation weights came and went"
    report = engine.pull(_learnt(9), "eval")
    assert report.packed_bytes == 0, "evaluation weights are not quantised"
    assert torch.equal(_final(engine, "draft"), draft)
    report = engine.pull(_learnt(4), "rollout")
    (group,) = engine.generate(ChunkRequest((TASK,), FOUR, "draft"))
    assert group.min_version == report.version == 4
    assert not torch.equal(group.latents.final_GCHW, draft)


def test_a_pull_says_what_it_took() -> None:
    config = _config({"precision": "nvfp4"})
    snapshot, engine = _learnt(3), build_engine(config)
    report = engine.pull(snapshot)
    shadow = engine._low["draft"].shadow
    assert (report.version, report.num_bytes, report.packed_bytes) == (3, snapshot.num_bytes, shadow.packed_bytes)
    num_values = sum(
        layer.in_features * layer.out_features
        for layer in shadow.network.modules()
        if isinstance(layer, QuantizedLinear)
    )
    assert 0.5625 * num_values <= report.packed_bytes <= 0.57 * num_values
    assert min(report.load_s, report.requantise_s) > 0
    metrics = pull_metrics([report, engine.pull(snapshot)])
    assert metrics.keys() == {"pull/load_s", "pull/bytes", "pull/requantise_s", "pull/packed_bytes"}
    assert metrics["pull/load_s"] >= report.load_s
    plain = build_engine(_config({})).pull(snapshot)
    assert pull_metrics([plain]) == {"pull/load_s": plain.load_s, "pull/bytes": float(snapshot.num_bytes)}
    assert pull_metrics([]) == {}


def test_the_same_key_starts_from_the_same_noise_in_every_precision_and_batch() -> None:
    starts: list[torch.Tensor] = []
    keys = [SampleKey(0, "p", 0, index) for index in FOUR]
    for precision in ("bf16", "fp8", "nvfp4", "mxfp4"):
        engine = build_engine(_config({"precision": precision}, precision="bf16"))
        policy = engine._low["draft"].policy if precision != "bf16" else engine.policy
        setup, told = engine._setups["draft"], engine.policy.encode("one cat", False)
        assert isinstance(setup, SamplerSetup)
        setup = replace(setup, needs=Needs.STEPS)
        with torch.no_grad():
            for some in (keys, keys[2:3]):
                states = denoise(policy, setup, told.repeat(len(some)), some).states_GS1CHW
                assert states is not None
                starts.append(states[-1 if some is not keys else 2, 0])
    assert len(starts) == 8
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_one_draft_that_is_not_finite_fails_alone() -> None:
    config = _config({"precision": "nvfp4"})
    engine = _engine(config)
    whole = _final(engine, "draft")
    low = engine._low["draft"]

    class Spoiled:
        """The low-precision policy, which answers its second sample with NaN."""

        def __getattr__(self, name: str) -> Any:
            return getattr(low.policy, name)

        def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Any) -> torch.Tensor:
            state_BCHW = state_BCHW.clone()
            state_BCHW[1] = math.nan
            return low.policy.predict(state_BCHW, sigma_B, conditioning)

    spoiled: Any = RolloutEngine(
        engine.policy, engine._setups, config.seed, {"draft": LowPrecision(Spoiled(), low.shadow)}
    )
    spoiled.pull(_learnt(3))
    (group,) = spoiled.generate(ChunkRequest((TASK,), FOUR, "draft"))
    assert [one.status is RolloutStatus.OK for one in group.rollouts] == [True, False, True, True]
    others = [0, 2, 3]
    assert torch.equal(group.latents.final_GCHW[others], whole[others]), "a maximum over the batch would carry NaN"


def test_a_draft_does_not_depend_on_its_neighbours_scales() -> None:
    engine = _engine(_config({"precision": "nvfp4"}))
    alone = _final(engine, "draft", (2,))
    together = _final(engine, "draft")
    assert torch.allclose(alone[0], together[2], atol=1e-5)


def test_evaluations_are_never_in_low_precision() -> None:
    engine = _engine(_config({"precision": "nvfp4"}))
    with pytest.raises(ConfigError, match="training precision"):
        RolloutEngine(engine.policy, engine._setups, 0, {"eval": engine._low["draft"]})


def test_low_precision_rollouts_pass_the_parity_gate_and_a_wrong_weight_does_not() -> None:
    config = _config(precision="nvfp4")
    assert config.parity_tolerance == FORMAT_GAPS["nvfp4"]
    engine, learner = build_engine(config), build_learner(config, RankGroup.single())
    engine.pull(learner.publish(0))
    probe = engine.probe("one cat")
    answer = learner.predict(probe.state, probe.sigma_B, probe.conditioning)
    assert 1e-3 < parity_gap(probe, answer, config.parity_tolerance) < 0.05
    engine.pull(_learnt(3))
    with pytest.raises(NumericsError, match=r"version 3: .*tolerance 0\.25"):
        parity_gap(engine.probe("one cat"), answer, config.parity_tolerance)
    assert list(engine.precision_report) == ["rollout"]
    drafts = _engine(_config({"precision": "nvfp4"}))
    near, exact = drafts.probe("one cat", "draft"), drafts.probe("one cat")
    assert torch.equal(near.state, exact.state)
    assert not torch.equal(near.answer, exact.answer)


def test_pruned_drafts_are_the_ones_that_would_have_been_drawn() -> None:
    explore = {"num_steps": 3, "pool_size": 4, "prune": {"at_step": 1, "keep": 0.5}}
    engine = _engine(_config(explore))
    (group,) = engine.generate(ChunkRequest((TASK,), FOUR, "draft"))
    kept = [one.key.sample_index for one in group.rollouts]
    assert len(kept) == 2
    assert group.images_GHWC is not None
    assert len(group.images_GHWC) == len(group.latents.final_GCHW) == 2
    whole = _final(_engine(_config({"num_steps": 3})), "draft")
    assert torch.allclose(group.latents.final_GCHW, whole[kept], atol=1e-5)
    # Each prompt of a batch is pruned by itself, and keeps as many.
    other = GroupTask(Prompt("q", "two dogs"), 0, 1, learner_step=1)
    both = engine.generate(ChunkRequest((TASK, other), FOUR, "draft"))
    assert [one.key.sample_index for one in both[0].rollouts] == kept
    assert [one.key.prompt_id for one in both[1].rollouts] == ["q", "q"]


def test_texts_have_drafts_in_low_precision_too() -> None:
    values: dict[str, Any] = {
        "model": text_config(TinyTextConfig, "full"),
        "placement": "in_process",
        "group_size": 2,
        "algorithm": {"type": "d1"},
        "sampler": {"type": "entropy_bounded", "gamma": 0.1},
        "rewards": [{"type": "exact_answer"}],
        "rollout": {"explore": {"pool_size": 4, "gamma": 5.0, "precision": "nvfp4"}},
    }
    engine = build_engine(parse_config(RunConfig, values, "the test"))
    engine.pull(engine.policy.export_weights(2))
    task = GroupTask(Prompt("p", "abc"), 0, 0)
    (rollout,), (draft,) = (engine.generate(ChunkRequest((task,), FOUR, slot)) for slot in ("rollout", "draft"))
    assert draft.tokens.nfe_G.sum() < rollout.tokens.nfe_G.sum(), "a greater budget takes fewer calls"
    exact, rough = engine.probe("abc").answer, engine.probe("abc", "draft").answer
    assert 0 < (rough - exact).norm() < 0.3 * exact.norm()
