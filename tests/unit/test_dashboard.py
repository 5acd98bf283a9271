"""The dashboard's server over run directories: its API, who may read, hostile input, and runs in progress."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from typer.testing import CliRunner

from benchmarks.dashboard_server import dashboard_over
from benchmarks.recorded_run import append_rows, made_up_groups, make_run, metrics_row, write_record
from raylign.errors import ConfigError, RunDirError
from services.dashboard.access import COOKIE, SECURITY_HEADERS, session_of
from services.dashboard.app import STATIC, dashboard_app, serve_dashboard
from services.dashboard.events import Watch
from services.dashboard.runs import RunsFolder, is_live
from services.dashboard_commands import app as command
from services.run_api import with_dashboard
from services.run_dir import RunDir
from services.run_drivers import Drivers
from tests.http_servers import served

_BANNED = (
    *("innerHTML", "outerHTML", "insertAdjacent", "document.write", "srcdoc", "DOMParser"),
    *("eval(", "new Function", 'onclick="', 'style="', "javascript:"),
)
TOKEN = "a secret of some length"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two short runs, and of something that is none."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", 120, groups_of=[1, 2, 97, 120])
    make_run(folder / "two", 40, groups_of=[40], seed=3, algorithm={"type": "nft", "beta": 0.5})
    (folder / "notes").mkdir()
    (folder / "secret.txt").write_text("not for you")
    return folder


def client(root: Path, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    return TestClient(dashboard_app(root, token), base_url=f"http://{host}", follow_redirects=False)


def got(root: Path, path: str) -> Any:
    answer = client(root).get(f"/api/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_runs_are_listed_with_how_they_go(runs: Path) -> None:
    cards = {card["name"]: card for card in got(runs, "runs")["runs"]}
    assert set(cards) == {"one", "two"}
    one = cards["one"]
    assert (one["step"], one["num_steps"], one["status"], one["live"]) == (120, 120, "finished", False)
    assert one["reward"]["first"] == pytest.approx(metrics_row(1, 120)["reward/mean"])
    assert one["heldout"]["last"] == pytest.approx(metrics_row(120, 120)["eval/mean"])
    assert len(one["spark"]) > 10


def test_a_single_run_can_be_given(runs: Path) -> None:
    assert [card["name"] for card in got(runs / "one", "runs")["runs"]] == ["one"]
    assert got(runs / "one", "runs/one")["step"] == 120


def test_an_overview_answers_the_five_questions(runs: Path) -> None:
    data = got(runs, "runs/one")
    assert data["headline"] == "mean"
    assert data["slow"][0]["phase"] == "rollout"
    assert data["slow"][0]["share"] == pytest.approx(3.1 / 5.04)
    assert data["failed"] == {"reward_failed": 1}
    assert data["samples_per_step"] == 24
    assert data["records"]["train"] == [[1, 2, 1], [97, 120, 23]]
    assert {one["name"] for one in data["heldout"]} == {"mean", "judge", "ocr", "diversity"}


def test_groups_and_their_pictures_are_served(runs: Path) -> None:
    record = got(runs, "runs/one/groups/train/97")
    sample = record["groups"][0]["samples"][0]
    assert sample["failure"]["kind"] == "timeout"
    assert "reasoning" in record["groups"][0]["samples"][1]["scores"][0]["details"]
    offset, length, _, _ = sample["picture"]
    picture = client(runs).get(f"/api/runs/one/pictures/train/97/{offset}-{length}")
    assert picture.headers["content-type"] == "image/webp"
    assert len(picture.content) == length
    failures = got(runs, "runs/one/failures")
    assert failures["kinds"] == [{"kind": "timeout", "reward": "judge", "count": 1}]
    assert failures["rows"][0]["step"] == 97


def test_a_step_tells_timeline_and_ages(runs: Path) -> None:
    data = got(runs, "runs/one/steps/97")
    assert [lane["role"] for lane in data["lanes"]] == ["Rollout actors", "Rewards", "Learner"]
    assert data["ages"] == [{"age": "0", "samples": 12.0}, {"age": "1", "samples": 12.0}]


def test_a_step_tells_when_its_work_was_done_as_far_as_that_is_recorded(tmp_path: Path) -> None:
    make_run(tmp_path / "sync", 8, groups_of=[3, 4])
    make_run(tmp_path / "async", 8, groups_of=[3, 4, 8], max_staleness=1)
    told = got(tmp_path, "runs/sync/steps/3")
    rows = {row["label"]: row for row in told["timeline"]["rows"]}
    assert list(rows) == ["Rollout actor 1", "Rollout actor 2", "Rewards", "Learner and loop"]
    assert rows["Rollout actor 2"]["tracks"] == [
        [["sample", 0.05, 2.0, 3], ["decode", 2.05, 0.3, 3], ["pull", 4.98, 0.04, 3]]
    ]
    assert (told["timeline"]["begin"], told["timeline"]["whole"], told["ahead"]) == (-1.0, True, 0)
    assert rows["Rollout actor 2"]["idle"] == pytest.approx(1 - 2.34 / 5.04)
    # Where groups are drawn ahead, a second of step 3 went to step 4, whose record says so.
    ahead = got(tmp_path, "runs/async/steps/3")
    first = ahead["timeline"]["rows"][0]
    assert [["sample", 4.04, 1.0, 4] in track for track in first["tracks"]] == [True, False]
    assert ahead["ahead"] == 1
    assert first["idle"] == pytest.approx(1 - (1.3 + 1.0) / 5.04)
    # Step 5 is not recorded, so nobody knows what was drawn for it; after step 8 comes none.
    assert got(tmp_path, "runs/async/steps/4")["timeline"]["rows"][0]["idle"] is None
    assert got(tmp_path, "runs/async/steps/8")["timeline"]["whole"]
    assert got(tmp_path, "runs/async/steps/2")["timeline"] is None


def test_two_runs_are_compared(runs: Path) -> None:
    data = got(runs, "compare?a=one&b=two")
    changed = {one["key"]: (one["a"], one["b"]) for one in data["changed"]}
    assert changed["seed"] == (0, 3)
    assert changed["num_steps"] == (120, 40)
    assert data["readable"]
    ends = {one["name"]: (one["a"], one["b"]) for one in data["ends"]}
    assert ends["reward/mean"] == pytest.approx(
        (metrics_row(120, 120)["reward/mean"], metrics_row(40, 40)["reward/mean"])
    )


def test_a_configuration_of_another_version_is_shown_nonetheless(tmp_path: Path) -> None:
    make_run(tmp_path / "old", 3)
    config = tmp_path / "old" / "config.toml"
    config.write_text("a_key_that_is_gone = 1\n" + config.read_text())
    append_rows(tmp_path / "old", [{**metrics_row(4, 4), "parity/gap": 0.5}])
    assert got(tmp_path, "runs/old")["num_steps"] == 3
    config.write_text("not TOML")
    assert got(tmp_path, "runs/old")["num_steps"] is None
    assert got(tmp_path, "compare?a=old&b=old")["readable"] is False


def test_a_parity_gap_is_held_against_the_tolerance_of_the_configuration(tmp_path: Path) -> None:
    make_run(tmp_path / "exact", 3)
    assert got(tmp_path, "runs/exact")["alerts"] == []
    append_rows(tmp_path / "exact", [{**metrics_row(4, 4), "parity/gap": 0.5}])
    (alert,) = got(tmp_path, "runs/exact")["alerts"]
    assert (alert["kind"], alert["level"]) == ("parity", "bad")


@pytest.mark.parametrize(
    "path",
    [
        "runs/notes",
        "runs/none",
        "runs/..",
        "runs/%2e%2e%2fsecret.txt",
        "runs/..%2F..%2Fetc/config",
        "runs/one/samples/..%2F..%2Fsecret.txt",
        "runs/one/samples/config.toml",
        "runs/one/groups/train/3",
        "runs/one/groups/config/1",
        "runs/one/groups/..%2ftrain/1",
        "runs/one/pictures/train/1/0-67000000",
        "runs/one/pictures/train/1/5-50",
        "runs/one/steps/121",
        "compare?a=one&b=../one",
    ],
)
def test_nothing_but_runs_is_found(runs: Path, path: str) -> None:
    answer = client(runs).get(f"/api/{path}")
    assert answer.status_code == 404
    assert "not for you" not in answer.text


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2f..%2frun.py", "/../secret.txt"]
)
def test_static_files_are_only_those_of_the_page(runs: Path, path: str) -> None:
    assert client(runs).get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "runs/one/pictures/train/1/a-b",
        "runs/one/pictures/train/1/0-99999999",
        "runs/one/series?keys=loss&points=9",
        "runs/one/series?points=x",
        "runs/one/events?since=x",
        f"runs/one/series?keys={','.join(['a'] * 41)}",
    ],
)
def test_what_makes_no_sense_is_refused(runs: Path, path: str) -> None:
    assert client(runs).get(f"/api/{path}").status_code == 400


def test_only_reading_is_possible(runs: Path) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client(runs).request(method, "/api/runs").status_code == 405


def test_without_a_token_only_loopback_names_are_answered(runs: Path) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "localhost:8280", "127.0.0.1:9"):
        assert client(runs, host=host).get("/api/runs").status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "0.0.0.0", "192.168.0.9:8280"):
        answer = client(runs, host=host).get("/api/runs")
        assert (answer.status_code, "one" in answer.text) == (400, False)


def test_every_answer_carries_the_headers_that_bind_a_browser(runs: Path) -> None:
    for path in ("/", "/api/runs", "/static/main.js", "/nothing", "/login"):
        headers = client(runs).get(path).headers
        for name, value in SECURITY_HEADERS.items():
            assert headers[name] == value, path
    assert "unsafe" not in SECURITY_HEADERS["content-security-policy"]
    assert client(runs).get("/api/runs").headers["cache-control"] == "no-store"


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_inline() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        outside = set(re.findall(r"""["'(](?:https?:)?//[^"')]*""", text))
        assert outside <= {'"http://www.w3.org/2000/svg'}, path.name
        for banned in _BANNED:
            assert banned not in text, (path.name, banned)
        assert "<script>" not in text


def test_with_a_token_nothing_is_told_to_strangers(runs: Path) -> None:
    stranger = client(runs, TOKEN, "runs.example")
    for path in ("/api/runs", "/api/runs/one", "/api/runs/one/events", "/static/main.js", "/api/nothing"):
        answer = stranger.get(path)
        assert (answer.status_code, "one" in answer.text) == (401, False), path
    assert stranger.get("/").headers["location"] == "/login"
    for given in ("Bearer wrong", TOKEN, f"Bearer {TOKEN}x", "Bearer ", "Basic eA==", "Bearer \xff"):
        headers = [(b"authorization", given.encode("latin-1"))]
        assert stranger.get("/api/runs", headers=headers).status_code == 401
    for cookie in (TOKEN, "", session_of("another secret, as long"), session_of(TOKEN)[:-1]):
        assert stranger.get("/api/runs", headers={"cookie": f"{COOKIE}={cookie}"}).status_code == 401
    assert stranger.get(f"/api/runs?token={TOKEN}").status_code == 401


def test_a_program_sends_the_token_and_a_person_logs_in(runs: Path) -> None:
    visitor = client(runs, TOKEN, "runs.example")
    assert visitor.get("/api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    wrong = visitor.post("/login", data={"token": "wrong"})
    assert wrong.status_code == 401
    assert 'role="alert"' in wrong.text
    assert "set-cookie" not in wrong.headers
    right = visitor.post("/login", data={"token": TOKEN})
    assert (right.status_code, right.headers["location"]) == (303, "/")
    cookie = right.headers["set-cookie"]
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in cookie.split(";")}
    assert "Secure" not in cookie
    assert visitor.get("/api/runs").status_code == 200
    assert visitor.post("/login", content=b"token=" + b"x" * 5000).status_code == 413
    secure = TestClient(dashboard_app(runs, TOKEN), base_url="https://runs.example", follow_redirects=False)
    assert "Secure" in secure.post("/login", data={"token": TOKEN}).headers["set-cookie"]


def test_it_can_be_mounted_in_another_application(runs: Path) -> None:
    host = FastAPI()
    host.mount("/dashboard", dashboard_app(runs, TOKEN))
    visitor = TestClient(host, follow_redirects=False)
    assert visitor.get("/dashboard/").headers["location"] == "/dashboard/login"
    logged_in = visitor.post("/dashboard/login", data={"token": TOKEN})
    assert logged_in.headers["location"] == "/dashboard/"
    assert "Path=/dashboard" in logged_in.headers["set-cookie"]
    assert visitor.get("/dashboard/api/runs").status_code == 200
    assert visitor.get("/dashboard/static/main.js").status_code == 200


def test_what_is_not_safe_is_not_served(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="others can reach"):
        serve_dashboard(runs, "0.0.0.0", 8280, None)
    with pytest.raises(ConfigError, match="16 or more"):
        dashboard_app(runs, "short")
    with pytest.raises(RunDirError, match="no folder"):
        dashboard_app(tmp_path / "none", None)


def test_the_command_takes_the_token_from_a_file_or_the_environment(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short\n")
    for options, environ in (
        (["--token-file", str(tmp_path / "token")], {}),
        ([], {"RAYLIGN_DASHBOARD_TOKEN": "short"}),
    ):
        done = CliRunner().invoke(command, [str(runs), "--host", "0.0.0.0", *options], env=environ)
        assert isinstance(done.exception, ConfigError)
        assert "has 5 characters" in str(done.exception)


def test_a_clusters_page_is_found_at_its_run_service(runs: Path) -> None:
    """Given an address, the command looks for the page there, behind a token as well, and says what is wrong."""
    with served(with_dashboard(runs, TOKEN, Drivers(runs, None))) as address:
        done = CliRunner().invoke(command, [address])
        assert (done.exit_code, done.output.count(f"{address}/dashboard/")) == (0, 1)
        wrong = CliRunner().invoke(command, [f"{address}/nowhere"])
    assert isinstance(wrong.exception, ConfigError)
    assert "raylign serve-runs" in str(wrong.exception)
    assert "does not answer" in str(CliRunner().invoke(command, [address]).exception)


def test_ctrl_c_is_clean_while_somebody_watches(runs: Path) -> None:
    with dashboard_over(runs, output=subprocess.PIPE) as (address, server):
        with urllib.request.urlopen(f"{address}/api/runs/one/events?since=120", timeout=30) as events:
            assert events.readline() == b"retry: 1000\n"
            server.send_signal(signal.SIGINT)
            told, _ = server.communicate(timeout=30)
        assert server.returncode == 0, told
        assert told.splitlines()[1:] == [f"Dashboard of {runs}: {address}/  Ctrl-C stops."]


def test_an_address_that_is_taken_is_named(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be served"):
            serve_dashboard(runs, "127.0.0.1", taken.getsockname()[1], None)


def test_hostile_names_and_texts_come_back_as_json(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> \"'&"
    make_run(tmp_path / name, 2, groups_of=[2], prompt="</script><script>alert(1)</script>\u202eevil\x00")
    card = got(tmp_path, "runs")["runs"][0]
    assert card["name"] == name
    answer = client(tmp_path).get(f"/api/runs/{_quoted(name)}/groups/train/2")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["groups"][0]["prompt"]["text"].startswith("</script><script>alert(1)")


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def changes(watch: Watch) -> dict[str, Any]:
    return dict(watch.changes())


def watched(root: Path, since: int) -> Watch:
    watch = Watch(RunsFolder(root).run("live"), since)
    watch.changes()
    return watch


def test_new_rows_and_groups_are_told_once(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 3, groups_of=[3])
    watch = watched(tmp_path, 3)
    assert changes(watch) == {}
    append_rows(tmp_path / "live", [metrics_row(4, 5), metrics_row(5, 5)])
    write_record(tmp_path / "live", 5, made_up_groups(5))
    told = changes(watch)
    assert [row["step"] for row in told["rows"]["rows"]] == [4, 5]
    assert told["groups"]["newest"] == {"train": 5, "eval": -1}
    assert changes(watch) == {}


def test_an_evaluation_that_joins_the_last_line_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 3)
    watch = watched(tmp_path, 3)
    path = tmp_path / "live" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # the sink cuts the line, then writes it anew
    assert changes(watch) == {}
    with path.open("a") as file:
        file.write(json.dumps({**metrics_row(3, 3), "eval/ocr": 0.75}) + "\n")
    (row,) = changes(watch)["rows"]["rows"]
    assert (row["step"], row["eval/ocr"]) == (3, 0.75)


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 3)
    watch = watched(tmp_path, 3)
    text = json.dumps(metrics_row(4, 4)) + "\n"
    with (tmp_path / "live" / "metrics.jsonl").open("a") as file:
        file.write(text[:50])
        file.flush()
        assert changes(watch) == {}
        file.write(text[50:])
    assert [row["step"] for row in changes(watch)["rows"]["rows"]] == [4]


def test_a_resumed_run_makes_the_page_load_anew(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 6)
    watch = watched(tmp_path, 6)
    path = tmp_path / "live" / "metrics.jsonl"
    partial = path.with_suffix(".partial")
    partial.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    os.replace(partial, path)
    assert "reload" in changes(watch)
    append_rows(tmp_path / "live", [metrics_row(5, 6)])
    assert [row["step"] for row in changes(watch)["rows"]["rows"]] == [5]


def test_a_reader_that_missed_too_much_is_told_to_load(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 3)
    watch = watched(tmp_path, 3)
    append_rows(tmp_path / "live", [metrics_row(step, 900) for step in range(4, 900)])
    assert list(changes(watch)) == ["reload"]
    assert changes(watch) == {}


def test_a_run_is_live_while_its_process_is(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as run:
        assert is_live(RunDir(run.path), 0.0)
    assert not is_live(RunDir(tmp_path / "run"), 0.0)
    lock = tmp_path / "run" / "lock"
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename}))
    assert not is_live(RunDir(tmp_path / "run"), 0.0)
    lock.write_text(json.dumps({"pid": 1, "host": "another"}))
    written_s = lock.stat().st_mtime
    assert is_live(RunDir(tmp_path / "run"), written_s + 5)
    assert not is_live(RunDir(tmp_path / "run"), written_s + 500)


def test_curves_are_bounded_and_keep_their_ends(runs: Path) -> None:
    series: Mapping[str, Any] = got(runs, "runs/one/series?keys=reward/mean,eval/ocr,loss,none&points=30")["series"]
    assert set(series) == {"reward/mean", "eval/ocr", "loss"}
    assert len(series["reward/mean"]["x"]) == 30
    assert series["reward/mean"]["band"] == "ci95"
    assert series["loss"]["band"] == "range"
    assert series["eval/ocr"]["x"] == [20, 40, 60, 80, 100, 120]
