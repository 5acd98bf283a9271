"""Runs foreign code where it can do no harm: fresh namespaces, no network, nothing of the host but Python, limits.

Bubblewrap is used where it works, else util-linux's unshare with a root of our own making (`sandbox_setup.py`). Which
of them isolates is not assumed but tried (`Sandbox.choose`): a probe program must fail to reach out. Either way, code
has

    user, pid, mount, network, IPC and UTS namespaces of its own, no capability, no new privileges, an empty environment
    a root with Python and the system's libraries, read-only, no /proc, no /etc, no home; a writable /tmp in memory
    limits on memory, CPU time, file size, open files and processes; a wall clock that ends everything in it

`unsafe` keeps the limits (but the one on processes) and drops the isolation.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylign.errors import ConfigError
from rewards.isolation.child_process import Child, ChildError
from rewards.isolation.sandbox_child import READY

Engine = Literal["bubblewrap", "unshare", "unsafe"]
START_TIMEOUT_S = 20.0
NOBODY = 65534
_HOST_PATHS = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_MOUNT_POINT = "/sys"
"""Where stage one builds the new root: exists everywhere, and nothing in it is wanted."""
_PROBE = """
import ctypes, json, os, socket, sys
facts = {}
def can(name, action):
    try:
        action()
        facts[name] = True
    except OSError:
        facts[name] = False
def fork_many():
    for _ in range(json.loads(sys.stdin.read())["forks"]):
        if os.fork() == 0:
            import time
            time.sleep(10)
            os._exit(0)
can("see the host's files", lambda: os.stat("/etc/passwd"))
can("see other processes", lambda: os.listdir("/proc"))
can("write outside of its folder", lambda: open(os.path.join(sys.prefix, "lib", "probe"), "w"))
can("reach a network", lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9)))
can("write into its folder", lambda: open("probe", "w"))
facts["be root"] = os.geteuid() == 0
facts["trace its init"] = ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0
try:
    can("start processes without end", fork_many)
finally:
    print(json.dumps(facts), flush=True)
"""
_EXPECTED = {
    "see the host's files": False,
    "see other processes": False,
    "write outside of its folder": False,
    "reach a network": False,
    "write into its folder": True,
    "be root": False,
    "trace its init": False,
    "start processes without end": False,
}


class SandboxError(Exception):
    """A sandbox did not start; nothing is known about the code that was to run in it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What code in a sandbox may use."""

    memory_bytes: int = 512 * 2**20
    """Address space of one process."""
    workdir_bytes: int = 64 * 2**20
    """Files in /tmp together."""
    file_bytes: int = 16 * 2**20
    num_processes: int = 8
    """Processes and threads together."""
    num_files: int = 64
    output_bytes: int = 2**20
    """Standard output, or one answer."""
    cpu_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to run code; `start` gives a process that waits for its order."""

    engine: Engine
    limits: Limits

    @classmethod
    def choose(cls, limits: Limits, allow_unsafe: bool = False) -> Sandbox:
        """The first engine that isolates here, else `unsafe` if that is allowed.

        Raises ConfigError, with what is missing, if it is not.
        """
        # As root, bubblewrap keeps the user, and the kernel does not limit root's processes.
        order: Sequence[Engine] = ("unshare", "bubblewrap") if os.geteuid() == 0 else ("bubblewrap", "unshare")
        problems: list[str] = []
        for engine in order:
            problem = _problem(engine)
            if problem is None:
                return cls(engine, limits)
            problems.append(f"{engine}: {problem}")
        if allow_unsafe:
            return cls("unsafe", limits)
        raise ConfigError(
            f"code cannot be isolated on this machine ({'; '.join(problems)}); install bubblewrap, or allow user "
            "namespaces (sysctl user.max_user_namespaces, in a container its seccomp profile), or set "
            "unsafe_local_exec = true where the whole machine is disposable"
        )

    def start(self, order: Mapping[str, Any]) -> Child:
        """A child that is limited, isolated and carrying out `order` (see sandbox_child). Raises SandboxError.

        Whoever starts it kills it, in the same thread.
        """
        child = _start(self.engine, self.limits)
        text = json.dumps(order).encode()
        child.send(f"{len(text)}\n".encode() + text)
        return child


@functools.cache
def _problem(engine: Engine) -> str | None:
    """What keeps an engine from isolating here, or None; tried once per process."""
    tools = {"bubblewrap": ["bwrap"], "unshare": ["setpriv", "unshare"]}.get(engine, [])
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    limits = Limits()
    text = json.dumps({"mode": "program", "code": _PROBE}).encode()
    try:
        with _start(engine, limits) as child:
            child.send(f"{len(text)}\n".encode() + text + json.dumps({"forks": 4 * limits.num_processes}).encode())
            facts = json.loads(child.read_rest(START_TIMEOUT_S).splitlines()[0])
    except SandboxError as error:
        return str(error)
    except (ChildError, ValueError, IndexError) as error:
        return f"the probe did not answer ({type(error).__name__})"
    wrong = [name for name, expected in _EXPECTED.items() if facts.get(name) != expected]
    return f"code {'can' if facts[wrong[0]] else 'cannot'} {wrong[0]}" if wrong else None


def _start(engine: Engine, limits: Limits) -> Child:
    """A child that has said `ready`. Raises SandboxError."""
    stage_two = [_python(), "-I", "-S", "-c", _source("sandbox_child.py"), json.dumps(_rlimits(engine, limits))]
    workdir = Path(tempfile.mkdtemp(prefix="raylign-code-")) if engine == "unsafe" else None
    command = {
        "bubblewrap": _bubblewrap, "unshare": _unshare, "unsafe": lambda command, _: command,
    }[engine](stage_two, limits)  # fmt: skip
    try:
        child = Child(command, env={}, max_bytes=limits.output_bytes, cwd=workdir, remove=workdir)
    except OSError as error:
        raise SandboxError(f"{command[0]} could not be run: {error.strerror}") from None
    try:
        ready = child.read_line(START_TIMEOUT_S)
        if ready == READY:
            return child
        said = ready + b"\n" + child.read_rest(1.0)
    except ChildError:
        said = child.unread
    child.kill()
    lines = said.decode(errors="replace").strip().splitlines()
    raise SandboxError(f"it said {lines[-1][:200]!r}" if lines else "it said nothing")


def _unshare(command: Sequence[str], limits: Limits) -> list[str]:
    """Fresh namespaces by util-linux, the rest by stage one. Root needs no user namespace to mount, and gives it up."""
    is_root = os.geteuid() == 0
    plan = {
        "root": _MOUNT_POINT,
        "expose": _exposed(),
        "workdir_bytes": limits.workdir_bytes,
        "user": NOBODY if is_root else None,
        "command": list(command),
    }
    as_user = [] if is_root else ["--user", "--map-root-user"]
    namespaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    die_with_owner = [_tool("setpriv"), "--pdeathsig", "KILL"]
    return [*die_with_owner, _tool("unshare"), *as_user, *namespaces, *_stage_one(plan)]


def _bubblewrap(command: Sequence[str], limits: Limits) -> list[str]:
    """All by bubblewrap, but for the last user namespace, without which its init could be traced."""
    binds = [
        argument
        for path in _exposed()
        for argument in (
            ("--symlink", str(Path(path).readlink()), path)
            if Path(path).is_symlink()
            else ("--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path)
        )
    ]
    return [
        _tool("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *binds,
        "--size", str(limits.workdir_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--",
        *_stage_one({"command": list(command)}),
    ]  # fmt: skip


def _stage_one(plan: Mapping[str, Any]) -> list[str]:
    return [_python(), "-I", "-S", "-c", _source("sandbox_setup.py"), json.dumps(plan)]


def _exposed() -> list[str]:
    """What code sees of the host: this interpreter's installation and the system's libraries."""
    installation = str(Path(sys.base_prefix).resolve())
    below_usr = installation == "/usr" or installation.startswith("/usr/")
    return [path for path in (*_HOST_PATHS, *([] if below_usr else [installation])) if os.path.lexists(path)]


def _rlimits(engine: Engine, limits: Limits) -> dict[str, int]:
    """By the names of the resource module. Outside of a namespace the user's other processes would count, too."""
    rlimits = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_CPU": math.ceil(limits.cpu_s) + 1,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.num_files,
        "RLIMIT_CORE": 0,
    }
    return rlimits if engine == "unsafe" else {**rlimits, "RLIMIT_NPROC": limits.num_processes}


def _tool(name: str) -> str:
    return shutil.which(name) or name


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return str(Path(sys.executable).resolve())


@functools.cache
def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
