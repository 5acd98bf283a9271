"""Jobs on a real cluster: two runs share it and neither notices; a stopped one leaves a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from raylign.errors import ClusterError
from services.config import RunConfig, load_run_config
from services.job_server import RayJobServer
from services.jobs import JobClient
from services.run import train_run
from tests.service import command_line as cli

OTHER_SEED = 5


@dataclass(frozen=True)
class Cluster:
    """A head node that `ray start` made, as an administrator would, and how to reach it."""

    address: str
    token_file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"RAYLIGN_ADDRESS": self.address, "RAY_AUTH_TOKEN_PATH": str(self.token_file)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")  # not the checkout: jobs must run from what is uploaded
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    dashboard, client_server = _free_ports(2)
    binaries = Path(sys.executable).parent
    taken = {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAYLIGN_ADDRESS", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in taken} | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {"num-cpus": 4, "port": 0, "dashboard-port": dashboard, "dashboard-agent-listen-port": 0}
    with tempfile.TemporaryDirectory(prefix="rj-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        options |= {"temp-dir": temporary, "ray-client-server-port": client_server, "object-store-memory": 2**27}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        with (folder / "output.txt").open("w") as output:
            head = subprocess.Popen(
                [str(binaries / "ray"), "start", "--head", "--block", "--disable-usage-stats", *arguments],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Cluster(f"http://127.0.0.1:{dashboard}", token_file)
        finally:
            family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait(10)
            psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> JobClient:
    deadline = time.monotonic() + 90
    while True:
        try:
            client = JobClient(RayJobServer(cluster.address, cluster.token_file.read_text()))
            client.list()
            return client
        except ClusterError:  # it is starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@pytest.mark.timeout(600)
def test_two_jobs_share_a_cluster_and_train_as_if_alone_and_stopping_one_leaves_a_checkpoint(
    cluster: Cluster, client: JobClient, tmp_path: Path
) -> None:
    config = cli.write_config(tmp_path, num_steps=2)
    first = client.submit(_colocated(config, num_steps=500), "long", str(tmp_path / "long"))
    _wait_for_step(client, first.id)
    told = _submit_by_example(cluster, config, tmp_path / "short")
    second = client.list()[0]
    assert second.id in told
    assert told.strip().endswith("SUCCEEDED, step 2 of 2")
    code, output = cli.run(["logs", second.id, "--follow"], tmp_path, cluster.environment, timeout_s=200)
    assert code == 0, output
    assert "step 2/2" in output
    assert not client.status(first.id).is_over

    assert client.stop(first.id)
    stopped = client.wait(first.id, timeout_s=120, every_s=0.2)
    assert (stopped.status, stopped.num_steps) == ("STOPPED", 500)
    assert [job.config for job in client.list()] == ["tiny", "long"]
    summary = cli.summary(tmp_path / "long")
    assert summary["status"] == "stopped"
    assert (tmp_path / "long" / "checkpoints" / f"step_{summary['num_steps']}").is_dir()

    assert train_run(_alone(config, OTHER_SEED), "alone", tmp_path / "alone_short", None) == 0
    assert train_run(_alone(config, 0), "alone", tmp_path / "alone_long", None) == 0
    alone = cli.summary(tmp_path / "alone_short")["weights_sha256"]
    assert cli.summary(tmp_path / "short")["weights_sha256"] == alone
    assert _losses(tmp_path / "long") == _losses(tmp_path / "alone_long")
    assert _losses(tmp_path / "short") != _losses(tmp_path / "long")


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # Ray's client, of a newer aiohttp
def test_what_a_cluster_cannot_do_is_said_at_once(
    cluster: Cluster, client: JobClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_jobs = len(client.list())
    many = load_run_config(str(cli.write_config(tmp_path)), {"rollout.num_actors": "9"})
    with pytest.raises(ClusterError, match=r"CPUs and the Ray cluster at http\S+ has 4: \S+ missing"):
        client.submit(many, "many")
    assert len(client.list()) == num_jobs
    for ask in (client.status, client.stop, lambda one: list(client.logs(one, follow=True))):
        with pytest.raises(ClusterError, match=r"has no job 'nobody'"):
            ask("nobody")
    with pytest.raises(ClusterError, match="refuses the token"):
        RayJobServer(cluster.address, token="wrong")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ClusterError, match="asks for a token and none was sent"):
        RayJobServer(cluster.address)


def _submit_by_example(cluster: Cluster, config: Path, run_dir: Path) -> str:
    """What the example prints, which sends a run, follows it, and says how it ended."""
    keys = ["--placement", "colocated", "--rollout.num_actors", "1", "--seed", str(OTHER_SEED)]
    example = cli.ROOT / "examples" / "submit_to_cluster.py"
    done = subprocess.run(
        [sys.executable, str(example), str(config), "--run-dir", str(run_dir), *keys],
        cwd=config.parent,
        env={**cli.ENVIRONMENT, **cluster.environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _colocated(config: Path, **keys: int) -> RunConfig:
    """One worker that samples and trains, and a reward."""
    given = {name: str(value) for name, value in keys.items()}
    return load_run_config(str(config), {"placement": "colocated", "rollout.num_actors": "1", **given})


def _alone(config: Path, seed: int) -> RunConfig:
    return load_run_config(str(config), {"placement": "in_process", "seed": str(seed)})


def _wait_for_step(client: JobClient, job_id: str, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = client.status(job_id)
        assert not job.is_over, job.message
        if job.step is not None and job.step >= 2:
            return
        time.sleep(0.3)
    raise AssertionError(f"{job_id} did not train within {timeout_s} s: {''.join(client.logs(job_id))}")


def _losses(run_dir: Path) -> list[float]:
    """Of the first two steps."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row.get("loss") is not None][:2]
