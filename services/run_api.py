"""The runs of a folder over HTTP: what they wrote, and control of those that are live on this machine.

    GET  /metrics                          the live runs' newest numbers, for Prometheus
    GET  /dashboard/                       the page over them (`services.dashboard`)
    GET  /v1/runs                          every run of the folder
    GET  /v1/runs/NAME                     one run; with its rollout actors while it is live
    GET  /v1/runs/NAME/metrics?tail=N      the last lines of metrics.jsonl
    GET  /v1/runs/NAME/samples[/FILE]      names of the pictures and texts, or one of them
    POST /v1/runs/NAME/scale {"rollout": 3}    /pause
    POST /v1/runs/NAME/resume {}           end a pause, or start the driver of a run that was stopped
    POST /v1/runs/NAME/fork {"name": "lower", "step": 40, "set": {"learner.lr": 1e-4}}

It reads files, passes questions on to the runs' drivers (`services.run_control`) and starts drivers
(`services.run_drivers`). Everybody sends a bearer token, but on loopback it may do without one.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import Field
from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount

import raylign
from raylign.config import Config
from raylign.errors import ClusterError, ConfigError, RaylignError, RunDirError
from raylign.metrics import MetricsRow, read_metrics
from services.page_server import Stopping, never, serve_pages
from services.run_control import GoOnAsk, PauseAsk, RunState, ScaleAsk, StatusAsk, ask
from services.run_dir import RunDir
from services.run_drivers import Drivers, as_options
from services.run_exporter import CONTENT_TYPE, FolderMetrics

_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]
_STATUS: dict[type[RaylignError], int] = {RunDirError: 404, ConfigError: 422, ClusterError: 409}


class ScaleBody(Config):
    """How many rollout actors a run should have."""

    rollout: int = Field(strict=True)


Key = Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
Value = str | int | float | bool
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class ResumeBody(Config):
    """How to go on with a run that was stopped; a run that is live only ends its pause."""

    step: int | None = Field(default=None, ge=0)
    """The checkpoint of this step; the newest good one if absent."""
    set: dict[Key, Value] = Field(default_factory=dict[Key, Value])
    """Configuration keys to change, by dotted name."""
    allow_config_change: list[Key] = Field(default_factory=list[Key])
    """Keys that may differ from what the checkpoint was made with."""


class ForkBody(Config):
    """A new run from a checkpoint of this one."""

    name: RunName
    """Its folder, beside this one's."""
    step: int | None = Field(default=None, ge=0)
    """The checkpoint of this step; the newest good one if absent."""
    set: dict[Key, Value] = Field(default_factory=dict[Key, Value])
    """Configuration keys to change, by dotted name."""


class RunView(Config):
    """One run of the folder."""

    name: str
    live: bool
    status: str
    """starting, running, finished, stopped or failed; unknown where a run was killed before it could say."""
    step: int | None
    state: RunState | None = None
    """What its driver says, while it is live."""
    problem: str = ""
    """Why a driver that this server started did not go on."""


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


_AS_IT_WAS = ResumeBody()
RunPath = Annotated[Path, Depends(_run_path)]


def build_run_api(folder: Path, token: str | None, drivers: Drivers) -> FastAPI:
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
        origin = request.headers.get("origin")
        if request.method != "GET" and origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            # A page of another site can make its reader's browser send this, though not read the answer.
            return JSONResponse({"error": f"a page of {origin} may not change runs here"}, 403)
        return await call_next(request)

    def paths() -> list[Path]:
        return sorted(path.parent for path in folder.glob("*/config.toml"))

    exported = FolderMetrics(lambda path: view(path, drivers))

    # Plain functions: they read files and wait for drivers, which a thread may do.
    @app.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> Response:
        return Response(exported.text(paths()), media_type=CONTENT_TYPE)

    @app.get("/v1/runs")
    def runs() -> list[RunView]:
        return [view(path, drivers) for path in paths()]

    @app.get("/v1/runs/{name}")
    def show(path: RunPath) -> RunView:
        return view(path, drivers)

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
    def go_on(path: RunPath, body: ResumeBody = _AS_IT_WAS) -> RunView:
        if _is_live(path):
            if body != _AS_IT_WAS:
                raise ClusterError(f"run {path.name!r} is live: stop it first, or POST fork to start another from it")
            ask(path, GoOnAsk())
            return view(path, drivers)
        allowed = [f"--allow-config-change={key}" for key in body.allow_config_change]
        options = [str(path), *as_options(body.set, body.step), *allowed]
        drivers.start(path.name, ["resume", *options], lambda: _is_live(path))
        return view(path, drivers)

    @app.post("/v1/runs/{name}/fork", status_code=201)
    def fork(path: RunPath, body: ForkBody) -> RunView:
        new = folder / body.name
        if new.exists():
            raise ClusterError(f"there is a run {body.name!r} already; choose another name")
        options = [str(path), "--run-dir", str(new), *as_options(body.set, body.step)]
        drivers.start(body.name, ["fork", *options], lambda: any(RunDir(new).checkpoints.glob("step_*/manifest.json")))
        return view(new, drivers)

    return app


def with_dashboard(folder: Path, token: str | None, drivers: Drivers, stopping: Stopping = never) -> Starlette:
    """The API, and the page over the same runs at /dashboard/, each behind its own door."""
    from services.dashboard.app import dashboard_app

    page = Mount("/dashboard", dashboard_app(folder, token, stopping))
    return Starlette(routes=[page, Mount("/", build_run_api(folder, token, drivers))])


def view(path: Path, drivers: Drivers) -> RunView:
    """A run as its files tell of it, and its driver if it answers."""
    folder = RunDir(path)
    try:
        state = ask(path, StatusAsk())
    except RunDirError:
        state = None
    summary = folder.read_summary()
    step = state.step if state is not None else summary.get("num_steps")
    if step is None:  # a driver that was killed left its metrics alone, and all of them are to be read
        step = _last_step(read_metrics(folder.metrics))
    status = str(summary.get("status", "unknown"))
    if state is not None:
        status = "running"
    elif drivers.is_starting(path.name):
        status = "starting"
    problem = drivers.problem(path.name)
    return RunView(name=path.name, live=state is not None, status=status, step=step, state=state, problem=problem)


def _is_live(path: Path) -> bool:
    try:
        ask(path, StatusAsk())
    except RunDirError:
        return False
    return True


def _last_step(rows: list[MetricsRow]) -> int | None:
    return int(rows[-1]["step"] or 0) if rows else None


def _files(path: Path) -> list[str]:
    return sorted(item.name for item in RunDir(path).samples.glob("*") if item.is_file())


def serve_runs(folder: Path, host: str, port: int, token: str | None, address: str | None = None) -> None:
    """Serve until Ctrl-C; runs that it starts join the cluster at `address`.

    Raises ConfigError for an address that others reach and no token, or no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give the one that holds run directories, such as runs")
    if token is None and not is_loopback(host):
        raise ConfigError(f"others can reach {host}, so --token-file is needed: a file that holds a secret of your own")
    drivers = Drivers(folder, address)
    serve_pages(lambda stopping: with_dashboard(folder, token, drivers, stopping), host, port)
