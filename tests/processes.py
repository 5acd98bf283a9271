"""What has become of processes that a test does not own."""

import time
from collections.abc import Sequence

import psutil


def still_running(processes: Sequence[psutil.Process], timeout_s: float = 5.0) -> list[psutil.Process]:
    """Those that have not ended in time. One that waits for its init to take note of its end has ended."""
    deadline = time.monotonic() + timeout_s
    running = list(processes)
    while running and time.monotonic() < deadline:
        time.sleep(0.01)
        running = [process for process in running if not _has_ended(process)]
    return running


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
