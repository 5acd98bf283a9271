"""Control of a live run: what it is asked, what it refuses, who may ask, and how its driver is found."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from raylign.errors import ClusterError, ConfigError, RaylignError, RunDirError
from services.autoscaler import Autoscaler, autoscaled
from services.elastic import ActorBounds, Autoscaling, PoolStatus
from services.run_api import build_run_api, is_loopback, serve_runs, with_dashboard
from services.run_control import (
    CONTROL_FILE,
    GoOnAsk,
    PauseAsk,
    RunControl,
    RunState,
    ScaleAsk,
    StatusAsk,
    ask,
    control_server,
    read_contact,
    reply_to,
)
from services.run_drivers import Drivers
from services.scale_commands import app, describe, read_token


class FakePool:
    """A fleet that only counts."""

    def __init__(self, wanted: int = 2) -> None:
        self.now = PoolStatus(wanted, wanted, 0, 0, 0, restarts=0, hung=0, paused=False)
        self.asked: list[int] = []

    def resize(self, num_actors: int) -> None:
        self.asked.append(num_actors)
        self.now = replace(self.now, wanted=num_actors, in_service=num_actors)

    def pause(self) -> None:
        self.now = replace(self.now, paused=True)

    def go_on(self) -> None:
        self.now = replace(self.now, paused=False)

    def status(self) -> PoolStatus:
        return self.now


def _control(pool: FakePool | None, least: int = 2, most: int = 2) -> RunControl:
    """Of a run at step 7 on a cluster that holds six actors."""
    return RunControl(pool, ActorBounds(least, most), lambda: 6, lambda: (7, 60))


def _run_dir(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text("seed = 0\n")
    return folder


@contextlib.contextmanager
def _live(control: RunControl, run_dir: Path) -> Generator[None]:
    """A driver with its event loop in a thread, as a run has it in a process."""
    up, down = threading.Event(), threading.Event()

    async def drive() -> None:
        async with control_server(control, run_dir):
            up.set()
            await asyncio.to_thread(down.wait)

    driver = threading.Thread(target=lambda: asyncio.run(drive()))
    driver.start()
    assert up.wait(10)
    try:
        yield
    finally:
        down.set()
        driver.join(10)


def test_a_live_run_tells_its_state_and_does_what_it_is_asked(tmp_path: Path) -> None:
    run_dir, pool = _run_dir(tmp_path / "run"), FakePool()
    with _live(_control(pool), run_dir):
        state = ask(run_dir, StatusAsk())
        assert (state.step, state.num_steps) == (7, 60)
        assert state.pool == PoolStatus(
            wanted=2, in_service=2, joining=0, away=0, leaving=0, restarts=0, hung=0, paused=False
        )
        scaled = ask(run_dir, ScaleAsk(rollout=5)).pool
        assert scaled is not None
        assert scaled.wanted == 5
        assert pool.asked == [5]
        paused, again = ask(run_dir, PauseAsk()).pool, ask(run_dir, GoOnAsk()).pool
        assert paused is not None
        assert again is not None
        assert (paused.paused, again.paused) == (True, False)
    assert not (run_dir / CONTROL_FILE).exists()


@pytest.mark.parametrize(
    ("wanted", "bounds", "error", "message"),
    [
        (0, (2, 2), ConfigError, "at least 1 rollout actor, got 0; `raylign pause`"),
        (-3, (2, 2), ConfigError, "at least 1 rollout actor, got -3"),
        (
            7,
            (2, 2),
            ClusterError,
            "7 rollout actors were asked for and the cluster can hold 6 .*goes on with 2",
        ),
        (5, (1, 4), ConfigError, "5 rollout actors are outside rollout.min_actors 1 to max_actors 4"),
    ],
)
def test_a_number_that_cannot_be_is_refused_and_nothing_happens(
    tmp_path: Path, wanted: int, bounds: tuple[int, int], error: type[RaylignError], message: str
) -> None:
    run_dir, pool = _run_dir(tmp_path / "run"), FakePool()
    with _live(_control(pool, *bounds), run_dir), pytest.raises(error, match=message):
        ask(run_dir, ScaleAsk(rollout=wanted))
    assert pool.asked == []


def test_a_run_whose_actors_are_fixed_says_so_and_still_tells_how_far_it_is() -> None:
    control = _control(None)
    assert control.answer(StatusAsk()) == RunState(step=7, num_steps=60, pool=None)
    for question in (ScaleAsk(rollout=3), PauseAsk(), GoOnAsk()):
        with pytest.raises(ConfigError, match=r"cannot \w+ this run: .*placement = 'separate'"):
            control.answer(question)


def test_only_the_owner_can_read_the_token_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    run_dir, pool = _run_dir(tmp_path / "run"), FakePool()
    with _live(_control(pool), run_dir):
        path = run_dir / CONTROL_FILE
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        contact = json.loads(path.read_text())
        assert len(contact["token"]) == 64
        path.write_text(json.dumps({**contact, "token": "0" * 64}))
        with pytest.raises(ConfigError, match="not the run's token"):
            ask(run_dir, ScaleAsk(rollout=5))
    assert pool.asked == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"scale to 5",
        b'{"token": "t"}',
        b'{"token": "t", "ask": {"verb": "scale"}}',
        b'{"token": "t", "ask": {"verb": "scale", "rollout": "5"}}',
        b'{"token": "t", "ask": {"verb": "scale", "rollout": 5.0}}',
        b'{"token": "t", "ask": {"verb": "scale", "rollout": true}}',
        b'{"token": "t", "ask": {"verb": "scale", "rollout": 5, "force": true}}',
        b'{"token": "t", "ask": {"verb": "scale", "rollout": 5}, "as": "root"}',
        b'{"token": "t", "ask": {"verb": "stop"}}',
        b'{"token": "t\xc3\xa9", "ask": {"verb": "status"}}',
        b"\xff\xfe",
    ],
)
def test_whatever_is_not_exactly_a_question_is_refused(line: bytes) -> None:
    pool = FakePool()
    reply = reply_to(_control(pool), "t", line)
    assert reply.state is None
    assert reply.error
    assert pool.asked == []


def test_a_caller_that_babbles_or_leaves_does_not_harm_the_run(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path / "run")
    with _live(_control(FakePool()), run_dir):
        contact = read_contact(run_dir)
        for data in (b"x" * 2**18, b"", b"half a line"):
            caller = socket.create_connection(("127.0.0.1", contact.port), timeout=5)
            with contextlib.suppress(OSError), caller:  # the run may hang up before we are done
                caller.sendall(data)
        assert ask(run_dir, StatusAsk()).step == 7


def test_a_directory_that_is_no_live_runs_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory at"):
        ask(tmp_path / "nowhere", StatusAsk())
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirError, match="is no run directory"):
        ask(tmp_path / "empty", StatusAsk())
    run_dir = _run_dir(tmp_path / "run")
    with pytest.raises(RunDirError, match="not live; `raylign resume"):
        ask(run_dir, StatusAsk())
    with _live(_control(FakePool()), run_dir):
        left = (run_dir / CONTROL_FILE).read_text()
    (run_dir / CONTROL_FILE).write_text(left)  # as a driver that was killed leaves it
    with pytest.raises(RunDirError, match=r"does not answer: its driver \(process \d+\) is gone"):
        ask(run_dir, StatusAsk())
    (run_dir / CONTROL_FILE).write_text(json.dumps({**json.loads(left), "host": "far-away"}))
    with pytest.raises(RunDirError, match="driven on far-away"):
        ask(run_dir, StatusAsk())
    (run_dir / CONTROL_FILE).write_text("{}")
    with pytest.raises(RunDirError, match="not what a run writes"):
        ask(run_dir, StatusAsk())


def test_the_command_line_scales_and_tells(tmp_path: Path) -> None:
    run_dir, pool, call = _run_dir(tmp_path / "run"), FakePool(), CliRunner()
    with _live(_control(pool), run_dir):
        shown = call.invoke(app, ["scale", str(run_dir)])
        assert shown.output == "step 7/60, 2 of 2 rollout actors at work\n"
        scaled = call.invoke(app, ["scale", str(run_dir), "--rollout", "4", "--wait"])
        assert scaled.output == "step 7/60, 4 of 4 rollout actors at work\n"
        assert call.invoke(app, ["pause", str(run_dir)]).output.endswith(", paused\n")
        assert not call.invoke(app, ["unpause", str(run_dir)]).output.endswith(", paused\n")
        assert isinstance(call.invoke(app, ["scale", str(run_dir), "--rollout", "0"]).exception, ConfigError)
    assert pool.asked == [4]


def test_a_line_tells_of_actors_that_are_not_at_work() -> None:
    pool = PoolStatus(
        wanted=5, in_service=2, joining=2, away=1, leaving=1, restarts=3, hung=1, paused=False, problem="no room"
    )
    assert describe(RunState(step=1, num_steps=9, pool=pool)) == (
        "step 1/9, 2 of 5 rollout actors at work, 2 joining, 1 away, 1 leaving\n"
        "the last actor that could not join: no room"
    )
    assert describe(RunState(step=1, num_steps=9)) == "step 1/9, rollout actors are fixed"


# Over HTTP


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run that has ended, one that was killed, and something else."""
    done, killed = _run_dir(tmp_path / "done"), _run_dir(tmp_path / "killed")
    (done / "summary.json").write_text('{"status": "finished", "num_steps": 60}')
    (killed / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(5)))
    (killed / "samples").mkdir()
    (killed / "samples" / "step_00000.png").write_bytes(b"a picture")
    (tmp_path / "notes").mkdir()
    (tmp_path / "secret.txt").write_text("nobody's business")
    return tmp_path


def _client(runs: Path, token: str | None = None, command: Sequence[str] = ()) -> TestClient:
    return TestClient(build_run_api(runs, token, Drivers(runs, None, command)), base_url="http://127.0.0.1:8270")


def test_runs_are_listed_with_what_their_files_tell(runs: Path) -> None:
    listed = _client(runs).get("/v1/runs").json()
    assert [(run["name"], run["live"], run["status"], run["step"]) for run in listed] == [
        ("done", False, "finished", 60),
        ("killed", False, "unknown", 4),
    ]


def test_metrics_and_samples_are_read_and_nothing_beside_them(runs: Path) -> None:
    client = _client(runs)
    assert client.get("/v1/runs/killed/metrics?tail=2").json() == {
        "rows": [{"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.5}]
    }
    assert client.get("/v1/runs/killed/samples").json() == {"files": ["step_00000.png"]}
    assert client.get("/v1/runs/killed/samples/step_00000.png").content == b"a picture"
    for path in ("killed/samples/../config.toml", "killed/samples/..%2Fconfig.toml", "..%2Fdone", "notes", "%2e%2e"):
        assert client.get(f"/v1/runs/{path}").status_code == 404, path
    assert client.get("/v1/runs/killed/metrics?tail=0").status_code == 422


def test_a_live_run_is_controlled_and_one_that_is_not_says_so(runs: Path) -> None:
    client, run_dir, pool = _client(runs), _run_dir(runs / "live"), FakePool()
    with _live(_control(pool), run_dir):
        shown = client.get("/v1/runs/live").json()
        assert (shown["status"], shown["step"], shown["state"]["pool"]["wanted"]) == ("running", 7, 2)
        assert client.post("/v1/runs/live/scale", json={"rollout": 3}).json()["pool"]["wanted"] == 3
        assert client.post("/v1/runs/live/pause").json()["pool"]["paused"]
        assert not client.post("/v1/runs/live/resume").json()["state"]["pool"]["paused"]
        changed = client.post("/v1/runs/live/resume", json={"set": {"learner.lr": 1e-4}})
        assert (changed.status_code, "is live: stop it first" in changed.json()["error"]) == (409, True)
        beyond = client.post("/v1/runs/live/scale", json={"rollout": 7})
        assert (beyond.status_code, "can hold 6" in beyond.json()["error"]) == (409, True)
        for body in ({}, {"rollout": "3"}, {"rollout": 3, "force": True}, {"rollout": 0}):
            assert client.post("/v1/runs/live/scale", json=body).status_code == 422, body
    assert pool.asked == [3]
    gone = client.post("/v1/runs/live/pause")
    assert (gone.status_code, "not live" in gone.json()["error"]) == (404, True)


def test_a_token_is_asked_for_where_one_is_set(runs: Path) -> None:
    client = _client(runs, "secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert client.get("/v1/runs", headers=headers).status_code == 401
    assert client.get("/v1/runs", headers={"Authorization": "Bearer secret"}).status_code == 200


DRIVER = """
import json, sys, time
from pathlib import Path
verb, source, *options = sys.argv[1:]
print("raylign: warming up", flush=True)
if "--seed=13" in options:
    sys.exit("raylign: seed: 13 is no seed\\n  choose another")
new = Path(options[options.index("--run-dir") + 1]) if verb == "fork" else Path(source)
(new / "checkpoints" / "step_3").mkdir(parents=True)
(new / "config.toml").write_text(json.dumps(options))
(new / "checkpoints" / "step_3" / "manifest.json").write_text("{}")
while not (new / "end").exists():
    time.sleep(0.02)
sys.exit("raylign: the disk is full")
"""
"""Behaves as `raylign fork` and `resume` do where the run API looks."""


def test_a_fork_is_started_and_says_how_it_fares(runs: Path) -> None:
    client = _client(runs, command=[sys.executable, "-c", DRIVER])
    keys = {"learner.lr": 1e-4, "learner.publish": "delta", "rollout.num_actors": 3, "model.tied": True}
    made = client.post("/v1/runs/done/fork", json={"name": "lower", "step": 3, "set": keys})
    assert (made.status_code, made.json()["name"], made.json()["status"]) == (201, "lower", "starting")
    assert json.loads((runs / "lower" / "config.toml").read_text()) == [
        "--run-dir",
        str(runs / "lower"),
        "--step=3",
        "--learner.lr=0.0001",
        "--learner.publish=delta",
        "--rollout.num_actors=3",
        "--model.tied=true",
    ]
    again = client.post("/v1/runs/done/fork", json={"name": "lower"})
    assert (again.status_code, "choose another name" in again.json()["error"]) == (409, True)
    (runs / "lower" / "end").touch()
    deadline = time.monotonic() + 10
    while not (shown := client.get("/v1/runs/lower").json())["problem"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (shown["status"], shown["problem"]) == ("unknown", "the disk is full")


def test_what_a_driver_refuses_is_the_answer(runs: Path) -> None:
    client = _client(runs, command=[sys.executable, "-c", DRIVER])
    for verb, body in (("fork", {"name": "new", "set": {"seed": 13}}), ("resume", {"set": {"seed": 13}})):
        refused = client.post(f"/v1/runs/done/{verb}", json=body)
        assert (refused.status_code, refused.json()["error"]) == (422, "seed: 13 is no seed\nchoose another"), verb
    assert not (runs / "new").exists()


@pytest.mark.parametrize(
    "body",
    [
        {"name": "../out"},
        {"name": ".hidden"},
        {"name": "a/b"},
        {"name": "ok", "set": {"--run-dir": "x"}},
        {"name": "ok", "set": {"seed": [1]}},
        {"name": "ok", "step": -1},
        {"name": "ok", "command": "rm"},
    ],
)
def test_a_fork_takes_keys_and_a_plain_name_and_nothing_else(runs: Path, body: dict[str, Any]) -> None:
    assert _client(runs, command=["false"]).post("/v1/runs/done/fork", json=body).status_code == 422


def test_a_page_of_another_site_changes_nothing(runs: Path) -> None:
    client = _client(runs, command=["false"])
    refused = client.post("/v1/runs/done/pause", headers={"Origin": "http://evil.example"})
    assert (refused.status_code, "may not change runs" in refused.json()["error"]) == (403, True)
    own = client.post("/v1/runs/done/pause", headers={"Origin": "http://127.0.0.1:8270"})
    assert own.status_code == 404, "it is only not live"


def test_the_page_stands_beside_the_api_behind_its_own_door(runs: Path) -> None:
    secret = "sixteen letters and more"
    client = TestClient(with_dashboard(runs, secret, Drivers(runs, None)), base_url="http://127.0.0.1:8270")
    assert client.get("/v1/runs").status_code == 401
    assert client.get("/v1/runs", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert "/dashboard/login" in str(client.get("/dashboard/").url), "a person logs in"
    listed = client.get("/dashboard/api/runs", headers={"Authorization": f"Bearer {secret}"})
    assert {run["name"] for run in listed.json()["runs"]} == {"done", "killed"}
    assert client.get("/dashboard/static/style.css").status_code == 200


def test_without_a_token_only_this_machine_is_let_in_and_by_its_own_name(runs: Path) -> None:
    assert _client(runs).get("/v1/runs", headers={"Host": "evil.example"}).status_code == 400
    with pytest.raises(ConfigError, match="--token-file is needed"):
        serve_runs(runs, "0.0.0.0", 8270, None)
    with pytest.raises(ConfigError, match="no folder"):
        serve_runs(runs / "nowhere", "127.0.0.1", 8270, None)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_token_file_is_read_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("secret\n")
    assert read_token(path) == "secret"
    assert read_token(None) is None
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_token(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


# By itself


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.others: list[str] = []

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[Any]) -> None:
        self.steps.append(dict(metrics))

    def evaluated(self, step: int, groups: Sequence[Any]) -> None:
        self.others.append("evaluated")

    def swept(self, step: int, sweeps: Mapping[Any, Sequence[Any]]) -> None:
        self.others.append("swept")


def _steps(scaler: Autoscaler, now: list[float], count: int, waited_s: float, evaluate_s: float = 0.0) -> None:
    for step in range(count):
        now[0] += 10.0
        seen = {"time/step_s": 10.0 + evaluate_s, "time/rollout_s": waited_s, "time/evaluate_s": evaluate_s}
        scaler.stepped(step, seen, ())


def test_the_pool_follows_the_steps_within_bounds_and_cluster_and_tells_of_it() -> None:
    pool, observer, now, notes = FakePool(2), Recorder(), [0.0], list[str]()
    rules = Autoscaling(settle_s=0.0)
    most: Callable[[], int] = lambda: 4  # noqa: E731 - a cluster of four
    scaler = Autoscaler(observer, pool, ActorBounds(1, 8), most, notes.append, rules, clock=lambda: now[0])
    _steps(scaler, now, 3, waited_s=6.0)
    assert pool.asked == [3]
    assert notes == ["step 2: from 2 to 3 rollout actors, for the learner waits for samples"]
    _steps(scaler, now, 9, waited_s=6.0)
    assert pool.asked == [3, 4], "the cluster holds no more"
    _steps(scaler, now, 60, waited_s=0.0)
    assert pool.asked == [3, 4, 3, 2, 1]
    assert len(observer.steps) == 72
    assert [row["actors/wanted"] for row in observer.steps[:4]] == [2.0, 2.0, 2.0, 3.0]
    scaler.evaluated(1, ())
    scaler.swept(1, {})
    assert observer.others == ["evaluated", "swept"]


def test_an_evaluation_is_no_time_in_which_the_learner_does_without_samples() -> None:
    pool, now = FakePool(2), [0.0]
    scaler = Autoscaler(Recorder(), pool, ActorBounds(1, 8), lambda: 8, lambda text: None, clock=lambda: now[0])
    # Four of ten seconds, and ninety of evaluation: 40 %, not 4 %.
    _steps(scaler, now, 3, waited_s=4.0, evaluate_s=90.0)
    assert pool.asked == [3]


def test_a_run_with_equal_bounds_or_fixed_actors_is_left_alone() -> None:
    observer = Recorder()
    assert autoscaled(observer, FakePool(), ActorBounds(2, 2), lambda: 8, print) is observer
    assert autoscaled(observer, None, ActorBounds(1, 8), lambda: 8, print) is observer
    assert isinstance(autoscaled(observer, FakePool(), ActorBounds(1, 8), lambda: 8, print), Autoscaler)
