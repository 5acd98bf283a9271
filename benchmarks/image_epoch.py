"""One epoch of image RL, by placement: how close Raylign is to a hand-written loop, and what workers add.

The geometry of `baseline_loop.py` (tiny random SD3, 4 prompts x 4 siblings, 6 Flow-SDE steps, 2 trained timesteps,
JPEG reward, fp32, no guidance), trained by Flow-GRPO through the ordinary controller. Every configuration and the
baseline run in a process of their own, round after round, so that the machine's mood touches all alike.

    python benchmarks/image_epoch.py --repeats 5 --json epoch.json

prints one JSON object: per configuration the median epoch with least and most, phases, pictures per second and peak
memory; then the ratios that matter: in-process against the loop, 2 workers against the loop's best, Ray's overhead.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tiny_sd3_64 import HEIGHT, PROMPTS, WIDTH, build_model_dir

HERE = Path(__file__).parent
GROUP_SIZE = 4
NUM_IMAGES = GROUP_SIZE * len(PROMPTS)
MICRO_BATCHES = (4, 8, 16)
WARM_UP = 2
PHASES = ("rollout", "credit", "train", "publish", "pull", "other")
BUSY = ("sample", "decode", "reward")


def configurations() -> list[dict[str, Any]]:
    """What is measured: placement, workers, micro-batch, threads. Two workers cannot share one batch of 16."""
    singles = [("in_process", 1), ("colocated", 1)]
    found = [
        {"placement": placement, "workers": workers, "micro_batch": micro_batch, "threads": threads}
        for placement, workers in [*singles, ("colocated", 2)]
        for micro_batch, threads in itertools.product(MICRO_BATCHES, (1, 2))
        if micro_batch * workers <= NUM_IMAGES
    ]
    return [entry for entry in found if entry["micro_batch"] != 8 or entry["workers"] == 2]


def run_settings(entry: Mapping[str, Any], folder: Path, num_steps: int) -> dict[str, Any]:
    """The run's configuration as plain data."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return {
        "num_steps": num_steps,
        "placement": entry["placement"],
        "group_size": GROUP_SIZE,
        "groups_per_step": len(PROMPTS),
        "model": {
            "path": str(folder / "model"),
            "height": HEIGHT,
            "width": WIDTH,
            "tuning": "full",
            "max_sequence_length": 128,
        },
        "prompts": {"train": str(prompts)},
        "sampler": {"type": "flow_sde", "num_steps": 6, "shift": 3.0},
        "algorithm": {"type": "flow_grpo", "kl_weight": 0.0, "num_train_steps": 2},
        "rewards": [{"type": "jpeg"}],
        "rollout": {
            "num_actors": entry["workers"],
            "chunk_size": entry["micro_batch"],
            "num_threads": entry["threads"],
        },
        "learner": {"num_ranks": entry["workers"], "num_threads": entry["threads"]},
        "eval": {"every_steps": 10**6},
        "checkpoint": {"every_steps": 10**6},
    }


class Rows:
    """An observer that keeps each step's metrics."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[Any]) -> None:
        """Keep the step's numbers."""
        self.rows.append(dict(metrics))

    def evaluated(self, step: int, groups: Sequence[Any]) -> None:
        """Nothing is evaluated here."""

    def swept(self, step: int, sweeps: Mapping[Any, Any]) -> None:
        """Nothing is repeated here."""


def measure_one(entry: Mapping[str, Any], folder: Path, num_steps: int) -> dict[str, Any]:
    """Run one configuration in this process and summarise its epochs but the warm-up."""
    from services.process import local_cluster, prepare_environment

    prepare_environment()
    from raylign.config import parse_config
    from rollout.prompts import PromptStream, load_prompts
    from services.config import RunConfig
    from services.controller import Controller
    from services.topology import build

    config = parse_config(RunConfig, run_settings(entry, folder, num_steps), "the benchmark")
    prompts = load_prompts(Path(config.prompts.train))
    observer = Rows()

    async def no_checkpoint(step: int) -> None:
        """Checkpoints are not part of an epoch."""

    async def drive() -> dict[str, int]:
        topology = await build(config, lambda name: nullcontext())
        controller = Controller(
            config,
            PromptStream(prompts, 0, config.groups_per_step),
            [],
            topology.fleet,
            topology.scorer,
            topology.learner,
            observer,
            no_checkpoint,
        )
        await controller.run(0)
        peak = await topology.peak_memory_bytes()
        await topology.close()
        return peak

    with tempfile.TemporaryDirectory() as scratch:
        # More logical CPUs than cores: the reward replica and the workers take turns.
        cluster = nullcontext() if config.placement == "in_process" else local_cluster(8, Path(scratch))
        with cluster:
            peak = asyncio.run(drive())
    rows = observer.rows[WARM_UP:]
    return {
        "epoch_s": [row["time/step_s"] for row in rows],
        "phases": {phase: [row.get(f"time/{phase}_s", 0.0) for row in rows] for phase in PHASES},
        "busy": {phase: [row.get(f"busy/{phase}_s", 0.0) for row in rows] for phase in BUSY},
        "ratio_deviation_max": max(row["ratio/deviation_max"] for row in rows),
        "peak_memory_bytes": peak,
    }


def in_own_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script of this folder and read the JSON it prints last."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=HERE
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def name_of(entry: Mapping[str, Any]) -> str:
    """Such as "colocated x2, micro-batch 8, 1 thread"."""
    threads = f"{entry['threads']} thread{'s' if entry['threads'] > 1 else ''}"
    return f"{entry['placement']} x{entry['workers']}, micro-batch {entry['micro_batch']}, {threads}"


def collect(repeats: int, epochs: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every configuration once per round, the baseline among them."""
    results: dict[str, list[dict[str, Any]]] = {}
    for round_number in range(repeats):
        for micro_batch, threads in itertools.product((4, 16), (1, 2)):
            name = f"baseline, micro-batch {micro_batch}, {threads} thread{'s' if threads > 1 else ''}"
            arguments = ["baseline_loop.py", "--micro-batch", str(micro_batch), "--threads", str(threads)]
            arguments += ["--epochs", str(epochs), "--model", str(folder / "model")]
            results.setdefault(name, []).append(in_own_process(arguments))
        for entry in configurations():
            arguments = ["image_epoch.py", "--one", json.dumps(entry), "--model", str(folder), "--epochs", str(epochs)]
            results.setdefault(name_of(entry), []).append(in_own_process(arguments))
        print(f"round {round_number + 1} of {repeats} done", file=sys.stderr)
    return results


def summarise(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and the ratios."""
    summary: dict[str, Any] = {"configurations": {}}
    medians: dict[str, float] = {}
    for name, rounds in results.items():
        if name.startswith("baseline"):
            epochs = [one["epoch_s"]["median"] for one in rounds]
            details: dict[str, Any] = {
                phase: statistics.median(one["seconds"][phase]["median"] for one in rounds)
                for phase in rounds[0]["seconds"]
            }
            extra = {key: rounds[0][key] for key in ("gflop_per_epoch", "num_params", "peak_rss_bytes")}
            extra |= {key: rounds[-1][key] for key in ("gemm_gflop_per_s", "floor_s")}
        else:
            epochs = [statistics.median(one["epoch_s"]) for one in rounds]
            details = {
                phase: statistics.median(itertools.chain.from_iterable(one[kind][phase] for one in rounds))
                for kind in ("phases", "busy")
                for phase in rounds[0][kind]
            }
            extra = {"peak_memory_bytes": rounds[-1]["peak_memory_bytes"]}
        medians[name] = statistics.median(epochs)
        summary["configurations"][name] = {
            "epoch_s": spread(epochs),
            "images_per_s": NUM_IMAGES / medians[name],
            "phases_s": details,
            "ratio_deviation_max": max(one["ratio_deviation_max"] for one in rounds),
            **extra,
        }
    summary["ratios"] = ratios(medians)
    return summary


def ratios(medians: Mapping[str, float]) -> dict[str, Any]:
    """What the figures are for; epochs of the same micro-batch and threads are compared."""
    settings = [(mb, t, f"micro-batch {mb}, {t} thread{'s' if t > 1 else ''}") for mb in (4, 16) for t in (1, 2)]
    best = min(value for name, value in medians.items() if name.startswith("baseline"))
    two = {name: value for name, value in medians.items() if " x2," in name}
    fastest = min(two, key=lambda name: two[name])
    return {
        "in_process_over_loop": {
            label: medians[f"in_process x1, {label}"] / medians[f"baseline, {label}"] for _, _, label in settings
        },
        "ray_overhead_ms": {
            label: 1000 * (medians[f"colocated x1, {label}"] - medians[f"in_process x1, {label}"])
            for _, _, label in settings
        },
        "two_workers_speedup_over_best_loop": best / two[fastest],
        "fastest_two_workers": fastest,
    }


def main() -> None:
    """Parse the arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--epochs", type=int, default=8, help="epochs per run, warm-up included")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("--one", default=None, help="measure one configuration (JSON) in this process")
    parser.add_argument("--model", type=Path, default=None, help="folder that holds model/, with --one")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure_one(json.loads(arguments.one), arguments.model, arguments.epochs)))
        return
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        build_model_dir(Path(scratch) / "model")
        result = summarise(collect(arguments.repeats, arguments.epochs, Path(scratch)))
    result["measured_in_s"] = time.monotonic() - started_s
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
