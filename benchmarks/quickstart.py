"""How reliably the quickstart learns: the same run from several seeds, with its curves.

    python benchmarks/quickstart.py --seeds 5 --json quickstart.json

runs `raylign train CONFIG --seed N` once per seed, each as a person would, and prints one JSON object: held-out
rewards before and after, the gain, the curves over steps and seconds, seconds to the first picture, training and
whole-run seconds, peak memory by worker; then how many seeds reach the wanted gain. Overrides after `--` go to
every run: `-- --algorithm.type flow_grpo`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METRIC = "ocr"


def run_seed(config: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One run and what it left."""
    run_dir = folder / f"seed_{seed}"
    command = [sys.executable, "-m", "services.cli", "train", config, "--run-dir", str(run_dir), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    started_s = time.monotonic()
    process = subprocess.Popen(
        [*command, *overrides], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first: dict[str, float] = {}
    output: list[str] = []
    for line in process.stdout or ():
        output.append(line)
        print(f"seed {seed}: {line.rstrip()}", file=sys.stderr)
        for name, pattern in (("picture", "first pictures"), ("reward", r"held-out at step 0|^step 1/")):
            if name not in first and re.search(pattern, line):
                first[name] = time.monotonic() - started_s
    if process.wait():
        raise SystemExit(f"seed {seed} failed:\n{''.join(output)[-3000:]}")
    wall_s = time.monotonic() - started_s
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before, after = summary["eval_initial"], summary["eval_final"]
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "gain": after[METRIC] - before[METRIC],
        "first_on_screen_s": first,
        "train_s": summary["train_s"],
        "wall_s": wall_s,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "weights_sha256": summary["weights_sha256"],
        "eval_curve": [
            {"step": row["step"], "seconds": row["time/since_start_s"], METRIC: row[f"eval/{METRIC}"]}
            for row in rows
            if f"eval/{METRIC}" in row
        ],
        "reward_curve": [row["reward/mean"] for row in rows if "reward/mean" in row],
        "median_step": {
            name: statistics.median(row[name] for row in rows if name in row)
            for name in ("time/step_s", "time/rollout_s", "time/train_s", "throughput/samples_per_s")
        },
    }


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart_image", help="configuration by path or shipped name")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--wanted-gain", type=float, default=0.35, help="held-out gain that counts as reached")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("overrides", nargs="*", help="configuration overrides for every run, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [run_seed(arguments.config, seed, Path(scratch), arguments.overrides) for seed in range(arguments.seeds)]
    gains = [run["gain"] for run in runs]
    result = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "wanted_gain": arguments.wanted_gain,
        "seeds_that_reach_it": sum(gain >= arguments.wanted_gain for gain in gains),
        "median_gain": statistics.median(gains),
        "longest_wall_s": max(run["wall_s"] for run in runs),
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
