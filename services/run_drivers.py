"""Drivers that the run API starts: `raylign resume` and `raylign fork` as processes of their own.

They outlive the server, as runs that a person starts outlive the terminal's next command. What they print goes to
`FOLDER/.drivers/NAME.log`. A request returns when the driver has passed the checks that refuse a run, or with its words
when it has not.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylign.errors import ClusterError, ConfigError

LOGS = ".drivers"
_POLL_S = 0.05
_PREFIX = "raylign: "


@dataclass(frozen=True, slots=True)
class Started:
    """A driver of ours, and where it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        """The error that it ended with."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        told = [line for line in lines if line]
        errors = [place for place, line in enumerate(told) if line.startswith(_PREFIX)]
        return "\n".join(told[errors[-1] :] if errors else told[-1:]).removeprefix(_PREFIX)


class Drivers:
    """The drivers that this server started, by run. Used from the threads of its requests."""

    def __init__(self, folder: Path, address: str | None, command: Sequence[str] = ()) -> None:
        """`address`: the cluster that they join; a local one of their own if None. `command` runs `raylign`."""
        self._folder = folder
        self._address = address
        self._command = tuple(command) or (sys.executable, "-m", "services.cli")
        self._started: dict[str, Started] = {}
        self._lock = threading.Lock()

    def start(
        self, name: str, arguments: Sequence[str], is_accepted: Callable[[], bool], timeout_s: float = 120.0
    ) -> None:
        """Start the driver of run `name`; returns when `is_accepted`, which sees what it has written.

        Raises ConfigError with the driver's words if it ends before, ClusterError if that takes too long.
        """
        with self._lock:
            if self.is_starting(name):
                raise ClusterError(f"run {name!r} has been started already; GET /v1/runs/{name} tells how far it is")
            started = self._started[name] = self._spawn(name, arguments)
        deadline = time.monotonic() + timeout_s
        while not is_accepted():
            if started.process.poll() is not None:
                if started.process.returncode == 0:  # a run that is finished has nothing to do
                    return
                raise ConfigError(started.last_words())
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"the driver of {name!r} has not begun after {timeout_s:g} s; it prints to {started.log}"
                )
            time.sleep(_POLL_S)

    def is_starting(self, name: str) -> bool:
        """Whether a driver that was started here for the run is alive."""
        started = self._started.get(name)
        return started is not None and started.process.poll() is None

    def problem(self, name: str) -> str:
        """Why the last driver that was started here for the run ended, if it failed; "" otherwise."""
        started = self._started.get(name)
        failed = started is not None and started.process.poll() not in (None, 0)
        return started.last_words() if started is not None and failed else ""

    def _spawn(self, name: str, arguments: Sequence[str]) -> Started:
        logs = self._folder / LOGS
        logs.mkdir(exist_ok=True)
        log = logs / f"{name}.log"
        joined = [*self._command, *arguments, *(["--address", self._address] if self._address is not None else [])]
        with log.open("wb") as output:
            # In a session of its own: a Ctrl-C at the server's terminal is not the run's.
            process = subprocess.Popen(
                joined, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Started(process, log)


def as_options(values: Mapping[str, str | float | bool], step: int | None) -> list[str]:
    """Configuration keys and a step as options of the command line; each is one argument, whatever it holds."""
    told = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
    return [*([f"--step={step}"] if step is not None else []), *(f"--{key}={value}" for key, value in told.items())]
