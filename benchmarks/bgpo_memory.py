"""How much memory one step of BGPO takes with few and with many Monte-Carlo samples per response.

Each figure is the peak resident memory of a fresh process that loads a tiny text model of random weights (no download),
draws one group of texts with the rollout engine and takes one step of the real learner, optimiser included. For
comparison, the same samples in one backward pass per micro-batch, as an objective with a ratio of the mean over
samples needs them.

With its default settings glibc keeps freed memory in its arenas, more or less of it from run to run: peaks of one and
the same step differ by 15 %. So each is measured with every larger block given back at once (`returned`, which shows
what is in use), and `--repeats` times as it comes (`default`, medians).

    python benchmarks/bgpo_memory.py --samples 2 32 --json docs/benchmarks/bgpo_memory.json

prints one JSON object: bytes before and at the peak of the step, seconds of the step, and the ratios of the peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from learner.algorithms.bgpo import BgpoConfig
from learner.batching import StepData, TokenBatch, cut
from learner.learner import Learner, LearnerConfig
from raylign.models import load_policy
from raylign.models.tiny_text import TinyTextConfig, make_tiny_text, make_tokenizer, save_tiny_text, settings_for
from raylign.models.tokens import TokenPolicy
from raylign.samplers import TokenSampler, make_token_sampler
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.types import Needs, Prompt, RewardBreakdown, RolloutGroup
from rollout.engine import ChunkRequest, RolloutEngine, TokenSetup
from rollout.prompts import GroupTask

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GROUP_SIZE = 4
RUN_SEED = 0
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings of glibc's allocator; it stops adapting the thresholds by itself when they are set."""


def make_policy(options: argparse.Namespace, folder: Path) -> TokenPolicy:
    """Write the model and load it as a learner would."""
    tokenizer = make_tokenizer([], LETTERS)
    settings = settings_for(
        tokenizer,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        max_prompt_length=len(LETTERS),
        max_canvas_length=options.canvas_length,
    )
    save_tiny_text(folder, settings, make_tiny_text(settings, seed=0), tokenizer)
    config = TinyTextConfig(
        path=str(folder), tuning="full", canvas_length=options.canvas_length, max_prompt_length=len(LETTERS)
    )
    return load_policy(config, "learner")


def draw_group(policy: TokenPolicy, sampler: TokenSampler) -> RolloutGroup:
    """One prompt's answers with unequal rewards."""
    engine = RolloutEngine(policy, {"rollout": TokenSetup(sampler, Needs.FINAL)}, RUN_SEED)
    engine.pull(policy.export_weights(0))
    task = GroupTask(Prompt("p", LETTERS), 0, 0)
    (group,) = engine.generate(ChunkRequest((task,), tuple(range(GROUP_SIZE))))
    return group.with_rewards([RewardBreakdown(float(sibling), ()) for sibling in range(GROUP_SIZE)])


def streamed(learner: Learner, groups: list[RolloutGroup]) -> None:
    """The gradient as the learner computes it: a backward pass per sample and micro-batch."""
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    if not learner.optimise(0).finite:
        raise SystemExit("the update was not finite")


def at_once(learner: Learner, groups: list[RolloutGroup], micro_batch_size: int) -> None:
    """The same losses with the graphs of all samples alive: a backward pass per micro-batch."""
    algorithm = learner.algorithm
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    shares = [algorithm.shares(group) for group in groups]
    data = StepData(groups, algorithm.credit(groups), items, shares, algorithm.needs)
    (update,) = cut(data, num_epochs=1, num_updates=1, rank=0, num_ranks=1, micro_batch_size=micro_batch_size)
    by_rows: dict[Any, list[TokenBatch]] = defaultdict(list)
    for batch in update.micro_batches():
        by_rows[batch.keys].append(batch)
    for batches in by_rows.values():
        losses = [algorithm.loss(learner.policies, batch).loss_N.sum() for batch in batches]
        (torch.stack(losses).sum() / update.denominator).backward()


def child(options: argparse.Namespace) -> None:
    """One measurement, in this very process; prints JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(options, Path(folder))
    sampler = make_token_sampler(LowConfidenceConfig(num_steps=4, stop_at_eos=False), options.canvas_length)
    group = draw_group(policy, sampler)
    config = BgpoConfig(num_samples=options.samples[0])
    learner = Learner(LearnerConfig(), config, policy, sampler, 1.0, options.micro_batch, RUN_SEED)
    before_bytes, started_s = peak_bytes(), time.perf_counter()
    if options.at_once:
        at_once(learner, [group], options.micro_batch)
    else:
        streamed(learner, [group])
    seconds = time.perf_counter() - started_s
    print(json.dumps({"before_step_bytes": before_bytes, "peak_bytes": peak_bytes(), "step_s": seconds}))


def peak_bytes() -> int:
    """Largest resident set of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(options: argparse.Namespace, num_samples: int, *, all_at_once: bool) -> dict[str, Any]:
    """`child` in processes of its own: once giving memory back, and as it comes."""
    default = [run_child(options, num_samples, all_at_once, {}) for _ in range(options.repeats)]
    return {
        "returned": run_child(options, num_samples, all_at_once, GIVE_BACK),
        "default": {name: statistics.median(run[name] for run in default) for name in default[0]},
        "default_peaks_bytes": [run["peak_bytes"] for run in default],
    }


def run_child(
    options: argparse.Namespace, num_samples: int, all_at_once: bool, allocator: dict[str, str]
) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", "--samples", str(num_samples)]
    for name in ("layers", "width", "canvas-length", "micro-batch"):
        command += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    if all_at_once:
        command.append("--at-once")
    environment = {**os.environ, **allocator}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 32], help="Monte-Carlo samples per response")
    parser.add_argument("--samples-at-once", type=int, nargs="+", default=[2, 8], help="the same for the comparison")
    parser.add_argument("--repeats", type=int, default=3, help="runs with the allocator's default settings")
    for name, default in (("layers", 6), ("width", 256), ("canvas-length", 256), ("micro-batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--hardware", default="", help="what to say about the machine")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--at-once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure in fresh processes and print."""
    options = parse_options()
    if options.child:
        child(options)
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bgpo_memory.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": options.hardware,
        "setting": {name: getattr(options, name) for name in ("layers", "width", "canvas_length", "micro_batch")}
        | {"group_size": GROUP_SIZE, "threads": 1},
    }
    for name, counts in (("streamed", options.samples), ("at_once", options.samples_at_once)):
        rows = {str(count): measure(options, count, all_at_once=name == "at_once") for count in counts}
        ratios = {
            how: rows[str(counts[-1])][how]["peak_bytes"] / rows[str(counts[0])][how]["peak_bytes"]
            for how in ("returned", "default")
        }
        report[name] = {"peak_last_over_first": ratios, "samples": rows}
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
