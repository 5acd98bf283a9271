"""The buffer's bound, by simulation, and that both ways to break it are caught by the same simulation."""

from __future__ import annotations

import asyncio
import random

import pytest

from rollout.buffer import TicketBuffer

GROUPS_PER_STEP = 3
NUM_STEPS = 8


class _UnorderedBuffer(TicketBuffer[tuple[int, int]]):
    """Hands groups out as they finish: what strict order protects from."""

    async def take(self, count: int) -> list[tuple[int, int]]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._ready) >= count)
            return [self._ready.pop(sequence) for sequence in list(self._ready)[:count]]


async def _worst_age(
    staleness: int,
    seed: int,
    release_early: bool = False,
    buffer_type: type[TicketBuffer[tuple[int, int]]] = TicketBuffer,
) -> int:
    """Run producers and a learner with random delays; the worst age of a group when it is trained on."""
    chance = random.Random(seed)
    buffer = buffer_type(GROUPS_PER_STEP, staleness)
    actor_version = 0

    async def pause(scale: int) -> None:
        for _ in range(chance.randrange(scale)):
            await asyncio.sleep(0)

    async def make(sequence: int) -> None:
        version = actor_version
        await pause(40)
        await buffer.put(sequence, (sequence, version))

    async def produce(tasks: asyncio.TaskGroup) -> None:
        for sequence in range(NUM_STEPS * GROUPS_PER_STEP):
            await buffer.reserve(1)
            tasks.create_task(make(sequence))

    async def hand_off(version: int) -> None:
        nonlocal actor_version
        await pause(30)
        actor_version = version
        if not release_early:
            await buffer.release(GROUPS_PER_STEP)

    worst = 0
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce(tasks))
        pending: asyncio.Task[None] | None = None
        for step in range(1, NUM_STEPS + 1):
            groups = await buffer.take(GROUPS_PER_STEP)
            worst = max(worst, *(step - 1 - version for _, version in groups))
            await pause(10)
            if pending is not None:
                await pending
            if release_early:
                await buffer.release(GROUPS_PER_STEP)
            pending = tasks.create_task(hand_off(step))
    return worst


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_the_worst_age_is_exactly_the_staleness_allowed(staleness: int) -> None:
    ages = [asyncio.run(_worst_age(staleness, seed)) for seed in range(40)]
    assert max(ages) == staleness


def test_the_simulation_catches_an_early_release() -> None:
    assert max(asyncio.run(_worst_age(1, seed, release_early=True)) for seed in range(40)) > 1


def test_the_simulation_catches_completion_order() -> None:
    assert max(asyncio.run(_worst_age(1, seed, buffer_type=_UnorderedBuffer)) for seed in range(40)) > 1


def test_a_group_handed_in_twice_is_an_error() -> None:
    async def twice() -> None:
        buffer = TicketBuffer[str](1, 0)
        await buffer.put(0, "a")
        await buffer.put(0, "a")

    with pytest.raises(ValueError, match="twice"):
        asyncio.run(twice())


def test_more_tickets_than_there_are_is_an_error_not_a_wait() -> None:
    with pytest.raises(ValueError, match="must fit into one step"):
        asyncio.run(TicketBuffer[str](2, 0).reserve(3))
