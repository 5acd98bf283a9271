"""Killable workers: deadlines, deaths, noise, and that nothing outlives its owner."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rewards.isolation.child_process import Child, ChildEndedError, ChildTimeoutError, ChildTooLoudError
from rewards.isolation.worker_pool import WorkerDiedError, WorkerPool, WorkerTimeoutError
from tests.processes import still_running

WORKER = """
import json, os, signal, sys, time
print("{}", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, task["limit_s"])
    if task.get("sleep_s"):
        time.sleep(task["sleep_s"])
    if task.get("die"):
        os._exit(3)
    if task.get("say"):
        print(task["say"], flush=True)
    print(json.dumps({"pid": os.getpid(), "echo": task.get("echo")}), flush=True)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "worker.py").write_text(WORKER)
    return [sys.executable, "-I", str(tmp_path / "worker.py")]


def test_a_worker_is_kept_between_tasks(command: list[str]) -> None:
    pool = WorkerPool(command, 1)
    pool.warm()
    first, second = pool.call({"echo": 1}, 5), pool.call({"echo": [2, None]}, 5)
    assert (first["echo"], second["echo"]) == (1, [2, None])
    assert first["pid"] == second["pid"]
    pool.close()
    assert not psutil.pid_exists(first["pid"])


def test_a_late_worker_is_killed_and_replaced(command: list[str]) -> None:
    pool = WorkerPool(command, 1)
    before = pool.call({}, 5)["pid"]
    started = time.monotonic()
    with pytest.raises(WorkerTimeoutError):
        pool.call({"sleep_s": 60}, 0.2)
    assert time.monotonic() - started < 5
    assert not psutil.pid_exists(before)
    assert pool.call({"echo": "next"}, 5)["echo"] == "next"
    pool.close()


@pytest.mark.parametrize("task", [{"die": True}, {"say": "not json"}, {"say": "x" * 2**21}])
def test_a_worker_that_dies_or_babbles_costs_one_task(command: list[str], task: dict) -> None:
    pool = WorkerPool(command, 1)
    with pytest.raises(WorkerDiedError):
        pool.call(task, 5)
    assert pool.call({"echo": 1}, 5)["echo"] == 1
    pool.close()


def test_a_worker_that_died_while_idle_is_replaced(command: list[str]) -> None:
    pool = WorkerPool(command, 1)
    pid = pool.call({}, 5)["pid"]
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=2)
    assert pool.call({}, 5)["pid"] != pid
    pool.close()


@pytest.mark.parametrize("broken", [["-c", "raise SystemExit('no such library')"], ["-c", "print('hello')"]])
def test_a_worker_that_does_not_start_says_why(broken: list[str]) -> None:
    pool = WorkerPool([sys.executable, *broken], 1)
    with pytest.raises(WorkerDiedError, match=r"no such library|hello"):
        pool.warm()


def test_workers_serve_threads_side_by_side(command: list[str]) -> None:
    pool = WorkerPool(command, 2)
    pool.warm()
    answers: list[dict] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(pool.call({"echo": i, "sleep_s": 0.05}, 5)))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["echo"] for answer in answers) == list(range(6))
    assert len({answer["pid"] for answer in answers}) == 2
    pool.close()


def test_no_worker_outlives_a_killed_owner(command: list[str]) -> None:
    owner_code = textwrap.dedent(f"""
        import threading, time
        from rewards.isolation.worker_pool import WorkerPool
        idle, busy = WorkerPool({command!r}, 1), WorkerPool({command!r}, 1)
        print(idle.call({{}}, 5)["pid"], busy.call({{}}, 5)["pid"], flush=True)
        busy.call({{"sleep_s": 60}}, 0.2)  # bounds itself at twice that
    """)
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(workers) == 2
    assert still_running(workers) == []


def _child(code: str, max_bytes: int = 1000) -> Child:
    return Child([sys.executable, "-I", "-S", "-c", code], env={}, max_bytes=max_bytes)


def test_a_child_that_reads_nothing_does_not_block_its_owner() -> None:
    with _child("print('hi', flush=True); import time; time.sleep(60)") as child:
        child.send(b"x" * 2**22)
        assert child.read_line(5) == b"hi"
        with pytest.raises(ChildTimeoutError):
            child.read_line(0.1)


def test_a_child_that_writes_while_it_is_fed_is_read() -> None:
    echo = "import sys\nfor line in sys.stdin: sys.stdout.write(line)"
    with _child(echo, max_bytes=2**22) as child:
        data = b"line\n" * 200_000
        child.send(data)
        assert child.read_rest(10) == data


def test_a_child_may_not_write_without_end() -> None:
    with _child("while True: print('x' * 1000)") as child, pytest.raises(ChildTooLoudError):
        child.read_rest(5)


def test_a_child_that_ends_is_no_answer() -> None:
    with _child("print('half', end='')") as child:
        with pytest.raises(ChildEndedError):
            child.read_line(5)
        assert child.unread == b"half"


def test_a_killed_child_takes_its_own_children_along() -> None:
    code = "import os, time\nprint(os.fork() or 'child', flush=True)\ntime.sleep(60)"
    child = _child(code)
    said = {child.read_line(5), child.read_line(5)} - {b"child"}
    grandchild = psutil.Process(int(said.pop()))
    child.kill()
    assert still_running([grandchild]) == []
