"""`raylign doctor`: what is missing on this machine, and what to do about it. Under five seconds, starts nothing.

What one configuration needs, and the servers it asks, are in `services/doctor_config.py`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.process import temp_root

if TYPE_CHECKING:
    from raylign.precision import Format
    from raylign.precision.quantizer import Capability

_GIB = 1024**3
_REPOSITORY = Path(__file__).resolve().parent.parent
KNOWN_PORTS: Mapping[int, str] = {
    8000: "reward service, or vLLM",
    8265: "Ray's dashboard and jobs",
    6379: "Ray's head, or Redis",
    10001: "Ray clients",
}
_TOO_FEW_FILES, _FEW_FILES = 512, 4096
_SLOW_DISK = 30e6
# Only needed where named: a missing one is a warning unless the run cannot start without it.
_REQUIRED = ("torch", "ray", "diffusers", "transformers", "pydantic", "numpy", "pillow", "rich", "tensorboard")


class Status(StrEnum):
    """How a check came out. Only FAIL stops a run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was looked at, what was found, and what to do if it is not fine."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def diagnose(
    constraints: Path = _REPOSITORY / "constraints.txt", model: Path | None = None, run_dir: Path = Path()
) -> list[Check]:
    """Every check, in the order a person would fix them. `model` is the shipped model's folder, `run_dir` where runs
    are to be written."""
    checks: list[Callable[[], Check]] = [
        check_python,
        lambda: check_packages(constraints),
        check_torch,
        check_gpus,
        check_driver,
        *(functools.partial(check_format, name) for name in ("fp8", "nvfp4", "mxfp4")),
        check_cores,
        check_memory,
        check_shared_memory,
        check_open_files,
        lambda: check_disk(run_dir),
        lambda: check_disk_speed(run_dir),
        check_temp_dir,
        check_ray,
        check_ports,
        check_known_ports,
        check_ocr,
        lambda: check_model(model),
    ]
    return [check() for check in checks]


def print_checks(checks: Sequence[Check], console: Console | None = None) -> int:
    """Print the findings; returns the exit code: 1 if a check failed, else 0."""
    if console is None:
        console = Console(highlight=False)
        # A log has no width to wrap at.
        console.width = console.width if console.is_terminal else 200
    marks = {Status.OK: ("ok", "green"), Status.WARN: ("warn", "yellow"), Status.FAIL: ("fail", "bold red")}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        text = Text(check.found)
        if check.status is not Status.OK:
            text.append(f"\n{check.remedy}", "dim")
        table.add_row(Text(*marks[check.status]), Text(check.name, "bold"), text)
    console.print(table)
    failed = sum(check.status is Status.FAIL for check in checks)
    warned = sum(check.status is Status.WARN for check in checks)
    if failed:
        console.print(Text(f"\n{failed} problem(s) to fix before a run, {warned} warning(s)", "bold red"))
    else:
        console.print(Text(f"\nready to train, {warned} warning(s)", "bold green"))
    return 1 if failed else 0


def checks_as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The findings for programs; `ok` is whether a run can start."""
    rows = [
        {
            "name": one.name,
            "status": one.status.value,
            "found": one.found,
            "remedy": "" if one.status is Status.OK else one.remedy,
        }
        for one in checks
    ]
    return {"ok": not any(one.status is Status.FAIL for one in checks), "checks": rows}


def check_python() -> Check:
    """The interpreter's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] == (3, 11):
        return Check("Python", Status.OK, found)
    newer = sys.version_info[:2] > (3, 11)
    return Check(
        "Python",
        Status.WARN if newer else Status.FAIL,
        found,
        "Raylign is tested on 3.11: `make env PYTHON=python3.11`",
    )


def check_packages(constraints: Path) -> Check:
    """Installed versions against the pins, if the pins are at hand."""
    missing = [name for name in _REQUIRED if _version(name) is None]
    if missing:
        return Check("packages", Status.FAIL, f"not installed: {', '.join(missing)}", "`make env` installs them")
    if not constraints.is_file():
        return Check("packages", Status.OK, f"all {len(_REQUIRED)} needed ones; no constraints.txt to compare with")
    pins = dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;#]+)", constraints.read_text(), re.MULTILINE))
    different = [
        f"{name} {installed} (pinned {pin})"
        for name, pin in pins.items()
        if (installed := _version(name)) is not None and installed.split("+")[0] != pin.split("+")[0]
    ]
    if different:
        shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
        return Check("packages", Status.WARN, f"not as pinned: {shown}", "`make env` installs the tested versions")
    return Check("packages", Status.OK, f"as pinned in {constraints.name}")


def check_torch() -> Check:
    """Which build of torch is installed."""
    try:
        import torch
    except ImportError as error:
        return Check("torch", Status.FAIL, f"cannot be imported: {error}", "`make env` installs it")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__} ({build} build), {torch.get_num_threads()} threads by default, 1 per Raylign process"
    return Check("torch", Status.OK, found)


def check_gpus() -> Check:
    """What torch can use; a GPU that only the driver sees is worth a word."""
    torch_found = importlib.util.find_spec("torch") is not None
    if torch_found:
        import torch

        if torch.cuda.is_available():
            properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
            names = ", ".join(f"{p.name} ({p.total_memory / _GIB:.0f} GiB)" for p in properties)
            return Check("GPUs", Status.OK, names)
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        return Check(
            "GPUs",
            Status.WARN,
            "this machine has an NVIDIA GPU that torch cannot use",
            "install the CUDA build of the pinned torch: `pip install torch==<pin>` without the +cpu suffix",
        )
    return Check("GPUs", Status.OK, "none: runs use the CPU")


def check_driver(
    version_file: Path = Path("/proc/driver/nvidia/version"), needs: str | None = None, usable: bool | None = None
) -> Check:
    """The NVIDIA driver beside what torch was built for. `needs`, `usable`: torch's CUDA version, and whether it works
    here; asked of torch when not given."""
    if needs is None and usable is None and importlib.util.find_spec("torch") is not None:
        import torch

        needs, usable = torch.version.cuda, torch.cuda.is_available()
    try:
        told = version_file.read_text(encoding="utf-8")
    except OSError:
        if needs is None:
            return Check("driver", Status.OK, "no NVIDIA driver; the CPU build of torch needs none")
        return Check(
            "driver",
            Status.WARN,
            f"no NVIDIA driver, and torch is built for CUDA {needs}: it computes on the CPU",
            "install the driver on the host, and start containers with `--gpus all`",
        )
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", told)
    version = found[1] if found else "of unknown version"
    if needs is not None and not usable:
        return Check(
            "driver",
            Status.FAIL,
            f"NVIDIA {version}, with which torch's CUDA {needs} does not start",
            f"install a driver for CUDA {needs} (`nvidia-smi` shows what this one can do), or an older build of torch",
        )
    return Check("driver", Status.OK, f"NVIDIA {version}" + (f", torch's CUDA {needs}" if needs else ""))


def check_format(name: Format, capabilities: Sequence[Capability] | None = None) -> Check:
    """Whether this machine's GPUs have units for a rollout format, and which backend uses them.

    `capabilities` are the GPUs' compute capabilities; read from torch when not given. Emulation is no fault: a run
    computes the same numbers, only no faster.
    """
    if importlib.util.find_spec("torch") is None:
        return Check(f"format {name}", Status.WARN, "unknown without torch", "`make env` installs it")
    import torch

    from raylign.precision.quantizer import UNITS, native_backend

    if capabilities is None:
        devices = range(torch.cuda.device_count()) if torch.version.cuda is not None else range(0)
        capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    needed = f"its units need {UNITS[name].name}"
    backends = [native_backend(name, capability) for capability in capabilities]
    native = [backend for backend in backends if backend is not None]
    if not native:
        return Check(f"format {name}", Status.OK, f"emulated, so never faster than bf16: {needed}")
    if len(native) == len(backends):
        return Check(f"format {name}", Status.OK, f"native on every GPU (backend {native[0]})")
    return Check(
        f"format {name}",
        Status.WARN,
        f"native on {len(native)} of {len(backends)} GPUs (backend {native[0]}), emulated on the others: {needed}",
        "`--rollout.quantizer.require_native true` refuses actors on those",
    )


def check_cores() -> Check:
    """Cores that this process may use, and whether they are busy."""
    usable = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    found = f"{usable} usable of {os.cpu_count()}, load {load:.1f}"
    if load > 1.5 * usable:
        return Check("cores", Status.WARN, found, "the machine is busy: step times will be longer than forecast")
    return Check("cores", Status.OK, found)


def check_memory() -> Check:
    """Room for the learner and its actors."""
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < 3 * _GIB:
        return Check("memory", Status.FAIL, found, "a small run needs 3 GiB: stop other programs, or fewer actors")
    if memory.available < 6 * _GIB:
        return Check("memory", Status.WARN, found, "6 GiB is comfortable; start with `--rollout.num_actors 1`")
    return Check("memory", Status.OK, found)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Ray's object store lives there; without room it falls back to a slow disk."""
    if not path.is_dir():
        return Check("shared memory", Status.WARN, f"no {path}", "Ray will keep objects in the temp folder, slowly")
    total = shutil.disk_usage(path).total
    found = f"{total / _GIB:.1f} GiB at {path}"
    if total < 1 * _GIB:
        return Check(
            "shared memory", Status.WARN, found, "in a container start it with `--shm-size 2g`; Ray is slower without"
        )
    return Check("shared memory", Status.OK, found)


def check_open_files(limit: int | None = None) -> Check:
    """How many files and sockets a process may have open: Ray's servers hold hundreds for each worker."""
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} per process"
    if limit != resource.RLIM_INFINITY and limit < _FEW_FILES:
        return Check(
            "open files",
            Status.FAIL if limit < _TOO_FEW_FILES else Status.WARN,
            found,
            "`ulimit -n 65536` in the shell that starts the run; Ray's servers die without a word when they run out",
        )
    return Check("open files", Status.OK, found)


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there already."""
    path = path.expanduser().resolve()
    return next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))


def check_disk_speed(path: Path = Path(), num_bytes: int = 32 * 2**20) -> Check:
    """How fast a checkpoint reaches the disk of the run directory: a file of its own is written, synced, removed."""
    folder = existing_folder(path)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".raylign-doctor-") as file:
            block = os.urandom(2**20)
            started_s = time.perf_counter()
            for _ in range(max(1, num_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started_s
    except OSError as error:
        remedy = "give a --run-dir that can be written, or free some space"
        return Check("disk speed", Status.FAIL, f"cannot write in {folder}: {error.strerror}", remedy)
    rate = num_bytes / max(seconds, 1e-9)
    found = f"{rate / 1e6:.0f} MB/s written and synced in {folder}"
    if rate < _SLOW_DISK:
        return Check(
            "disk speed", Status.WARN, found, "every checkpoint waits for it: a --run-dir on a local disk is faster"
        )
    return Check("disk speed", Status.OK, found)


def check_disk(path: Path = Path()) -> Check:
    """Room for checkpoints where the run directory will be."""
    path = existing_folder(path)
    free = shutil.disk_usage(path).free
    found = f"{free / _GIB:.1f} GiB free in {path}"
    if not os.access(path, os.W_OK):
        return Check("disk", Status.FAIL, f"cannot write in {path.resolve()}", "give a writable --run-dir")
    if free < _GIB:
        return Check("disk", Status.FAIL, found, "checkpoints need room: free some, or give another --run-dir")
    if free < 5 * _GIB:
        return Check("disk", Status.WARN, found, "long runs of large models need more for checkpoints")
    return Check("disk", Status.OK, found)


def check_temp_dir() -> Check:
    """Where Ray will put its sockets, logs and spilled objects."""
    root = temp_root()
    free = shutil.disk_usage(root).free
    found = f"{root}, {free / _GIB:.1f} GiB free"
    if str(root) != tempfile.gettempdir():
        found += f" ({tempfile.gettempdir()} is too long for Ray's sockets)"
    if free < _GIB:
        return Check("temp folder", Status.FAIL, found, "Ray logs and spills there: free some, or set TMPDIR")
    return Check("temp folder", Status.OK, found)


def check_ray() -> Check:
    """Ray itself; nothing is started."""
    try:
        import ray
    except ImportError as error:
        return Check("Ray", Status.FAIL, f"cannot be imported: {error}", "`make env` installs it")
    home_token = Path.home() / ".ray" / "auth_token"
    note = "; runs use a token of their own, not the one in the home directory" if home_token.exists() else ""
    return Check("Ray", Status.OK, f"{ray.__version__}{note}")


def check_ports(host: str = "127.0.0.1") -> Check:
    """Ray picks free ports by itself; it needs a few, and name resolution of this host."""
    held: list[socket.socket] = []
    try:
        while len(held) < 8:
            held.append(socket.create_server((host, 0)))
    except OSError as error:
        return Check("ports", Status.FAIL, f"cannot listen on {host}: {error}", "allow loopback sockets for Ray")
    finally:
        for server in held:
            server.close()
    try:
        with tempfile.TemporaryDirectory(dir=temp_root()) as folder, socket.socket(socket.AF_UNIX) as server:
            server.bind(str(Path(folder) / "socket"))
    except OSError as error:
        remedy = "Ray's processes talk through such files: set TMPDIR to a short path on a local disk"
        return Check("ports", Status.FAIL, f"no socket can lie in {temp_root()}: {error}", remedy)
    return Check("ports", Status.OK, f"a cluster can start: {host} and {temp_root()} take sockets")


def check_known_ports(ports: Mapping[int, str] | None = None, host: str = "127.0.0.1") -> Check:
    """The ports that services have by default; one that is taken is worth knowing, and nothing to stop for."""
    ports = KNOWN_PORTS if ports is None else ports
    taken = [f"{port} ({what})" for port, what in ports.items() if is_taken(port, host)]
    if not taken:
        return Check("known ports", Status.OK, f"{', '.join(map(str, ports))} are free")
    told = "a run's own cluster takes others by itself; `--service.port` moves a reward server, `--address` joins a Ray"
    return Check("known ports", Status.OK, f"in use: {', '.join(taken)}; {told}")


def is_taken(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def check_ocr() -> Check:
    """The OCR reward's models lie inside the rapidocr wheel."""
    spec = importlib.util.find_spec("rapidocr")
    if spec is None or not spec.submodule_search_locations:
        return Check(
            "OCR", Status.WARN, "rapidocr is not installed", "`make env` installs it; only OCR rewards need it"
        )
    folder = Path(spec.submodule_search_locations[0]) / "models"
    models = sorted(folder.glob("*.onnx"))
    if not any("rec" in model.name for model in models):
        return Check(
            "OCR",
            Status.WARN,
            f"no recognition model in {folder}",
            "reinstall: `pip install --force-reinstall rapidocr`",
        )
    return Check("OCR", Status.OK, f"rapidocr {_version('rapidocr')}, {len(models)} models in the wheel")


def check_model(folder: Path | None = None) -> Check:
    """The model that the quickstart trains is in the package."""
    folder = folder if folder is not None else _REPOSITORY / "raylign" / "assets" / "glyphs"
    weights = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    if not weights:
        return Check(
            "shipped model",
            Status.FAIL,
            f"no weights in {folder}",
            "the checkout is incomplete: `git checkout raylign/assets`",
        )
    size = sum(path.stat().st_size for path in weights)
    return Check("shipped model", Status.OK, f"{folder.name}, {size / 1e6:.1f} MB in {len(weights)} file(s)")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
