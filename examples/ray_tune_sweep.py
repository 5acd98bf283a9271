"""Search a learning rate with Ray Tune: each trial is a run of its own, in one process.

    python examples/ray_tune_sweep.py quickstart_image --trials 4 --out runs/sweep
    python examples/ray_tune_sweep.py my_run.toml --trials 16 --at-once 4 --num_steps 20

Trials are `raylign train` with other keys, so whatever a run can be given can be searched: add a line to `SPACE`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray import tune

ROOT = Path(__file__).resolve().parents[1]
SPACE: dict[str, Any] = {"learner.lr": tune.loguniform(3e-5, 1e-3)}
"""Configuration keys, and what their values are drawn from."""
METRIC = "eval_mean"


def trial(drawn: dict[str, Any], config: str, fixed: list[str], out: str) -> None:
    """One run with the drawn keys; reports its held-out reward at the end."""
    run_dir = Path(out) / tune.get_context().get_trial_id()
    keys = [word for key, value in drawn.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "services.cli", "train", config, "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*command, "--placement", "in_process", *keys, *fixed],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"raylign train ended with {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    tune.report({METRIC: summary["eval_final"]["mean"], "run_dir": str(run_dir)})


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a TOML file, or the name of a shipped one")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2, help="trials that run side by side, one CPU each")
    parser.add_argument(
        "--address", help="a running Ray cluster, such as auto; one of its own on this machine if absent"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    options, fixed = parser.parse_known_args(arguments)

    config = str(Path(options.config).resolve()) if Path(options.config).is_file() else options.config
    if options.address is None:
        ray.init("local", num_cpus=options.at_once, include_dashboard=False)
    else:
        ray.init(options.address)
    search = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(trial, config=config, fixed=fixed, out=str(options.out.resolve())), {"cpu": 1}
        ),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", num_samples=options.trials, max_concurrent_trials=options.at_once
        ),
        run_config=tune.RunConfig(storage_path=str(options.out.resolve() / "tune"), verbose=0),
    )
    results = search.fit()
    for result in results:
        told = f"{result.metrics[METRIC]:.4f}" if result.error is None and result.metrics else "failed"
        print(told, result.config)
    best = results.get_best_result()
    print(f"best: {best.config}, in {best.metrics and best.metrics['run_dir']}")


if __name__ == "__main__":
    main()
