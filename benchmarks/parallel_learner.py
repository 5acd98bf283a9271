"""A learner step on one rank and on two, replicated and sharded: seconds, bytes between ranks, memory, and the floor.

    python benchmarks/parallel_learner.py --json docs/benchmarks/parallel_learner.json

DiffusionNFT on a random Stable Diffusion 3 (`--layers` blocks `--width` wide, 64x64 pictures, fp32, one thread per
rank), with an adapter and with every weight trained. All cases are up at once and take turns, so that all have the same
machine; those who wait compute nothing. Ranks meet over gloo on 127.0.0.1. Prints one JSON object:

  step       seconds of a step (medians over rounds, least and most), and steps per second over those of one rank
  apart      two processes that never speak, each with half of the samples: what two cores give at most on this machine
  traffic    bytes a rank sends per step by the collectives it calls, and the seconds of just these, one after another
  floor      half of one rank's step, plus those seconds: nothing overlaps on a CPU
  memory     per rank: weights and state that it holds, and peak resident memory of steps beyond that of its imports
  loss_gap   largest difference to one rank's loss, over the rounds
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.fsdp  # pyright: ignore[reportUnusedImport]  # so that it is an import of every case
from measuring import publish, spread, tell
from tiny_sd3_64 import PROMPTS, build_model_dir
from torch import distributed

from learner.algorithms.nft import NftConfig
from learner.learner import Learner, LearnerConfig
from learner.parallel import RankGroup
from raylign.models import load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.base import DenoisingPolicy
from raylign.models.sd3 import Sd3Config
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Prompt, RewardBreakdown, RolloutGroup
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup
from rollout.prompts import GroupTask

ROOT = Path(__file__).parents[1]
T5_TOKENS = 32
GROUP_SIZE = 4
ALGORITHM = NftConfig(num_train_times=2)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives every larger block back at once, so that the peak is what was in use."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a step's samples are trained on. apart: processes that share the samples and nothing else."""

    num_processes: int
    sharding: str = "none"
    apart: bool = False


WAYS: Mapping[str, Way] = {
    "one": Way(1),
    "replicated": Way(2),
    "sharded": Way(2, "fsdp"),
    "apart": Way(2, apart=True),
}


def build_model(folder: Path, layers: int, width: int) -> Path:
    """The pipeline of `tiny_sd3_64` with a larger transformer."""
    from diffusers import SD3Transformer2DModel

    build_model_dir(folder)
    described = json.loads((folder / "transformer" / "config.json").read_text())
    sizes = {"num_layers": layers, "attention_head_dim": 64, "num_attention_heads": width // 64}
    sizes["caption_projection_dim"] = width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = SD3Transformer2DModel.from_config({**described, **sizes})
    network.save_pretrained(folder / "transformer")
    return folder


def model_config(folder: Path, tuning: str) -> Sd3Config:
    """The model, at the pipeline's own size."""
    options: dict[str, Any] = {"path": str(folder), "height": 64, "width": 64, "max_sequence_length": T5_TOKENS}
    return Sd3Config(**options, tuning=cast("Any", tuning), lora=LoraSettings(rank=32, alpha=64))


def draw_groups(config: Sd3Config, num_groups: int) -> list[RolloutGroup]:
    """The step's samples: the same in every process, because they are drawn by key."""
    actor: DenoisingPolicy = load_policy(config, "rollout")
    sampler = make_sampler(EulerOdeConfig(num_steps=4), actor.schedule)
    engine = RolloutEngine(actor, {"rollout": SamplerSetup(sampler, 1.0, ALGORITHM.needs)}, 0)
    engine.pull(actor.export_weights(0))
    texts = [PROMPTS[index % len(PROMPTS)] for index in range(num_groups)]
    tasks = [GroupTask(Prompt(f"p{index}", text), 0, index, 1) for index, text in enumerate(texts)]
    drawn = [group.without_outputs() for task in tasks for group in engine.generate(_chunk(task))]
    rewards = [RewardBreakdown(0.3 * ((7 * sibling) % 5), ()) for sibling in range(GROUP_SIZE)]
    return [group.with_rewards(rewards) for group in drawn]


def _chunk(task: GroupTask) -> ChunkRequest:
    return ChunkRequest((task,), tuple(range(GROUP_SIZE)))


class Rank:
    """One process of a case: answers its parent's words with a line of JSON each."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        way = Way(**spec["way"])
        torch.set_num_threads(1)
        config = model_config(Path(spec["folder"]), spec["tuning"])
        groups = draw_groups(config, spec["num_groups"])
        self._groups = groups[spec["rank"] :: 2] if way.apart else groups
        self._imported = _trimmed_bytes()
        num_ranks = 1 if way.apart else way.num_processes
        self._ranks = RankGroup.connect(0 if way.apart else spec["rank"], num_ranks, spec["address"])
        policy: Any = load_policy(config, "learner")
        self._total = sum(p.numel() * p.element_size() for p in policy.network.parameters())
        learner_config = LearnerConfig(num_ranks=num_ranks, sharding=cast("Any", way.sharding))
        sampler = make_sampler(EulerOdeConfig(num_steps=4), policy.schedule)
        self._learner = Learner(
            learner_config, ALGORITHM, policy, sampler, 1.0, spec["micro_batch"], 0, ranks=self._ranks
        )
        self._policy = policy
        self._is_sharded = way.sharding == "fsdp"
        self._step = 0
        # Every rank reads the whole model before it is sharded, which is no part of a step.
        _trimmed_bytes()
        Path("/proc/self/clear_refs").write_text("5")

    def step(self) -> dict[str, Any]:
        """One learner step, from the moment that all ranks are there."""
        self._step += 1
        self._ranks.barrier()
        started = time.perf_counter()
        learner = self._learner
        learner.begin_step(self._groups, self._step)
        learner.forward_backward(0)
        result = learner.optimise(0)
        learner.end_step(self._step)
        if not result.finite:
            raise SystemExit("the update was not finite")
        return {"s": time.perf_counter() - started, "loss": result.metrics["loss"]}

    def memory(self) -> dict[str, int]:
        """What this rank holds, and the most that it held in a step beyond its imports and the samples."""
        peak = _resident("VmHWM") - self._imported
        state = self._learner.state_dict()
        held = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
        frozen = [p for p in self._policy.network.parameters() if not p.requires_grad]
        parts: list[Any] = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
        held += sum(part.numel() * part.element_size() for part in parts)
        return {"held_bytes": held, "peak_bytes": peak}

    def traffic(self, num_forwards: int, num_backwards: int, num_reductions: int) -> dict[str, Any]:
        """The collectives of a step, by bytes that a rank sends, and how long they take with nothing between."""
        trained = [p.numel() * p.element_size() for p in self._policy.trainable_parameters().values()]
        if self._ranks.num_ranks == 1:
            return {"bytes": 0, "s": 0.0}
        gradient, share = sum(trained), (self._ranks.num_ranks - 1) / self._ranks.num_ranks
        if not self._is_sharded:
            flat = torch.zeros(gradient // 4)
            return {"bytes": int(2 * share * gradient), "s": self._timed(lambda: self._ranks.sum_(flat))}
        part = torch.zeros(math.ceil(self._total / 4 / self._ranks.num_ranks))
        whole = torch.zeros(len(part) * self._ranks.num_ranks)
        gather_s = self._timed(lambda: distributed.all_gather_single(whole, part))
        reduced = torch.zeros(math.ceil(gradient / 4 / self._ranks.num_ranks))
        given = torch.zeros(len(reduced) * self._ranks.num_ranks)
        scatter_s = self._timed(lambda: distributed.reduce_scatter_single(reduced, given))
        num_gathers = num_forwards + num_backwards
        sent = share * (num_gathers * self._total + num_reductions * gradient)
        return {"bytes": int(sent), "s": num_gathers * gather_s + num_reductions * scatter_s}

    def _timed(self, collective: Any, repeats: int = 5) -> float:
        seconds: list[float] = []
        for _ in range(repeats):
            self._ranks.barrier()
            started = time.perf_counter()
            collective()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def serve(self) -> None:
        """Answer until the parent has no more questions."""
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            verb, *arguments = json.loads(line)
            print(json.dumps(getattr(self, verb)(*arguments)), flush=True)
        self._ranks.close()


def _trimmed_bytes() -> int:
    """What this process holds once it has given back what it does not use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """What Linux says this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


class Case:
    """The processes of one way of training, waiting for words."""

    def __init__(
        self,
        way: Way,
        tuning: str,
        folder: Path,
        options: argparse.Namespace,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        common = {"way": {"num_processes": way.num_processes, "sharding": way.sharding, "apart": way.apart}}
        common |= {"tuning": tuning, "folder": str(folder), "address": address}
        common |= {"num_groups": options.groups, "micro_batch": options.micro_batch}
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", json.dumps({**common, "rank": rank})],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(way.num_processes)
        ]

    def answers(self) -> list[Any]:
        """One line of each process. Raises SystemExit if one has ended."""
        found: list[Any] = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"a process ended with {process.wait()}; see above")
            found.append(json.loads(line))
        return found

    def ask(self, verb: str, *arguments: Any) -> list[Any]:
        """Every process's answer to a word."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([verb, *arguments]) + "\n")
            process.stdin.flush()
        return self.answers()

    def close(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(tuning: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All ways of one tuning, in turns; the first two rounds warm up."""
    cases: dict[str, Case] = {}
    try:
        for name, way in WAYS.items():
            cases[name] = Case(way, tuning, folder, options)
        for case in cases.values():
            case.answers()
        rounds = [{name: case.ask("step") for name, case in cases.items()} for _ in range(options.rounds + 2)]
        micro_batches = options.groups * GROUP_SIZE // 2 // options.micro_batch * (ALGORITHM.num_train_times or 0)
        # Each micro-batch asks the old and the current policy; unreduced gradients of all weights would not be sharded.
        counts = 2 * micro_batches, micro_batches, micro_batches if tuning == "full" else 1
        traffic = {name: cases[name].ask("traffic", *counts)[0] for name in ("replicated", "sharded")}
    finally:
        for case in cases.values():
            case.close()
    memory = {name: peaks(WAYS[name], tuning, folder, options) for name in ("one", "replicated", "sharded")}
    return told(rounds, traffic, memory)


def peaks(way: Way, tuning: str, folder: Path, options: argparse.Namespace) -> list[dict[str, int]]:
    """What each rank of a case holds, in processes of their own: to give memory back at once takes time."""
    case = Case(way, tuning, folder, options, GIVE_BACK)
    try:
        case.answers()
        for _ in range(2):
            case.ask("step")
        return case.ask("memory")
    finally:
        case.close()


def told(
    rounds: Sequence[Mapping[str, list[Any]]], traffic: Mapping[str, Any], memory: Mapping[str, Any]
) -> dict[str, Any]:
    """What one tuning's rounds say."""
    step_s = {name: [max(one["s"] for one in found[name]) for found in rounds[2:]] for name in WAYS}
    one_s = step_s["one"]
    step: dict[str, Any] = {}
    for name, seconds in step_s.items():
        ratios = [alone / together for alone, together in zip(one_s, seconds, strict=True)]
        step[name] = {"s": spread(seconds), "throughput_over_one": spread(ratios)}
    floors = {name: statistics.median(one_s) / 2 + found["s"] for name, found in traffic.items()}
    gaps = {
        name: max(abs(found[name][0]["loss"] - found["one"][0]["loss"]) for found in rounds)
        for name in ("replicated", "sharded")
    }
    return {
        "step": step,
        "traffic": traffic,
        "floor": {name: {"s": s, "throughput_over_one": statistics.median(one_s) / s} for name, s in floors.items()},
        "memory": memory,
        "loss_gap": gaps,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="transformer blocks")
    parser.add_argument("--width", type=int, default=256, help="of a block; a multiple of 64")
    parser.add_argument("--groups", type=int, default=4, help="prompts of 4 pictures each per step; even")
    parser.add_argument("--micro-batch", type=int, default=4, help="pictures per forward")
    parser.add_argument("--rounds", type=int, default=4, help="measured turns of each")
    parser.add_argument("--tunings", nargs="+", default=("lora", "full"), choices=("lora", "full"))
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        Rank(json.loads(options.child)).serve()
        return
    if options.groups * GROUP_SIZE % (2 * options.micro_batch):
        parser.error(f"{options.groups * GROUP_SIZE} pictures do not make whole micro-batches for two ranks")
    setting = {
        "algorithm": "nft",
        "pictures": options.groups * GROUP_SIZE,
        "micro_batch": options.micro_batch,
        "items_per_picture": ALGORITHM.num_train_times,
        "layers": options.layers,
        "width": options.width,
        "threads_per_rank": 1,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = build_model(Path(scratch) / "model", options.layers, options.width)
        found: dict[str, Any] = {}
        for tuning in options.tunings:
            found[tuning] = measure(tuning, folder, options)
            tell(tuning, found[tuning]["step"])
    publish(__file__, options, {"torch": torch.__version__, "setting": setting, **found})


if __name__ == "__main__":
    main()
