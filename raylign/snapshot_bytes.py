"""A snapshot as bytes, for whatever is not an object store: a header of plain JSON, and its arrays one after another.

The header holds all but the numbers: version, kind, index with every tensor's hash, and how long each array is. Arrays
follow in a fixed order, those of the widest numbers first, so that each is aligned. In a file they stand behind a
safetensors head, which makes it one that any tool reads: of a whole snapshot each tensor by its name, of a delta the
packed arrays. Nothing is pickled. What is read is checked against the header; whether the numbers are those that were
published is asked by whoever loads them (`raylign.weights.check_contents`), however they came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from raylign.weights import BaseVersion, SnapshotKind, TensorEntry, TornSnapshotError, WeightSnapshot

FORMAT = 1
_HEAD_LENGTH_BYTES = 8
# A head as long as this would be no head: it guards against reading a length from foreign bytes.
_MOST_HEAD_BYTES = 1 << 28
_SAFETENSORS: Mapping[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "uint8": "U8",
}
_NUMPY_SAFETENSORS: Mapping[str, str] = {"|u1": "U8", "<i8": "I64"}


@dataclass(frozen=True, slots=True)
class Header:
    """All of a snapshot but its numbers. lengths: (key, numpy type, elements) of each array, in the order of bytes."""

    snapshot: WeightSnapshot
    lengths: tuple[tuple[str, str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays together."""
        return sum(np.dtype(dtype).itemsize * count for _, dtype, count in self.lengths)


def header_of(snapshot: WeightSnapshot) -> Header:
    """The header, without a copy of anything."""
    keys = sorted(snapshot.arrays, key=lambda key: (-snapshot.arrays[key].itemsize, key))
    lengths = tuple((key, snapshot.arrays[key].dtype.str, snapshot.arrays[key].size) for key in keys)
    return Header(replace(snapshot, arrays={}), lengths)


def write_header(header: Header) -> bytes:
    """As JSON; the same header gives the same bytes."""
    snapshot = header.snapshot
    base = None if snapshot.base is None else [snapshot.base.version, snapshot.base.sha256]
    data = {
        "format": FORMAT,
        "version": snapshot.version,
        "kind": snapshot.kind,
        "sha256": snapshot.sha256,
        "lora_scale": snapshot.lora_scale,
        "base": base,
        "arrays": [list(one) for one in header.lengths],
        "entries": [[one.name, one.dtype, list(one.shape), one.offset, one.sha256] for one in snapshot.entries],
    }
    return json.dumps(data, separators=(",", ":")).encode()


def read_header(data: bytes, where: str) -> Header:
    """The inverse. Raises TornSnapshotError, naming `where`, for bytes that are no header."""
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT or raw["kind"] not in get_args(SnapshotKind):
            raise ValueError(f"format {raw['format']!r} and kind {raw['kind']!r} are unknown")
        entries = tuple(
            TensorEntry(name, dtype, tuple(shape), offset, sha256)
            for name, dtype, shape, offset, sha256 in raw["entries"]
        )
        base = None if raw["base"] is None else BaseVersion(*raw["base"])
        lengths = tuple((str(key), np.dtype(dtype).str, int(count)) for key, dtype, count in raw["arrays"])
        whole = WeightSnapshot(raw["version"], raw["kind"], entries, {}, raw["sha256"], float(raw["lora_scale"]), base)
        return Header(whole, lengths)
    except (ValueError, TypeError, KeyError) as error:
        raise TornSnapshotError(f"{where} is not the header of a snapshot ({error}); publish it again") from error


def bytes_of(snapshot: WeightSnapshot) -> list[np.ndarray]:
    """The arrays' bytes in the header's order, without a copy."""
    return [np.ascontiguousarray(snapshot.arrays[key]).view(np.uint8) for key, _, _ in header_of(snapshot).lengths]


def empty_arrays(header: Header) -> dict[str, np.ndarray]:
    """Room for the arrays, in the header's order."""
    return {key: np.empty(count, dtype) for key, dtype, count in header.lengths}


def snapshot_of(header: Header, arrays: Mapping[str, np.ndarray]) -> WeightSnapshot:
    """The snapshot of a header and its arrays."""
    return replace(header.snapshot, arrays=dict(arrays))


def safetensors_parts(snapshot: WeightSnapshot) -> list[bytes | np.ndarray]:
    """A safetensors file in pieces, to be written one after another: its head, and the arrays without a copy."""
    header = header_of(snapshot)
    tensors = _by_name(snapshot, header)
    described: dict[str, Any] = {
        "__metadata__": {"raylign.version": str(snapshot.version), "raylign.kind": snapshot.kind},
        **{name: {"dtype": dtype, "shape": shape, "data_offsets": span} for name, dtype, shape, span in tensors},
    }
    head = json.dumps(described, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _HEAD_LENGTH_BYTES)
    return [len(head).to_bytes(_HEAD_LENGTH_BYTES, "little") + head, *bytes_of(snapshot)]


def read_safetensors(header: Header, data: np.ndarray, where: str) -> WeightSnapshot:
    """The snapshot of a file's bytes (uint8), whose memory it keeps. Raises TornSnapshotError, naming `where`."""
    head_bytes = int.from_bytes(data[:_HEAD_LENGTH_BYTES].tobytes(), "little")
    wanted = _HEAD_LENGTH_BYTES + head_bytes + header.num_bytes
    if head_bytes > _MOST_HEAD_BYTES or data.size != wanted:
        raise TornSnapshotError(
            f"{where} has {data.size:,} bytes and snapshot {header.snapshot.version} takes "
            f"{header.num_bytes:,} besides its head; it is torn or foreign, so publish it again"
        )
    arrays: dict[str, np.ndarray] = {}
    start = _HEAD_LENGTH_BYTES + head_bytes
    for key, dtype, count in header.lengths:
        stop = start + np.dtype(dtype).itemsize * count
        arrays[key] = data[start:stop].view(dtype)
        start = stop
    return snapshot_of(header, arrays)


def _by_name(snapshot: WeightSnapshot, header: Header) -> Sequence[tuple[str, str, list[int], list[int]]]:
    """(name, safetensors type, shape, [begin, end)) of what a file holds, in the order of bytes."""
    found: list[tuple[str, str, list[int], list[int]]] = []
    start = 0
    for key, dtype, count in header.lengths:
        itemsize = np.dtype(dtype).itemsize
        if snapshot.base is not None:
            found.append((key, _NUMPY_SAFETENSORS[dtype], [count], [start, start + itemsize * count]))
        else:
            mine = sorted((one for one in snapshot.entries if one.dtype == key), key=lambda one: (one.offset, one.size))
            for one in mine:
                begin = start + itemsize * one.offset
                found.append((one.name, _SAFETENSORS[key], list(one.shape), [begin, begin + itemsize * one.size]))
        start += itemsize * count
    return found
