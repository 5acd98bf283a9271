"""The runs of a folder over HTTP: what they wrote, and control of those that are live on this machine.

    GET  /v1/runs                          every run of the folder
    GET  /v1/runs/NAME                     one run; with its rollout actors while it is live
    GET  /v1/runs/NAME/metrics?tail=N      the last lines of metrics.jsonl
    GET  /v1/runs/NAME/samples[/FILE]      names of the pictures and texts, or one of them
    POST /v1/runs/NAME/scale {"rollout": 3}    /pause    /resume

It reads files and passes questions on to the runs' drivers (`services.run_control`); it holds no state. Everybody
sends a bearer token, but on loopback it may do without one.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

import raylign
from raylign.config import Config
from raylign.errors import ClusterError, ConfigError, RaylignError, RunDirError
from raylign.metrics import MetricsRow, read_metrics
from services.run_control import GoOnAsk, PauseAsk, RunState, ScaleAsk, StatusAsk, ask
from services.run_dir import RunDir

_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
_STATUS: dict[type[RaylignError], int] = {RunDirError: 404, ConfigError: 422, ClusterError: 409}


class ScaleBody(Config):
    """How many rollout actors a run should have."""

    rollout: int = Field(strict=True)


class RunView(Config):
    """One run of the folder."""

    name: str
    live: bool
    status: str
    """running, finished, stopped or failed; unknown where a run was killed before it could say."""
    step: int | None
    state: RunState | None = None
    """What its driver says, while it is live."""


class MetricsView(Config):
    """Steps of a run, the oldest first; null stands for a number that was not finite."""

    rows: list[dict[str, float | None]]


class SamplesView(Config):
    """Files that a run left to look at."""

    files: list[str]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _run_path(request: Request, name: str) -> Path:
    """The folder of the run that a request names."""
    folder: Path = request.app.state.folder
    path = folder / name
    if path.parent != folder or not (path / "config.toml").is_file():
        raise RunDirError(f"no run {name!r} here; GET /v1/runs lists them")
    return path


RunPath = Annotated[Path, Depends(_run_path)]


def build_run_api(folder: Path, token: str | None) -> FastAPI:
    """The application over a folder of runs. `token` None lets everyone in who names a loopback host."""
    app = FastAPI(title="Raylign runs", version=raylign.__version__, docs_url=None, redoc_url=None)
    if token is None:
        # A web page may send its reader's browser here under a name of its own.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        return JSONResponse({"error": str(error)}, status)

    app.state.folder = folder
    for kind in _STATUS:
        app.add_exception_handler(kind, refuse)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "send the token: Authorization: Bearer TOKEN"}, 401)
        return await call_next(request)

    # Plain functions: they read files and wait for drivers, which a thread may do.
    @app.get("/v1/runs")
    def runs() -> list[RunView]:
        paths = sorted(path.parent for path in folder.glob("*/config.toml"))
        return [view(path) for path in paths]

    @app.get("/v1/runs/{name}")
    def show(path: RunPath) -> RunView:
        return view(path)

    @app.get("/v1/runs/{name}/metrics")
    def metrics(path: RunPath, tail: Annotated[int, Query(ge=1, le=10_000)] = 100) -> MetricsView:
        return MetricsView(rows=read_metrics(RunDir(path).metrics)[-tail:])

    @app.get("/v1/runs/{name}/samples")
    def samples(path: RunPath) -> SamplesView:
        return SamplesView(files=_files(path))

    @app.get("/v1/runs/{name}/samples/{file}")
    def sample(path: RunPath, file: str) -> FileResponse:
        if file not in _files(path):
            raise RunDirError(f"no file {file!r} among the samples of {path.name}")
        return FileResponse(RunDir(path).samples / file)

    @app.post("/v1/runs/{name}/scale")
    def scale(path: RunPath, body: ScaleBody) -> RunState:
        return ask(path, ScaleAsk(rollout=body.rollout))

    @app.post("/v1/runs/{name}/pause")
    def pause(path: RunPath) -> RunState:
        return ask(path, PauseAsk())

    @app.post("/v1/runs/{name}/resume")
    def go_on(path: RunPath) -> RunState:
        return ask(path, GoOnAsk())

    return app


def view(path: Path) -> RunView:
    """A run as its files tell of it, and its driver if it answers."""
    folder = RunDir(path)
    try:
        state = ask(path, StatusAsk())
    except RunDirError:
        state = None
    summary = folder.read_summary()
    step = state.step if state is not None else summary.get("num_steps", _last_step(read_metrics(folder.metrics)))
    status = "running" if state is not None else str(summary.get("status", "unknown"))
    return RunView(name=path.name, live=state is not None, status=status, step=step, state=state)


def _last_step(rows: list[MetricsRow]) -> int | None:
    return int(rows[-1]["step"] or 0) if rows else None


def _files(path: Path) -> list[str]:
    return sorted(item.name for item in RunDir(path).samples.glob("*") if item.is_file())


def serve_runs(folder: Path, host: str, port: int, token: str | None) -> None:
    """Serve until Ctrl-C. Raises ConfigError for an address that others reach and no token, or no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give the one that holds run directories, such as runs")
    if token is None and not is_loopback(host):
        raise ConfigError(f"others can reach {host}, so --token-file is needed: a file that holds a secret of your own")
    import uvicorn

    uvicorn.run(build_run_api(folder, token), host=host, port=port, log_level="warning", server_header=False)
