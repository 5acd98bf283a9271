"""Do cheap drafts rank pictures as full-quality ones do? Over draft steps, pool sizes and number formats.

    python benchmarks/explore_ranking.py --report docs/benchmarks/explore_ranking

draws `--prompts` held-out prompts of the glyphs task, `--pool` keys each, at full quality, and the same keys as drafts
in every number of steps T and every format, and scores all of them. Reported per setting, means over prompts:

    kendall, spearman   agreement of draft and full-quality reward over the pool (ties as tau-b and mean ranks)
    recall@4, recall@12 of pools of 24: the share of the best 4, or 12, by draft that are so at full quality as well
    spread              standard deviation of the full-quality reward over the 24 that drafts select from N,
                        over that of the first 24 keys: how much contrast exploring buys; `oracle` selects by the
                        full-quality reward itself
    draft ms            of one draft on this machine; formats are emulated where the device has no units for them,
                        and then slower than fp32: only their ranking is of interest

The published figures for real models (Sol-RL, 2604.06916, NVFP4, 6 of 10 steps) are recall@12 of 24 of 93 % and
Kendall .80. `--checkpoint RUN` ranks with a trained policy instead of the base model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_curves import ROOT, provenance, pyplot

from learner.checkpoint import list_checkpoints, load_checkpoint
from learner.state import policy_tensors
from raylign.assets import resolve
from raylign.weights import WeightSnapshot
from rewards import make_mix
from rollout.drawn import Slot
from rollout.engine import ChunkRequest, RolloutEngine
from rollout.prompts import GroupTask, load_prompts
from rollout.rank_agreement import kendall, recall, spearman
from rollout.selection import select
from services.assembly import build_engine
from services.config import RunConfig, load_run_config
from services.scoring import score_groups

STEPS, CHUNK, KEPT = 10, 24, 24
FORMATS = ("fp32", "fp8", "nvfp4", "mxfp4")


def config_of(draft_steps: int, precision: str, options: argparse.Namespace) -> RunConfig:
    """The benchmark's run with such drafts."""
    changes = {
        "rollout.explore.pool_size": str(options.pool),
        "rollout.explore.num_steps": str(draft_steps),
        "rollout.explore.precision": f'"{precision}"',
        "rollout.num_threads": str(options.threads),
    }
    return load_run_config(["quickstart_image", str(ROOT / "benchmarks" / "explore.toml")], changes)


def rewards_of(
    config: RunConfig, weights: WeightSnapshot | None, slot: Slot, options: argparse.Namespace
) -> tuple[np.ndarray, float]:
    """(prompts, pool) rewards of the same keys drawn in a slot, and milliseconds per picture to draw one."""
    engine: RolloutEngine[Any] = build_engine(config)
    engine.pull(weights or engine.policy.export_weights(0))
    prompts = load_prompts(resolve(str(config.prompts.heldout)), config.prompts.fields)[: options.prompts]
    scorer = make_mix([reward for reward in config.rewards if not reward.only_eval])
    rows: list[list[float]] = []
    spent_s = 0.0
    for place, prompt in enumerate(prompts):
        task = GroupTask(prompt, 0, place, 1)
        row: list[float] = []
        for start in range(0, options.pool, CHUNK):
            request = ChunkRequest((task,), tuple(range(start, start + CHUNK)), slot)
            started_s = time.perf_counter()
            groups = engine.generate(request)
            spent_s += time.perf_counter() - started_s
            scored = asyncio.run(score_groups(scorer, groups))
            row += [float("nan") if r.total is None else r.total for r in scored[0].rollouts]
        rows.append(row)
    return np.array(rows), 1e3 * spent_s / (len(prompts) * options.pool)


def agreement(full: np.ndarray, draft: np.ndarray) -> dict[str, float | None]:
    """Rank agreement, means over prompts; those on which either side is constant say nothing and are left out."""
    pairs = [(f.tolist(), d.tolist()) for f, d in zip(full, draft, strict=True)]
    pools = [(f[start : start + 24], d[start : start + 24]) for f, d in pairs for start in range(0, len(f) - 23, 24)]
    return {
        "kendall": _mean([kendall(d, f) for f, d in pairs]),
        "spearman": _mean([spearman(d, f) for f, d in pairs]),
        "recall_at_4": _mean([recall(d, f, 4) for f, d in pools]),
        "recall_at_12": _mean([recall(d, f, 12) for f, d in pools]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return statistics.fmean(told) if told else None


def spreads(full: np.ndarray, draft: np.ndarray, pools: Sequence[int]) -> dict[int, float]:
    """Contrast of the chosen 24 of N over that of 24 drawn anyhow, means over prompts that have any."""
    found: dict[int, float] = {}
    for pool in pools:
        ratios: list[float] = []
        for place, (f, d) in enumerate(zip(full, draft, strict=True)):
            if (plain := f[:KEPT].std()) > 0:
                chosen = select([float(x) for x in d[:pool]], KEPT, "best_worst", (0, str(place)))
                ratios.append(float(f[chosen].std() / plain))
        found[pool] = statistics.fmean(ratios)
    return found


def trained(run_dir: Path | None, config: RunConfig) -> WeightSnapshot | None:
    """The newest checkpoint's policy."""
    if run_dir is None:
        return None
    tensors = policy_tensors(load_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1]).state)
    return build_engine(config).policy.export_weights(1, tensors)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per setting; the first is the full-quality one, which is its own oracle."""
    base = config_of(options.draft_steps[0], "fp32", options)
    weights = trained(options.checkpoint, base)
    full, full_ms = rewards_of(base, weights, "rollout", options)
    pools = [pool for pool in (24, 48, 72, 96) if pool <= options.pool]
    rows: list[dict[str, Any]] = [
        {"format": "full quality", "steps": STEPS, "ms": full_ms, "spread": spreads(full, full, pools)}
    ]
    for precision, steps in itertools.product(options.formats, options.draft_steps):
        draft, draft_ms = rewards_of(config_of(steps, precision, options), weights, "draft", options)
        row = {"format": precision, "steps": steps, "ms": draft_ms, **agreement(full, draft)}
        rows.append({**row, "spread": spreads(full, draft, pools)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def report(data: Mapping[str, Any]) -> str:
    """The table, as Markdown."""
    pools = list(data["rows"][0]["spread"])
    about = (
        f"`{data['command']}`, {data['date']}, commit {data['commit']}, {data['hardware']}. {data['prompts']} prompts "
        f"x {data['pool']} keys; `spread` is the contrast of the 24 selected of N over that of 24 drawn anyhow."
    )
    titles = ["format", "steps", "ms", "Kendall", "Spearman", "recall@4", "recall@12"]
    titles += [f"spread, N = {pool}" for pool in pools]
    lines = ["# How well drafts rank on the glyphs task", "", about, ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in data["rows"]:
        cells = [row["format"], str(row["steps"]), f"{row['ms']:.1f}"]
        cells += [_cell(row.get(name), "{:.3f}") for name in ("kendall", "spearman")]
        cells += [_cell(row.get(name), "{:.1%}") for name in ("recall_at_4", "recall_at_12")]
        cells += [f"{row['spread'][pool]:.2f}" for pool in pools]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Recall@12 and contrast over draft steps, a curve per format."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    oracle, drafts = rows[0], rows[1:]
    largest = max(oracle["spread"])
    for name in dict.fromkeys(row["format"] for row in drafts):
        mine = [row for row in drafts if row["format"] == name]
        steps = [row["steps"] for row in mine]
        axes[0].plot(steps, [100 * row["recall_at_12"] for row in mine], marker="o", label=name)
        axes[1].plot(steps, [row["spread"][largest] for row in mine], marker="o", label=name)
        best = mine[-1]
        axes[2].plot(list(best["spread"]), list(best["spread"].values()), marker="o", label=f"{name}, {best['steps']}")
    axes[0].axhline(93, color="grey", linestyle=":", label="published, NVFP4")
    axes[1].axhline(oracle["spread"][largest], color="grey", linestyle=":", label="full quality")
    axes[2].plot(list(oracle["spread"]), list(oracle["spread"].values()), color="grey", linestyle=":", label="oracle")
    labels = (
        ("draft steps of 10", "recall@12 of 24, %"),
        ("draft steps of 10", f"contrast of 24 of {largest}"),
        ("candidates N", "contrast of 24 of N"),
    )
    for axis, (across, up) in zip(axes, labels, strict=True):
        axis.set_xlabel(across)
        axis.set_ylabel(up)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Parse the arguments, draw and score, write the report, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts")
    parser.add_argument("--pool", type=int, default=96, help="keys per prompt (N), a multiple of 24")
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="T, of 10")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--checkpoint", type=Path, default=None, help="run directory of a trained policy")
    parser.add_argument("--threads", type=int, default=2, help="compute threads")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json, .md and .png")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPUs", help="what it runs on, in words")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    data = {
        **provenance(__file__, options.hardware),
        "prompts": options.prompts,
        "pool": options.pool,
        "rows": rows,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if options.report is not None:
        options.report.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        options.report.with_suffix(".md").write_text(report(data), encoding="utf-8")
        plot(rows, options.report.with_suffix(".png"))


if __name__ == "__main__":
    main()
