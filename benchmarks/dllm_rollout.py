"""How fast texts are drawn: the rollout engine, plain and with caches, against a plain loop over the same model.

A tiny text model of random weights (no download), its output layer sharpened so that tokens depend on their context,
fills a canvas semi-autoregressively with low-confidence remasking. The loop is what one writes by hand: every call
computes every position, and nothing is recorded but the tokens. It draws from the engine's own uniforms, so that the
engine without a cache must give the very same tokens. All configurations run in one process, round after round, so
that the machine's mood touches all alike.

    python benchmarks/dllm_rollout.py --repeats 3 --json docs/benchmarks/dllm_rollout.json

prints one JSON object: per configuration sequences per second, calls and cached calls per sequence, and the share of
tokens that differ from the loop's; then the speed-up of each cache and the engine's overhead over the loop. CPU time
stands beside wall time, as it does not count what a shared machine does for others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

from raylign.keys import sample_generators
from raylign.models import load_policy
from raylign.models.text_policy import TextPolicy
from raylign.models.tiny_text import TinyTextConfig, make_tiny_text, make_tokenizer, save_tiny_text, settings_for
from raylign.models.tokens import CacheKind, TokenPolicy, TokenPrompts, join_prompts
from raylign.samplers import make_token_sampler
from raylign.samplers.low_confidence import LowConfidenceConfig, even_quotas
from raylign.types import Needs, Prompt, SampleKey, TokenTrajectory
from rollout.engine import ChunkRequest, RolloutEngine, TokenSetup
from rollout.prompts import GroupTask

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijkl"
WORDS = ["".join(letters) for letters in product(LETTERS, repeat=3)]
CACHES: tuple[CacheKind, ...] = ("none", "prefix", "dual")


class NetworkClock:
    """CPU seconds spent in the network and its output layer."""

    def __init__(self, policy: TextPolicy) -> None:
        self.cpu_s = 0.0
        self._started_s = 0.0
        network: Any = policy.network
        for module in (network, network.lm_head):
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started_s = time.process_time()

    def _stop(self, *_: object) -> None:
        self.cpu_s += time.process_time() - self._started_s


def make_policy(options: argparse.Namespace, folder: Path) -> TextPolicy:
    """Write and load the model, as a run would."""
    tokenizer = make_tokenizer(WORDS, "")
    settings = settings_for(
        tokenizer,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 8 * 8,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        max_prompt_length=options.prompt_length,
        max_canvas_length=options.canvas_length,
    )
    network = make_tiny_text(settings, seed=0)
    with torch.no_grad():
        network.lm_head.weight *= options.sharpness
    save_tiny_text(folder, settings, network, tokenizer)
    config = TinyTextConfig(
        path=str(folder),
        tuning="full",
        canvas_length=options.canvas_length,
        max_prompt_length=options.prompt_length,
    )
    policy = load_policy(config, "rollout")
    assert isinstance(policy, TextPolicy)
    return policy


@torch.no_grad()
def plain_loop(
    policy: TokenPolicy, prompts: TokenPrompts, keys: list[SampleKey], block_length: int, num_steps: int
) -> torch.Tensor:
    """LLaDA's sampler as written by hand, at temperature 1: tokens (B, L)."""
    mask_id, length = policy.vocabulary.mask_id, policy.canvas_length
    canvas_BL = torch.full((len(keys), length), mask_id)
    draws = sample_generators(keys, "tokens")
    for start in range(0, length, block_length):
        span = slice(start, start + block_length)
        for quota in even_quotas(block_length, num_steps * block_length // length):
            probs_BLV = policy.predict(canvas_BL, prompts, span).logits_BLV.softmax(dim=-1)
            uniforms_BL = torch.stack([torch.rand(length, generator=draw, dtype=torch.float64) for draw in draws])
            cumulative = probs_BLV.double().cumsum(dim=-1)
            tokens_BL = torch.searchsorted(cumulative, uniforms_BL[:, span, None] * cumulative[..., -1:], right=True)
            confidence_BL = probs_BLV.gather(-1, tokens_BL).squeeze(-1)
            confidence_BL = confidence_BL.masked_fill(canvas_BL[:, span] != mask_id, -1.0)
            places_BL = confidence_BL.topk(quota, dim=1).indices
            canvas_BL.scatter_(1, start + places_BL, tokens_BL.squeeze(-1).gather(1, places_BL))
    return canvas_BL


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All configurations, round after round."""
    torch.set_num_threads(options.threads)
    policy = make_policy(options, folder)
    half = options.prompt_length // 2
    texts = [" ".join(WORDS[7 * n : 7 * n + half + half * n // options.batch]) for n in range(options.batch)]
    tasks = tuple(GroupTask(Prompt(str(n), text), 0, n) for n, text in enumerate(texts))
    keys = [SampleKey(0, task.prompt.id, 0, 0) for task in tasks]
    prompts = join_prompts([policy.encode(text) for text in texts])
    engines = {kind: engine_of(policy, options, kind) for kind in CACHES}

    def draw(kind: CacheKind) -> list[TokenTrajectory]:
        groups = engines[kind].generate(ChunkRequest(tasks, (0,)))
        return [group.trajectory for group in groups if isinstance(group.trajectory, TokenTrajectory)]

    jobs: dict[str, Callable[[], Any]] = {
        "plain loop": lambda: plain_loop(policy, prompts, keys, options.block_length, options.num_steps)
    }
    for kind in CACHES:
        jobs[f"engine, cache {kind}"] = lambda kind=kind: draw(kind)
    wall_s, cpu_s, around_s = ({name: list[float]() for name in jobs} for _ in range(3))
    clock = NetworkClock(policy)
    results: dict[str, Any] = {}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            started_s, cpu_started_s, clock.cpu_s = time.perf_counter(), time.process_time(), 0.0
            results[name] = job()
            wall_s[name].append(time.perf_counter() - started_s)
            cpu_s[name].append(time.process_time() - cpu_started_s)
            around_s[name].append(cpu_s[name][-1] - clock.cpu_s)
    return {
        "configurations": {
            name: {
                "wall_s": spread(wall_s[name]),
                "cpu_s": spread(cpu_s[name]),
                "cpu_s_around_the_network": spread(around_s[name]),
                "sequences_per_s": options.batch / statistics.median(wall_s[name]),
                "sequences_per_cpu_s": options.batch / statistics.median(cpu_s[name]),
                **summary(result, results["plain loop"], options),
            }
            for name, result in results.items()
        },
        "speed_up": {"wall": speed_ups(wall_s), "cpu": speed_ups(cpu_s)},
        "engine_overhead": overhead(cpu_s, around_s),
    }


def engine_of(policy: TokenPolicy, options: argparse.Namespace, kind: CacheKind) -> RolloutEngine[TokenPolicy]:
    """The rollout engine with the benchmark's sampler and one kind of cache."""
    config = LowConfidenceConfig(
        num_steps=options.num_steps, block_length=options.block_length, cache=kind, stop_at_eos=False
    )
    setup = TokenSetup(make_token_sampler(config, policy.canvas_length), Needs.FINAL)
    engine = RolloutEngine(policy, {"rollout": setup}, run_seed=0)
    engine.pull(policy.export_weights(0))
    return engine


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def summary(result: Any, plain_BL: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """One configuration's calls, and how its tokens differ from the loop's."""
    if isinstance(result, torch.Tensor):
        return {"nfe_per_sequence": options.num_steps, "cached_calls_per_sequence": 0}
    tokens_BL = torch.cat([trajectory.tokens_GL for trajectory in result])
    chosen = torch.cat([trajectory.plain_logprob_GL for trajectory in result]).exp()
    return {
        "nfe_per_sequence": mean([trajectory.nfe_G for trajectory in result]),
        "cached_calls_per_sequence": mean([trajectory.cached_calls_G for trajectory in result]),
        "tokens_unlike_the_loops": float((tokens_BL != plain_BL).double().mean()),
        "tokens_unlike_the_loops_in_the_first_block": float(
            (tokens_BL != plain_BL)[:, : options.block_length].double().mean()
        ),
        "median_probability_of_a_revealed_token": float(chosen.median()),
    }


def mean(parts: list[torch.Tensor]) -> float:
    """Mean over all samples."""
    return float(torch.cat(parts).double().mean())


def speed_ups(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times faster than the loop in the same round each cache is: medians over rounds."""
    return {
        kind: statistics.median(
            plain / own for own, plain in zip(seconds[f"engine, cache {kind}"], seconds["plain loop"], strict=True)
        )
        for kind in CACHES
    }


def overhead(cpu_s: dict[str, list[float]], around_s: dict[str, list[float]]) -> float:
    """What the engine does around the network more than the loop does, over all that the loop does.

    Both compute the very same calls, so their network time differs by chance alone and is left out of the difference.
    """
    engine, plain = (statistics.median(around_s[name]) for name in ("engine, cache none", "plain loop"))
    return (engine - plain) / statistics.median(cpu_s["plain loop"])


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("repeats", 3),
        ("batch", 4),
        ("canvas-length", 256),
        ("prompt-length", 32),
        ("block-length", 32),
        ("num-steps", 128),
        ("layers", 6),
        ("width", 192),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sharpness", type=float, default=8.0, help="factor on the random output layer")
    parser.add_argument("--hardware", default="", help="what to say about the machine")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse_options()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
    report = {
        "command": shlex.join(["python", "benchmarks/dllm_rollout.py", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": options.hardware,
        "setting": {key: value for key, value in vars(options).items() if key not in ("json", "hardware")},
        **measured,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
