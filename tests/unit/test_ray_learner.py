"""What is asked of which learner rank, and when: fakes for the actors, no cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raylign.errors import CheckpointError
from services.ray_learner import RayLearner

RECORD = {"step": 4}


class Verb:
    """An actor's method: notes the call at once, as Ray submits it, and answers later."""

    def __init__(self, rank: Rank, name: str) -> None:
        self._rank = rank
        self._name = name

    def options(self, num_returns: int) -> Verb:
        return self

    def remote(self, *args: Any) -> Any:
        name = args[0] if self._name == "learner_call" else self._name
        self._rank.asked.append((self._rank.number, name))
        if self._name == "publish":
            return "ticket", self._later(("adapter", "hash"))
        return self._later(self._rank.answers.get(name, f"{name} of {self._rank.number}"))

    async def _later(self, answer: Any) -> Any:
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Rank:
    """A learner rank. asked: (rank, verb) of all ranks, in order."""

    def __init__(self, number: int, asked: list[tuple[int, str]], answers: Mapping[str, Any]) -> None:
        self.number, self.asked, self.answers = number, asked, answers

    def __getattr__(self, name: str) -> Verb:
        return Verb(self, name)


def learner_of(
    num_ranks: int, sharded: bool, answers: Mapping[int, Mapping[str, Any]] | None = None
) -> tuple[RayLearner, list[tuple[int, str]]]:
    asked: list[tuple[int, str]] = []
    ranks: list[Any] = [Rank(number, asked, (answers or {}).get(number, {})) for number in range(num_ranks)]
    return RayLearner(ranks, sharded=sharded), asked


def save(learner: RayLearner) -> None:
    asyncio.run(learner.save(Path("run/checkpoints/step_4"), RECORD))


@pytest.mark.parametrize(("num_ranks", "sharded"), [(3, False), (1, True)])
def test_ranks_that_hold_everything_leave_it_to_the_first(num_ranks: int, sharded: bool) -> None:
    learner, asked = learner_of(num_ranks, sharded)
    asyncio.run(learner.publish(1, "rollout"))
    asyncio.run(learner.weights_sha256())
    save(learner)
    assert asked == [(0, "publish"), (0, "weights_sha256"), (0, "save")]


def test_sharded_ranks_are_all_asked_before_any_answers() -> None:
    learner, asked = learner_of(3, sharded=True)

    async def both() -> None:
        # As when a version is handed over while the next step begins: each rank must see the same order.
        await asyncio.gather(learner.publish(1, "rollout"), learner.end_step(2), learner.weights_sha256())

    asyncio.run(both())
    order = {rank: [verb for number, verb in asked if number == rank] for rank in range(3)}
    assert order == {
        0: ["publish", "end_step", "weights_sha256"],
        1: ["contribute", "end_step", "contribute"],
        2: ["contribute", "end_step", "contribute"],
    }


def test_a_sharded_checkpoint_is_finished_when_all_have_written() -> None:
    learner, asked = learner_of(3, sharded=True)
    save(learner)
    assert asked == [(0, "save_part"), (1, "save_part"), (2, "save_part"), (0, "finish_save")]


def test_a_part_that_cannot_be_written_makes_no_checkpoint() -> None:
    full = CheckpointError("cannot write checkpoint: No space left on device")
    learner, asked = learner_of(3, sharded=True, answers={1: {"save_part": full}})
    with pytest.raises(CheckpointError, match="No space left"):
        save(learner)
    assert asked == [(0, "save_part"), (1, "save_part"), (2, "save_part"), (0, "discard_parts")]
