"""The buffer between producers and the learner: tickets bound the age of what is trained on.

A producer reserves tickets before it draws a sample; the learner takes groups in strict prompt order; tickets come back
only when the actors hold the new weights. With (S + 1) x P tickets and P groups per step, no group is ever more than S
versions old when it is trained on, and nothing is ever thrown away.

Why: let R steps be released when the group at place q is admitted, so its weights are of version R or newer. Tickets
admit it only if q < (R + S + 1) P, so it is trained on in step R + S + 1 at the latest, which starts from version
R + S. The argument asks for the S of that moment alone, so S may change while a run goes: what was admitted keeps its
bound, what comes after has the new one. Handing groups out as they finish, or releasing at the optimiser step, would
break it (`tests/unit/test_buffer.py` simulates all of this).
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

GroupT = TypeVar("GroupT")


class TicketBuffer(Generic[GroupT]):
    """See the module. Single event loop, one consumer, one producer that reserves places in order."""

    def __init__(self, groups_per_step: int, max_staleness: int, first_sequence: int = 0) -> None:
        self._groups_per_step = groups_per_step
        self._staleness = max_staleness
        self._free = (max_staleness + 1) * groups_per_step
        self._next = first_sequence
        self._reserved = first_sequence
        self._whole = first_sequence
        self._ready: dict[int, GroupT] = {}
        # Two conditions, so that a group that comes in does not wake the producer, nor a ticket the learner.
        self._groups_in = asyncio.Condition()
        self._tickets_in = asyncio.Condition()

    @property
    def num_ready(self) -> int:
        """Groups that are in and not yet taken."""
        return len(self._ready)

    @property
    def num_admitted(self) -> int:
        """Places that tickets were given for and that are not yet taken, those in it included."""
        return self._reserved - self._next

    @property
    def last_step(self) -> int:
        """The last step, from 1, that a place has been reserved for."""
        return -(-self._reserved // self._groups_per_step)

    async def reserve(self, count: int) -> None:
        """Wait for `count` tickets and take them; woken by `release`. Places are given in order."""
        if count > self._groups_per_step:
            raise ValueError(f"asked for {count} tickets of {self._groups_per_step}; a chunk must fit into one step")
        async with self._tickets_in:
            await self._tickets_in.wait_for(lambda: self._free >= count)
            self._free -= count
            self._reserved += count

    async def put(self, sequence: int, group: GroupT) -> None:
        """Hand in the group at a place in the prompt stream; wakes `take`."""
        async with self._groups_in:
            if sequence < self._next or sequence in self._ready:
                raise ValueError(f"group {sequence} was handed in twice")
            self._ready[sequence] = group
            if sequence == self._whole:
                while self._whole in self._ready:
                    self._whole += 1
                self._groups_in.notify_all()

    async def take(self, count: int) -> list[GroupT]:
        """The next `count` groups in prompt order; waits until the first missing one is in."""
        async with self._groups_in:
            await self._groups_in.wait_for(lambda: self._whole >= self._next + count)
            wanted = range(self._next, self._next + count)
            self._next += count
            return [self._ready.pop(sequence) for sequence in wanted]

    async def release(self, count: int) -> None:
        """Give back the tickets of groups that were trained on, once actors hold the weights that came of it."""
        await self._give(count)

    async def limit(self, staleness: int) -> None:
        """From now on admit groups that may become so many versions old. Those admitted before stay and are trained on.

        After `limit(0)` steps up to `last_step` may hold older groups; the tickets that are out are owed first, so all
        later ones are drawn with the newest weights.
        """
        change, self._staleness = staleness - self._staleness, staleness
        await self._give(change * self._groups_per_step)

    async def _give(self, count: int) -> None:
        # Before anything is waited for, so that whoever gives sees the new state at once.
        self._free += count
        async with self._tickets_in:
            self._tickets_in.notify_all()
