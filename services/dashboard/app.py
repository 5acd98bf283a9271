"""The dashboard's server: a JSON view of run directories, their pictures, an event stream, and one static page.

    GET  /                                      the page
    GET  /api/runs                              every run of the folder
    GET  /api/runs/NAME                         how it goes: state, alerts, timing, what is recorded
    GET  /api/runs/NAME/series?keys=A,B&points=400
    GET  /api/runs/NAME/steps/STEP              one step's numbers, seconds by role, timeline and ages
    GET  /api/runs/NAME/groups/train|eval/STEP  its groups
    GET  /api/runs/NAME/pictures/KIND/STEP/OFFSET-LENGTH
    GET  /api/runs/NAME/failures  /frontier  /config  /samples/FILE
    GET  /api/runs/NAME/events?since=STEP       server-sent events
    GET  /api/compare?a=NAME&b=NAME

It reads files, writes none, and keeps no state but what it has parsed.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from raylign.errors import ConfigError
from services.dashboard.access import MIN_TOKEN, Guard, same, session_cookie
from services.dashboard.events import stream
from services.dashboard.runs import (
    RunFiles,
    RunsFolder,
    UnknownRunError,
    compared,
    frontier,
    raw_config,
    sample_files,
    timeline,
)
from services.dashboard.series import curve
from services.dashboard.timing import ages, as_json, lanes
from services.page_server import Stopping, never, serve_pages
from services.record_files import RECORD_KINDS, RecordKind, picture_type, read_failures, read_picture, read_record
from services.run_api import is_loopback

STATIC = Path(__file__).parent / "static"
_MAX_KEYS = 40
_MAX_POINTS = 2000
_MAX_PICTURE = 64 * 2**20
_MAX_FAILURES = 500
_MAX_FORM = 4096
_SPAN = re.compile(r"(\d{1,15})-(\d{1,8})")
_WRONG_TOKEN_S = 0.5


def dashboard_app(root: Path, token: str | None, stopping: Stopping = never) -> Guard:
    """The application over a run or a folder of runs; it may be mounted in another.

    `token` None lets in everyone who names a loopback host; event streams end when the server is `stopping`. Raises
    RunDirError if there is no such folder, ConfigError for a token that is soon guessed.
    """
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(f"the dashboard's token has {len(token)} characters; give one of {MIN_TOKEN} or more")
    pages = _Pages(RunsFolder(root), token, stopping)
    routes = [
        Route("/", pages.index),
        Route("/login", pages.login, methods=["GET", "POST"]),
        Route("/api/runs", pages.runs),
        Route("/api/compare", pages.compare),
        Route("/api/runs/{name}", pages.overview),
        Route("/api/runs/{name}/series", pages.series),
        Route("/api/runs/{name}/steps/{step:int}", pages.step),
        Route("/api/runs/{name}/groups/{kind}/{step:int}", pages.groups),
        Route("/api/runs/{name}/pictures/{kind}/{step:int}/{span}", pages.picture),
        Route("/api/runs/{name}/failures", pages.failures),
        Route("/api/runs/{name}/frontier", pages.frontier),
        Route("/api/runs/{name}/config", pages.config),
        Route("/api/runs/{name}/samples/{file}", pages.sample),
        Route("/api/runs/{name}/events", pages.events),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    app = Starlette(routes=routes, exception_handlers={UnknownRunError: _not_found, ValueError: _bad_request})
    return Guard(app, token)


def serve_dashboard(root: Path, host: str, port: int, token: str | None) -> None:
    """Serve until Ctrl-C. Raises ConfigError for an address that others reach and no token, or no such folder."""
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"others can reach {host}, so a token is needed: --token-file with a secret of your own, or "
            "RAYLIGN_DASHBOARD_TOKEN"
        )
    serve_pages(lambda stopping: dashboard_app(root, token, stopping), host, port)


class _Pages:
    """The handlers. Plain functions read files in a thread of the server's pool."""

    def __init__(self, runs: RunsFolder, token: str | None, stopping: Stopping) -> None:
        self._runs = runs
        self._token = token
        self._stopping = stopping

    def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def login(self, request: Request) -> Response:
        if self._token is None:
            return PlainTextResponse("no token is needed here", 404)
        if request.method == "GET":
            return HTMLResponse((STATIC / "login.html").read_text(encoding="utf-8"))
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM:
                return PlainTextResponse("the form is too long", 413)
        from urllib.parse import parse_qs

        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
        if not same(given.strip(), self._token):
            await asyncio.sleep(_WRONG_TOKEN_S)
            page = (STATIC / "login.html").read_text(encoding="utf-8")
            return HTMLResponse(page.replace('<p id="wrong" hidden>', '<p id="wrong" role="alert">'), 401)
        root = request.scope.get("root_path", "")
        secure = request.url.scheme == "https"
        cookie = session_cookie(self._token, secure, root or "/")
        return Response(status_code=303, headers={"location": f"{root}/", "set-cookie": cookie})

    def runs(self, request: Request) -> Response:
        return JSONResponse({"runs": [self._runs.card(name) for name in self._runs.names()]})

    def overview(self, request: Request) -> Response:
        return JSONResponse(self._runs.overview(request.path_params["name"]))

    def series(self, request: Request) -> Response:
        columns = self._run(request).tail.refresh()
        keys = [key for key in request.query_params.get("keys", "").split(",") if key]
        if len(keys) > _MAX_KEYS:
            raise ValueError(f"at most {_MAX_KEYS} keys at once, got {len(keys)}")
        points = int(request.query_params.get("points", "400"))
        if not 10 <= points <= _MAX_POINTS:
            raise ValueError(f"points must lie between 10 and {_MAX_POINTS}, got {points}")
        curves = {key: curve(columns, key, points).json() for key in keys if key in columns.values}
        return JSONResponse({"last_step": columns.steps[-1] if columns.steps else -1, "series": curves})

    def step(self, request: Request) -> Response:
        run = self._run(request)
        step: int = request.path_params["step"]
        row = run.tail.refresh().row(step)
        if row is None:
            raise UnknownRunError("no such step")
        config = raw_config(run.path)
        actors = config.get("rollout", {}).get("num_actors", 1)
        num_actors = 1 if config.get("placement") == "in_process" else int(actors)
        finite = {name: value for name, value in row.items() if value == value and abs(value) != float("inf")}
        num_actors = int(finite.get("actors/in_service", num_actors)) or num_actors
        answer = {"row": finite, "lanes": as_json(lanes(finite, num_actors)), "ages": ages(finite)}
        return JSONResponse({**answer, **timeline(run, step, config, num_actors)})

    def groups(self, request: Request) -> Response:
        run, kind = self._run(request), _kind(request)
        data = read_record(run.path, kind, request.path_params["step"])
        if data is None:
            raise UnknownRunError("no groups of this step are recorded")
        return Response(data, media_type="application/json")

    def picture(self, request: Request) -> Response:
        run, kind = self._run(request), _kind(request)
        span = _SPAN.fullmatch(request.path_params["span"])
        if span is None or int(span[2]) > _MAX_PICTURE:
            raise ValueError("a picture is named OFFSET-LENGTH")
        data = read_picture(run.path, kind, request.path_params["step"], int(span[1]), int(span[2]))
        if data is None:
            raise UnknownRunError("no such picture")
        headers = {"cache-control": "private, max-age=60"}
        return Response(data, media_type=picture_type(data), headers=headers)

    def failures(self, request: Request) -> Response:
        rows = read_failures(self._run(request).path, _MAX_FAILURES)
        kinds = Counter((str(row.get("kind", "")), str(row.get("reward", ""))) for row in rows)
        counted = [{"kind": kind, "reward": reward, "count": count} for (kind, reward), count in kinds.most_common()]
        return JSONResponse({"kinds": counted, "rows": rows})

    def frontier(self, request: Request) -> Response:
        return JSONResponse({"frontier": frontier(self._run(request))})

    def config(self, request: Request) -> Response:
        text = (self._run(request).path / "config.toml").read_text(encoding="utf-8", errors="replace")
        return JSONResponse({"toml": text})

    def sample(self, request: Request) -> Response:
        run, file = self._run(request), request.path_params["file"]
        if file not in sample_files(run):
            raise UnknownRunError("no such picture among the samples")
        return FileResponse(run.folder.samples / file, media_type="image/png", headers={"cache-control": "no-cache"})

    def compare(self, request: Request) -> Response:
        names = [request.query_params.get(side, "") for side in ("a", "b")]
        return JSONResponse(compared(self._runs.run(names[0]), self._runs.run(names[1])))

    async def events(self, request: Request) -> Response:
        run = await asyncio.to_thread(self._run, request)
        since = int(request.query_params.get("since", "-1"))
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(stream(run, since, self._stopping), media_type="text/event-stream", headers=headers)

    def _run(self, request: Request) -> RunFiles:
        return self._runs.run(request.path_params["name"])


def _kind(request: Request) -> RecordKind:
    kind: Any = request.path_params["kind"]
    if kind not in RECORD_KINDS:
        raise UnknownRunError(f"groups are of {' or '.join(RECORD_KINDS)}")
    return kind


def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 404)


def _bad_request(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)
