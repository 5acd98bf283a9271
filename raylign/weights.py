"""Versioned, immutable, verified weight snapshots: what a learner publishes and rollout actors pull.

A snapshot is one flat array per dtype and an index of tensors into them, each with its own hash. Flat arrays
cross a process boundary without a copy; the hashes let an actor refuse a torn or foreign snapshot. Hashing costs as
much as all the rest together, and the hash of one tensor does not wait for another's: several threads share them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from raylign.errors import WeightError
from raylign.types import WeightVersion

SnapshotKind = Literal["adapter", "full", "delta", "packed"]
_T = TypeVar("_T")
_R = TypeVar("_R")

# What has no type in numpy travels as the bits of an integer.
_WIRE: dict[torch.dtype, tuple[str, type[np.generic]]] = {
    torch.float32: ("float32", np.float32),
    torch.float16: ("float16", np.float16),
    torch.bfloat16: ("bfloat16", np.int16),
    torch.float8_e4m3fn: ("float8_e4m3fn", np.uint8),
    torch.float8_e8m0fnu: ("float8_e8m0fnu", np.uint8),
    torch.uint8: ("uint8", np.uint8),
}
_TORCH = {name: dtype for dtype, (name, _) in _WIRE.items()}
_MOST_THREADS = 4
# Below this, starting threads costs more than they save.
_THREADS_FROM_BYTES = 1 << 20


class TornSnapshotError(WeightError):
    """What arrived is not what was published: once it is published again, it may well arrive whole."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` and the product of `shape` count elements of the `dtype` array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    sha256: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class BaseVersion:
    """The snapshot that a delta says the changes of."""

    version: WeightVersion
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """One published policy. `lora_scale` (alpha / rank) is what a fold multiplies an adapter by.

    A snapshot of kind "delta" has a `base`: its arrays are what changed since (`raylign.weight_delta`), its index and
    hashes are those of the weights that come out. Only whole snapshots can be loaded. One of kind "packed" holds some
    weights quantised, for a low-precision copy to take (`raylign.precision.broadcast`).
    """

    version: WeightVersion
    kind: SnapshotKind
    entries: tuple[TensorEntry, ...]
    arrays: Mapping[str, np.ndarray]
    sha256: str
    lora_scale: float = 1.0
    base: BaseVersion | None = None

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def make_snapshot(
    tensors: Mapping[str, torch.Tensor], version: WeightVersion, kind: SnapshotKind, lora_scale: float = 1.0
) -> WeightSnapshot:
    """Copy named tensors into a snapshot. Raises WeightError for a dtype that has no wire form."""
    totals: dict[str, int] = {}
    offsets: dict[str, int] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _WIRE:
            raise WeightError(f"{name} is {tensor.dtype}; a snapshot holds {', '.join(_TORCH)}")
        dtype, _ = _WIRE[tensor.dtype]
        offsets[name] = totals.get(dtype, 0)
        totals[dtype] = offsets[name] + tensor.numel()
    arrays = {dtype: np.empty(totals[dtype], wire) for dtype, wire in _WIRE.values() if dtype in totals}

    def gather(name: str) -> TensorEntry:
        tensor = tensors[name].detach()
        dtype, _ = _WIRE[tensor.dtype]
        flat = arrays[dtype][offsets[name] : offsets[name] + tensor.numel()]
        # One copy, wherever the tensor lies, and its bytes are hashed while the cache holds them.
        torch.from_numpy(flat).view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return TensorEntry(name, dtype, tuple(tensor.shape), offsets[name], _sha256(flat))

    entries = tuple(in_threads(gather, sorted(tensors), sum(array.nbytes for array in arrays.values())))
    return WeightSnapshot(version, kind, entries, arrays, weights_sha256(entries), lora_scale)


def weights_sha256(entries: Sequence[TensorEntry]) -> str:
    """One hash over names, shapes, dtypes and contents, in name order."""
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}|{entry.sha256}\n".encode())
    return digest.hexdigest()


def verify_snapshot(snapshot: WeightSnapshot, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The snapshot's tensors by name, after checking names and shapes against `expected` and every hash.

    The tensors are fresh copies. Raises WeightError naming the first tensor that is missing, foreign,
    misshapen or torn; nothing has been loaded then.
    """
    return {name: tensor.clone() for name, tensor in view_snapshot(snapshot, expected).items()}


def view_snapshot(snapshot: WeightSnapshot, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """As `verify_snapshot`, but the tensors lie in the snapshot's own memory: to copy from at once, never to write to.

    That memory may be mapped read-only from an object store, where torch does not see that it must not be written.
    """
    if snapshot.base is not None:
        raise WeightError(
            f"snapshot {snapshot.version} is what changed since {snapshot.base.version}; apply it to that one first"
        )
    names = {entry.name for entry in snapshot.entries}
    for missing in sorted(set(expected) - names):
        raise WeightError(f"snapshot {snapshot.version} lacks {missing}; it belongs to another model or adapter")
    for foreign in sorted(names - set(expected)):
        raise WeightError(f"snapshot {snapshot.version} has {foreign}, which this model does not have")
    for entry in snapshot.entries:
        if entry.shape != expected[entry.name]:
            raise WeightError(
                f"snapshot {snapshot.version}: {entry.name} must be {expected[entry.name]}, got {entry.shape}"
            )
    check_contents(snapshot)
    return {entry.name: _view(snapshot, entry) for entry in snapshot.entries}


def check_contents(snapshot: WeightSnapshot) -> None:
    """Hash everything. Raises TornSnapshotError if the index or a tensor of a whole snapshot is not as published."""
    if weights_sha256(snapshot.entries) != snapshot.sha256:
        raise TornSnapshotError(
            f"snapshot {snapshot.version} has an index that does not fit its hash; publish it again"
        )

    def is_whole(entry: TensorEntry) -> bool:
        flat = _flat(snapshot, entry)
        return flat.size == entry.size and _sha256(flat) == entry.sha256

    for entry, whole in zip(snapshot.entries, in_threads(is_whole, snapshot.entries, snapshot.num_bytes), strict=True):
        if not whole:
            raise TornSnapshotError(
                f"snapshot {snapshot.version}: {entry.name} is torn (its hash differs); pull it again"
            )


def in_threads(work: Callable[[_T], _R], items: Iterable[_T], num_bytes: int) -> list[_R]:
    """`work` of every item, in order; in a few threads where there are bytes enough to pay for them.

    For work that releases the interpreter's lock: hashes, copies, compression.
    """
    num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
    if num_threads == 1 or num_bytes < _THREADS_FROM_BYTES:
        return [work(item) for item in items]
    with ThreadPoolExecutor(num_threads, "weights") as pool:
        return list(pool.map(work, items))


def _flat(snapshot: WeightSnapshot, entry: TensorEntry) -> np.ndarray:
    return snapshot.arrays.get(entry.dtype, np.empty(0))[entry.offset : entry.offset + entry.size]


def _view(snapshot: WeightSnapshot, entry: TensorEntry) -> torch.Tensor:
    # DLPack takes read-only memory, which torch.from_numpy warns of.
    return torch.from_dlpack(_flat(snapshot, entry)).view(_TORCH[entry.dtype]).view(entry.shape)


def _sha256(flat: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest()
