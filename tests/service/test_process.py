"""A real Ray cluster of a run: it works with its own token, and nothing remains when it ends or its driver dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from services import process

ROOT = Path(__file__).parents[2]
# In a process of its own: Ray reads its settings once per process, and the whole test run shares this one.
DRIVER = """
import os, sys, time
from pathlib import Path
from services.process import local_cluster, prepare_environment

prepare_environment()
run_dir = Path(sys.argv[1])
with local_cluster(2, run_dir) as cluster:
    import ray
    import psutil

    @ray.remote
    class Worker:
        def settings(self):
            print("a word on stderr", file=sys.stderr, flush=True)
            return {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "RAY_AUTH_MODE")}

    worker = Worker.remote()
    print(ray.get(worker.settings.remote()))
    print((run_dir / "ray_token").stat().st_mode & 0o777, cluster.dashboard_url)
    print(cluster.temp_dir)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    if sys.argv[2] == "fail":
        raise RuntimeError("boom")
    if sys.argv[2] == "hang":
        time.sleep(120)
print(len(psutil.Process().children(recursive=True)), cluster.temp_dir.exists(), "RAY_AUTH_TOKEN_PATH" in os.environ)
"""


def _start(run_dir: Path, how: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(run_dir), how]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if _is_alive(pid)]


def _gone(pids: list[int], timeout_s: float = 20.0) -> bool:
    end = time.monotonic() + timeout_s
    while _alive(pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not _alive(pids)


def _is_agent(pid: int) -> bool:
    """Ray's two agents of a node wait a minute for a cluster that is gone, then end by themselves."""
    try:
        return psutil.Process(pid).name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    except psutil.NoSuchProcess:
        return False


@pytest.mark.service
def test_a_cluster_works_with_its_token_and_leaves_nothing(tmp_path: Path) -> None:
    output, errors = _start(tmp_path, "finish").communicate(timeout=120)
    settings, token, temp_dir, pids, rest = output.splitlines() or [errors] * 5
    assert settings == "{'OMP_WAIT_POLICY': 'PASSIVE', 'HF_HUB_OFFLINE': '1', 'RAY_AUTH_MODE': 'token'}"
    assert token == f"{0o600} None"
    assert rest == "0 False False"
    assert not Path(temp_dir).exists()
    assert _alive([int(pid) for pid in pids.split()]) == []
    assert list(tmp_path.iterdir()) == [], "neither the token nor logs remain after a good run"
    assert errors == "", "nothing that a person would have to wonder about"


@pytest.mark.service
def test_stderr_of_workers_survives_a_failure(tmp_path: Path) -> None:
    driver = _start(tmp_path, "fail")
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "RuntimeError: boom" in errors
    assert f"Ray's logs, are in {tmp_path / 'logs'}" in errors
    assert any("a word on stderr" in path.read_text() for path in (tmp_path / "logs").glob("worker-*.err"))
    assert _alive([int(pid) for pid in output.splitlines()[3].split()]) == []


@pytest.mark.service
def test_nothing_runs_on_when_the_driver_is_killed(tmp_path: Path) -> None:
    driver = _start(tmp_path, "hang")
    assert driver.stdout is not None
    assert driver.stderr is not None
    lines = [driver.stdout.readline() for _ in range(4)]
    pids, temp_dir = [int(pid) for pid in lines[3].split()], Path(lines[2].strip())
    watched = [pid for pid in pids if not _is_agent(pid)]
    assert len(watched) >= 4
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    driver.stderr.close()
    assert _gone(watched)
    # The folder of a killed run goes when the next one starts.
    assert temp_dir.exists()
    with process._temp_dir():
        assert not temp_dir.exists()
