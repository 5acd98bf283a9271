"""Learner ranks as real processes: one rank's numbers on two and three, whole or sharded; checkpoints between them.

Nothing here is approximate but the order of sums. AdamW divides by the root of its moments, so a gradient that is 0 but
for rounding would move a weight by `lr`; the learners here have an `eps` above that rounding.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from learner.algorithms import AlgorithmConfig
from learner.algorithms.crd import CrdConfig
from learner.algorithms.diffpo import DiffpoConfig
from learner.algorithms.nft import NftConfig
from learner.checkpoint import Part, finish_checkpoint, load_checkpoint, save_checkpoint, save_part
from learner.learner import Learner, LearnerConfig
from learner.parallel import RankGroup
from raylign.models import load_policy
from raylign.models.tiny_text import TinyTextConfig
from raylign.types import RolloutGroup
from tests.rank_processes import answers_of, outputs_of, start_ranks
from tests.text_groups import draw_text_groups, sampler_for
from tests.tiny_models import RUN_SEED, by_sibling, draw_groups, euler, sd3_config, train_step
from tests.tiny_text_models import LETTERS, text_config

Sharding = Literal["none", "fsdp"]
WORDS = tuple(LETTERS[at : at + 3] for at in range(5))


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A learner of a real tiny network and its steps. reward: None for a sample that failed."""

    config: LearnerConfig
    algorithm: AlgorithmConfig
    model: Callable[[], Any]
    micro_batch_size: int = 2
    num_steps: int = 3
    reward: Callable[[int, int], float | None] = by_sibling


def _picture(tuning: Literal["lora", "full"] = "lora") -> Callable[[], Any]:
    return lambda: sd3_config(tuning)


def _text() -> Any:
    return text_config(TinyTextConfig, budget_head=True)


def _few(group: int, sibling: int) -> float | None:
    """Two samples of twelve have a reward: with three ranks one has none, and no rank has two."""
    return {(0, 1): 0.2, (0, 3): 0.9}.get((group, sibling))


_TRAIN: dict[str, Any] = {"lr": 2e-3, "eps": 1e-4}
CASES: dict[str, Case] = {
    # Old, sampling, reference and average policies, and a first pass over all items.
    "crd": Case(
        LearnerConfig(**_TRAIN, ema_decay=0.9, warmup_steps=2),
        CrdConfig(num_train_times=2, kl_weight=0.1, sampling_decay="0-0.5-0-0.5"),  # type: ignore[arg-type]
        _picture(),
    ),
    "nft, every weight": Case(
        LearnerConfig(**_TRAIN, gradient_checkpointing=True), NftConfig(num_train_times=1), _picture("full")
    ),
    # A second pass over the samples asks the old policy too; the budget head is no part of the network.
    "diffpo": Case(LearnerConfig(**_TRAIN, epochs_per_step=2), DiffpoConfig(kl_weight=0.05), _text),
    # Half-precision weights and an fp32 adapter are gathered together. One step: what is 1e-7 to an adapter may be a
    # whole bit of an activation in the next.
    "nft, bf16": Case(LearnerConfig(**_TRAIN, precision="bf16"), NftConfig(num_train_times=1), _picture(), num_steps=1),
    "crd, few samples": Case(
        LearnerConfig(**_TRAIN), CrdConfig(num_train_times=2, center_scope="batch"), _picture(), 1, reward=_few
    ),
    "diffpo, few samples": Case(LearnerConfig(**_TRAIN), DiffpoConfig(kl_weight=0.05), _text, 1, reward=_few),
}


def make_learner(case: Case, ranks: RankGroup, sharding: Sharding) -> Learner:
    policy: Any = load_policy(case.model(), "learner", "cpu", case.config.precision, seed=3)
    is_text = isinstance(case.algorithm, DiffpoConfig)
    sampler = sampler_for(case.algorithm, policy.canvas_length, "learned") if is_text else euler()
    config = case.config.model_copy(update={"num_ranks": ranks.num_ranks, "sharding": sharding})
    return Learner(config, case.algorithm, policy, sampler, 1.0, case.micro_batch_size, RUN_SEED, ranks)


@functools.cache
def _rollout_policy(model: Callable[[], Any]) -> Any:
    return load_policy(model(), "rollout", seed=3)


@functools.cache
def groups_of(case: Case, step: int) -> list[RolloutGroup]:
    """The groups of a step, drawn with untrained weights: they are to be equal, not on-policy."""
    policy = _rollout_policy(case.model)
    if isinstance(case.algorithm, DiffpoConfig):
        sampler = sampler_for(case.algorithm, policy.canvas_length, "learned")
        return draw_text_groups(policy, sampler, reward=case.reward, first_sequence=3 * step, words=WORDS)
    return draw_groups(policy, euler(), case.algorithm.needs, reward=case.reward, first_sequence=3 * step)


def train(case: Case, ranks: RankGroup, sharding: Sharding) -> dict[str, Any]:
    """Some steps: metrics of each, how many micro-batches this rank took in the first, and on rank 0 the weights."""
    learner = make_learner(case, ranks, sharding)
    metrics: list[dict[str, float]] = []
    for step in range(1, case.num_steps + 1):
        for result in train_step(learner, groups_of(case, step), step):
            assert result.finite
            metrics.append(dict(result.metrics))
    weights: dict[str, Any] = {}
    for which in ("current", "rollout", "eval"):
        if ranks.rank == 0 or sharding == "none":
            snapshot = learner.publish(3, which)
            weights[which] = [torch.from_numpy(one.copy()).tolist() for one in snapshot.arrays.values()]
        else:
            learner.contribute(which)
    return {"metrics": metrics, "weights": weights}


def train_all(connect: Callable[[], RankGroup], *names: str) -> dict[str, Any]:
    """Every named case, replicated and sharded."""
    for name in names:
        CASES[name].model()
    ranks = connect()
    shardings: tuple[Sharding, ...] = ("none", "fsdp")
    return {f"{name}/{sharding}": train(CASES[name], ranks, sharding) for name in names for sharding in shardings}


def _same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for step, (one, expected) in enumerate(zip(found["metrics"], alone["metrics"], strict=True)):
        assert one.keys() == expected.keys()
        assert one["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-6), step
        for name, value in expected.items():
            # A share of clipped ratios is a count: one that rounding moves over the edge is a whole item.
            assert one[name] == pytest.approx(value, rel=1e-4, abs=2e-6), (step, name)
    for which, arrays in alone["weights"].items():
        for array, expected in zip(found["weights"][which], arrays, strict=True):
            torch.testing.assert_close(torch.tensor(array), torch.tensor(expected), rtol=0, atol=1e-6)


TWO_RANKS = ("crd", "nft, every weight", "nft, bf16", "diffpo")
THREE_RANKS = ("crd, few samples", "diffpo, few samples")


@pytest.mark.parametrize(("num_ranks", "names"), [(2, TWO_RANKS), (3, THREE_RANKS)])
def test_ranks_train_as_one_whole_or_sharded(num_ranks: int, names: tuple[str, ...]) -> None:
    processes = start_ranks(num_ranks, __name__, "train_all", *names)
    try:
        alone = {name: train(CASES[name], RankGroup.single(), "fsdp") for name in names}
    finally:
        first, *others = answers_of(processes)
    for name in names:
        for sharding in ("none", "fsdp"):
            found = first[f"{name}/{sharding}"]
            _same(found, alone[name])
            moved = torch.tensor(found["weights"]["current"][0]) - torch.tensor(found["weights"]["rollout"][0])
            assert name != "crd" or moved.abs().max() > 1e-4, "the sampling policy is a copy of its own"
            assert all(other[f"{name}/{sharding}"]["metrics"] == found["metrics"] for other in others)


CHECKPOINTED = ("crd", "diffpo")


def save_again(connect: Callable[[], RankGroup], source: str, target: str) -> dict[str, Any]:
    """Sharded ranks load each case's checkpoint of `source` and write it to `target`; returns hashes and parts."""
    for name in CHECKPOINTED:
        CASES[name].model()
    ranks = connect()
    told: dict[str, Any] = {}
    for name in CHECKPOINTED:
        learner = make_learner(CASES[name], ranks, "fsdp")
        learner.load_state_dict(load_checkpoint(Path(source) / name / "step_2").state)
        state = learner.state_dict()
        part = save_part(Path(target) / name / "step_2", "token", state, ranks.rank, ranks.num_ranks)
        if ranks.rank > 0:
            learner.contribute("current")
        told[name] = {
            "part": [part.name, part.sha256],
            "values": state.values,
            "held": sum(tensor.numel() for tensor in state.tensors.values()),
            "sha256": "" if ranks.rank else learner.weights_sha256(),
        }
    return told


def _finish(folder: Path, answers: list[Any]) -> None:
    """What the process that owns the ranks does when all have written."""
    for name in CHECKPOINTED:
        parts = [Part(*one[name]["part"]) for one in answers]
        record = {"step": 2, "config_sha256": "abc"}
        finish_checkpoint(folder / name / "step_2", "token", parts, answers[0][name]["values"], record)


def test_checkpoints_reload_exactly_at_any_number_of_ranks(tmp_path: Path) -> None:
    alone: dict[str, Learner] = {}
    for name in CHECKPOINTED:
        learner = alone[name] = make_learner(CASES[name], RankGroup.single(), "none")
        for step in (1, 2):
            train_step(learner, groups_of(CASES[name], step), step)
        record = {"step": 2, "config_sha256": "abc"}
        save_checkpoint(tmp_path / "1" / name / "step_2", learner.state_dict(), record)
    for num_ranks, source in ((3, "1"), (2, "3")):
        target = tmp_path / str(num_ranks)
        answers = answers_of(start_ranks(num_ranks, __name__, "save_again", str(tmp_path / source), str(target)))
        _finish(target, answers)
        for name, learner in alone.items():
            whole = learner.state_dict()
            read = load_checkpoint(target / name / "step_2")
            assert len(read.manifest.files) == num_ranks
            assert read.state.values == whole.values
            assert read.state.tensors.keys() == whole.tensors.keys()
            for tensor_name, tensor in whole.tensors.items():
                assert torch.equal(read.state.tensors[tensor_name], tensor), (num_ranks, tensor_name)
            assert answers[0][name]["sha256"] == learner.weights_sha256()
            total = sum(tensor.numel() for tensor in whole.tensors.values())
            assert max(one[name]["held"] for one in answers) < 1.3 * total / num_ranks
    for name, learner in alone.items():
        again = make_learner(CASES[name], RankGroup.single(), "fsdp")
        again.load_state_dict(load_checkpoint(tmp_path / "2" / name / "step_2").state)
        groups = groups_of(CASES[name], 3)
        assert train_step(again, groups, 3) == train_step(learner, groups, 3)
        assert again.weights_sha256() == learner.weights_sha256()


def train_until_one_dies(connect: Callable[[], RankGroup], sharding: Sharding, when: str) -> str:
    """Rank 1 goes without a word, in an update or before the weights are gathered; what rank 0 is told."""
    case = CASES["crd"]
    case.model()
    ranks = connect()
    learner = make_learner(case, ranks, sharding)
    learner.begin_step(groups_of(case, 1), 1)
    if ranks.rank == 1 and when == "update":
        os._exit(0)
    try:
        learner.forward_backward(0)
        learner.optimise(0)
        if ranks.rank == 1:
            os._exit(0)
        learner.publish(1, "current")
    except RuntimeError as error:
        sys.stdout.write(str(error))
        sys.stdout.flush()
        os._exit(0)  # the group is broken: nothing is to be said to it any more
    return "nobody died"


@pytest.mark.parametrize(("sharding", "when"), [("none", "update"), ("fsdp", "update"), ("fsdp", "publish")])
def test_a_rank_that_dies_makes_the_others_raise(sharding: Sharding, when: str) -> None:
    processes = start_ranks(2, __name__, "train_until_one_dies", sharding, when)
    assert "onnection" in outputs_of(processes)[0]
