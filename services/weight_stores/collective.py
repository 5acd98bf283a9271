"""Broadcast from the learner's first rank to the actors in service: gloo between CPUs, NCCL between GPUs.

    controller               learner's rank 0                    each seated actor
    seats, a new group  ───▶ waits for every seat's "here"  ◀─── says "here", or "gone" if it is not of this group
    if the members are       sets the header and the verdict ──▶ waits for the verdict
    others than last time    broadcasts the arrays, in parts ──▶ receives them

They meet in a torch TCPStore that the controller's process keeps, so that it can say "gone" for an actor that died. A
group is fixed once it is formed, so nobody enters a broadcast before all are known to be there. One who dies after that
breaks connections or lets the others wait for `timeout_s` at most. Whatever goes wrong, an actor takes the same version
from Ray's object store, where it lies anyway for those who come late, and the next broadcast forms a group anew.

Neither `ray.util.collective` nor Ray Direct Transport's two-sided transports can do this: their groups live in torch's
one default process group (the learner's ranks have theirs there already) for as long as the process, without a timeout;
and Ray kills both ends of a transfer that fails, because it cannot abort it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import distributed

from raylign.config import Config
from raylign.snapshot_bytes import bytes_of, empty_arrays, header_of, read_header, snapshot_of, write_header
from raylign.weights import TornSnapshotError, WeightSnapshot
from services.weight_stores.base import Fetched

Backend = Literal["gloo", "nccl"]
_PART_BYTES = 64 << 20
"""Broadcast at a time: what NCCL needs on the GPU, and what must get through within `timeout_s`."""
_GRACE_S = 5.0
"""How much longer than the learner an actor waits: only one of them should decide that it took too long."""
GONE = "gone"
"""Stands in the meeting store for a member that will not come; also the controller says so of one that died."""
_HERE, _GO, _OFF = "here", "go", "off"


class CollectiveStoreConfig(Config):
    """A broadcast to all actors at once."""

    type: Literal["collective"] = "collective"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """nccl needs a whole GPU for each actor and rank; auto takes it where they have one, and gloo elsewhere."""
    timeout_s: float = Field(default=15.0, gt=0)
    """How long members wait for one another, and for a part of 64 MiB, before a version goes by the object store."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One member's place in one broadcast; rank 0 is the learner's.

    A group's first round forms it. which, sha256: the policy and the snapshot that is broadcast. whole: where to take
    the version from when the broadcast fails; something that `get` of the store resolves.
    """

    meeting: str
    group: str
    round: int
    rank: int
    size: int
    backend: Backend
    timeout_s: float
    which: str
    sha256: str
    whole: Any

    def key(self, what: object) -> str:
        """In the meeting store: a rank, "header" or "verdict" of this round."""
        return f"{self.group}/{self.round}/{what}"


class MissedError(Exception):
    """A broadcast that did not happen, or broke; the version comes by the object store."""


class CollectiveStore:
    """A WeightStore of one member; see the module. `send` is the learner's part of a broadcast."""

    num_fetches = 2

    def __init__(self, get: Callable[[Any], WeightSnapshot]) -> None:
        """`get` resolves what stands in a seat's `whole`, and a ticket that is no seat."""
        self._get = get
        self._put: dict[str, WeightSnapshot] = {}
        self._meetings: dict[str, distributed.TCPStore] = {}
        self._group: _Group | None = None

    def put(self, snapshot: WeightSnapshot, which: str) -> WeightSnapshot:
        """Kept until it was broadcast; the ticket, for those who are not seated, is the object store's."""
        self._put[which] = snapshot
        return snapshot

    def fetch(self, ticket: Seat | WeightSnapshot, attempt: int = 0) -> Fetched:
        if not isinstance(ticket, Seat):
            return Fetched(ticket)
        if attempt:
            return Fetched(self._get(ticket.whole), "what was broadcast arrived torn")
        try:
            return Fetched(self._receive(ticket))
        except MissedError as error:
            return Fetched(self._get(ticket.whole), str(error))

    def send(self, seat: Seat) -> str:
        """Broadcast what was put; returns why that failed, empty if it did not."""
        snapshot = self._put.pop(seat.which, None)
        try:
            meeting = self._meeting(seat)
            if snapshot is None or snapshot.sha256 != seat.sha256:
                meeting.set(seat.key("verdict"), _OFF)
                return f"the learner does not hold snapshot {seat.sha256[:8]} any more"
            self._call_roll(seat, meeting, write_header(header_of(snapshot)))
            with self._breaking():
                group = self._seated(seat, meeting)
                for array in bytes_of(snapshot):
                    group.broadcast(array)
        except MissedError as error:
            return str(error)
        return ""

    def _call_roll(self, seat: Seat, meeting: distributed.TCPStore, header: bytes) -> None:
        """Wait until all are there, and say so. Raises MissedError where one is missing."""
        places = [seat.key(rank) for rank in range(1, seat.size)]
        try:
            meeting.wait(places, timedelta(seconds=seat.timeout_s))
            missing = [rank for rank, key in enumerate(places, 1) if meeting.get(key).decode() != _HERE]
            why = f"member(s) {missing} of {seat.size - 1} are gone"
        except RuntimeError:
            missing = [rank for rank, key in enumerate(places, 1) if not meeting.check([key])]
            why = f"member(s) {missing} of {seat.size - 1} did not come within {seat.timeout_s:g} s"
        if missing:
            meeting.set(seat.key("verdict"), _OFF)
            raise MissedError(why)
        meeting.set(seat.key("header"), header.decode())
        meeting.set(seat.key("verdict"), _GO)
        for key in [*places, seat.key("header"), seat.key("verdict")] if seat.round else ():
            # Of the round before, which everybody has left: a run has many rounds.
            meeting.delete_key(key.replace(f"/{seat.round}/", f"/{seat.round - 1}/"))

    def _receive(self, seat: Seat) -> WeightSnapshot:
        meeting = self._meeting(seat)
        is_member = seat.round == 0 or (self._group is not None and self._group.name == seat.group)
        meeting.set(seat.key(seat.rank), _HERE if is_member else GONE)
        if not is_member:
            raise MissedError("this process is not of the group: it was started after the group was formed")
        try:
            meeting.wait([seat.key("verdict")], timedelta(seconds=seat.timeout_s + _GRACE_S))
        except RuntimeError:
            raise MissedError(f"the learner did not begin within {seat.timeout_s + _GRACE_S:g} s") from None
        if meeting.get(seat.key("verdict")).decode() != _GO:
            raise MissedError("another member is missing")
        header = read_header(meeting.get(seat.key("header")), "what was broadcast")
        arrays = empty_arrays(header)
        with self._breaking():
            group = self._seated(seat, meeting)
            for array in arrays.values():
                group.broadcast(array.view(np.uint8))
        if header.snapshot.sha256 != seat.sha256:
            raise TornSnapshotError(f"what was broadcast is not snapshot {seat.sha256[:8]}; publish it again")
        return snapshot_of(header, arrays)

    def _meeting(self, seat: Seat) -> distributed.TCPStore:
        if seat.meeting not in self._meetings:
            host, _, port = seat.meeting.rpartition(":")
            try:
                store = distributed.TCPStore(host, int(port), timeout=timedelta(seconds=seat.timeout_s))
            except RuntimeError as error:
                raise MissedError(f"{seat.meeting} cannot be reached: {error}") from error
            # A new address is a new controller's, or a new learner's: nobody comes to the old one any more.
            self._meetings = {seat.meeting: store}
        return self._meetings[seat.meeting]

    def _seated(self, seat: Seat, meeting: distributed.TCPStore) -> _Group:
        """The seat's group, formed in its first round."""
        if self._group is None or self._group.name != seat.group:
            self._leave()
            self._group = _Group(seat, meeting)
        return self._group

    @contextmanager
    def _breaking(self) -> Generator[None]:
        """Leave the group at an error, so that those who wait for this member notice."""
        try:
            yield
        except RuntimeError as error:
            self._leave()
            raise MissedError(f"the broadcast broke: {str(error).splitlines()[0]}") from error

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class _Group:
    """A process group of its own, beside torch's default one."""

    def __init__(self, seat: Seat, meeting: distributed.TCPStore) -> None:
        self.name = seat.group
        self._timeout = timedelta(seconds=seat.timeout_s)
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if seat.backend == "nccl" else torch.device("cpu")
        )
        # Each group on keys, and so on connections, of its own.
        store = distributed.PrefixStore(f"{seat.group}/group", meeting)
        self._group: Any = _FORM[seat.backend](store, seat.rank, seat.size, self._timeout)
        self._is_source = seat.rank == 0

    def broadcast(self, data: np.ndarray) -> None:
        """Fill `data` (uint8) with the learner's. Raises RuntimeError when a member is lost or too slow."""
        options = distributed.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        for part in _parts(data):
            # Read-only memory is only ever read: it is the learner's.
            host = torch.from_dlpack(part) if self._is_source else torch.from_numpy(part)
            sent = host.to(self._device)
            self._group.broadcast([sent], options).wait()
            if not self._is_source and sent is not host:
                host.copy_(sent)

    def close(self) -> None:
        """Drop the connections; for good."""
        self._group.abort()
        del self._group


def _parts(data: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, data.size, _PART_BYTES):
        yield data[start : start + _PART_BYTES]


def _form_gloo(store: distributed.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return distributed.ProcessGroupGloo(store, rank, size, timeout)


def _form_nccl(store: distributed.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Waits that end with an error after the timeout, and no watchdog that ends the process: read when it is made."""
    nccl: Any = getattr(distributed, "ProcessGroupNCCL")  # noqa: B009 - torch has it in its CUDA builds only
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        options = nccl.Options()
        options._timeout = timeout
        return nccl(store, rank, size, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_FORM: dict[Backend, Callable[[distributed.Store, int, int, timedelta], Any]] = {
    "gloo": _form_gloo,
    "nccl": _form_nccl,
}
