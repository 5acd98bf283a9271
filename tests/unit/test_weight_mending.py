"""A fleet whose actors get weights torn: it has them published again, and goes on or says why it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from raylign.errors import WeightError
from raylign.weights import TornSnapshotError
from rollout.drawn import Pulled
from services.fleet import RayFleet
from services.publication import Broadcast, Publication
from services.pull_metrics import pull_metrics
from services.ray_actors import Answer


class Actors:
    """Two actors at the fleet's seam; what they are told to pull is torn if it begins so."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.queue: list[tuple[int, str, str, Mapping[str, Any]]] = []
        self.well: dict[int, bool] = {}

    def add(self, actor: Any) -> int:
        self.well[actor] = True
        return actor

    def ids(self) -> list[int]:
        return list(self.well)

    def healthy(self) -> list[int]:
        return [actor for actor, well in self.well.items() if well]

    def set_healthy(self, actor_id: int, healthy: bool) -> None:
        self.well[actor_id] = healthy

    def call(self, actor_id: int, verb: str, tag: str, kwargs: Mapping[str, Any]) -> bool:
        if self.well[actor_id]:
            self.queue.append((actor_id, verb, tag, kwargs))
        return self.well[actor_id]

    def ask(self, actor_id: int, tag: str) -> None:
        self.queue.append((actor_id, "ping", tag, {}))

    def answers(self) -> list[Answer]:
        calls, self.queue = self.queue, []
        return [self.answer(*call) for call in calls]

    def answer(self, actor_id: int, verb: str, tag: str, kwargs: Mapping[str, Any]) -> Answer:
        if verb != "pull":
            return Answer(tag, actor_id, self.held.get(actor_id), failed=False)
        ticket = kwargs["snapshot"]
        if str(ticket).startswith("torn"):
            self.well[actor_id] = False
            return Answer(tag, actor_id, TornSnapshotError(f"{ticket} is torn"), failed=True)
        self.held[actor_id] = ticket
        return Answer(tag, actor_id, Pulled(1, 8, 0.0, detour="" if ticket != "detour" else "broke"), failed=False)

    def remove(self, actor_id: int) -> None:
        del self.well[actor_id]

    def restart(self, actor_id: int) -> None:
        raise AssertionError("nobody hangs")

    def handle(self, actor_id: int) -> Any:
        return actor_id

    def name(self, actor_id: int) -> str:
        return str(actor_id)

    def clear(self) -> None:
        self.well.clear()


def publishing(*tickets: str) -> tuple[Callable[[], Awaitable[str]], list[str]]:
    """Publishes these one after the other, then no more; and what it has published."""
    done: list[str] = []

    async def again() -> str:
        if len(done) == len(tickets):
            raise WeightError("the learner has gone on")
        done.append(tickets[len(done)])
        return done[-1]

    return again, done


def run(work: Callable[[RayFleet, Actors], Awaitable[None]]) -> None:
    async def main() -> None:
        actors = Actors()
        fleet = RayFleet([0, 1], manager=actors)  # type: ignore[list-item]
        await asyncio.wait_for(work(fleet, actors), 20)
        await fleet.close()

    asyncio.run(main())


async def all_back(fleet: RayFleet) -> None:
    while fleet.status().in_service < 2:  # noqa: ASYNC110 - the fleet has no event for it
        await asyncio.sleep(0.02)


def test_torn_weights_are_published_again_once_for_all_who_got_them_so() -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        again, done = publishing("torn too", "whole")
        assert await fleet.pull(Publication("torn", "torn", again), "rollout") == []
        await all_back(fleet)
        assert done == ["torn too", "whole"]
        assert actors.held == {0: "whole", 1: "whole"}
        assert "torn" in fleet.status().problem

    run(work)


def test_who_gets_a_torn_delta_takes_the_whole_which_nobody_has_to_publish_again() -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        again, done = publishing()
        assert await fleet.pull(Publication("torn delta", "whole", again), "rollout") == []
        await all_back(fleet)
        assert done == []
        assert actors.held == {0: "whole", 1: "whole"}

    run(work)


def test_weights_that_stay_torn_end_the_run_by_name() -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        again, done = publishing("torn 2", "torn 3", "never")
        await fleet.pull(Publication("torn", "torn", again), "rollout")
        with pytest.raises(TornSnapshotError, match="torn 3 is torn"):
            await fleet.precision_report()
        assert done == ["torn 2", "torn 3"]
        assert actors.held == {}

    run(work)


@pytest.mark.parametrize("way", ["a bare handle", "nobody publishes again"])
def test_torn_weights_that_nobody_publishes_again_end_the_run_at_once(way: str) -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        with pytest.raises(TornSnapshotError, match="torn is torn"):
            await fleet.pull("torn" if way == "a bare handle" else Publication("torn", "torn"), "rollout")

    run(work)


def test_a_learner_that_has_gone_on_is_waited_for_and_its_next_version_mends_all() -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        again, _ = publishing()
        assert await fleet.pull(Publication("torn", "torn", again), "rollout") == []
        await asyncio.sleep(1.5)  # long enough to be asked, and not to pull what is torn
        assert fleet.status().in_service == 0
        assert await fleet.pull(Publication("next", "next", again), "rollout") == []
        await all_back(fleet)
        assert actors.held == {0: "next", 1: "next"}

    run(work)


def test_in_a_broadcast_each_takes_its_seat_and_those_who_could_not_are_told_of() -> None:
    async def work(fleet: RayFleet, actors: Actors) -> None:
        lost: list[int] = []
        ended: list[bool] = []

        async def end() -> None:
            ended.append(True)

        def seat(ids: Any) -> Broadcast:
            tickets: Any = dict(zip(ids, ("seat", "detour"), strict=True))
            return Broadcast(tickets, lost.append, end)

        pulled = await fleet.pull(Publication("whole", "whole", None, seat), "rollout")
        assert actors.held == {0: "seat", 1: "detour"}
        assert (lost, ended) == ([1], [True])
        assert pull_metrics(pulled)["pull/detours"] == 1
        assert "pull/detours" not in pull_metrics(pulled[:1])

    run(work)
