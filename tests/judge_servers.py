"""Real judge servers as child processes: started on a free port, waited for, killed by their process ids."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """A running server and the address of its API."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def kill(self) -> None:
        """SIGKILL to it and to whatever it started, each by its id; nobody gets to say goodbye."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            family = []
        for process in reversed(family):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)
        self.process.wait(timeout=30)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def judge_server(
    command: Sequence[str], port: int, environment: Mapping[str, str], log: Path, timeout_s: float
) -> Generator[JudgeServer]:
    """A server that answers /health; raises with the end of its log when it dies or takes longer than that."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    server = JudgeServer(process, f"http://127.0.0.1:{port}/v1", log)
    try:
        deadline = time.monotonic() + timeout_s
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                state = "ended" if process.poll() is not None else f"was not up after {timeout_s} s"
                raise RuntimeError(f"{command[:3]} {state}:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield server
    finally:
        server.kill()


def _healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success
    except httpx2.TransportError:
        return False
