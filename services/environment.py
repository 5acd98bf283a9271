"""What a run ran on: versions, hardware, source, cluster. Written when it starts, one entry per part of a resumed run.

A report that is written later, or elsewhere, tells of the run and not of where it was written. No environment variable,
user or host is in it: the file travels with the report.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from raylign.types import JsonValue
from services.run_dir import write_atomic

ENVIRONMENT_FILE = "environment.json"
LIBRARIES = ("raylign", "torch", "ray", "diffusers", "transformers", "peft", "torchao", "numpy")
_MAX_PARTS = 50
_GIT_TIMEOUT_S = 5.0

Part = dict[str, JsonValue]


def write_environment(run_dir: Path) -> None:
    """Add what this process runs on to the run's `environment.json`."""
    parts = [*read_environment(run_dir), {"began": time.strftime("%Y-%m-%d %H:%M:%S %z"), **environment()}]
    write_atomic(run_dir / ENVIRONMENT_FILE, json.dumps(parts[-_MAX_PARTS:], indent=2).encode() + b"\n")


def read_environment(run_dir: Path) -> list[Part]:
    """The parts of a run, the first first; [] if there are none, or the file is no list of them."""
    try:
        parts: Any = json.loads((run_dir / ENVIRONMENT_FILE).read_bytes())
    except (OSError, ValueError):
        return []
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def environment() -> Part:
    """What this process runs on."""
    found: Part = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        **_source(Path(__file__).parents[1]),
        **_devices(),
        **_cluster(),
    }
    libraries: Part = {}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**{key: value for key, value in found.items() if value not in (None, "")}, "libraries": libraries}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None


def _source(root: Path) -> Part:
    """The commit of a source tree, and whether it was changed since; {} where it is installed from a wheel."""
    if not (root / ".git").exists():
        return {}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout

    try:
        commit, changed = git("rev-parse", "HEAD").strip(), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "commit_changed": bool(changed.strip())}


def _devices() -> Part:
    """GPUs that this process sees, if it has torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"gpus": [str(name) for name in names], "cuda": str(torch.version.cuda)}


def _cluster() -> Part:
    """What the Ray cluster offers, if this process is in one."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    offered = ray.cluster_resources()
    kinds = {name: offered[name] for name in ("CPU", "GPU") if name in offered}
    return {"cluster": {"nodes": sum(bool(node["Alive"]) for node in ray.nodes()), **kinds}}
