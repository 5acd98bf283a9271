"""The short probe: each role in a process of its own, one after the other, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raylign.errors import ClusterError
from services.config import RunConfig
from services.run_dir import config_toml

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 1800.0
_SAID_CHARS = 600

Measured = Mapping[str, Mapping[str, Any]]
"""By role, what its process measured; see `services.plan.probe_role`."""


def run_probe(config: RunConfig, told: Callable[[str], None]) -> Measured:
    """Play every role for a moment; `told` hears which. Raises ClusterError for one that fails.

    `config` has absolute paths.
    """
    roles = ("rollout", "rewards", "learner") if config.placement == "in_process" else (
        "driver", "rollout", "rewards", "learner"
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rayl-plan-") as name:
        folder = Path(name)
        (folder / "config.toml").write_text(config_toml(config), encoding="utf-8")
        return {role: _play(role, folder, told) for role in roles}


def _play(role: str, folder: Path, told: Callable[[str], None]) -> Mapping[str, Any]:
    told(role)
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Ray gives a worker one thread of OpenMP per CPU that it reserved, which is one.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "services.plan.probe_role", role, str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"the probe's {role} was not done after {_TIMEOUT_S:.0f} s; plan without it: --no-probe"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        said = lines[-1].removeprefix("raylign: ") if lines else f"exit code {done.returncode}"
        if done.returncode < 0:
            said = f"killed by signal {-done.returncode}, as when memory runs out"
        raise ClusterError(f"the probe's {role} failed: {said[:_SAID_CHARS]}; plan without it: --no-probe")
    return json.loads((folder / f"{role}.json").read_text(encoding="utf-8"))
