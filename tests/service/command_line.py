"""The `raylign` command as a process of its own, for tests that watch it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.tiny_models import sd3_folder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

TINY_RUN = """
num_steps = {num_steps}
group_size = 2
groups_per_step = 4
[model]
path = "{model}"
height = 8
width = 16
tuning = "{tuning}"
lora = {{ rank = 2, alpha = 4 }}
max_sequence_length = 4
[prompts]
train = "{prompts}"
heldout = "{heldout}"
[sampler]
type = "flow_sde"
num_steps = 3
[algorithm]
type = "flow_grpo"
kl_weight = 0.01
[[rewards]]
type = "jpeg"
[checkpoint]
every_steps = 2
[eval]
every_steps = 1000
num_prompts = 2
"""


def write_config(folder: Path, num_steps: int = 6, tuning: str = "full") -> Path:
    """A run of seconds: a random SD3 of two layers, Flow-GRPO, JPEG reward."""
    files = {"prompts": ("ONE", "TWO", "SIX", "TEN", "CAT", "DOG"), "heldout": ("OWL", "BEE")}
    for name, words in files.items():
        (folder / f"{name}.txt").write_text("".join(f'a sign that says "{word}"\n' for word in words))
    paths = {name: folder / f"{name}.txt" for name in files}
    config = folder / "tiny.toml"
    config.write_text(TINY_RUN.format(num_steps=num_steps, model=sd3_folder(), tuning=tuning, **paths))
    return config


TEXT_RUN = """
num_steps = {num_steps}
group_size = 4
groups_per_step = 4
[model]
type = "tiny_text"
path = "{model}"
tuning = "full"
budget_head = true
canvas_length = 8
max_prompt_length = 16
[prompts]
train = "{prompts}"
heldout = "{heldout}"
[sampler]
type = "entropy_bounded"
budget = "learned"
gamma = 0.3
[algorithm]
type = "diffpo"
[[rewards]]
type = "exact_answer"
mode = "share"
[rollout]
chunk_size = 8
[learner]
epochs_per_step = 2
[checkpoint]
every_steps = 2
[eval]
every_steps = 1000
num_prompts = 4
gammas = [0.1, 1.0]
"""


def write_text_config(folder: Path, num_steps: int = 6) -> Path:
    """A run of seconds: the embedded text model sorts digits, DiffPO with a learned budget."""
    assets = ROOT / "raylign" / "assets" / "text"
    config = folder / "text.toml"
    files = {"model": "asset:text/tiny", "prompts": assets / "tiny/sort_train.jsonl"}
    config.write_text(TEXT_RUN.format(num_steps=num_steps, heldout=assets / "tiny/sort_heldout.jsonl", **files))
    return config


def start(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`raylign ARGUMENTS` in its own process group, output in `folder/output.txt` (appended)."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=folder,
            env={**ENVIRONMENT, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 120
) -> tuple[int, str]:
    """Exit code and output of `raylign ARGUMENTS`."""
    process = start(arguments, folder, environment)
    try:
        process.wait(timeout_s)
    finally:
        end(process)
    return process.returncode, (folder / "output.txt").read_text()


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind, whatever a test did."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 90) -> Any:
    """Poll until `condition` is true; fails if the process ends or time runs out first."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            raise AssertionError(f"the process ended with {process.returncode} before it happened")
        time.sleep(0.02)
    raise AssertionError(f"did not happen within {timeout_s} s")


def num_logged(run_dir: Path) -> int:
    """Training steps in metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    return sum('"weight_version"' in line for line in path.read_text().splitlines())


def workers(process: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """Ray workers of a run by what `ps` calls them, such as "RolloutWorker"."""
    found: list[psutil.Process] = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if f"ray::{kind}" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def still_alive(processes: Sequence[psutil.Process], within_s: float = 15) -> list[psutil.Process]:
    """Those of `processes` that have not ended within a time."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return alive


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())
