"""The fleet without a cluster: actors come, go, die and hang at its seam, and no chunk is lost or answered twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ray.exceptions import ActorDiedError, RayActorError

from raylign.config import parse_config
from raylign.errors import ClusterError, ConfigError, ModelError, WeightError
from rewards.jpeg import JpegConfig
from services.config import RunConfig
from services.elastic import (
    ActorBounds,
    Autoscaling,
    ElasticConfig,
    Load,
    PoolStatus,
    Pressure,
    advise,
    most_that_fit,
    who_leaves,
)
from services.fleet import RayFleet
from services.nodes import ROLE_LABEL, local_cpus, might_fit, required_resources, reward_selector, selector
from services.patience import Patience
from services.ray_actors import Answer
from services.reward_config import ServiceConfig
from services.reward_deploy import reward_application
from services.run_name import left_behind, new_run_name
from services.topology import _first_up


@dataclass
class Actor:
    """One fake: `up` when it has a place, `hung` while it does not answer, `dead` when its process is gone."""

    up: bool = True
    hung: bool = False
    dead: bool = False
    refuses: Exception | None = None
    cannot_pull: Exception | None = None
    weights: dict[str, Any] = field(default_factory=dict)
    queue: list[tuple[str, str, Mapping[str, Any]]] = field(default_factory=list)
    done: list[Any] = field(default_factory=list)
    restarts: int = 0

    def answer(self, verb: str, kwargs: Mapping[str, Any]) -> Any:
        if verb == "ping":
            if self.refuses is not None:
                raise self.refuses
            return "pong"
        if verb == "pull":
            if self.cannot_pull is not None:
                raise self.cannot_pull
            self.weights[kwargs["slot"]] = kwargs["snapshot"]
            return kwargs["snapshot"]
        self.done.append(kwargs["request"])
        return [(kwargs["request"], dict(self.weights))]


class FakeActors:
    """`Actors` that work one call per look, in the order in which they were sent."""

    def __init__(self) -> None:
        self.by_id: dict[int, Actor] = {}
        self.removed: dict[int, Actor] = {}
        self._healthy: set[int] = set()
        self._next = 0
        self.slow: Callable[[int], bool] = lambda actor_id: False

    def add(self, actor: Actor) -> int:
        self.by_id[self._next] = actor
        self._healthy.add(self._next)
        self._next += 1
        return self._next - 1

    def remove(self, actor_id: int) -> None:
        self.removed[actor_id] = self.by_id.pop(actor_id)
        self._healthy.discard(actor_id)

    def restart(self, actor_id: int) -> None:
        actor = self.by_id[actor_id]
        actor.hung, actor.weights, actor.restarts = False, {}, actor.restarts + 1

    def ids(self) -> list[int]:
        return list(self.by_id)

    def healthy(self) -> list[int]:
        return [actor_id for actor_id in self.by_id if actor_id in self._healthy]

    def set_healthy(self, actor_id: int, healthy: bool) -> None:
        if healthy:
            self._healthy.add(actor_id)
        else:
            self._healthy.discard(actor_id)
            self.by_id[actor_id].queue.clear()

    def call(self, actor_id: int, verb: str, tag: str, kwargs: Mapping[str, Any]) -> bool:
        if actor_id not in self._healthy:
            return False
        self.by_id[actor_id].queue.append((verb, tag, kwargs))
        return True

    def ask(self, actor_id: int, tag: str) -> None:
        self.by_id[actor_id].queue.append(("ping", tag, {}))

    def answers(self) -> list[Answer]:
        found: list[Answer] = []
        for actor_id, actor in list(self.by_id.items()):
            if not actor.queue or not actor.up or actor.hung or self.slow(actor_id):
                continue
            verb, tag, kwargs = actor.queue.pop(0)
            try:
                if actor.dead:
                    actor.dead, actor.weights = False, {}  # Ray starts it anew
                    raise RayActorError
                found.append(Answer(tag, actor_id, actor.answer(verb, kwargs), failed=False))
            except Exception as error:  # noqa: BLE001 - what Ray does with whatever a worker raises
                self.set_healthy(actor_id, False)
                found.append(Answer(tag, actor_id, error, failed=True))
        return found

    def handle(self, actor_id: int) -> Actor:
        return self.by_id[actor_id]

    def name(self, actor_id: int) -> str:
        return str(actor_id)

    def clear(self) -> None:
        self.by_id.clear()


def _fleet(actors: FakeActors, count: int = 1, **options: Any) -> RayFleet:
    options = {"create": Actor, "patience": Patience(least_s=0.1, restart_after_s=0.1), **options}
    return RayFleet([Actor() for _ in range(count)], manager=actors, **options)  # type: ignore[arg-type]


def _run(work: Callable[[], Awaitable[Any]], timeout_s: float = 20) -> Any:
    return asyncio.run(asyncio.wait_for(work(), timeout_s))  # type: ignore[arg-type]


async def _generate(fleet: RayFleet, number: int) -> tuple[int, dict[str, Any]]:
    return (await fleet.generate(number))[0]  # type: ignore[arg-type,return-value]


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen within 7.5 s")


def test_a_new_actor_holds_every_slots_newest_weights_before_it_draws() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors)
        await fleet.pull(1, "rollout")
        await fleet.pull(1, "eval")
        await fleet.pull(2, "rollout")
        fleet.resize(3)
        assert fleet.status().joining == 2
        await _until(lambda: fleet.status().in_service == 3)
        assert all(actor.weights == {"rollout": 2, "eval": 1} for actor in actors.by_id.values())
        answers = await asyncio.gather(*(_generate(fleet, number) for number in range(12)))
        assert answers == [(number, {"rollout": 2, "eval": 1}) for number in range(12)]
        assert all(actor.done for actor in actors.by_id.values())
        assert fleet.num_restarts == 0
        await fleet.close()

    _run(work)


def test_those_that_leave_finish_what_they_have_and_get_nothing_more() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 3)
        await fleet.pull(1, "rollout")
        stuck = True
        actors.slow = lambda actor_id: stuck
        jobs = [asyncio.create_task(_generate(fleet, number)) for number in range(9)]
        await _until(lambda: all(len(actor.queue) == 2 for actor in actors.by_id.values()))
        had = {actor_id: [kwargs["request"] for *_, kwargs in actor.queue] for actor_id, actor in actors.by_id.items()}
        fleet.resize(1)
        await asyncio.sleep(0.03)
        assert (fleet.status().leaving, fleet.status().wanted, actors.removed) == (2, 1, {})
        stuck = False
        answers = await asyncio.gather(*jobs)
        assert [number for number, _ in answers] == list(range(9))
        await _until(lambda: len(actors.removed) == 2)
        assert {actor_id: actor.done for actor_id, actor in actors.removed.items()} == {1: had[1], 2: had[2]}
        assert fleet.status() == PoolStatus(1, 1, 0, 0, 0, 0, 0, paused=False)
        await fleet.close()

    _run(work)


def test_an_actor_that_finds_no_place_keeps_nobody_waiting_and_can_be_given_up() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1, late=[Actor(up=False), Actor(up=False)])
        await fleet.pull(1, "rollout")
        assert [(await _generate(fleet, number))[0] for number in range(3)] == [0, 1, 2]
        assert (fleet.status().joining, fleet.status().in_service) == (2, 1)
        fleet.resize(2)
        await _until(lambda: len(actors.removed) == 1)
        assert list(actors.removed) == [2], "the newest of those that do not work"
        actors.by_id[1].up = True
        await _until(lambda: fleet.status().in_service == 2)
        await fleet.close()

    _run(work)


@pytest.mark.parametrize(
    "broken",
    [Actor(refuses=ModelError("no weights on this node")), Actor(cannot_pull=WeightError("no weights on this node"))],
    ids=["cannot load", "cannot pull"],
)
def test_a_new_actor_that_cannot_work_is_let_go_and_the_run_goes_on(broken: Actor) -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1, create=lambda: broken)
        await fleet.pull(1, "rollout")
        fleet.resize(2)
        await _until(lambda: len(actors.removed) == 1)
        assert (fleet.status().wanted, fleet.status().problem) == (1, "no weights on this node")
        assert (await _generate(fleet, 7))[0] == 7
        await fleet.close()

    _run(work)


def test_an_actor_that_ray_does_not_start_again_is_replaced() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1)
        await fleet.pull(1, "rollout")
        actors.by_id[0].dead = True
        actors.by_id[0].refuses = ActorDiedError()
        assert await _generate(fleet, 7) == (7, {"rollout": 1})
        assert (list(actors.removed), list(actors.by_id)) == ([0], [1])
        await fleet.close()

    _run(work)


def test_a_hung_actors_chunks_go_to_another_and_it_is_started_anew() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 2)
        await fleet.pull(1, "rollout")
        await asyncio.gather(*(_generate(fleet, number) for number in range(4)))
        actors.by_id[1].hung = True
        answers = await asyncio.gather(*(_generate(fleet, number) for number in range(10, 18)))
        assert [number for number, _ in answers] == list(range(10, 18))
        assert fleet.status().hung == 1
        await _until(lambda: fleet.status().in_service == 2)
        assert actors.by_id[1].restarts == 1
        assert actors.by_id[1].weights == {"rollout": 1}
        await fleet.close()

    _run(work)


def test_an_actor_that_hangs_in_a_pull_does_not_hold_up_the_others() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 2)
        await fleet.pull(1, "rollout")
        actors.by_id[0].hung = True
        assert await fleet.pull(2, "rollout") == [2]
        await _until(lambda: actors.by_id[0].weights == {"rollout": 2})
        await fleet.close()

    _run(work)


def test_calls_that_merely_take_longer_than_before_get_through() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1)
        await fleet.pull(1, "rollout")
        await _generate(fleet, 0)
        now = asyncio.get_running_loop().time
        began, taken = now(), 0.0

        def slow(actor_id: int) -> bool:
            """A chunk needs 0.3 s from when it reaches the actor; giving up (after 0.1 s) starts it anew."""
            nonlocal began, taken
            queue = actors.by_id[actor_id].queue
            if not queue or queue[0][0] != "generate":
                began = now()
                return False
            taken = now() - began
            return taken < 0.3

        actors.slow = slow
        assert (await _generate(fleet, 1))[0] == 1
        assert fleet.status().hung == 2, "after 0.1 and 0.2 s; the third try has 0.4"
        await fleet.close()

    _run(work)


def test_a_pause_holds_chunks_back_and_nothing_else() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 2)
        await fleet.pull(1, "rollout")
        fleet.pause()
        job = asyncio.create_task(_generate(fleet, 5))
        assert await fleet.pull(2, "rollout") == [2, 2]
        await asyncio.sleep(0.05)
        assert not job.done()
        assert fleet.status().paused
        fleet.go_on()
        assert await job == (5, {"rollout": 2})
        await fleet.close()

    _run(work)


def test_a_fixed_fleet_whose_actor_is_gone_for_good_says_so_at_once() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1, create=None)
        await fleet.pull(1, "rollout")
        actors.by_id[0].dead, actors.by_id[0].refuses = True, ActorDiedError()
        with pytest.raises(ClusterError, match="rollout actor 0 of a fixed fleet died"):
            await _generate(fleet, 1)
        await fleet.close()

    _run(work)


def test_a_fleet_begins_again_with_the_weights_of_another_learner() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 2)
        await fleet.pull(7, "rollout")
        await fleet.pull(7, "eval")
        actors.slow = lambda actor_id: True
        stale = asyncio.create_task(_generate(fleet, 1))
        await asyncio.sleep(0.01)
        fleet.begin_again()
        actors.slow = lambda actor_id: False
        await fleet.pull(3, "rollout")
        assert await _generate(fleet, 2) == (2, {"rollout": 3, "eval": 7})
        assert (await asyncio.gather(stale, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        # One that comes back pulls what the new learner published, and nothing of the lost one.
        actors.by_id[1].dead = True
        await asyncio.gather(*(_generate(fleet, number) for number in range(4)))
        await _until(lambda: fleet.status().restarts == 1 and fleet.status().in_service == 2)
        await _until(lambda: actors.by_id[1].weights == {"rollout": 3})
        await fleet.close()

    _run(work)


def test_a_fleet_that_failed_begins_again() -> None:
    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 1)
        await fleet.pull(1, "rollout")
        actors.by_id[0].dead, actors.by_id[0].cannot_pull = True, WeightError("the weights are lost")
        with pytest.raises(WeightError):
            await _generate(fleet, 1)
        with pytest.raises(WeightError):
            await _generate(fleet, 2)
        actors.by_id[0].cannot_pull = None
        fleet.begin_again()
        await fleet.pull(2, "rollout")
        assert await _generate(fleet, 3) == (3, {"rollout": 2})
        await fleet.close()

    _run(work)


def test_a_fleet_without_a_way_to_make_actors_says_so() -> None:
    async def work() -> None:
        fleet = _fleet(FakeActors(), 1, create=None)
        with pytest.raises(ClusterError, match="fixed"):
            fleet.resize(2)
        await fleet.close()

    _run(work)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_every_chunk_is_answered_once_with_the_newest_weights_whatever_happens(seed: int) -> None:
    """Random numbers of actors, deaths, pauses and hangs while 40 chunks are drawn in 4 rounds of weights."""
    draw = random.Random(seed)

    async def disturb(fleet: RayFleet, actors: FakeActors) -> None:
        hangs = 4  # every one that hits the same chunk doubles the time that the next actor has for it
        while True:
            match draw.choice(["resize", "kill", "hang" if hangs else "pause", "pause", "late"]):
                case "resize":
                    fleet.resize(draw.randint(1, 5))
                case "kill":
                    actors.by_id[draw.choice(actors.ids())].dead = True
                case "hang":
                    hangs -= 1
                    actors.by_id[draw.choice(actors.ids())].hung = True
                case "late":
                    actors.by_id[draw.choice(actors.ids())].up = draw.random() < 0.5
                case _:
                    fleet.pause()
                    await asyncio.sleep(0.005)
                    fleet.go_on()
            await asyncio.sleep(draw.random() * 0.01)
            for actor in actors.by_id.values():
                actor.up = True

    async def work() -> None:
        actors = FakeActors()
        fleet = _fleet(actors, 2, patience=Patience(least_s=0.03, unmeasured_s=0.03, restart_after_s=0.02))
        fleet._next_probe_s = 0.0
        quick = asyncio.create_task(_ask_often(fleet))
        trouble = asyncio.create_task(disturb(fleet, actors))
        for version in range(4):
            await fleet.pull(version, "rollout")
            numbers = range(10 * version, 10 * version + 10)
            answers = await asyncio.gather(*(_generate(fleet, number) for number in numbers))
            assert answers == [(number, {"rollout": version}) for number in numbers]
        for task in (trouble, quick):
            task.cancel()
        await asyncio.gather(trouble, quick, return_exceptions=True)
        await fleet.close()

    _run(work)


async def _ask_often(fleet: RayFleet) -> None:
    """Once a second is right for processes that take seconds to start; these take none."""
    while True:
        fleet._next_probe_s = 0.0
        await asyncio.sleep(0.002)


def test_patience_follows_what_calls_take_and_doubles_with_every_try() -> None:
    patience = Patience(factor=10, least_s=60, unmeasured_s=1800)
    assert patience.limit_s("chunk") == 1800
    patience.learn("chunk", 2.0)
    assert patience.limit_s("chunk") == 60
    patience.learn("chunk", 30.0)
    assert patience.limit_s("chunk") == 300
    assert patience.limit_s("chunk", tries=3) == 2400
    assert patience.limit_s("another") == 1800
    for _ in range(16):
        patience.learn("chunk", 7.0)
    assert patience.limit_s("chunk") == 70, "only the last sixteen count"


def _pool(wanted: int, **changes: Any) -> PoolStatus:
    return replace(PoolStatus(wanted, wanted, 0, 0, 0, restarts=0, hung=0, paused=False), **changes)


def _simulate(
    shares: list[float], wanted: int = 4, step_s: float = 10.0, bounds: ActorBounds | None = None
) -> list[int]:
    """How many actors are wanted after each step, when the learner waits such shares of its steps."""
    pressure, now_s, seen = Pressure(), 0.0, []
    for share in shares:
        now_s += step_s
        load = Load(now_s, waited_s=share * step_s, step_s=step_s)
        pressure, wanted = advise(pressure, load, _pool(wanted), bounds or ActorBounds(1, 16))
        seen.append(wanted)
    return seen


def test_a_learner_that_waits_gets_half_as_many_actors_more_after_three_steps() -> None:
    # Steps of 10 s: three in a row last 30 s, then 60 s pass before anything is concluded again.
    assert _simulate([0.6] * 12) == [4, 4, 6, 6, 6, 6, 6, 6, 6, 6, 9, 9]


def test_a_learner_that_never_waits_gives_up_a_quarter_after_ten_steps_and_two_minutes() -> None:
    seen = _simulate([0.0] * 12)
    assert seen == [4] * 11 + [3]  # ten steps have passed at 100 s, two minutes at the twelfth


def test_nothing_changes_between_the_two_shares_and_one_odd_step_begins_the_count_anew() -> None:
    assert _simulate([0.1] * 50) == [4] * 50
    assert _simulate([0.6, 0.6, 0.1] * 10) == [4] * 30
    assert _simulate([0.6, 0.0] * 20) == [4] * 40


def test_quick_steps_must_also_last() -> None:
    assert _simulate([0.9] * 19, step_s=1.0) == [4] * 19
    assert _simulate([0.9] * 20, step_s=1.0)[-1] == 6


def test_bounds_hold_and_nothing_is_concluded_while_the_pool_changes() -> None:
    assert max(_simulate([0.9] * 200, bounds=ActorBounds(2, 7))) == 7
    assert min(_simulate([0.0] * 200, bounds=ActorBounds(2, 7))) == 2
    rules = Autoscaling(grow_steps=1, grow_after_s=0, settle_s=0)
    hungry = Load(100.0, waited_s=9.0, step_s=10.0)
    for busy in ({"joining": 1}, {"leaving": 1}, {"paused": True}):
        assert advise(Pressure(), hungry, _pool(4, **busy), ActorBounds(1, 9), rules)[1] == 4
    assert advise(Pressure(), hungry, _pool(4), ActorBounds(1, 9), rules)[1] == 6


def test_the_number_settles_where_the_actors_just_keep_up() -> None:
    """A learner of 10 s per step, and samples that take 100 actor-seconds: ten actors keep up."""
    pressure, now_s, wanted, seen = Pressure(), 0.0, 2, []
    for _ in range(300):
        step_s = max(10.0, 100.0 / wanted)
        now_s += step_s
        load = Load(now_s, waited_s=step_s - 10.0, step_s=step_s)
        pressure, wanted = advise(pressure, load, _pool(wanted), ActorBounds(1, 64))
        seen.append(wanted)
    assert 8 <= seen[-1] <= 12
    assert len(set(seen[-100:])) == 1, "it does not swing"


def test_bounds_are_those_of_the_configuration() -> None:
    assert ElasticConfig(num_actors=3).bounds == ActorBounds(3, 3)
    assert ElasticConfig(num_actors=3, min_actors=1, max_actors=8).bounds == ActorBounds(1, 8)
    assert not ActorBounds(3, 3).is_elastic
    with pytest.raises(ValidationError, match="between min_actors 4 and max_actors 3"):
        ElasticConfig(num_actors=3, min_actors=4)


@pytest.mark.parametrize(
    ("nodes", "need", "others", "most"),
    [
        ([{"CPU": 8.0}], {"CPU": 1.0}, {"CPU": 2.0}, 6),
        ([{"CPU": 8.0, "GPU": 4.0}], {"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, 3),
        # Of a GPU's tenths a part lies on one GPU: three thirds fit on each, not ten on three.
        ([{"CPU": 64.0, "GPU": 3.0}], {"CPU": 1.0, "GPU": 0.3}, {}, 9),
        # 1.5 CPUs are free on each of two nodes: one actor each, not three.
        ([{"CPU": 1.5}, {"CPU": 1.5}], {"CPU": 1.0}, {}, 2),
        ([], {"CPU": 1.0}, {}, 0),
        ([{"CPU": 2.0}], {"CPU": 1.0}, {"CPU": 3.0}, 0),
    ],
)
def test_what_a_cluster_can_hold(
    nodes: list[dict[str, float]], need: dict[str, float], others: dict[str, float], most: int
) -> None:
    everywhere = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    assert most_that_fit(nodes, everywhere, need, others) == most


def test_those_that_do_not_work_leave_first_and_then_the_newest() -> None:
    assert who_leaves([0, 1, 2, 3], in_service=[0, 2, 3], count=2) == [1, 3]
    assert who_leaves([0, 1, 2, 3], in_service=[0, 1, 2, 3], count=0) == []
    assert who_leaves([0, 1], in_service=[0, 1], count=-3) == []


def test_only_applications_of_runs_that_are_gone_are_left_over() -> None:
    alive, gone = new_run_name(), "raylign-0badcafe"
    apps = [f"{alive}-ocr", f"{gone}-http", f"{gone}-ocr", "rewards-ocr", "raylign-site", "raylign-0badcafe"]
    assert left_behind(apps, {alive, "somebody"}) == [f"{gone}-http", f"{gone}-ocr"]


def test_a_runs_own_rewards_go_to_the_nodes_that_are_set_aside_for_them() -> None:
    def node(role: str | None, gpus: float = 0.0) -> dict[str, Any]:
        labels = {} if role is None else {ROLE_LABEL: role}
        return {"Alive": True, "Labels": labels, "Resources": {"CPU": 8.0, "GPU": gpus}}

    rewards, judge, learner = node("rewards"), node("judge", 1.0), node("learner", 8.0)
    assert reward_selector([learner, rewards, judge], num_gpus=0) == {ROLE_LABEL: "rewards"}
    assert reward_selector([learner, rewards, judge], num_gpus=0.5) == {ROLE_LABEL: "judge"}
    assert reward_selector([learner, node("rewards", 1.0)], num_gpus=0.5) == {ROLE_LABEL: "rewards"}
    assert reward_selector([learner, rewards], num_gpus=1) == {}, "kept on nodes without a GPU it would never start"
    assert reward_selector([node(None)], num_gpus=0) == {}


def test_a_rewards_replicas_carry_the_label_and_none_where_none_is_given() -> None:
    def options(where: dict[str, str] | None) -> dict[str, Any]:
        deployment: Any = reward_application(JpegConfig(), ServiceConfig(), where)._bound_deployment
        return deployment.ray_actor_options

    assert options({ROLE_LABEL: "rewards"})["label_selector"] == {ROLE_LABEL: "rewards"}
    assert "label_selector" not in options({})
    assert "label_selector" not in options(None)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_a_run_starts_when_as_many_actors_are_up_as_it_needs(least: int) -> None:
    class Ping:
        """What `worker.ping.remote()` is to be, for a worker that comes up when its event is set."""

        def __init__(self, up: asyncio.Event, refusal: Exception | None = None) -> None:
            self.up, self.refusal = up, refusal

        @property
        def ping(self) -> Any:
            return self

        async def remote(self) -> str:
            await self.up.wait()
            if self.refusal is not None:
                raise self.refusal
            return "pong"

    async def work() -> None:
        events = [asyncio.Event() for _ in range(3)]
        workers: Any = [Ping(event) for event in events]
        waiting = asyncio.create_task(_first_up(workers, least))
        for number in range(least):
            await asyncio.sleep(0.01)
            assert not waiting.done()
            events[2 - number].set()
        up, late = await waiting
        assert up == workers[3 - least :]
        assert late == workers[: 3 - least]
        refusing: Any = Ping(events[2], ModelError("no such model"))
        with pytest.raises(ModelError, match="no such model"):
            await _first_up([workers[0], refusing], 2)

    _run(work)


def test_what_a_run_reserves_follows_its_number_of_actors() -> None:
    config = parse_config(RunConfig, {"rollout": {"num_actors": 2, "num_gpus": 0.5}}, "test")
    now, more = required_resources(config), required_resources(config, num_actors=5)
    assert more["CPU"] - now["CPU"] == 3
    assert more["GPU"] - now["GPU"] == 1.5
    assert required_resources(config, num_actors=0)["CPU"] == now["CPU"] - 2
    assert local_cpus(config) >= now["CPU"]


def test_what_a_run_reserves_is_what_its_nodes_table_says() -> None:
    nodes = {
        "rollout": {"num_cpus": 0.5, "resources": {"spot": 1.0}},
        "learner": {"num_cpus": 4, "resources": {"fast_net": 0.25}},
    }
    data = {"rollout": {"num_actors": 3}, "learner": {"num_ranks": 2, "num_gpus_per_rank": 1}, "nodes": nodes}
    apart = required_resources(parse_config(RunConfig, data, "test"))
    rewards = required_resources(parse_config(RunConfig, {"rollout": {"num_actors": 3}}, "test"))["CPU"] - 4
    assert apart == {"CPU": rewards + 1.5 + 8, "GPU": 2.0, "spot": 3.0, "fast_net": 0.5}
    both = {**data, "placement": "colocated", "rollout": {"num_actors": 2, "num_gpus": 0.5}}
    assert required_resources(parse_config(RunConfig, both, "test")) == {
        "CPU": rewards + 8,
        "GPU": 2.0,
        "fast_net": 0.5,
    }
    for resources, told in (({"GPU": 1.0}, "is set by rollout.num_gpus"), ({"spot": 0.0}, "must be above 0")):
        with pytest.raises(ConfigError, match=told):
            parse_config(RunConfig, {"nodes": {"rollout": {"resources": resources}}}, "test")


def test_nodes_are_matched_by_plain_labels() -> None:
    node = {"Alive": True, "Labels": {"ray.io/accelerator-type": "H100", ROLE_LABEL: "rollout"}}
    assert might_fit(node, {"ray.io/accelerator-type": "H100"})
    assert might_fit(node, {"ray.io/accelerator-type": "!in(T4)"}), "a condition is left to Ray"
    assert not might_fit(node, {"ray.io/accelerator-type": "T4"})
    assert not might_fit({**node, "Alive": False}, {})
    assert selector([node], "rollout", {"zone": "a"}) == {ROLE_LABEL: "rollout", "zone": "a"}
    assert selector([node], "rollout", {ROLE_LABEL: "shared"}) == {ROLE_LABEL: "shared"}, "what is given counts"
