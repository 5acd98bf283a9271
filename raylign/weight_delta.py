"""What changed between two snapshots, without loss: for weights that travel further than the next process.

One optimiser step moves a number by a few units in its last place. So the bit patterns are subtracted as integers
(modulo 2^bits; any bits do, a NaN's too), the sign is moved to the last bit (zigzag: 0, -1, 1, -2 ... -> 0, 1, 2, 3
...), and the bytes of equal significance are laid together: the high planes are nearly all zero and vanish under
zstd; the low ones stay. Blocks are independent, so that several threads pack and unpack them.

A delta's index and hashes are those of the weights that come out, and they are checked; so nothing is trusted that
was computed on the way. Both ends keep the last whole snapshot: the learner what it last published, the actor what it
last pulled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raylign.errors import WeightError
from raylign.weights import BaseVersion, TornSnapshotError, WeightSnapshot, check_contents, in_threads

_BLOCK = 1 << 16
"""Elements per block: few enough for the cache (4 times faster than 2^18), enough for the codec."""
_LENGTHS = ".lengths"
_PAYS_BELOW = 0.75
"""Share of the whole above which a delta is not worth its packing."""
_UNSIGNED: Mapping[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True)
class _Block:
    """Part of one array: elements [start, stop)."""

    dtype: str
    start: int
    stop: int


def make_delta(base: WeightSnapshot, new: WeightSnapshot) -> WeightSnapshot:
    """What turns `base` into `new`, as a snapshot of kind "delta".

    Raises WeightError if either is a delta itself, or if they do not hold tensors of the same names, dtypes and shapes.
    """
    for whole in (base, new):
        if whole.base is not None:
            raise WeightError(f"snapshot {whole.version} is a delta; a delta lies between two whole snapshots")
    if base.kind != new.kind or _layout(base) != _layout(new):
        raise WeightError(
            f"snapshots {base.version} and {new.version} do not hold the same tensors; publish {new.version} whole"
        )
    blocks = _blocks({dtype: array.size for dtype, array in new.arrays.items()})
    codec = _codec()

    def pack(block: _Block) -> list[bytes]:
        part = slice(block.start, block.stop)
        planes = _to_planes(base.arrays[block.dtype][part], new.arrays[block.dtype][part])
        return [codec.compress(plane, asbytes=True) if plane.any() else b"" for plane in planes]

    packed = in_threads(pack, blocks, new.num_bytes)
    arrays: dict[str, np.ndarray] = {}
    for dtype in new.arrays:
        mine = [planes for block, planes in zip(blocks, packed, strict=True) if block.dtype == dtype]
        arrays[dtype] = np.frombuffer(b"".join(plane for planes in mine for plane in planes), np.uint8)
        arrays[dtype + _LENGTHS] = np.array([len(plane) for planes in mine for plane in planes], np.int64)
    return replace(new, kind="delta", arrays=arrays, base=BaseVersion(base.version, base.sha256))


def apply_delta(base: WeightSnapshot | None, delta: WeightSnapshot) -> WeightSnapshot:
    """The whole snapshot that `delta` was made from, bit for bit; `base` is what the caller holds, None for nothing.

    A delta that was applied before changes nothing. Raises WeightError, naming both versions, if it changes another
    snapshot than `base`; and, naming the tensor, if what comes out is not what was published.
    """
    if delta.base is None:
        raise WeightError(f"snapshot {delta.version} is whole; there is nothing to apply it to")
    if base is not None and (base.version, base.sha256) == (delta.version, delta.sha256):
        return base
    if base is None or (base.version, base.sha256) != (delta.base.version, delta.base.sha256):
        held = "none is held" if base is None else f"the one held is {base.version} ({base.sha256[:8]})"
        changed = f"{delta.base.version} ({delta.base.sha256[:8]})"
        raise WeightError(
            f"snapshot {delta.version} is what changed since {changed}, and {held}; pull {delta.version} whole"
        )
    arrays = {dtype: np.empty_like(array) for dtype, array in base.arrays.items()}
    blocks = _blocks({dtype: array.size for dtype, array in arrays.items()})
    packed = _cut(delta, blocks, {dtype: array.itemsize for dtype, array in arrays.items()})
    codec = _codec()

    def unpack(number: int) -> None:
        block = blocks[number]
        part = slice(block.start, block.stop)
        old = base.arrays[block.dtype][part]
        planes = np.zeros((old.itemsize, old.size), np.uint8)
        for plane, data in zip(planes, packed[number], strict=True):
            if data.size:
                plane[:] = np.frombuffer(codec.decompress(data, decompressed_size=old.size), np.uint8)
        arrays[block.dtype][part] = _from_planes(old, planes)

    try:
        in_threads(unpack, range(len(blocks)), base.num_bytes)
    except OSError as error:
        raise _torn(delta) from error
    whole = replace(delta, kind=base.kind, arrays=arrays, base=None)
    check_contents(whole)
    return whole


def worthwhile_delta(base: WeightSnapshot, new: WeightSnapshot) -> WeightSnapshot | None:
    """`make_delta`, or None where it would be little smaller than `new` itself."""
    delta = make_delta(base, new)
    return delta if delta.num_bytes < _PAYS_BELOW * new.num_bytes else None


def _layout(snapshot: WeightSnapshot) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(entry.name, entry.dtype, entry.shape, entry.offset) for entry in snapshot.entries]


def _blocks(sizes: Mapping[str, int]) -> list[_Block]:
    return [
        _Block(dtype, start, min(start + _BLOCK, size))
        for dtype, size in sizes.items()
        for start in range(0, size, _BLOCK)
    ]


def _cut(delta: WeightSnapshot, blocks: list[_Block], itemsizes: Mapping[str, int]) -> list[list[np.ndarray]]:
    """Each block's packed planes, as views of the payload. Raises WeightError where the lengths do not add up."""
    packed: list[list[np.ndarray]] = []
    for dtype, itemsize in itemsizes.items():
        payload, lengths = delta.arrays.get(dtype), delta.arrays.get(dtype + _LENGTHS)
        num_blocks = sum(block.dtype == dtype for block in blocks)
        if payload is None or lengths is None or lengths.size != num_blocks * itemsize:
            raise _torn(delta)
        if payload.size != lengths.sum() or (lengths < 0).any():
            raise _torn(delta)
        planes = np.split(payload, np.cumsum(lengths)[:-1]) if lengths.size else []
        packed += [planes[start : start + itemsize] for start in range(0, len(planes), itemsize)]
    return packed


def _torn(delta: WeightSnapshot) -> TornSnapshotError:
    return TornSnapshotError(
        f"snapshot {delta.version} is torn: its changes cannot be unpacked; pull it again, or whole"
    )


def _to_planes(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The zigzag differences of the bit patterns, (bytes per element, N) uint8."""
    unsigned = _UNSIGNED[new.itemsize]
    change = new.view(unsigned) - old.view(unsigned)
    # (c << 1) ^ (c < 0 ? all ones : 0), in unsigned arithmetic.
    zigzag = (change << 1) ^ (0 - (change >> (8 * new.itemsize - 1)))
    return np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, new.itemsize).T)


def _from_planes(old: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """The inverse: `old` with its differences added."""
    unsigned = _UNSIGNED[old.itemsize]
    zigzag_bytes = np.empty(planes.shape[::-1], np.uint8)
    for column, plane in enumerate(planes):  # 3 times faster than a transposed copy
        zigzag_bytes[:, column] = plane
    zigzag = zigzag_bytes.view(unsigned).reshape(-1)
    change = (zigzag >> 1) ^ (0 - (zigzag & 1))
    return (old.view(unsigned) + change).view(old.dtype)


def _codec() -> Any:
    import pyarrow as pa

    return pa.Codec("zstd", compression_level=1)
