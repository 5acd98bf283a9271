"""How a run is stopped by signals: Ctrl-C or SIGTERM once to stop after the step, twice to give up at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals(stop: asyncio.Event, note: Callable[[str], None]) -> Generator[None]:
    """Within it the first Ctrl-C or SIGTERM sets `stop`, and the second raises KeyboardInterrupt where the thread is.

    An event loop that is busy with a step in this very process hears of the second at once all the same. Must be
    entered on the main thread's running event loop.
    """
    loop = asyncio.get_running_loop()
    asked = False

    def ask() -> None:
        stop.set()
        note("stopping after this step, with a checkpoint (Ctrl-C again: at once, without one)")

    def heard(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # The screen and the loop may be in the middle of anything.
        loop.call_soon_threadsafe(ask)

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
