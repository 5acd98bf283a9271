"""Prometheus' view of runs: every metric in one family, sums, a port that is let go, a folder's live runs."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from raylign.errors import ConfigError
from services.dashboard.columns import Columns
from services.elastic import PoolStatus
from services.run_api import RunView, build_run_api
from services.run_control import RunState
from services.run_drivers import Drivers
from services.run_exporter import ExporterSink, FolderMetrics, numbers_of
from services.run_metrics import RunNumbers, families, names
from tests.documents import ROOT

ROW = {
    "step": 3,
    "weight_version": 3,
    "reward/mean": 0.5,
    "reward/ocr/exact": 0.25,
    "ci95/reward/mean": 0.1,
    "eval/ocr": 0.75,
    "ci95/eval/ocr": 0.05,
    "loss": -1.5,
    "loss/kl": 0.01,
    "grad/norm": 2.0,
    "ratio/clip_fraction": 0.2,
    "staleness/max": 1.0,
    "samples/age_1": 24.0,
    "time/train_s": 4.0,
    "time/step_s": 9.0,
    "busy/reward_s": 3.0,
    "throughput/samples_per_s": 12.0,
    "failed/reward_failed": 2.0,
    "nfe/mean": 3.5,
    "parity/gap": 1e-6,
}
POOL = PoolStatus(wanted=3, in_service=2, joining=1, away=0, leaving=0, restarts=4, hung=0, paused=False)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _read(text: str) -> Samples:
    """What a scrape says, as the reference parser of the format reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def _scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return _read(answer.read().decode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_answers_with_the_newest_numbers_and_is_let_go(tmp_path: Path) -> None:
    run, port = tmp_path / "my-run", _free_port()
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "failed/reward_failed": 1.0, "loss": None}) + "\n")
    sink = ExporterSink(run, 60, "127.0.0.1", port)
    try:
        sink.log(3, {name: value for name, value in ROW.items() if name != "step"})
        sink.log(3, {"eval/ocr": 0.8, "reward/mean": float("nan")})
        samples = _scrape(port)
        with pytest.raises(ConfigError, match=f"metrics_port {port} of 127.0.0.1 cannot be listened at"):
            ExporterSink(run, 60, "127.0.0.1", port)
    finally:
        sink.close()
        sink.close()
    assert samples[_key("raylign_reward", run="my-run", reward="mean")] == 0.5, "the newest that was finite"
    assert samples[_key("raylign_reward", run="my-run", reward="ocr/exact")] == 0.25
    assert samples[_key("raylign_reward_ci95", run="my-run", reward="mean")] == 0.1
    assert samples[_key("raylign_heldout", run="my-run", metric="ocr")] == 0.8
    assert samples[_key("raylign_heldout_ci95", run="my-run", metric="ocr")] == 0.05
    assert samples[_key("raylign_loss", run="my-run")] == -1.5
    assert samples[_key("raylign_kl", run="my-run")] == 0.01
    assert samples[_key("raylign_gradient", run="my-run", kind="norm")] == 2.0
    assert samples[_key("raylign_ratio", run="my-run", stat="clip_fraction")] == 0.2
    assert samples[_key("raylign_staleness_versions", run="my-run", stat="max")] == 1.0
    assert samples[_key("raylign_samples_by_age", run="my-run", age="1")] == 24.0
    assert samples[_key("raylign_phase_seconds", run="my-run", phase="train")] == 4.0
    assert samples[_key("raylign_step_seconds", run="my-run")] == 9.0
    assert samples[_key("raylign_busy_seconds", run="my-run", phase="reward")] == 3.0
    assert samples[_key("raylign_metric", run="my-run", metric="nfe/mean")] == 3.5
    assert samples[_key("raylign_failures_total", run="my-run", kind="reward_failed")] == 3.0, "earlier steps count"
    assert (samples[_key("raylign_step", run="my-run")], samples[_key("raylign_num_steps", run="my-run")]) == (3, 60)
    with pytest.raises(OSError, match="refused"):
        _scrape(port)


def test_every_number_of_a_row_is_exported_once_and_every_family_is_named() -> None:
    numbers = RunNumbers("r", 10)
    numbers.take(3, ROW)
    samples = [sample for family in families([numbers]) for sample in family.samples]
    run_wide = {"raylign_step", "raylign_num_steps"}
    assert len([sample for sample in samples if sample.name not in run_wide]) == len(ROW) - 1
    assert {sample.name for sample in samples} <= names()


def test_hostile_names_stay_label_values() -> None:
    numbers = RunNumbers('run"} evil 1\n', 1)
    numbers.take(1, {'reward/a"b\\c\nd': 1.0})
    from prometheus_client import CollectorRegistry, generate_latest

    from services.run_exporter import _Collected

    registry = CollectorRegistry()
    registry.register(_Collected(lambda: families([numbers])))
    samples = _read(generate_latest(registry).decode())
    assert samples[_key("raylign_reward", run='run"} evil 1\n', reward='a"b\\c\nd')] == 1.0
    assert {name for name, _ in samples} == {"raylign_step", "raylign_num_steps", "raylign_reward"}


def test_a_folder_shows_live_runs_with_their_actors_and_counts_the_others(tmp_path: Path) -> None:
    for name in ("live", "done"):
        (tmp_path / name).mkdir()
        lines = [{**ROW, "step": 1}, {**ROW, "step": 2, "eval/ocr": None}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def view(path: Path) -> RunView:
        live = path.name == "live"
        state = RunState(step=2, num_steps=60, pool=POOL) if live else None
        return RunView(name=path.name, live=live, status="running" if live else "finished", step=2, state=state)

    exported = FolderMetrics(view)
    paths = sorted(tmp_path.iterdir())
    samples = _read(exported.text(paths).decode())
    assert samples[_key("raylign_failures_total", run="live", kind="reward_failed")] == 4.0
    assert samples[_key("raylign_heldout", run="live", metric="ocr")] == 0.75, "of the newest evaluation"
    assert samples[_key("raylign_actors", run="live", state="in_service")] == 2
    assert samples[_key("raylign_actors", run="live", state="joining")] == 1
    assert samples[_key("raylign_runs", status="finished")] == 1
    assert samples[_key("raylign_updated_timestamp_seconds", run="live")] > 1e9
    assert not [key for key in samples if ("run", "done") in key[1]]
    with (tmp_path / "live" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**ROW, "step": 3, "reward/mean": 0.9}) + "\n")
    assert _read(exported.text(paths).decode())[_key("raylign_reward", run="live", reward="mean")] == 0.9


def test_the_service_answers_prometheus_to_those_who_may_ask(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.toml").write_text("seed = 1")
    (tmp_path / "done" / "summary.json").write_text('{"status": "finished", "num_steps": 3}')
    app = build_run_api(tmp_path, "a-token", Drivers(tmp_path, None, ()))
    client = TestClient(app, base_url="http://runs.example")
    assert client.get("/metrics").status_code == 401
    answer = client.get("/metrics", headers={"authorization": "Bearer a-token"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert _read(answer.text) == {_key("raylign_runs", status="finished"): 1.0}


def test_columns_give_the_same_numbers_as_rows() -> None:
    rows = [{**ROW, "step": step} for step in (1, 2, 3)]
    by_row = RunNumbers("r", 0)
    for row in rows:
        by_row.take(int(row["step"]), row)
    by_column = numbers_of("r", Columns.of(rows))
    assert (by_column.newest, by_column.failures, by_column.step) == (by_row.newest, by_row.failures, by_row.step)


def test_the_page_lists_every_family() -> None:
    page = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
    assert {name for name in names() if f"`{name}" not in page} == set()
