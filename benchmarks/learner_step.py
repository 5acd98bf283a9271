"""A learner step of Raylign beside the same step written by hand in plain torch: seconds, and peak memory.

    python benchmarks/learner_step.py --json docs/benchmarks/learner_step.json

For NFT, CRD and Flow-GRPO, on the random Stable Diffusion 3 of `tiny_sd3_64.py` (64x64, every weight trained, fp32, one
thread): 4 prompts x 4 pictures drawn once, then the two take turns at training on them: credit, every forward and
backward, clipping, one AdamW update, and the slow copies' move. The hand-written loop knows one algorithm, one model
and one batch, holds a second network for each frozen copy, and draws its noise from one generator; ours holds tensors,
keys every draw, checks every number and could be stopped after any step. Prints one JSON object: medians over the
rounds, their ratio (wanted: at most 1.10), and the peak resident memory of one step on all 16 pictures at once, in a
process of its own, with an adapter and with every weight trained (wanted of CRD: at most NFT's + 10 %).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_sd3_64 import PROMPTS, build_model_dir

from learner.algorithms.crd import CrdConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.nft import NftConfig
from learner.learner import Learner, LearnerConfig
from learner.noise_levels import TrainTimes
from raylign.models import load_policy
from raylign.models.base import Conditioning, DenoisingPolicy, join_conditioning
from raylign.models.sd3 import Sd3Config
from raylign.samplers import Sampler, make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.types import Prompt, RewardBreakdown, RolloutGroup
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup
from rollout.prompts import GroupTask

ROOT = Path(__file__).parents[1]
GROUP_SIZE, NUM_STEPS, NUM_TRAINED = 4, 10, 4
T5_TOKENS = 128
NUM_IMAGES = GROUP_SIZE * len(PROMPTS)
KL_WEIGHT = {"nft": 1e-4, "crd": 0.1, "flow_grpo": 0.04}
CONFIGS: dict[str, Any] = {
    "nft": NftConfig(num_train_times=NUM_TRAINED),
    "crd": CrdConfig(num_train_times=NUM_TRAINED, times=TrainTimes()),
    "flow_grpo": FlowGrpoConfig(num_train_steps=NUM_TRAINED),
}
GUIDANCE = 4.5
"""Of CRD's anchor."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives every larger block back at once, so that the peak is what was in use."""


class HandWritten:
    """One algorithm's step on one batch, as a research script would have it."""

    def __init__(self, learner: Learner, groups: list[RolloutGroup], micro_batch: int) -> None:
        self.network = copy.deepcopy(learner.policy.network)
        self.old = copy.deepcopy(self.network).requires_grad_(False)
        self.base = copy.deepcopy(self.network).requires_grad_(False)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, weight_decay=1e-4)
        self.noise = torch.Generator().manual_seed(0)
        self.told = join_conditioning([group.conditioning.repeat(GROUP_SIZE) for group in groups])
        self.x0 = torch.cat([group.latents.final_GCHW for group in groups])
        self.reward = torch.tensor([[rollout.total or 0.0 for rollout in group.rollouts] for group in groups])
        self.sigmas = groups[0].latents.sigmas_S1
        self.rows = [slice(start, start + micro_batch) for start in range(0, NUM_IMAGES, micro_batch)]
        states, logprob = groups[0].latents.states_GS1CHW, groups[0].latents.rollout_logprob_GS
        if states is not None and logprob is not None:
            self.states = torch.cat([group.latents.states_GS1CHW for group in groups])  # type: ignore[arg-type]
            self.logprob = torch.cat([group.latents.rollout_logprob_GS for group in groups])  # type: ignore[arg-type]

    def advantages(self) -> torch.Tensor:
        """Group means taken off, divided by everybody's deviation, (N,)."""
        reward = self.reward.double()
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(correction=0) + 1e-4)
        return adv.clamp(-5, 5).float().flatten()

    def ask(self, network: Any, state: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        """A network's velocity."""
        return network(
            hidden_states=state,
            timestep=t * 1000,
            encoder_hidden_states=told.prompt_embeds_PLD,
            pooled_projections=told.pooled_PD,
            return_dict=False,
        )[0]

    def update(self, decay: float) -> None:
        """Clip, one AdamW step, and the slow copy's move."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.old.parameters(), self.parameters, strict=True):
                slow.mul_(decay).add_(fast, alpha=1 - decay)

    def noised(self, rows: slice, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(state, target velocity, t) of a micro-batch."""
        t, x0 = self.sigmas[level], self.x0[rows]
        eps = torch.randn(x0.shape, generator=self.noise)
        wide = t.view(-1, 1, 1, 1)
        return (1 - wide) * x0 + wide * eps, eps - x0, t

    def nft(self) -> None:
        """DiffusionNFT with a velocity anchor."""
        self.optimizer.zero_grad()
        r = (self.advantages() / 10 + 0.5).clamp(0, 1)
        levels = torch.stack([torch.randperm(NUM_STEPS, generator=self.noise) for _ in range(NUM_IMAGES)])
        for rows in self.rows:
            told = self.told.rows(rows)
            for k in range(NUM_TRAINED):
                state, _, t = self.noised(rows, levels[rows, k])
                with torch.no_grad():
                    old = self.ask(self.old, state, t, told)
                    base = self.ask(self.base, state, t, told)
                velocity = self.ask(self.network, state, t, told)
                loss = torch.zeros(())
                for sign, weight in ((1, r[rows]), (-1, 1 - r[rows])):
                    mixed = velocity if sign == 1 else 2 * old - velocity
                    gap = (state - t.view(-1, 1, 1, 1) * mixed - self.x0[rows]).double()
                    norm = gap.detach().abs().mean((1, 2, 3)).clamp_min(1e-5)
                    loss = loss + 5 * (weight * (gap**2).mean((1, 2, 3)) / norm).sum()
                loss = loss + KL_WEIGHT["nft"] * ((velocity - base) ** 2).mean((1, 2, 3)).sum()
                (loss / (NUM_IMAGES * NUM_TRAINED)).backward()
        self.update(0.001)

    def crd(self) -> None:
        """CRD with the adaptive implicit reward, whole groups centred, and the guided anchor."""
        self.optimizer.zero_grad()
        share = (self.advantages() / 10 + 0.5).clamp(0, 1).double()
        orders = [torch.randperm(NUM_STEPS, generator=self.noise) for _ in PROMPTS]
        levels = torch.stack([order for order in orders for _ in range(GROUP_SIZE)])
        centred = (share.view(-1, GROUP_SIZE) - share.view(-1, GROUP_SIZE).mean(1, keepdim=True)).flatten()
        m = 1e-4 / KL_WEIGHT["crd"]
        for k in range(NUM_TRAINED):
            noised, olds, firsts = [], [], []
            for rows in self.rows:
                told = self.told.rows(rows).without_negative()
                noised.append(self.noised(rows, levels[rows, k]))
                state, target, t = noised[-1]
                with torch.no_grad():
                    olds.append(normalised(self.ask(self.old, state, t, told) - target))
                    firsts.append(olds[-1] - normalised(self.ask(self.network, state, t, told) - target))
            means = torch.cat(firsts).view(-1, GROUP_SIZE).mean(1).repeat_interleave(GROUP_SIZE)
            for rows, (state, target, t), old in zip(self.rows, noised, olds, strict=True):
                told = self.told.rows(rows)
                both = join_conditioning([told.need_negative(), told.without_negative()])
                with torch.no_grad():
                    answer = self.ask(self.base, torch.cat([state, state]), torch.cat([t, t]), both)
                    without, within = answer.chunk(2)
                    base = without + GUIDANCE * (within - without)
                velocity = self.ask(self.network, state, t, told.without_negative())
                implied = old - normalised(velocity - target)
                policy = 5 * (implied - means[rows] - centred[rows]) ** 2
                kl = ((velocity - base) ** 2).mean((1, 2, 3)) * (m + share[rows] * (1 - m))
                ((policy + KL_WEIGHT["crd"] * kl).sum() / (NUM_IMAGES * NUM_TRAINED)).backward()
        self.update(0.25)

    def flow_grpo(self) -> None:
        """Flow-GRPO with its KL."""
        self.optimizer.zero_grad()
        adv = self.advantages()
        steps = torch.randperm(int(0.99 * NUM_STEPS), generator=self.noise)[:NUM_TRAINED].tolist()
        for rows in self.rows:
            told = self.told.rows(rows)
            for step in steps:
                state = self.states[rows, step].contiguous()
                t = torch.full((len(state),), float(self.sigmas[step]))
                with torch.no_grad():
                    base = self.ask(self.base, state, t, told)
                velocity = self.ask(self.network, state, t, told)
                mean, std, scale = self.sde(velocity, state, step)
                log_density = -((self.states[rows, step + 1] - mean) ** 2) / (2 * std**2) - math.log(std)
                logprob = (log_density - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
                ratio = torch.exp(logprob - self.logprob[rows, step])
                a = adv[rows]
                loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-4, 1 + 1e-4))
                kl = ((mean - self.sde(base, state, step)[0]) ** 2).mean((1, 2, 3)) / (2 * scale**2)
                ((loss + KL_WEIGHT["flow_grpo"] * kl).sum() / (NUM_IMAGES * NUM_TRAINED)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def sde(self, velocity: torch.Tensor, state: torch.Tensor, step: int) -> tuple[torch.Tensor, float, float]:
        """Flow-GRPO's mean, std and noise scale."""
        sigma, dt = float(self.sigmas[step]), float(self.sigmas[step + 1] - self.sigmas[step])
        scale = 0.7 * math.sqrt(sigma / (1 - (float(self.sigmas[1]) if sigma >= 1 else sigma)))
        pull = scale**2 / (2 * sigma)
        mean = state * (1 + pull * dt) + velocity * (1 + pull * (1 - sigma)) * dt
        return mean, scale * math.sqrt(-dt), scale


def normalised(gap: torch.Tensor) -> torch.Tensor:
    """mean gap² over the detached mean |gap|, (N,) fp64."""
    gap = gap.double()
    return (gap**2).mean((1, 2, 3)) / gap.detach().abs().mean((1, 2, 3)).clamp_min(1e-5)


def prepare(
    name: str, folder: Path, micro_batch: int, tuning: Literal["lora", "full"] = "full"
) -> tuple[Learner, list[RolloutGroup]]:
    """A learner with its groups, drawn and given unequal rewards."""
    config = Sd3Config(path=str(folder), height=64, width=64, tuning=tuning, max_sequence_length=T5_TOKENS)
    algorithm = CONFIGS[name]
    sampler_config = FlowSdeConfig(num_steps=NUM_STEPS) if name == "flow_grpo" else EulerOdeConfig(num_steps=NUM_STEPS)
    actor: DenoisingPolicy = load_policy(config, "rollout")
    sampler: Sampler = make_sampler(sampler_config, actor.schedule)
    engine = RolloutEngine(actor, {"rollout": SamplerSetup(sampler, 1.0, algorithm.needs)}, 0)
    engine.pull(actor.export_weights(0))
    tasks = [GroupTask(Prompt(f"p{index}", text), 0, index, 1) for index, text in enumerate(PROMPTS)]
    groups = [
        group.without_outputs()
        for start in range(0, len(tasks), micro_batch // GROUP_SIZE)
        for group in engine.generate(
            ChunkRequest(tuple(tasks[start : start + micro_batch // GROUP_SIZE]), tuple(range(GROUP_SIZE)))
        )
    ]
    groups = [g.with_rewards([RewardBreakdown(0.3 * ((7 * i) % 5), ()) for i in range(GROUP_SIZE)]) for g in groups]
    learner = Learner(LearnerConfig(), algorithm, load_policy(config, "learner"), sampler, 1.0, micro_batch, 0)
    return learner, groups


def our_step(learner: Learner, groups: list[RolloutGroup], step: int) -> None:
    """One learner step, as the controller takes it."""
    learner.begin_step(groups, step)
    learner.forward_backward(0)
    if not learner.optimise(0).finite:
        raise SystemExit("the update was not finite")
    learner.end_step(step)


def timed(work: Callable[[], None]) -> float:
    """Seconds it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def race(name: str, folder: Path, micro_batch: int, rounds: int) -> dict[str, Any]:
    """Both steps, in turns; the first round warms up."""
    learner, groups = prepare(name, folder, micro_batch)
    by_hand = HandWritten(learner, groups, micro_batch)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for step in range(1, rounds + 2):
        ours_s.append(timed(lambda step=step: our_step(learner, groups, step)))
        theirs_s.append(timed(getattr(by_hand, name)))
    ratios = [ours / theirs for ours, theirs in zip(ours_s[1:], theirs_s[1:], strict=True)]
    return {
        "ours_s": statistics.median(ours_s[1:]),
        "hand_written_s": statistics.median(theirs_s[1:]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "rounds": rounds,
    }


def peak(name: str, tuning: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of one step in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--tuning", tuning, "--micro-batch", str(NUM_IMAGES)]
    command += ["--folder", str(options.folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **GIVE_BACK}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def compared(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Ratios of the peaks of two processes, and of what the steps alone added to them."""
    added = [found["peak_bytes"] - found["before_step_bytes"] for found in (one, other)]
    return {"peak": one["peak_bytes"] / other["peak_bytes"], "added_by_step": added[0] / added[1]}


def child(name: str, options: argparse.Namespace) -> None:
    """One step in this very process; prints how much memory it held at most, beyond what it held before."""
    learner, groups = prepare(name, options.folder, options.micro_batch, options.tuning)
    # The second step counts: the first one makes the optimiser's moments.
    our_step(learner, groups, 1)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    our_step(learner, groups, 2)
    print(json.dumps({"before_step_bytes": before, "peak_bytes": resident_bytes("VmHWM")}))


def resident_bytes(field: str) -> int:
    """What Linux says this process holds (VmRSS) or has held since the mark was cleared (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=tuple(CONFIGS), choices=tuple(CONFIGS))
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures per forward; a multiple of 4, at most 16")
    parser.add_argument("--rounds", type=int, default=9, help="measured turns of each")
    parser.add_argument("--hardware", default="", help="what it runs on, in words, for the JSON")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--tuning", default="full", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help="model directory, made when absent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        child(options.child, options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = build_model_dir(options.folder or Path(scratch) / "model")
        times = {name: race(name, options.folder, options.micro_batch, options.rounds) for name in options.algorithms}
        memory = {
            tuning: {name: peak(name, tuning, options) for name in options.algorithms} for tuning in ("lora", "full")
        }
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/learner_step.py", *sys.argv[1:]]),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": options.hardware,
        "setting": {"pictures": NUM_IMAGES, "micro_batch": options.micro_batch, "items": NUM_TRAINED, "threads": 1},
        "step": times,
        "memory": memory,
    }
    if {"nft", "crd"} <= times.keys():
        report["crd_over_nft"] = {tuning: compared(found["crd"], found["nft"]) for tuning, found in memory.items()}
    text = json.dumps(report, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
