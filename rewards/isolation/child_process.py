"""A child process that talks in lines and is killed when it is late, too loud or gone. Blocking; one thread at a time.

Writing and reading go on together, so a child that does not read, or writes more than a pipe holds, blocks nobody.
The child gets a session of its own and dies with everything in it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_CHUNK_BYTES = 2**16


class ChildError(Exception):
    """A child that did not answer."""


class ChildTimeoutError(ChildError):
    """It was not done in time."""


class ChildEndedError(ChildError):
    """It closed its output or died."""


class ChildTooLoudError(ChildError):
    """It wrote more than it may."""


class Child:
    """A process with pipes to its standard input and output; a context manager that kills it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        max_bytes: int,
        cwd: Path | None = None,
        remove: Path | None = None,
    ) -> None:
        """Start it; it may write `max_bytes` per answer. Its standard error joins its output.

        `remove` is a folder that goes away with it.

        Raises OSError if there is no such program.
        """
        self._max_bytes = max_bytes
        self._remove = remove
        self._outgoing = b""
        self._incoming = b""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            env=dict(env), cwd=cwd, start_new_session=True,
        )  # fmt: skip
        self._stdin, self._stdout = _nonblocking(self._process.stdin), _nonblocking(self._process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet. Does not reap it: its number must stay its own until `kill`."""
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Queue bytes for its standard input; they are written while an answer is awaited."""
        self._outgoing += data

    def read_line(self, timeout_s: float) -> bytes:
        """Its next line without the line end. Raises ChildError; what it wrote instead is `unread`."""
        self._pump(lambda: b"\n" in self._incoming, time.monotonic() + timeout_s)
        line, _, self._incoming = self._incoming.partition(b"\n")
        return line

    def read_rest(self, timeout_s: float) -> bytes:
        """All it writes until it ends, its standard input closed behind what was sent. Raises ChildError."""
        with contextlib.suppress(ChildEndedError):
            self._pump(lambda: False, time.monotonic() + timeout_s, close_stdin=True)
        return self._incoming

    @property
    def unread(self) -> bytes:
        """What it wrote and nobody read."""
        return self._incoming

    def kill(self) -> None:
        """End it and its session, and reap it; harmless when it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
        self._stdin.close()
        self._stdout.close()
        if self._remove is not None:
            shutil.rmtree(self._remove, ignore_errors=True)

    def _pump(self, done: Callable[[], bool], deadline: float, close_stdin: bool = False) -> None:
        while not done():
            poll = select.poll()
            poll.register(self._stdout, select.POLLIN)
            if self._outgoing:
                poll.register(self._stdin, select.POLLOUT)
            elif close_stdin:
                self._stdin.close()
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise ChildTimeoutError("no answer in time")
            ready = {fd for fd, _ in poll.poll(1000 * remaining_s)}
            if self._outgoing and self._stdin.fileno() in ready:
                self._write()
            if self._stdout.fileno() in ready:
                self._read()

    def _write(self) -> None:
        try:
            written = os.write(self._stdin.fileno(), self._outgoing[:_CHUNK_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError:  # it reads no more; whether it still answers, its output tells
            written = len(self._outgoing)
        self._outgoing = self._outgoing[written:]

    def _read(self) -> None:
        chunk = os.read(self._stdout.fileno(), _CHUNK_BYTES)
        if not chunk:
            raise ChildEndedError("it closed its output")
        self._incoming += chunk
        if len(self._incoming) > self._max_bytes:
            raise ChildTooLoudError(f"more than {self._max_bytes} bytes")


def _nonblocking(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("Popen was asked for a pipe")
    os.set_blocking(pipe.fileno(), False)
    return pipe
