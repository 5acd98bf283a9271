"""`raylign dashboard` in a process of its own, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_START_S = 60.0
_STOP_S = 15.0


@contextlib.contextmanager
def dashboard_over(
    runs: Path, *options: str, output: int | None = None
) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """Its address, once it answers, and the process, which has ended when the block has.

    options: of the command. output: where all that it prints goes, such as subprocess.PIPE; this process's own output
    when not given.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "services.cli", "dashboard", str(runs), "--port", str(port), *options]
    errors = None if output is None else subprocess.STDOUT
    server = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=errors, text=True)
    try:
        deadline_s = time.monotonic() + _START_S
        while True:
            assert server.poll() is None, "the dashboard ended"
            assert time.monotonic() < deadline_s, "the dashboard does not answer"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(_STOP_S)
