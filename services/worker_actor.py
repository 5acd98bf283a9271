"""The one Ray actor shell: hosts a rollout engine, a learner rank, or (colocated) both. It only forwards."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from learner.checkpoint import Part, discard_parts, finish_checkpoint, load_checkpoint, save_checkpoint, save_part
from learner.parallel import RankGroup
from raylign.errors import RaylignError
from raylign.types import RolloutGroup, WeightVersion
from raylign.weights import WeightSnapshot
from rollout.drawn import WEIGHTS_OF, Pulled, Slot
from rollout.engine import ChunkRequest, Probe, RolloutEngine, WeightSlot, outputs_only
from services.assembly import build_engine, build_learner
from services.config import RunConfig
from services.ray_errors import NotPulledError
from services.roles import WhichPolicy
from services.weight_stores import Seat, Ticket, make_weight_store, take


class Worker:
    """See the module. `ping` and `apply` are what RLlib's FaultTolerantActorManager calls."""

    def __init__(self, config: RunConfig, rollout: bool, rank: int | None) -> None:
        self._config = config
        self._rank = rank
        self._engine: RolloutEngine[Any] | None = None
        self._refusal: RaylignError | None = None
        try:
            self._engine = build_engine(config) if rollout else None
        except RaylignError as error:
            # What a constructor raises reaches the driver as the text of a dead actor; a ping's answer as itself.
            self._refusal = error
        self._learner: Any = None
        self._weights: Any = make_weight_store(config.weight_store, ray.get)
        self._pulled: set[WeightSlot] = set()

    def ping(self) -> str:
        """Raises what kept the engine from being built."""
        if self._refusal is not None:
            raise self._refusal
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    def peak_memory_bytes(self) -> int:
        """Peak resident memory of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def free_address(self) -> str:
        """host:port on this node, for ranks to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    # Rollout
    def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        self._check_pulled(WEIGHTS_OF[request.slot])
        groups: list[RolloutGroup] = self._engine.generate(request)  # type: ignore[union-attr]  # rollout workers only
        return [outputs_only(group) for group in groups] if request.slot == "draft" else groups

    def probe(self, text: str, slot: Slot) -> Probe:
        self._check_pulled(WEIGHTS_OF[slot])
        return self._engine.probe(text, slot)  # type: ignore[union-attr]

    def precision_report(self) -> dict[Slot, str]:
        return self._engine.precision_report  # type: ignore[union-attr]

    def pull(self, snapshot: Ticket, slot: WeightSlot) -> Pulled:
        def load(fetched: WeightSnapshot) -> Pulled:
            if fetched.kind == "delta":
                self._check_pulled(slot)
            return self._engine.pull(fetched, slot)  # type: ignore[union-attr]

        began_s = time.time()
        report, fetched = take(self._weights, snapshot, load)
        self._pulled.add(slot)
        work = report.work and replace(report.work, start_s=began_s, seconds=time.time() - began_s)
        return replace(report, detour=fetched.detour, work=work)

    def _check_pulled(self, slot: WeightSlot) -> None:
        """Tell the fleet, which may not know that this process is a new one."""
        if slot not in self._pulled:
            raise NotPulledError(slot)

    # Learner
    def join_ranks(self, init_method: str) -> None:
        """Build this rank's learner, once rank 0's address is known."""
        ranks = RankGroup.connect(self._rank or 0, self._config.learner.num_ranks, init_method)
        self._learner = build_learner(self._config, ranks)

    def learner_call(self, verb: str, *args: Any) -> Any:
        """Run one verb of the learner."""
        return getattr(self._learner, verb)(*args)

    def publish(self, version: WeightVersion, which: WhichPolicy) -> tuple[Ticket, tuple[str, str]]:
        """A ticket, and kind and hash of the snapshot as a receipt that is cheap to fetch."""
        snapshot = self._learner.publish(version, which)
        return self._weights.put(snapshot, which), (snapshot.kind, snapshot.sha256)

    def publish_changes(
        self, version: WeightVersion, which: WhichPolicy
    ) -> tuple[Ticket | None, Ticket, tuple[str, str]]:
        """Tickets of what changed, if that is worth sending, and of the whole; and the receipt of what to send."""
        delta, whole, kind = self._learner.publish_changes(version, which)
        whole_ticket = self._weights.put(whole, which)
        return None if delta is None else self._weights.put(delta, which), whole_ticket, (kind, whole.sha256)

    def send(self, seat: Seat) -> str:
        """The learner's part of a broadcast; why it failed, if it did."""
        return self._weights.send(seat)  # seats are given where the store is collective

    def save(self, folder: str, record: Mapping[str, Any]) -> None:
        save_checkpoint(Path(folder), self._learner.state_dict(), record)

    def save_part(self, folder: str, token: str) -> Part:
        """A sharded rank's file of a checkpoint, which `finish_save` completes."""
        many = self._config.learner.num_ranks
        return save_part(Path(folder), token, self._learner.state_dict(), self._rank or 0, many)

    def finish_save(self, folder: str, token: str, parts: list[Part], record: Mapping[str, Any]) -> None:
        finish_checkpoint(Path(folder), token, parts, self._learner.state_values(), record)

    def discard_parts(self, folder: str, token: str) -> None:
        discard_parts(Path(folder), token)

    def load(self, folder: str) -> None:
        self._learner.load_state_dict(load_checkpoint(Path(folder)).state)


class RolloutWorker(Worker):
    """The name that `ps` and Ray's dashboard show for a rollout actor."""


class LearnerWorker(Worker):
    """The name for a learner rank."""


class ColocatedWorker(Worker):
    """The name for a rollout actor and learner rank in one."""
