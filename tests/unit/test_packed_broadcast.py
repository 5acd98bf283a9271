"""Weights that the learner packs once: the same samples and codes as when actors quantise, for fewer bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from learner.learner import Learner
from learner.parallel import RankGroup
from raylign.config import parse_config
from raylign.errors import ConfigError, NumericsError, WeightError
from raylign.models.tiny_text import TinyTextConfig
from raylign.precision import Format, RolloutPrecision
from raylign.precision.broadcast import make_packed_snapshot, make_packing
from raylign.types import Prompt, RewardBreakdown
from raylign.weights import WeightSnapshot
from rollout.engine import ChunkRequest, RolloutEngine
from rollout.prompts import GroupTask
from services.assembly import build_engine, build_learner
from services.config import RunConfig
from services.pull_metrics import pull_metrics
from tests.tiny_models import sd3_config
from tests.tiny_text_models import text_config

TASK = GroupTask(Prompt("p", "one cat"), 0, 0, learner_step=1)
PACKED = ("nvfp4", "mxfp4", "fp8")


def _config(precision: RolloutPrecision = "nvfp4", publish: str = "packed", **rollout: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {**sd3_config().model_dump(), "tuning": "full"},
        "placement": "in_process",
        "group_size": 2,
        "groups_per_step": 1,
        "sampler": {"type": "euler_ode", "num_steps": 2},
        "learner": {"publish": publish, "ema_decay": 0.5, "lr": 1e-2},
        "rollout": {"precision": precision, **rollout},
    }
    return parse_config(RunConfig, values, "the test")


def _text_config(publish: str) -> RunConfig:
    values: dict[str, Any] = {
        "model": text_config(TinyTextConfig, "full"),
        "placement": "in_process",
        "group_size": 2,
        "algorithm": {"type": "d1"},
        "sampler": {"type": "entropy_bounded", "gamma": 0.1},
        "rewards": [{"type": "exact_answer"}],
        "learner": {"publish": publish},
        "rollout": {"precision": "nvfp4"},
    }
    return parse_config(RunConfig, values, "the test")


@functools.cache
def _learner(precision: Format = "nvfp4") -> Learner:
    """One that took a step, so that its policies differ from what actors load."""
    config = _config(precision)
    learner, engine = build_learner(config, RankGroup.single()), build_engine(config)
    engine.pull(learner.publish(0))
    _train(learner, engine, 1)
    return learner


def _train(learner: Learner, engine: RolloutEngine[Any], step: int) -> None:
    (group,) = engine.generate(ChunkRequest((TASK,), (0, 1)))
    rewarded = group.with_rewards([RewardBreakdown(float(sibling), ()) for sibling in range(2)])
    learner.begin_step([rewarded], step)
    learner.forward_backward(0)
    assert learner.optimise(0).finite
    learner.end_step(step)


def _final(engine: RolloutEngine[Any], slot: Any = "rollout") -> torch.Tensor:
    (group,) = engine.generate(ChunkRequest((TASK,), (0, 1), slot))
    return group.latents.final_GCHW


def _codes(engine: RolloutEngine[Any]) -> dict[str, torch.Tensor]:
    layers = engine._low["rollout"].shadow.layers
    return {
        f"{name}.{part}": tensor.reshape(-1).view(torch.uint8).clone()
        for name, layer in layers.items()
        for part, tensor in layer.packed.tensors.items()
    }


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", PACKED)
def test_samples_and_codes_are_those_of_actors_that_quantise_themselves(precision: Format) -> None:
    config = _config(precision)
    learner, engines = _learner(precision), {name: build_engine(config) for name in ("whole", "packed")}
    start = _codes(engines["packed"])
    packed = learner.publish(1)
    assert (packed.kind, packed.version) == ("packed", 1)
    for array in packed.arrays.values():
        array.setflags(write=False)  # as an object store maps it
    whole = learner.policy.export_weights(1, learner.policies.relatives["old"])
    reports = {"whole": engines["whole"].pull(whole), "packed": engines["packed"].pull(packed)}
    assert _same(_codes(engines["whole"]), _codes(engines["packed"]))
    assert not _same(_codes(engines["packed"]), start), "the step moved the weights"
    assert torch.equal(_final(engines["whole"]), _final(engines["packed"]))
    assert reports["packed"].packed_bytes == reports["whole"].packed_bytes > 0
    assert pull_metrics([reports["packed"]])["pull/bytes"] == packed.num_bytes < whole.num_bytes


def test_texts_are_the_same_too() -> None:
    config = _text_config("packed")
    engine, other = build_engine(config), build_engine(_text_config("whole"))
    learner = build_learner(config, RankGroup.single())
    engine.pull(learner.publish(1))
    other.pull(learner.policy.export_weights(1))
    ours, theirs = engine.probe("abc"), other.probe("abc")
    assert torch.equal(ours.answer, theirs.answer)


@pytest.mark.parametrize(("precision", "per_value"), [("nvfp4", 9 / 16), ("mxfp4", 17 / 32), ("fp8", 1.0)])
def test_what_travels_is_the_codes_and_their_scales(precision: Format, per_value: float) -> None:
    """A network of 1024 x 256 and 256 x 1024, all packed: 524 288 values, and 1 280 numbers of biases in fp32."""
    network = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256))
    packing = make_packing(network, ("0", "1"), precision, "1x16", torch.bfloat16)
    snapshot = make_packed_snapshot(packing, dict(network.named_parameters()), 0)
    num_values, biases = 2 * 1024 * 256, 4 * (1024 + 256)
    # NVFP4 has an fp32 scale for each of the two matrices, FP8 one for each of the 1 280 rows.
    scales = {"nvfp4": 2 * 4, "mxfp4": 0, "fp8": 4 * 1280}[precision]
    assert snapshot.num_bytes == per_value * num_values + scales + biases
    share_fp32 = snapshot.num_bytes / (4 * num_values + biases)
    assert share_fp32 == pytest.approx({"nvfp4": 0.1428, "mxfp4": 0.1349, "fp8": 0.2543}[precision], abs=1e-4)
    share_bf16 = snapshot.num_bytes / (2 * num_values + biases / 2)
    assert share_bf16 == pytest.approx(2 * share_fp32)


def test_torn_foreign_and_misdirected_snapshots_change_nothing() -> None:
    config = _config()
    learner, engine = _learner(), build_engine(config)
    engine.pull(learner.publish(1))
    before, codes = _final(engine), _codes(engine)
    newer = build_learner(config, RankGroup.single()).publish(2)
    for dtype in newer.arrays:
        torn = newer.arrays[dtype].copy()
        torn.view("uint8")[-1] ^= 1
        (name,) = [entry.name for entry in newer.entries if entry.dtype == dtype and _is_last(newer, entry)]
        with pytest.raises(WeightError, match=rf"{name} is torn"):
            engine.pull(replace(newer, arrays={**newer.arrays, dtype: torn}))
    other = _learner("fp8").publish(2)
    with pytest.raises(WeightError, match=r"snapshot 2 has weights packed in fp8, and this actor computes in nvfp4"):
        engine.pull(other)
    wider = build_learner(_config(quantizer={"keep_high": ["*embed*", "*norm*"]}), RankGroup.single()).publish(2)
    with pytest.raises(WeightError, match=r"snapshot 2 (has|lacks) "):
        engine.pull(wider)
    with pytest.raises(WeightError, match=r"snapshot 2 is packed.* slot 'eval' .*publish them whole"):
        engine.pull(newer, "eval")
    plain = build_engine(_config("bf16", "whole"))
    with pytest.raises(WeightError, match=r"slot 'rollout' of this actor computes with whole weights"):
        plain.pull(newer)
    assert _same(_codes(engine), codes)
    assert torch.equal(_final(engine), before)


def _is_last(snapshot: WeightSnapshot, entry: Any) -> bool:
    return entry.offset + entry.size == snapshot.arrays[entry.dtype].size


def test_evaluations_come_and_go_and_rollouts_stay_what_they_were() -> None:
    config = _config()
    learner = build_learner(config, RankGroup.single())
    engine = build_engine(config)
    engine.pull(learner.publish(0))
    _train(learner, engine, 1)
    packed, evaluated = learner.publish(1), learner.publish(1, "eval")
    assert (packed.kind, evaluated.kind) == ("packed", "full")
    engine.pull(packed)
    drawn, codes = _final(engine), _codes(engine)
    engine.pull(evaluated, "eval")
    exact = _final(engine, "eval")
    assert _same(_codes(engine), codes)
    assert torch.equal(_final(engine), drawn)
    # An actor that never pulled a rollout snapshot evaluates the same, so no packed weight is left stale.
    fresh = build_engine(config)
    fresh.pull(evaluated, "eval")
    assert torch.equal(_final(fresh, "eval"), exact)
    assert torch.equal(_final(engine, "eval"), exact)
    # Nor does an evaluation see what the next rollout version brings.
    _train(learner, engine, 2)
    engine.pull(learner.publish(2))
    assert not torch.equal(_final(engine), drawn)
    assert torch.equal(_final(engine, "eval"), exact)


def test_a_resumed_learner_publishes_the_same_bits_to_an_actor_that_is_new() -> None:
    config = _config()
    learner = _learner()
    resumed = build_learner(config, RankGroup.single())
    resumed.load_state_dict(learner.state_dict())
    assert resumed.publish(1).sha256 == learner.publish(1).sha256
    assert resumed.weights_sha256() == learner.weights_sha256(), "of the weights, not of their codes"
    old, new = build_engine(config), build_engine(config)
    old.pull(learner.publish(0))
    old.pull(learner.publish(1))
    new.pull(resumed.publish(1))
    assert torch.equal(_final(old), _final(new))


def test_a_weight_that_is_not_finite_is_named_before_it_is_sent() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    packing = make_packing(network, ("1",), "nvfp4", "1x16", torch.bfloat16)
    torch.nn.init.constant_(network.get_parameter("1.weight")[:1, :1], math.inf)
    with pytest.raises(NumericsError, match=r"layer 1: 1 of 256 values"):
        make_packed_snapshot(packing, dict(network.named_parameters()), 0)


def test_a_weight_that_two_modules_read_is_not_packed() -> None:
    network = nn.ModuleDict({"embed": nn.Embedding(32, 16), "head": nn.Linear(16, 32, bias=False)})
    assert make_packing(network, ("head",), "nvfp4", "1x16", torch.bfloat16).layers == ("head",)
    network["head"].weight = network["embed"].weight
    with pytest.raises(ConfigError, match=r"layer head shares its weight .* rollout.quantizer.keep_high"):
        make_packing(network, ("head",), "nvfp4", "1x16", torch.bfloat16)
