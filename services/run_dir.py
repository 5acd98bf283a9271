"""The directory of one run: what lies where, and that only one process writes it at a time.

    config.toml  metrics.jsonl  summary.json  report.html  lock
    samples/     checkpoints/step_N/          tensorboard/  logs/ (only after a failure)
    groups/      what prompts, samples and scores there were, to look at (services.record_files)
    environment.json (what it ran on)       tracking.json (what trackers know it by, if any do)
    config_changes.json (only if the configuration was changed on resumption)

The lock is the kernel's (`flock`), so it goes away with the process that holds it, however that one ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from pydantic import BaseModel

from raylign.errors import ConfigError, RunDirError
from raylign.metrics import METRICS_FILE, TENSORBOARD_FOLDER
from raylign.types import JsonValue


class RunDir:
    """One run's directory. `create` and `open` take its lock; a plain `RunDir(path)` is for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / METRICS_FILE
        self.summary = path / "summary.json"
        self.config_changes = path / "config_changes.json"
        self.report = path / "report.html"
        self.samples = path / "samples"
        self.before_after = self.samples / "before_after.png"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / TENSORBOARD_FOLDER
        self.logs = path / "logs"
        self.lock = path / "lock"
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, path: Path | None, config_name: str, root: Path = Path("runs")) -> Self:
        """A new, locked run directory: `path`, or `runs/<config stem>-<time>` if None.

        Raises RunDirError if another process works in it, or if it already holds a run.
        """
        run = cls(path if path is not None else _fresh_path(root, Path(config_name).stem))
        run._make_folder(run.path)
        run._acquire("choose another --run-dir")
        problem = run._holds_a_run()
        if problem:
            run.release()
            raise RunDirError(problem)
        for folder in (run.samples, run.checkpoints):
            run._make_folder(folder)
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run, locked, to go on with. Raises RunDirError if it is none, or in use."""
        run = cls(path)
        run.check()
        run._acquire("start a new run from its checkpoints: `raylign fork RUN_DIR --run-dir NEW`")
        for folder in (run.samples, run.checkpoints):
            run._make_folder(folder)
        return run

    def check(self) -> None:
        """Raise RunDirError unless this is a run's directory."""
        if not self.path.is_dir():
            raise RunDirError(f"no run directory at {self.path}; `raylign train CONFIG` makes one under runs/")
        if not self.config.is_file():
            raise RunDirError(f"{self.path} is no run directory: it has no config.toml; give the folder of a run")

    def write_config(self, config: BaseModel) -> None:
        """Write the resolved configuration as `config.toml`."""
        write_atomic(self.config, config_toml(config).encode())

    def write_summary(self, summary: Mapping[str, JsonValue]) -> None:
        """Write `summary.json`; readers see the old one or the new one, never half of it."""
        write_atomic(self.summary, json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")

    def read_summary(self) -> dict[str, Any]:
        """The summary as written, {} if there is none yet."""
        return read_summary(self.summary)

    def release(self) -> None:
        """Let another process use the directory. The lock file stays, empty; calling this twice is fine."""
        if self._lock_fd is not None:
            os.ftruncate(self._lock_fd, 0)
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _holds_a_run(self) -> str:
        """Why this directory cannot take a new run, "" if it can."""
        if any(self.checkpoints.glob("step_*")):
            remedy = f"go on with `raylign resume {self.path}`, or choose another --run-dir"
            return f"{self.path} already holds a run with checkpoints; {remedy}"
        held = [item.name for item in (self.config, self.metrics, self.summary) if item.exists()]
        if held:
            remedy = "it has no checkpoint to go on from, so delete the folder or choose another --run-dir"
            return f"{self.path} already holds a run ({', '.join(held)}); {remedy}"
        return ""

    def _acquire(self, instead: str) -> None:
        """Take the lock. `instead` is what to do where another process has it and shall keep it."""
        try:
            fd = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirError(
                f"cannot write in {self.path}: {error.strerror}; free some space, or choose another folder"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _lock_owner(fd)
            os.close(fd)
            raise RunDirError(
                f"{self.path} is in use by {owner}; wait for it, stop it with Ctrl-C or `kill <pid>`, or {instead}"
            ) from None
        except OSError as error:
            os.close(fd)
            raise RunDirError(
                f"cannot lock {self.lock}: {error}; put the run on a file system with locks (--run-dir)"
            ) from None
        # A descriptor made by os.open is not inherited, so no child of this process keeps the lock alive.
        self._lock_fd = fd
        with contextlib.suppress(OSError):  # on a full disk the lock stands, without the note of who has it
            os.ftruncate(fd, 0)
            os.write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"cannot make {folder}: {error.strerror}; choose another --run-dir") from None


def config_toml(config: BaseModel) -> str:
    """A configuration as TOML that reads back as the same configuration. TOML has no null: None is left out.

    Raises ConfigError if leaving it out would change a value (a field whose default is not None).
    """
    data = config.model_dump(mode="json", exclude_none=True)
    try:
        text = tomli_w.dumps(data)
    except TypeError as error:
        raise ConfigError(f"the configuration cannot be written as TOML: {error}; leave out empty list items") from None
    if type(config).model_validate(tomllib.loads(text)) != config:
        raise ConfigError("the configuration does not survive TOML: a field whose default is a value is set to None")
    return text


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json, {} if there is none."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunDirError(f"{path} is not JSON: {error}; delete it and run `raylign report` again") from None
    return dict(data)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash or power loss it holds the old bytes or the new ones.

    Raises RunDirError, with the old bytes in place, if the new ones cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise RunDirError(
            f"cannot write {path}: {error.strerror}; it takes {len(data):,} bytes, {free_space(path.parent)}"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def free_space(folder: Path) -> str:
    """What a disk has left, in words."""
    try:
        return f"and {shutil.disk_usage(folder).free:,} bytes are free there"
    except OSError as error:
        return f"and the folder cannot be reached ({error.strerror})"


def _fresh_path(root: Path, stem: str) -> Path:
    """`root/stem-YYYYmmdd-HHMMSS`, counted on if two runs start in one second."""
    base = root / f"{stem or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return path


def _lock_owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        # Between the lock and the note of who has it, or a note cut short.
        return "another process"
