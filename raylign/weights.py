"""Versioned, immutable, verified weight snapshots: what a learner publishes and rollout actors pull.

A snapshot is one flat array per dtype and an index of tensors into them, each with its own hash. Flat arrays
cross a process boundary without a copy; the hashes let an actor refuse a torn or foreign snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from raylign.errors import WeightError
from raylign.types import WeightVersion

SnapshotKind = Literal["adapter", "full"]

# numpy has no bfloat16; its bits travel as 16-bit integers.
_WIRE: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.float32: ("float32", torch.float32),
    torch.float16: ("float16", torch.float16),
    torch.bfloat16: ("bfloat16", torch.int16),
}
_TORCH = {name: dtype for dtype, (name, _) in _WIRE.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `offset` and the product of `shape` count elements of the `dtype` array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightSnapshot:
    """One published policy. `lora_scale` (alpha / rank) is what a fold multiplies an adapter by."""

    version: WeightVersion
    kind: SnapshotKind
    entries: tuple[TensorEntry, ...]
    arrays: Mapping[str, np.ndarray]
    sha256: str
    lora_scale: float = 1.0

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def make_snapshot(
    tensors: Mapping[str, torch.Tensor], version: WeightVersion, kind: SnapshotKind, lora_scale: float = 1.0
) -> WeightSnapshot:
    """Copy named tensors into a snapshot. Raises WeightError for a dtype that has no wire form."""
    by_dtype: dict[str, list[np.ndarray]] = {}
    offsets: dict[str, int] = {}
    entries: list[TensorEntry] = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _WIRE:
            raise WeightError(f"{name} is {tensor.dtype}; a snapshot holds {', '.join(_TORCH)}")
        dtype, wire = _WIRE[tensor.dtype]
        flat = tensor.view(wire).reshape(-1).numpy()
        offset = offsets.get(dtype, 0)
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, _sha256(flat)))
        by_dtype.setdefault(dtype, []).append(flat)
        offsets[dtype] = offset + flat.size
    arrays = {dtype: np.concatenate(flats) for dtype, flats in by_dtype.items()}
    return WeightSnapshot(version, kind, tuple(entries), arrays, weights_sha256(entries), lora_scale)


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
    names = {entry.name for entry in snapshot.entries}
    for missing in sorted(set(expected) - names):
        raise WeightError(f"snapshot {snapshot.version} lacks {missing}; it belongs to another model or adapter")
    for foreign in sorted(names - set(expected)):
        raise WeightError(f"snapshot {snapshot.version} has {foreign}, which this model does not have")
    if weights_sha256(snapshot.entries) != snapshot.sha256:
        raise WeightError(f"snapshot {snapshot.version} has an index that does not fit its hash; publish it again")
    return {entry.name: _checked_tensor(snapshot, entry, expected[entry.name]) for entry in snapshot.entries}


def _checked_tensor(snapshot: WeightSnapshot, entry: TensorEntry, shape: tuple[int, ...]) -> torch.Tensor:
    if entry.shape != shape:
        raise WeightError(f"snapshot {snapshot.version}: {entry.name} must be {shape}, got {entry.shape}")
    size = int(np.prod(entry.shape, dtype=np.int64))
    array = snapshot.arrays.get(entry.dtype, np.empty(0))
    flat = array[entry.offset : entry.offset + size]
    if flat.size != size or _sha256(flat) != entry.sha256:
        raise WeightError(f"snapshot {snapshot.version}: {entry.name} is torn (its hash differs); pull it again")
    return torch.from_numpy(flat.copy()).view(_TORCH[entry.dtype]).reshape(entry.shape)


def _sha256(flat: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest()
