"""The buffer between producers and the learner: tickets bound the age of what is trained on.

A producer reserves tickets before it draws a sample; the learner takes groups in strict prompt order; tickets
come back only when the actors hold the new weights. With (S + 1) x P tickets and P groups per step, no group
is ever more than S versions old when it is trained on. Handing groups out as they finish, or releasing at the
optimiser step, would break the bound (`tests/unit/test_buffer.py` simulates all three).
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

GroupT = TypeVar("GroupT")


class TicketBuffer(Generic[GroupT]):
    """See the module. Single event loop, one consumer."""

    def __init__(self, groups_per_step: int, max_staleness: int, first_sequence: int = 0) -> None:
        self._free = (max_staleness + 1) * groups_per_step
        self._capacity = self._free
        self._next = first_sequence
        self._ready: dict[int, GroupT] = {}
        self._changed = asyncio.Condition()

    async def reserve(self, count: int) -> None:
        """Wait for `count` tickets and take them; woken by `release`."""
        if count > self._capacity:
            raise ValueError(f"asked for {count} tickets of {self._capacity}; a chunk must fit into one step")
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    async def put(self, sequence: int, group: GroupT) -> None:
        """Hand in the group at a place in the prompt stream; wakes `take`."""
        async with self._changed:
            if sequence < self._next or sequence in self._ready:
                raise ValueError(f"group {sequence} was handed in twice")
            self._ready[sequence] = group
            self._changed.notify_all()

    async def take(self, count: int) -> list[GroupT]:
        """The next `count` groups in prompt order; waits until the first missing one is in."""
        async with self._changed:
            wanted = range(self._next, self._next + count)
            await self._changed.wait_for(lambda: all(sequence in self._ready for sequence in wanted))
            self._next += count
            return [self._ready.pop(sequence) for sequence in wanted]

    async def release(self, count: int) -> None:
        """Give back the tickets of groups that were trained on, once actors hold the weights that came of it."""
        async with self._changed:
            self._free += count
            self._changed.notify_all()
