"""The sandbox: what code in it cannot do, tried by code that tries."""

import json
import os
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from raylign.errors import ConfigError
from rewards.isolation.child_process import ChildError, ChildTimeoutError, ChildTooLoudError
from rewards.isolation.sandbox import Limits, Sandbox, SandboxError
from rewards.isolation.sandbox_child import OpaqueError, called_names, decode, encode
from tests.processes import still_running

LIMITS = Limits(memory_bytes=256 * 2**20, workdir_bytes=8 * 2**20, file_bytes=4 * 2**20, num_processes=4)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox.choose(LIMITS)
    except ConfigError as error:
        pytest.skip(str(error))


def _run(sandbox: Sandbox, code: str, stdin: str = "", timeout_s: float = 10.0) -> str:
    with sandbox.start({"mode": "program", "code": textwrap.dedent(code)}) as child:
        child.send(stdin.encode())
        return child.read_rest(timeout_s).decode()


def test_a_program_reads_and_prints(sandbox: Sandbox) -> None:
    assert _run(sandbox, "import sys\nprint(sum(map(int, sys.stdin)))\nexit(3)", "1\n2\n39\n") == "42\n"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/hostname", "/proc/1/environ", "/proc/self/cmdline", str(Path(__file__))]
)
def test_it_sees_no_file_of_the_host(sandbox: Sandbox, path: str) -> None:
    assert Path(path).exists()
    code = f"try:\n    print(open({path!r}).read())\nexcept OSError as error:\n    print(type(error).__name__)"
    assert _run(sandbox, code) == "FileNotFoundError\n"


def test_it_sees_no_secret(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_REWARD_TOKEN", "hunter2")
    seen = _run(sandbox, "import os, sys\nprint(dict(os.environ), sys.argv, os.listdir('/'), os.listdir('/tmp'))")
    assert "hunter2" not in seen
    assert "TOKEN" not in seen


@pytest.mark.parametrize("folder", ["/", "/usr", "/usr/lib", "/dev", "/lib", os.path.realpath(os.__file__ + "/..")])
def test_it_writes_nowhere_but_in_its_folder(sandbox: Sandbox, folder: str) -> None:
    code = f"""
    for name in ("{folder}/raylign-probe", "raylign-probe"):
        try:
            open(name, "w").write("x")
            print("wrote")
        except OSError as error:
            print("no")
    """
    assert _run(sandbox, code) == "no\nwrote\n"
    assert not Path(folder, "raylign-probe").exists()
    assert not Path("/tmp/raylign-probe").exists()


def test_it_reaches_no_network(sandbox: Sandbox) -> None:
    code = """
    import socket
    for family, address in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("192.0.2.1", 80))):
        try:
            socket.socket(family).connect(address)
            print("connected")
        except OSError as error:
            print("no")
    print(len(socket.if_nameindex()) <= 1 or [name for _, name in socket.if_nameindex()])
    """
    assert _run(sandbox, code).startswith("no\nno\n")


def test_it_cannot_become_root_mount_or_trace(sandbox: Sandbox) -> None:
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None)
    print(os.geteuid() != 0, libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.ptrace(16, 1, 0, 0))
    try:
        os.setuid(0)
    except OSError:
        print("no")
    try:
        os.kill(1, 9)
    except OSError:
        pass
    print("still here")
    """
    assert _run(sandbox, code) == "True -1 -1\nno\nstill here\n"


def test_an_endless_loop_is_ended(sandbox: Sandbox) -> None:
    started = time.monotonic()
    with pytest.raises(ChildTimeoutError):
        _run(sandbox, "while True: pass", timeout_s=0.5)
    assert time.monotonic() - started < 5


def test_a_memory_bomb_hits_its_limit(sandbox: Sandbox) -> None:
    code = "try:\n    x = bytearray(2**30)\n    print('got it')\nexcept MemoryError:\n    print('no')"
    assert _run(sandbox, code) == "no\n"


def test_a_full_disk_is_its_own(sandbox: Sandbox) -> None:
    code = """
    import os
    written = 0
    try:
        for i in range(100):
            with open(f"f{i}", "wb", buffering=0) as file:
                written += file.write(b"x" * 2**20)
    except OSError:
        pass
    print(written <= 8 * 2**20, written > 0)
    """
    assert _run(sandbox, code) == "True True\n"


def test_a_fork_bomb_stays_small_and_dies(sandbox: Sandbox) -> None:
    code = """
    import os, time
    started = 1
    for _ in range(50):
        try:
            if os.fork() == 0:
                time.sleep(60)
        except OSError:
            break
        started += 1
    print(started, flush=True)
    time.sleep(60)
    """
    with sandbox.start({"mode": "program", "code": textwrap.dedent(code)}) as child:
        assert int(child.read_line(10)) <= LIMITS.num_processes
        family = psutil.Process(child.pid).children(recursive=True)
        assert len(family) >= LIMITS.num_processes
    assert still_running(family) == []


def test_a_process_that_flees_its_session_dies_with_the_rest(sandbox: Sandbox) -> None:
    code = """
    import ctypes, os, signal, time
    if os.fork() == 0:
        os.setsid()
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # forget the parent's death
    print("fled", flush=True)
    time.sleep(60)
    """
    with sandbox.start({"mode": "program", "code": textwrap.dedent(code)}) as child:
        assert [child.read_line(10), child.read_line(10)] == [b"fled", b"fled"]
        family = psutil.Process(child.pid).children(recursive=True)
        assert len(family) >= 3
    assert still_running(family) == []


def test_output_without_end_is_cut_off(sandbox: Sandbox) -> None:
    with pytest.raises(ChildTooLoudError):
        _run(sandbox, "while True: print('x' * 10000)")


def test_sandboxes_do_not_share_a_folder_or_a_limit(sandbox: Sandbox) -> None:
    hold = {
        "mode": "program",
        "code": "import os, time\nopen('mark', 'w')\nos.fork()\nos.fork()\nprint('up', flush=True)\ntime.sleep(60)",
    }
    with sandbox.start(hold) as first, sandbox.start(hold) as second:
        assert (first.read_line(10), second.read_line(10)) == (b"up", b"up")
        assert _run(sandbox, "import os\nprint(os.path.exists('mark'))") == "False\n"


def test_without_an_engine_it_is_refused_or_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    from rewards.isolation import sandbox as module

    module._problem.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"bwrap is not installed.*unsafe_local_exec"):
            Sandbox.choose(LIMITS)
        assert Sandbox.choose(LIMITS, allow_unsafe=True).engine == "unsafe"
    finally:
        module._problem.cache_clear()


def test_unsafe_keeps_limits_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox = Sandbox("unsafe", LIMITS)
    code = "try:\n    x = bytearray(2**30)\nexcept MemoryError:\n    print('no')\nopen('mark', 'w')"
    assert _run(sandbox, code) == "no\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_does_not_start_says_why(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="it said"):
        Sandbox(sandbox.engine, Limits(workdir_bytes=-1)).start({"mode": "program", "code": ""})


@pytest.mark.parametrize("value", [
    None, True, 0, -1, 2**53 - 1, 2**53, -(2**4000), 1.5, -0.0, float("inf"), "", "é\x00", b"\x00\xff", [],
    [1, [2, None]], (), (1, (2,)), set(), {1, "a"}, frozenset({(1, 2)}), {}, {"a": 1, 2: [3], (4,): {5}}, 1 + 2j,
])  # fmt: skip
def test_plain_data_travels_unchanged(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_a_subclass_travels_as_what_it_extends_and_an_object_not_at_all() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert type(decode(encode(Liar(3)))) is int
    with pytest.raises(OpaqueError):
        encode(object())


@pytest.mark.parametrize("data", [{}, {"a": 1, "b": 2}, {"eval": "1"}, {"int": "x"}, {"dict": [[1]]}, {"set": [[1]]}])
def test_what_is_no_encoding_is_refused(data: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(data)


def test_the_functions_under_test_are_what_a_test_does_not_define() -> None:
    test = """
import math as m
def check(candidate):
    for x in range(3):
        assert m.isclose(candidate(x), helper(x))
check(sum)
"""
    assert called_names(test, "sum") == ["helper", "sum"]
    assert called_names(test, "") == ["helper"]


def test_a_dead_child_is_an_error_not_an_answer(sandbox: Sandbox) -> None:
    with sandbox.start({"mode": "serve", "code": "import os\nos._exit(0)"}) as child, pytest.raises(ChildError):
        child.read_line(10)
