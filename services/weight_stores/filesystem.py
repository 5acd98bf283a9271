"""A shared folder or bucket: anything that fsspec reaches by a URL.

    <path>/weights-<process>/rollout-000007-v6/weights.safetensors   the numbers
                                               manifest.json         the rest of the snapshot; written last

Nothing is changed once it has its name: on local and network file systems a file is written beside its final name and
renamed, buckets write an object whole or not at all. The ticket holds the manifest's hash, and the manifest every
tensor's, so whatever else lies there is refused. What is torn or not there (yet, on a store that is consistent in the
end only) is read again after a moment. Files are not synced to the disk: they need not outlive a power cut, and a torn
one is found out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from raylign.config import Config
from raylign.errors import ClusterError
from raylign.snapshot_bytes import header_of, read_header, read_safetensors, safetensors_parts, write_header
from raylign.weights import TornSnapshotError, WeightSnapshot
from services.weight_stores.base import Fetched

MANIFEST = "manifest.json"
TENSORS = "weights.safetensors"
_PART_BYTES = 64 << 20
"""A large object is fetched in parts of this size, several at a time where the file system can."""


class FilesystemStoreConfig(Config):
    """A folder that learner and actors share, or a bucket."""

    type: Literal["filesystem"] = "filesystem"
    path: str
    """An absolute folder on every node, or a URL that fsspec knows: `file:///mnt/weights`, `s3://bucket/weights`."""
    keep: int = Field(default=3, ge=2)
    """Newest snapshots of each policy that are kept; an actor may still be reading the one before the newest."""
    num_reads: int = Field(default=4, ge=1)
    """How often an actor reads a snapshot that is torn or not there, before it is asked for anew."""
    first_wait_s: float = Field(default=0.1, ge=0)
    """Seconds before the second read; doubled before each further one."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        import fsspec

        protocol = path.split("://", 1)[0] if "://" in path else "file"
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise ValueError(f"weight_store.path {path!r} cannot be reached: {error}") from None
        if protocol == "memory":
            raise ValueError(f"weight_store.path {path!r} is one process's own memory; name a folder or a bucket")
        if "://" not in path and not Path(path).is_absolute():
            raise ValueError(f"weight_store.path must be absolute or a URL, as actors run elsewhere; got {path!r}")
        return path


@dataclass(frozen=True, slots=True)
class FileTicket:
    """Where a snapshot lies, and the hash of its manifest."""

    folder: str
    manifest_sha256: str


class FilesystemStore:
    """A WeightStore in a folder; see the module."""

    def __init__(
        self,
        path: str,
        keep: int = 3,
        num_reads: int = 4,
        first_wait_s: float = 0.1,
        wait: Callable[[float], None] = time.sleep,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(path)
        self._files: Any = filesystem
        self._is_local = "file" in (
            [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
        )
        # Nobody else writes here, neither another run nor this run's learner once it was started anew.
        self._root = f"{str(root).rstrip('/')}/weights-{uuid.uuid4().hex[:8]}"
        self._keep, self.num_fetches, self._first_wait_s, self._wait = keep, num_reads, first_wait_s, wait
        self._written: dict[str, deque[str]] = {}
        self._count = 0
        self._part_bytes = part_bytes

    def put(self, snapshot: WeightSnapshot, which: str) -> FileTicket:
        self._count += 1
        folder = f"{self._root}/{which}-{self._count:06d}-v{snapshot.version}"
        manifest = write_header(header_of(snapshot))
        try:
            self._files.makedirs(folder, exist_ok=True)
            self._write(f"{folder}/{TENSORS}", safetensors_parts(snapshot))
            self._write(f"{folder}/{MANIFEST}", [manifest])
        except OSError as error:
            self._remove(folder)
            raise ClusterError(
                f"cannot write {snapshot.num_bytes:,} bytes of weights to {folder}: {error}. Free some space or mend "
                "weight_store.path, then `raylign resume`"
            ) from error
        self._retire(folder, which)
        return FileTicket(folder, hashlib.sha256(manifest).hexdigest())

    def fetch(self, ticket: FileTicket, attempt: int = 0) -> Fetched:
        if attempt:
            self._wait(self._first_wait_s * 2 ** (attempt - 1))
            # What was listed or looked up before the wait would be answered from memory.
            self._files.invalidate_cache()
        path = f"{ticket.folder}/{MANIFEST}"
        manifest = self._read(path)
        if hashlib.sha256(manifest.data).hexdigest() != ticket.manifest_sha256:
            raise TornSnapshotError(f"{path} is not what the learner wrote (its hash differs); publish it again")
        path = f"{ticket.folder}/{TENSORS}"
        return Fetched(read_safetensors(read_header(manifest.tobytes(), path), self._read(path), path))

    def _write(self, path: str, parts: Iterable[bytes | np.ndarray]) -> None:
        """Write a file that has its name only once it is whole."""
        partial = f"{path}.partial" if self._is_local else path
        with self._files.open(partial, "wb") as file:
            for part in parts:
                file.write(part if isinstance(part, bytes) else part.data)
        if self._is_local:
            os.replace(partial, path)

    def _read(self, path: str) -> np.ndarray:
        """A file's bytes, in memory of their own: what is mapped from a file goes away with it."""
        try:
            num_bytes = int(self._files.size(path) or 0)
            starts = range(0, num_bytes, self._part_bytes)
            if self._is_local or len(starts) <= 1:
                return self._read_at_once(path, num_bytes)
            stops = [min(start + self._part_bytes, num_bytes) for start in starts]
            parts: Sequence[bytes] = self._files.cat_ranges([path] * len(stops), list(starts), stops, on_error="raise")
            return np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
        except (OSError, ValueError) as error:
            raise TornSnapshotError(f"{path} cannot be read ({error!r}); publish it again") from error

    def _read_at_once(self, path: str, num_bytes: int) -> np.ndarray:
        data = np.empty(num_bytes, np.uint8)
        with self._files.open(path, "rb") as file:
            read = file.readinto(data.data)
        return data[:read]

    def _retire(self, folder: str, which: str) -> None:
        written = self._written.setdefault(which, deque())
        written.append(folder)
        while len(written) > self._keep:
            self._remove(written.popleft())

    def _remove(self, folder: str) -> None:
        # What cannot be deleted takes room and harms nobody.
        with contextlib.suppress(OSError):
            self._files.rm(folder, recursive=True)
