"""The fleet on a real cluster with actors that are cheap to kill: nothing is lost, hangs or keeps old weights."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError

from raylign.errors import ClusterError, WeightError
from rollout.drawn import Pulled, Slot
from services.fleet import RayFleet
from services.patience import Patience
from services.process import local_cluster
from services.ray_errors import NotPulledError
from services.ray_learner import RayLearner
from tests.processes import still_running


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # By value: workers that imported this module would load torch and RLlib first, seconds each.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with local_cluster(6, tmp_path_factory.mktemp("fleet")):
        yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Sleeper:
    """Answers chunks slowly with who it is and which weights it had; `kill` files make it die in the middle."""

    def __init__(self) -> None:
        self.version = -1
        self.pulled: dict[str, Any] = {}
        self.log: list[str] = []

    def ping(self) -> str:
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    def pull(self, snapshot: Any, slot: str) -> Pulled:
        if snapshot == "torn":
            time.sleep(0.5)  # long enough for a fleet that does not wait to send a chunk
            raise WeightError("the snapshot is torn")
        self.log.append(slot)
        self.pulled[slot] = snapshot
        self.version = self.pulled.get("rollout", -1)
        return Pulled(self.version, num_bytes=os.getpid(), load_s=0.0)

    def history(self) -> tuple[list[str], dict[str, Any]]:
        return self.log, self.pulled

    def generate(self, request: Any) -> list[Any]:
        if request == "broken":
            raise WeightError("no weights")
        if isinstance(request, Path):
            with request.open("a") as file:
                file.write(f"{self.version}\n")
        if "rollout" not in self.pulled:
            raise NotPulledError("rollout")
        self.log.append("chunk")
        time.sleep(0.2)
        return [(os.getpid(), self.version, request)]

    def probe(self, text: str, slot: Slot) -> str:
        return f"{text} {slot} {os.getpid()}"

    def precision_report(self) -> dict[Slot, str]:
        return {"draft": "nvfp4, emulated"}

    def publish(self, version: int, which: str) -> tuple[int, tuple[str, str]]:
        if which == "dies":
            os._exit(1)
        return version, ("full", "its hash")


def _actor(restarts: int = -1, **options: Any) -> Any:
    remote_class: Any = ray.remote(Sleeper)
    return remote_class.options(num_cpus=0.1, max_restarts=restarts, **options).remote()


def _actors(count: int, restarts: int = -1) -> list[Any]:
    actors = [_actor(restarts) for _ in range(count)]
    ray.get([actor.ping.remote() for actor in actors])
    return actors


def _run(work: Callable[[], Awaitable[Any]], timeout_s: float = 30) -> Any:
    return asyncio.run(asyncio.wait_for(work(), timeout_s))  # type: ignore[arg-type]


async def _generate(fleet: Any, number: Any) -> tuple[int, int, int]:
    """(process, weights, number) for a chunk that is only a number: the fleet passes requests on as they are."""
    return (await fleet.generate(number))[0]


def _num_in_flight(fleet: Any) -> Counter[int]:
    return Counter(call.actor_id for call in fleet._pool.sent.values() if call.verb == "generate")


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen within 10 s")


def _process(actor: Any) -> psutil.Process:
    return psutil.Process(ray.get(actor.pid.remote()))


def test_chunks_spread_over_actors_and_come_back_in_their_places() -> None:
    async def work() -> None:
        fleet = RayFleet(_actors(3))
        reports = await fleet.pull(5, "rollout")
        assert [report.version for report in reports] == [5, 5, 5]
        answers = await asyncio.gather(*(_generate(fleet, n) for n in range(9)))
        assert [answer[2] for answer in answers] == list(range(9))
        assert len({answer[0] for answer in answers}) == 3
        assert {answer[1] for answer in answers} == {5}
        assert {report.num_bytes for report in reports} == {answer[0] for answer in answers}, "one from each process"
        assert len(set(await fleet.probe_all("hello"))) == 3
        assert all("hello draft" in str(probe) for probe in await fleet.probe_all("hello", "draft"))
        assert await fleet.precision_report() == {"draft": "nvfp4, emulated"}
        await fleet.close()

    _run(work)


def test_a_killed_actors_chunks_are_all_answered_and_it_comes_back_with_the_newest_weights() -> None:
    async def work() -> None:
        actors = _actors(2)
        victim = _process(actors[0])
        fleet = RayFleet(actors)
        await fleet.pull(0, "rollout")
        await fleet.pull(7, "eval")
        await fleet.pull(1, "rollout")
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(8)]
        await _until(lambda: _num_in_flight(fleet) == {0: 2, 1: 2})
        victim.kill()
        answers = await asyncio.gather(*jobs)
        assert [answer[2] for answer in answers] == list(range(8))
        # One that dies meanwhile has nothing to report.
        assert all(report.version == 2 for report in await fleet.pull(2, "rollout"))
        pids: set[int] = set()
        while len(pids) < 2:  # until the killed one works again
            answers = await asyncio.gather(*(_generate(fleet, n) for n in range(4)))
            assert {answer[1] for answer in answers} == {2}
            pids = {answer[0] for answer in answers}
        assert fleet.num_restarts >= 1
        log, pulled = ray.get(actors[0].history.remote())
        assert pulled == {"rollout": 2, "eval": 7}
        assert {"rollout", "eval"} <= set(log[: log.index("chunk")])
        await fleet.close()

    _run(work)


def test_an_actor_that_died_idle_and_came_back_unseen_pulls_before_it_works() -> None:
    async def work() -> None:
        actors = _actors(1)
        fleet = RayFleet(actors)
        await fleet.pull(3, "rollout")
        _process(actors[0]).kill()
        while True:  # Ray restarts it, and nobody called it meanwhile
            try:
                await actors[0].ping.remote()
                break
            except RayActorError:
                await asyncio.sleep(0.05)
        assert (await _generate(fleet, 0))[1] == 3
        assert fleet.num_restarts == 1
        await fleet.close()

    _run(work)


def test_chunks_of_a_dead_actor_are_taken_back_in_their_order() -> None:
    async def work() -> None:
        actors = _actors(1)
        fleet = RayFleet(actors)
        await fleet.pull(1, "rollout")
        victim = _process(actors[0])
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(4)]
        await _until(lambda: len(fleet._pool.sent) == 2)
        fleet._next_probe_s = float("inf")  # it stays away while the test looks
        victim.kill()
        await _until(lambda: not fleet._pool.sent)
        assert [call.kwargs["request"] for call in fleet._pool.waiting] == [0, 1, 2, 3]
        fleet._next_probe_s = 0.0
        await asyncio.gather(*jobs)
        await fleet.close()

    _run(work)


def test_no_actor_gets_more_than_two_chunks_at_once() -> None:
    async def work() -> None:
        fleet = RayFleet(_actors(2))
        await fleet.pull(1, "rollout")
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(12)]
        most = 0
        while not all(job.done() for job in jobs):
            most = max([most, *_num_in_flight(fleet).values()])
            await asyncio.sleep(0.005)
        assert most == 2
        await fleet.close()

    _run(work)


def test_closing_ends_those_who_wait_and_leaves_no_task() -> None:
    async def work() -> None:
        before = asyncio.all_tasks()
        fleet = RayFleet(_actors(1))
        await fleet.pull(1, "rollout")
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(4)]
        await asyncio.sleep(0.05)
        await fleet.close()
        done, waiting = await asyncio.wait(jobs, timeout=2)
        assert not waiting
        assert all(job.cancelled() for job in done)
        assert asyncio.all_tasks() == before

    _run(work)


def test_every_call_to_an_actor_that_goes_out_of_service_is_taken_back() -> None:
    async def work() -> None:
        actors = _actors(1)
        fleet = RayFleet(actors)
        await fleet.pull(1, "rollout")
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(2)]
        await asyncio.sleep(0.05)
        # What RLlib does at the first error of an actor: all its other calls are forgotten by the manager.
        fleet._manager.set_healthy(0, False)
        answers = await asyncio.gather(*jobs)
        assert [answer[2] for answer in answers] == [0, 1]
        await fleet.close()

    _run(work)


def test_an_error_of_the_work_itself_is_raised_as_it_was() -> None:
    async def work() -> None:
        fleet = RayFleet(_actors(1))
        await fleet.pull(1, "rollout")
        with pytest.raises(WeightError, match="no weights") as raised:
            await _generate(fleet, "broken")
        assert type(raised.value) is WeightError
        await fleet.close()

    _run(work)


def test_an_actor_that_comes_back_and_cannot_pull_ends_the_run_and_draws_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    async def work() -> None:
        actors = _actors(1)
        victim = _process(actors[0])
        fleet = RayFleet(actors)
        await fleet.pull(1, "rollout")
        fleet._snapshots["rollout"] = "torn"
        job = asyncio.create_task(_generate(fleet, ran))
        await _until(ran.exists)
        victim.kill()
        with pytest.raises(WeightError, match="torn"):
            await job
        assert ran.read_text() == "1\n"  # before the kill; never without the weights that could not be pulled
        with pytest.raises(WeightError, match="torn"):
            await _generate(fleet, 0)
        await fleet.close()

    _run(work)


def test_a_snapshot_whose_maker_died_is_an_error_and_not_a_pull() -> None:
    async def work() -> None:
        (maker,) = _actors(1, restarts=0)
        fleet = RayFleet(_actors(2))
        await fleet.pull(1, "rollout")
        lost = maker.publish.options(num_returns=2).remote(2, "dies")[0]
        with pytest.raises(ClusterError, match=r"pulled are lost .*raylign resume"):
            await fleet.pull(lost, "rollout")
        await fleet.close()

    _run(work)


def test_a_learner_that_dies_while_it_publishes_is_noticed_at_once() -> None:
    async def work() -> None:
        learner = RayLearner(_actors(1, restarts=0))
        published = await learner.publish(3, "rollout")
        assert (ray.get(published.newest), ray.get(published.whole)) == (3, 3)
        with pytest.raises(RayActorError):
            await learner.publish(4, "dies")  # type: ignore[arg-type]

    _run(work)


def test_cancelled_chunks_do_not_block_the_others() -> None:
    async def work() -> None:
        fleet = RayFleet(_actors(1))
        await fleet.pull(1, "rollout")
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(6)]
        await asyncio.sleep(0.05)
        for job in jobs[:5]:
            job.cancel()
        assert (await jobs[5])[2] == 5
        await fleet.close()
        assert fleet._pump_task is None or fleet._pump_task.done()

    _run(work)


def test_a_fleet_grows_and_shrinks_with_processes_that_really_come_and_go() -> None:
    async def work() -> None:
        (first,) = _actors(1)
        fleet = RayFleet([first], _actor)
        await fleet.pull(4, "rollout")
        await fleet.pull(2, "eval")
        fleet.resize(3)
        await _until(lambda: fleet.status().in_service == 3)
        answers = await asyncio.gather(*(_generate(fleet, n) for n in range(12)))
        assert [(answer[1], answer[2]) for answer in answers] == [(4, n) for n in range(12)]
        assert len({answer[0] for answer in answers}) == 3, "the new ones draw"
        leavers = [_process(fleet.handles()[number]) for number in (1, 2)]
        jobs = [asyncio.create_task(_generate(fleet, n)) for n in range(9)]
        await _until(lambda: _num_in_flight(fleet) == {0: 2, 1: 2, 2: 2})
        fleet.resize(1)
        assert [answer[2] for answer in await asyncio.gather(*jobs)] == list(range(9))
        await _until(lambda: fleet.status().leaving == 0)
        assert still_running(leavers) == []
        assert (fleet.status().wanted, fleet.num_restarts) == (1, 0)
        assert (await _generate(fleet, 0))[0] == _process(first).pid
        await fleet.close()

    _run(work)


def test_actors_that_find_no_place_do_not_keep_the_others_waiting() -> None:
    async def work() -> None:
        nowhere = [_actor(resources={"nowhere": 1}) for _ in range(2)]
        fleet = RayFleet(_actors(1), _actor, late=nowhere)
        await fleet.pull(1, "rollout")
        assert [(await _generate(fleet, n))[2] for n in range(3)] == [0, 1, 2]
        assert (fleet.status().joining, fleet.status().in_service) == (2, 1)
        fleet.resize(2)
        await _until(lambda: len(fleet._manager.ids()) == 2)
        fleet.resize(1)
        await _until(lambda: len(fleet._manager.ids()) == 1)
        await fleet.close()

    _run(work)


def test_a_stopped_process_loses_no_chunk_and_is_started_anew() -> None:
    async def work() -> None:
        actors = _actors(2)
        fleet = RayFleet(actors, patience=Patience(least_s=1.5, restart_after_s=1.0))
        await fleet.pull(6, "rollout")
        await asyncio.gather(*(_generate(fleet, n) for n in range(4)))
        victim = _process(actors[1])
        victim.suspend()
        answers = await asyncio.gather(*(_generate(fleet, n) for n in range(6)))
        assert [answer[2] for answer in answers] == list(range(6))
        assert {answer[0] for answer in answers} == {_process(actors[0]).pid}
        assert fleet.status().hung == 1
        await _until(lambda: fleet.status().in_service == 2)
        assert still_running([victim]) == []
        answers = await asyncio.gather(*(_generate(fleet, n) for n in range(4)))
        assert len({answer[0] for answer in answers}) == 2
        assert {answer[1] for answer in answers} == {6}
        await fleet.close()

    _run(work, timeout_s=60)


def test_a_process_that_goes_on_after_a_stop_pulls_before_it_draws() -> None:
    async def work() -> None:
        actors = _actors(2)
        fleet = RayFleet(actors, patience=Patience(least_s=1.0, restart_after_s=600))
        await fleet.pull(1, "rollout")
        await asyncio.gather(*(_generate(fleet, n) for n in range(4)))
        victim = _process(actors[1])
        victim.suspend()
        reports = await fleet.pull(2, "rollout")
        assert [report.version for report in reports] == [2], "the other one's"
        victim.resume()
        await _until(lambda: fleet.status().in_service == 2)
        answers = await asyncio.gather(*(_generate(fleet, n) for n in range(4)))
        assert {(answer[0], answer[1]) for answer in answers} == {(_process(actor).pid, 2) for actor in actors}
        await fleet.close()

    _run(work, timeout_s=60)
