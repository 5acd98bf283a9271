"""Ray Direct Transport over NIXL: an actor reads the learner's memory itself, over RDMA where there is any.

The transport is one-sided, so nobody has to meet anybody: actors that come, go or die concern no other, and one that
comes late reads the newest snapshot like the rest. (Ray's two-sided transports, gloo and NCCL, need a group that is
fixed when it is made, and Ray kills both ends of a transfer that fails, the learner
too; `collective` does without them.)
The learner keeps what it put last of each policy; the ticket carries the header. Needs the package `nixl`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import field_validator

from raylign.config import Config
from raylign.snapshot_bytes import bytes_of, header_of, read_header, snapshot_of, write_header
from raylign.weights import TornSnapshotError, WeightSnapshot
from services.weight_stores.base import Fetched

TRANSPORT = "nixl"
_KEPT = 2
"""An actor may still be reading the one before the newest."""


class DirectStoreConfig(Config):
    """Ray Direct Transport over NIXL."""

    type: Literal["direct"] = "direct"

    @field_validator("type")
    @classmethod
    def _check_installed(cls, value: Literal["direct"]) -> Literal["direct"]:
        import importlib.util

        if importlib.util.find_spec("nixl") is None:
            raise ValueError("needs the package nixl on every node: pip install nixl; or another weight_store.type")
        return value


@dataclass(frozen=True, slots=True)
class DirectTicket:
    """What to read, and what it is. The reference is inside, so that Ray does not fetch it by itself."""

    header: bytes
    arrays: Any


class DirectStore:
    """A WeightStore over the learner's memory; see the module. Its actors need `enable_tensor_transport`."""

    num_fetches = 2

    def __init__(self) -> None:
        self._kept: dict[str, deque[Any]] = {}

    def put(self, snapshot: WeightSnapshot, which: str) -> DirectTicket:
        import ray

        arrays = [torch.from_dlpack(array) for array in bytes_of(snapshot)]
        reference = ray.put(arrays, _tensor_transport=TRANSPORT)
        self._kept.setdefault(which, deque(maxlen=_KEPT)).append(reference)
        return DirectTicket(write_header(header_of(snapshot)), reference)

    def fetch(self, ticket: DirectTicket, attempt: int = 0) -> Fetched:
        import ray
        from ray.exceptions import RayError

        header = read_header(ticket.header, "a direct ticket")
        try:
            arrays: list[torch.Tensor] = ray.get(ticket.arrays)
        except RayError as error:
            raise TornSnapshotError(
                f"snapshot {header.snapshot.version} cannot be read from the learner's memory ({error}); "
                "publish it again"
            ) from error
        pairs = zip(header.lengths, arrays, strict=True)
        return Fetched(snapshot_of(header, {key: array.numpy().view(dtype) for (key, dtype, _), array in pairs}))
