"""What the programs that measure models of published sizes share: a clock, a step of the learner, options, a report."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from learner.learner import Learner
from raylign.precision import DTYPES
from raylign.types import RewardBreakdown, RolloutGroup

ROOT = Path(__file__).parents[1]
CALLS_PER_REPEAT = 4


class Clock:
    """Seconds and peak memory of jobs on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def timed(self, job: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each repetition, the device idle before and after."""
        seconds: list[float] = []
        for _ in range(repeats):
            self._synchronise()
            started_s = time.perf_counter()
            job()
            self._synchronise()
            seconds.append(time.perf_counter() - started_s)
        return seconds

    def forget_peak(self, *, release: bool = False) -> None:
        """Let the next peak be of what follows; on a CPU nothing can be forgotten. release: unused memory as well."""
        gc.collect()
        if self.device.type == "cuda":
            if release:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Most memory held since `forget_peak` (CUDA), or largest resident set of the process (CPU, in KiB there)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """As rows tell seconds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def rising_rewards(group: RolloutGroup) -> RolloutGroup:
    """The group with the rewards 0, 1, 2 and so on, so that there is something to learn."""
    return group.with_rewards([RewardBreakdown(float(sibling), ()) for sibling in range(group.group_size)])


def take_step(learner: Learner, group: RolloutGroup) -> None:
    """One step of one update, optimiser included."""
    learner.begin_step([group], 1)
    learner.forward_backward(0)
    if not learner.optimise(0).finite:
        raise SystemExit("the update was not finite")
    learner.end_step(1)


def make_parser(description: str | None, numbers: Sequence[tuple[str, int, str]]) -> argparse.ArgumentParser:
    """Options that every program has, and whole `numbers`: name, default and what it is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16", help="of the weights; adapters are fp32")
    common = (("repeats", 3, "measurements after the warm-up"), ("threads", 1, "CPU threads, with --device cpu"))
    for name, default, what in (*numbers, *common):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--force", action="store_true", help="run published sizes on a CPU all the same")
    parser.add_argument("--hardware", default="", help="what to say about the machine")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser


def parse_with_device(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, small: str = "--geometry small"
) -> argparse.Namespace:
    """Parsed options, of a device that is there. small: the option that suits a CPU."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda, but torch finds no CUDA device; use --device cpu {small}")
    return options


def use_device(options: argparse.Namespace) -> dict[str, str]:
    """Set the threads of a CPU; what a report says of torch and the device."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name(options.device) if options.device == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def tell(name: str, row: Mapping[str, Any]) -> None:
    """Show a finished row at once."""
    print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)


def publish(program: str, options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Print what was found as one JSON object that says by which program, where and when; write it if asked for."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "command": shlex.join(["python", f"benchmarks/{Path(program).name}", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": options.hardware,
        **found,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
