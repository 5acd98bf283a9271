"""The settings that the program makes so that the user need not: environment, and the Ray cluster of a run.

    prepare_environment()          first thing in the command line, before torch, Ray or a hub library is imported
    local_cluster(num_cpus, dir)   a cluster of its own: own temp folder, own token, nothing left behind
    join_cluster(address)          a cluster that somebody else runs; its token comes from the user's environment

What a library reads at import or at `ray.init` only works if it is set before; that is why this is one place.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raylign.errors import ClusterError

ENVIRONMENT: Mapping[str, str] = {
    # Ray starts workers with its own interpreter, sends nothing home, and keeps a GPU-less worker quiet.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # A run submitted as a job adds its settings to those of the job.
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Models are folders on disk; a run never waits for a hub that may not answer.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Advice of the libraries, which every worker would repeat on the run's screen.
    "TRANSFORMERS_VERBOSITY": "error",
    # A process that starts a second cluster forks while gRPC's threads of the first one are still there, and says so.
    "GRPC_VERBOSITY": "ERROR",
    "DIFFUSERS_VERBOSITY": "error",
    # Idle OpenMP threads that spin made two processes on two cores 4 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Each is a default: what the user has set stands."""

TOKEN_FILE = "ray_token"

# A Unix socket path holds 107 bytes; Ray appends "session_<date>_<pid>/sockets/plasma_store", up to 66.
_TEMP_PATH_BYTES = 40
_TEMP_PREFIX = "rayl-"
_SERVER_LOGS = ("gcs_server.out", "raylet.out")
_CHILD_EXIT_TIMEOUT_S = 5.0


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set every default of ENVIRONMENT that the user has not set. One hub switch alone implies the other."""
    if "HF_HUB_OFFLINE" in environ:
        environ.setdefault("TRANSFORMERS_OFFLINE", environ["HF_HUB_OFFLINE"])
    for name, value in ENVIRONMENT.items():
        environ.setdefault(name, value)


def worker_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same settings for workers of a joined cluster, whose nodes know nothing of this process's environment."""
    return {name: environ.get(name, value) for name, value in ENVIRONMENT.items()}


def ray_settings(run_dir: Path, environ: MutableMapping[str, str] = os.environ) -> Path:
    """Turn token authentication on for the run's own cluster; returns the token file (mode 0600, in the run folder).

    Without it Ray listens on all interfaces for whoever asks, or takes a token from the home directory that may
    belong to another cluster. A token or mode that the user has set stands.
    """
    path = run_dir / TOKEN_FILE
    if "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ or environ.get("RAY_AUTH_MODE") == "disabled":
        return Path(environ.get("RAY_AUTH_TOKEN_PATH", path))
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_process_token())
    _point_to(path, environ)
    return path


def _point_to(token_file: Path, environ: MutableMapping[str, str]) -> None:
    environ["RAY_AUTH_TOKEN_PATH"] = str(token_file.resolve())
    # Ray reads the mode when it is imported. Set any later, its servers ask for a token that this process does not
    # send; left unset, ray.init(address="local") turns tokens on for both.
    if "ray" not in sys.modules:
        environ["RAY_AUTH_MODE"] = "token"


@functools.cache
def _process_token() -> str:
    """One token per process: Ray reads it once and sends the same to every cluster that the process starts."""
    return secrets.token_hex(32)


@dataclass(frozen=True, slots=True)
class StartedCluster:
    """A cluster that this process is connected to."""

    address: str
    dashboard_url: str | None
    temp_dir: Path | None
    """Where a cluster of our own keeps sessions and logs while it lives; None for a joined one."""
    started_s: float


@contextlib.contextmanager
def local_cluster(
    num_cpus: int,
    run_dir: Path,
    dashboard: bool = False,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
) -> Generator[StartedCluster]:
    """A Ray cluster for this run alone; afterwards its processes and its temp folder are gone.

    If the body raises, what workers wrote to stderr is kept in `run_dir/logs` and the error says so.
    Call it from the main thread: Ray's processes die with the thread that started them, a SIGKILL included (but
    for two idle agents, which Ray lets wait a minute).
    """
    import ray

    began = time.perf_counter()
    with _own_settings(run_dir), _temp_dir() as temp_dir:
        others = set(psutil.Process().children())
        with _signals_kept():
            try:
                context = ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    object_store_memory=object_store_bytes,
                    include_dashboard=dashboard,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(temp_dir),
                )
            except Exception as error:  # whatever Ray raises here, the user can only act on the cluster
                servers = set(psutil.Process().children()) - others
                ray.shutdown()
                _end(_children(servers))
                failure = ClusterError(f"Ray did not start on this machine: {_first_line(error)}; see `raylign doctor`")
                _keep_logs(failure, temp_dir, run_dir)
                raise failure from error
        servers = set(psutil.Process().children()) - others
        try:
            yield _started(context, temp_dir, began)
        except Exception as error:  # raised again at once; only the logs are saved before their folder goes
            _keep_logs(error, temp_dir, run_dir)
            raise
        finally:
            # Listed before the shutdown: a worker that outlives its raylet is nobody's child any more.
            processes = _children(servers)
            ray.shutdown()
            _end(processes)


@contextlib.contextmanager
def join_cluster(address: str) -> Generator[StartedCluster]:
    """Connect to a running cluster ("auto", or host:port) and disconnect afterwards; the cluster goes on."""
    import ray

    began = time.perf_counter()
    with _signals_kept():
        try:
            context = ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": worker_environment()},
            )
        except Exception as error:  # whatever Ray raises here, the user can only act on the address or the token
            raise ClusterError(
                f"cannot join the Ray cluster at {address!r}: {_first_line(error)}; check the address with "
                "`ray status`, and if the cluster uses tokens set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its "
                "token file"
            ) from error
    try:
        yield _started(context, None, began)
    finally:
        ray.shutdown()


def _started(context: Any, temp_dir: Path | None, began: float) -> StartedCluster:
    url = f"http://{context.dashboard_url}" if context.dashboard_url else None
    return StartedCluster(str(context.address_info["gcs_address"]), url, temp_dir, time.perf_counter() - began)


@contextlib.contextmanager
def _own_settings(run_dir: Path) -> Generator[None]:
    """The token of this cluster for as long as it lives, so that a later cluster of this process gets its own."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.get(name) for name in names}
    ours = ray_settings(run_dir)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if before["RAY_AUTH_TOKEN_PATH"] is None:
            ours.unlink(missing_ok=True)


@contextlib.contextmanager
def _signals_kept() -> Generator[None]:
    """ray.init replaces the handler of SIGTERM; the run's own graceful stop must stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _temp_dir() -> Generator[Path]:
    """A short temp folder of our own, removed afterwards; also removes those that killed runs left behind.

    Each is locked by the process that owns it, and the kernel frees the lock when that process dies.
    """
    root = temp_root()
    _sweep(root)
    path = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=root))
    lock = _try_lock(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def temp_root() -> Path:
    """The system's temp folder, or /tmp where that path is too long for Ray's sockets."""
    root = Path(tempfile.gettempdir())
    fits = len(os.fsencode(root)) + len(f"/{_TEMP_PREFIX}12345678") <= _TEMP_PATH_BYTES
    return root if fits else Path("/tmp")


def _sweep(root: Path) -> None:
    for path in root.glob(f"{_TEMP_PREFIX}*"):
        if not (path / "lock").exists() or path.stat().st_uid != os.getuid():
            continue
        lock = _try_lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the folder's lock, None if another process has it."""
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None  # its owner is removing it this moment
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _keep_logs(error: BaseException, temp_dir: Path, run_dir: Path) -> None:
    """Copy what Ray's processes and our workers wrote to stderr, and tell the reader of the error."""
    written = [
        path
        for path in sorted(temp_dir.glob("session_2*/logs/**/*"))
        if path.is_file() and (path.suffix == ".err" or "serve" in path.parts or path.name in _SERVER_LOGS)
        if path.stat().st_size
    ]
    if not written:
        return
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for path in written:
        shutil.copyfile(path, folder / path.name)
    error.add_note(f"what the workers wrote to stderr, and Ray's logs, are in {folder}")


def _children(parents: Iterable[psutil.Process]) -> set[psutil.Process]:
    """The parents and everything below them; a psutil.Process knows its start time, so a reused id is no match."""
    found: set[psutil.Process] = set()
    for parent in parents:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {parent, *parent.children(recursive=True)}
    return found


def _end(processes: Iterable[psutil.Process]) -> None:
    """Wait for the cluster's own processes to go, and kill those that stay."""
    _, alive = psutil.wait_procs(list(processes), timeout=_CHILD_EXIT_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_CHILD_EXIT_TIMEOUT_S)


def _first_line(error: BaseException) -> str:
    """Ray puts whole tracebacks into messages; the reader needs what happened, the rest is in the cause."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
