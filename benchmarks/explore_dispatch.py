"""What two-stage dispatch costs over the sum of its generation calls.

    python benchmarks/explore_dispatch.py --json docs/benchmarks/explore_dispatch.json

runs a few steps of the exploration benchmark in one process and one thread with a reward that takes no time (JPEG
size), so that a step's rollout is its generation calls and whatever stands around them: cutting chunks, joining their
parts, scoring, selecting, the second round, the buffer. Per step the overhead is the wall time of the rollout phase
less the busy seconds of sampling and decoding, over those seconds; the median over steps is wanted at no more than
2 %. `one_stage` is the same pool drawn at full quality in one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from learning_curves import ROOT, provenance, step_rows, train_once

POOL, WANTED = 96, 0.02
ARMS = {
    "two_stage": ["--rollout.explore.num_steps", "5"],
    "one_stage": ["--rollout.explore.regenerate", "false"],
}


def measure(arm: str, steps: int, folder: Path) -> dict[str, Any]:
    """Overhead of each step of one run."""
    arguments = ["quickstart_image", str(ROOT / "benchmarks" / "explore.toml"), "--num_steps", str(steps)]
    arguments += ["--rollout.explore.pool_size", str(POOL), *ARMS[arm], "--rewards", '[{type = "jpeg"}]']
    train_once([*arguments, "--eval.num_prompts", "2", "--eval.every_steps", "1000"], folder / arm)
    overheads: list[float] = []
    called: list[float] = []
    for row in step_rows(folder / arm).values():
        called.append(row["busy/sample_s"] + row["busy/decode_s"])
        overheads.append(row["time/rollout_s"] / called[-1] - 1)
    return {
        "generation_s": statistics.median(called),
        "overhead": statistics.median(overheads),
        "overhead_least": min(overheads),
        "overhead_most": max(overheads),
        "selection_s": statistics.median(row["busy/select_s"] for row in step_rows(folder / arm).values()),
    }


def main() -> None:
    """Parse the arguments, run both arms, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="learner steps per arm")
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = {arm: measure(arm, options.steps, Path(folder)) for arm in ARMS}
    data = {
        **provenance(__file__, options.hardware),
        "wanted": WANTED,
        **measured,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
