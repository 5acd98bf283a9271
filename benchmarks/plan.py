"""How good `raylign plan` is: its forecast of memory and step time beside a short real run of the same configuration.

    python benchmarks/plan.py --steps 10 --repeats 3 --json plan.json

plans and runs each quickstart in turn, `--repeats` times, and prints one JSON object: for every worker the forecast of
its memory over the measured peak (`peak_memory_bytes` of summary.json), and the forecast of a step's seconds over the
median of the run's steps without an evaluation, the first one left out. Wanted: memory within 15 %, time within 25 %.
A plan and its run share nothing but the machine, so on one that others use, ratios of time also tell of them: `load`
is the machine's before each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import publish

ROOT = Path(__file__).parents[1]
QUICKSTARTS = ("quickstart_image", "quickstart_shapes", "quickstart_text")
MEMORY_WITHIN, TIME_WITHIN = 0.15, 0.25
ROLE_OF = {"rollout": "rollout actor", "learner": "learner rank", "process": "process"}


def raylign(*words: str) -> str:
    """The output of a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "services.cli", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"raylign {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def compare(name: str, steps: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One plan and one run of a configuration."""
    changed = ["--num_steps", str(steps), "--eval.num_prompts", "8", *overrides]
    if name == "quickstart_text":
        changed += ["--eval.gammas", "[]"]
    load = {"plan": os.getloadavg()[0]}
    plan = json.loads(raylign("plan", name, "--json", *changed))
    load["run"] = os.getloadavg()[0]
    raylign("train", name, "--run-dir", str(folder), *changed)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "time/step_s" in row and not row.get("time/evaluate_s")]
    steady = trained[1:] or trained
    planned = {role["role"]: role["host_bytes"] for role in plan["roles"]}
    memory = {
        worker: {
            "planned": planned[ROLE_OF[worker.partition("_")[0]]],
            "measured": measured,
            "ratio": planned[ROLE_OF[worker.partition("_")[0]]] / measured,
        }
        for worker, measured in summary["peak_memory_bytes"].items()
    }
    phases = ("rollout", "credit", "train", "publish", "pull")
    median = {
        phase: statistics.median(row.get(f"time/{phase}_s", 0.0) for row in steady) for phase in (*phases, "step")
    }
    return {
        "config": name,
        "load": load,
        "memory": memory,
        "step_s": {
            "planned": plan["step"]["step_s"],
            "measured": median["step"],
            "ratio": plan["step"]["step_s"] / median["step"],
        },
        "phases_s": {phase: {"planned": plan["step"][f"{phase}_s"], "measured": median[phase]} for phase in phases},
        "payload_bytes": plan["payload_bytes"],
        "steps": len(steady),
    }


def within(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst ratios, and whether they are as wanted."""
    memory = [worker["ratio"] for one in found for worker in one["memory"].values()]
    by_config: dict[str, list[float]] = {}
    for one in found:
        by_config.setdefault(one["config"], []).append(one["step_s"]["ratio"])
    times = [statistics.median(ratios) for ratios in by_config.values()]
    return {
        "memory_ratios": [min(memory), max(memory)],
        "memory_as_wanted": all(abs(ratio - 1) <= MEMORY_WITHIN for ratio in memory),
        "step_ratios": {name: statistics.median(ratios) for name, ratios in by_config.items()},
        "step_as_wanted": all(abs(ratio - 1) <= TIME_WITHIN for ratio in times),
    }


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", choices=QUICKSTARTS, help="only this one; may be given again")
    parser.add_argument("--steps", type=int, default=10, help="steps of each run (default 10)")
    parser.add_argument("--repeats", type=int, default=1, help="plans and runs of each (default 1)")
    parser.add_argument("--hardware", default="", help="what to say about the machine")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("overrides", nargs="*", help="after --: keys for every plan and run")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="raylign-plan-") as folder:
        for repeat in range(options.repeats):
            for name in options.config or QUICKSTARTS:
                one = compare(name, options.steps, Path(folder) / f"{name}_{repeat}", options.overrides)
                print(f"{name}: {json.dumps(one['step_s'])}", file=sys.stderr, flush=True)
                found.append(one)
    publish(__file__, options, {"cores": len(os.sched_getaffinity(0)), "verdict": within(found), "runs": found})


if __name__ == "__main__":
    main()
