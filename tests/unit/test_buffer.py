"""The buffer's bound on a virtual clock: thousands of schedules with delays, deaths, pauses and changed limits, and
that each way to break it is caught by the same simulation."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.virtual_time import run_virtually
from rollout.buffer import TicketBuffer

KINDS, SEEDS_OF_EACH = 500, 5


@dataclass(frozen=True)
class Group:
    """A group as it comes out of the buffer."""

    sequence: int
    version: int


class UnorderedBuffer(TicketBuffer[Group]):
    """Hands groups out as they finish: what strict order protects from."""

    async def put(self, sequence: int, group: Group) -> None:
        async with self._groups_in:
            self._ready[sequence] = group
            self._groups_in.notify_all()

    async def take(self, count: int) -> list[Group]:
        async with self._groups_in:
            await self._groups_in.wait_for(lambda: len(self._ready) >= count)
            return [self._ready.pop(sequence) for sequence in list(self._ready)[:count]]


@dataclass
class Schedule:
    """A controller's loop in small: actors that hold versions of their own, die and come back, and a learner.

    Every duration and every accident is drawn from the seed. `limits`: the step after which admission changes to the
    staleness given.
    """

    seed: int
    staleness: int
    groups_per_step: int = 3
    chunk: int = 1
    num_steps: int = 6
    num_actors: int = 3
    deaths: float = 0.0
    pauses: float = 0.0
    limits: dict[int, int] = field(default_factory=dict[int, int])
    release_early: bool = False
    buffer_type: type[TicketBuffer[Group]] = TicketBuffer
    trained: list[list[Group]] = field(default_factory=list[list[Group]])
    allowed: list[int] = field(default_factory=list[int])
    """The bound of each step."""
    most_admitted: int = 0

    def go(self) -> Schedule:
        run_virtually(self._run())
        return self

    @property
    def ages(self) -> list[list[int]]:
        return [[step - group.version for group in groups] for step, groups in enumerate(self.trained)]

    def check(self) -> None:
        """Everything that is promised of a schedule."""
        assert self.most_admitted <= (self.staleness + 1) * self.groups_per_step
        sequences = [group.sequence for groups in self.trained for group in groups]
        assert sequences == list(range(self.num_steps * self.groups_per_step)), "each once, in order, none lost"
        for step, (ages, allowed) in enumerate(zip(self.ages, self.allowed, strict=True), 1):
            assert 0 <= min(ages) <= max(ages) <= allowed, f"step {step}: ages {ages}, allowed {allowed}"

    async def _run(self) -> None:
        self._chance = random.Random(self.seed)
        self._buffer = self.buffer_type(self.groups_per_step, self.staleness)
        self._versions = [0] * self.num_actors
        self._newest = 0
        self._actors: asyncio.Queue[int] = asyncio.Queue()
        for actor in range(self.num_actors):
            self._actors.put_nowait(actor)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._produce(tasks))
            await self._learn(tasks)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds * self._chance.random() ** 3)
        if self._chance.random() < self.pauses:
            await asyncio.sleep(20 * self._chance.random())

    async def _produce(self, tasks: asyncio.TaskGroup) -> None:
        for sequence in range(0, self.num_steps * self.groups_per_step, self.chunk):
            await self._buffer.reserve(self.chunk)
            self.most_admitted = max(self.most_admitted, self._buffer.num_admitted)
            tasks.create_task(self._make(range(sequence, sequence + self.chunk)))

    async def _make(self, sequences: range) -> None:
        """One chunk; an actor that dies under it loses it, and it is drawn anew by whoever is free."""
        while True:
            actor = await self._actors.get()
            version = self._versions[actor]
            await self._pause(4.0)
            died = self._chance.random() < self.deaths
            if died:
                # It comes back with the newest weights that were published, before it is given work.
                await self._pause(6.0)
                self._versions[actor] = max(self._versions[actor], self._newest)
            self._actors.put_nowait(actor)
            if not died:
                break
        await self._pause(1.0)  # rewards
        for sequence in sequences:
            await self._buffer.put(sequence, Group(sequence, version))

    async def _learn(self, tasks: asyncio.TaskGroup) -> None:
        pending: asyncio.Task[None] | None = None
        limit, old_until = self.staleness, 0
        for step in range(1, self.num_steps + 1):
            self.trained.append(await self._buffer.take(self.groups_per_step))
            self.allowed.append(self.staleness if step <= old_until else limit)
            await self._pause(2.0)
            if pending is not None:
                await pending
            if self.release_early:
                await self._buffer.release(self.groups_per_step)
            if step in self.limits:
                limit = self.limits[step]
                old_until = max(old_until, self._buffer.last_step)
                await self._buffer.limit(limit)
            pending = tasks.create_task(self._hand_off(step))

    async def _hand_off(self, version: int) -> None:
        self._newest = version

        async def pull(actor: int) -> None:
            await self._pause(3.0)
            self._versions[actor] = max(self._versions[actor], version)

        await asyncio.gather(*(pull(actor) for actor in range(self.num_actors)))
        if not self.release_early:
            await self._buffer.release(self.groups_per_step)


@settings(max_examples=KINDS, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32),
    staleness=st.integers(0, 4),
    chunk=st.sampled_from([1, 3]),
    num_actors=st.integers(1, 5),
    accidents=st.sampled_from([(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.3, 0.1)]),
    falls=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), max_size=2),
)
def test_no_schedule_breaks_the_bound_or_loses_a_group(
    seed: int,
    staleness: int,
    chunk: int,
    num_actors: int,
    accidents: tuple[float, float],
    falls: list[tuple[int, int]],
) -> None:
    limits = {step: min(limit, staleness) for step, limit in falls}
    for more in range(SEEDS_OF_EACH):
        Schedule(seed + more, staleness, 3, chunk, 6, num_actors, *accidents, limits=limits).go().check()


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_the_worst_age_is_exactly_the_staleness_allowed(staleness: int) -> None:
    runs = [Schedule(seed, staleness).go() for seed in range(30)]
    for run in runs:
        run.check()
    assert max(age for run in runs for ages in run.ages for age in ages) == staleness


def test_after_a_fall_to_0_what_was_admitted_is_trained_and_all_later_groups_are_fresh() -> None:
    older: set[int] = set()
    for seed in range(30):
        run = Schedule(seed, 3, num_steps=10, limits={3: 0}).go()
        run.check()
        older |= {step for step, ages in enumerate(run.ages, 1) if max(ages) > 0}
        # At most 4 steps' groups were admitted when step 3 was done, the first of them for step 4.
        assert all(max(ages) == 0 for ages in run.ages[7:])
    assert max(older) > 4, "something old was admitted before the fall, or this shows nothing"


def test_a_raised_limit_is_used_again() -> None:
    runs = [Schedule(seed, 2, num_steps=12, limits={3: 0, 8: 2}).go() for seed in range(20)]
    for run in runs:
        run.check()
    assert max(age for run in runs for ages in run.ages[9:] for age in ages) == 2


@pytest.mark.parametrize("change", [{"release_early": True}, {"buffer_type": UnorderedBuffer}])
def test_the_simulation_catches_an_early_release_and_completion_order(change: dict[str, object]) -> None:
    runs = [Schedule(seed, 1, **change).go() for seed in range(40)]  # type: ignore[arg-type]  # one of two keys
    assert max(age for run in runs for ages in run.ages for age in ages) > 1


def test_a_wait_without_end_is_found() -> None:
    async def starve() -> None:
        await TicketBuffer[str](2, 0).take(1)

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtually(starve())


def test_the_level_is_told() -> None:
    async def levels() -> list[tuple[int, int, int]]:
        buffer, seen = TicketBuffer[str](2, 1), list[tuple[int, int, int]]()
        for act in (buffer.reserve(2), buffer.put(1, "b"), buffer.reserve(1), buffer.put(0, "a"), buffer.take(2)):
            await act
            seen.append((buffer.num_admitted, buffer.num_ready, buffer.last_step))
        return seen

    assert asyncio.run(levels()) == [(2, 0, 1), (2, 1, 1), (3, 1, 2), (3, 2, 2), (1, 0, 2)]


def test_a_group_handed_in_twice_is_an_error() -> None:
    async def twice() -> None:
        buffer = TicketBuffer[str](1, 0)
        await buffer.put(0, "a")
        await buffer.put(0, "a")

    with pytest.raises(ValueError, match="twice"):
        asyncio.run(twice())


def test_more_tickets_than_there_are_is_an_error_not_a_wait() -> None:
    with pytest.raises(ValueError, match="must fit into one step"):
        asyncio.run(TicketBuffer[str](2, 3).reserve(3))
