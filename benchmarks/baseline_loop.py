"""Flow-GRPO by hand: the single-file loop that Raylign's own speed is measured against. No Raylign import.

One epoch of 4 prompts x 4 siblings on the model of `tiny_sd3_64.py`: 6 Flow-SDE steps with log-probs, VAE decode to
64x64 bytes, JPEG reward, advantages, 2 trained timesteps forward and backward, one AdamW update of every weight.
fp32, no guidance, no reference (KL weight 0). Prompts are encoded once, before the first epoch.

    python benchmarks/baseline_loop.py --micro-batch 16 --threads 1 --epochs 6

prints one JSON object: seconds per phase (median, min, max over the epochs but the first, which warms up), pictures
per second, peak memory, the FLOPs of an epoch, and what they would take at this machine's matrix-product speed.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_sd3_64 import HEIGHT, LATENT_CHANNELS, PROMPTS, build_model_dir
from torch.utils.flop_counter import FlopCounterMode

GROUP_SIZE = 4
NUM_STEPS = 6
NUM_TRAIN_STEPS = 2
NUM_USABLE_STEPS = int(0.99 * NUM_STEPS)
T5_TOKENS = 128
NOISE_LEVEL = 0.7
SHIFT = 3.0
CLIP_RANGE, ADV_CLIP, GRAD_CLIP = 1e-4, 5.0, 1.0
LR, WEIGHT_DECAY = 3e-4, 1e-4
JPEG_QUALITY = 95
LATENT = (LATENT_CHANNELS, HEIGHT // 8, HEIGHT // 8)
NUM_IMAGES = len(PROMPTS) * GROUP_SIZE
PHASES = ("sample", "decode", "reward", "credit", "train")


@dataclass(slots=True)
class Recorded:
    """What sampling leaves for training, one row per image."""

    states_NS1CHW: torch.Tensor
    logprob_NS: torch.Tensor


@dataclass(slots=True)
class Loop:
    """The model, its optimiser, the encoded prompts (one row per image) and the noise levels."""

    transformer: Any
    vae: Any
    prompt_NLD: torch.Tensor
    pooled_ND: torch.Tensor
    sigmas: list[float]
    optimizer: torch.optim.Optimizer
    micro_batch: int
    noise: torch.Generator
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    @classmethod
    def load(cls, model_dir: Path, micro_batch: int, seed: int) -> Loop:
        """Read the pipeline directory and encode the prompts."""
        from diffusers import StableDiffusion3Pipeline

        pipeline: Any = StableDiffusion3Pipeline.from_pretrained(str(model_dir), local_files_only=True)
        with torch.no_grad():
            prompt, _, pooled, _ = pipeline.encode_prompt(
                list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
            )
        transformer = pipeline.transformer.eval().requires_grad_(True)
        return cls(
            transformer=transformer,
            vae=pipeline.vae.eval(),
            prompt_NLD=prompt.repeat_interleave(GROUP_SIZE, dim=0),
            pooled_ND=pooled.repeat_interleave(GROUP_SIZE, dim=0),
            sigmas=shifted_sigmas(),
            optimizer=torch.optim.AdamW(transformer.parameters(), lr=LR, weight_decay=WEIGHT_DECAY),
            micro_batch=micro_batch,
            noise=torch.Generator().manual_seed(seed),
        )

    def chunks(self) -> list[slice]:
        """The rows of each micro-batch."""
        return [slice(start, start + self.micro_batch) for start in range(0, NUM_IMAGES, self.micro_batch)]

    def velocity(self, state: torch.Tensor, step: int, rows: slice) -> torch.Tensor:
        """The network's answer for one micro-batch, (N, C, H, W)."""
        return self.transformer(
            hidden_states=state,
            timestep=torch.full((len(state),), self.sigmas[step] * 1000.0),
            encoder_hidden_states=self.prompt_NLD[rows],
            pooled_projections=self.pooled_ND[rows],
            return_dict=False,
        )[0]

    def sde_mean_std(self, velocity: torch.Tensor, state: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        """Flow-GRPO's step (2505.05470, eq. 9)."""
        sigma, dt = self.sigmas[step], self.sigmas[step + 1] - self.sigmas[step]
        scale = NOISE_LEVEL * math.sqrt(sigma / (1 - (self.sigmas[1] if sigma >= 1 else sigma)))
        mean = state * (1 + scale**2 / (2 * sigma) * dt) + velocity * (1 + scale**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, scale * math.sqrt(-dt)

    def sample(self) -> Recorded:
        """Every image's states and log-probs."""
        recorded: list[Recorded] = []
        with torch.no_grad():
            for rows in self.chunks():
                state = torch.randn((self.micro_batch, *LATENT), generator=self.noise)
                states, logprobs = [state], []
                for step in range(NUM_STEPS):
                    mean, std = self.sde_mean_std(self.velocity(state, step, rows), state, step)
                    state = mean + std * torch.randn(state.shape, generator=self.noise)
                    logprobs.append(gaussian_logprob(state, mean, std))
                    states.append(state)
                recorded.append(Recorded(torch.stack(states, dim=1), torch.stack(logprobs, dim=1)))
        return Recorded(torch.cat([r.states_NS1CHW for r in recorded]), torch.cat([r.logprob_NS for r in recorded]))

    def decode(self, recorded: Recorded) -> np.ndarray:
        """Pictures, (N, H, W, 3) uint8."""
        config = self.vae.config
        pictures: list[torch.Tensor] = []
        with torch.no_grad():
            for rows in self.chunks():
                latents = recorded.states_NS1CHW[rows, -1] / config.scaling_factor + config.shift_factor
                picture = self.vae.decode(latents, return_dict=False)[0]
                pictures.append(((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(pictures).permute(0, 2, 3, 1).numpy()

    def train(self, recorded: Recorded, adv_N: torch.Tensor) -> float:
        """Two trained timesteps for every image, one update. Returns the largest |ratio - 1|: 0 on policy."""
        self.optimizer.zero_grad()
        steps = sorted(torch.randperm(NUM_USABLE_STEPS, generator=self.noise)[:NUM_TRAIN_STEPS].tolist())
        deviation = 0.0
        for rows in self.chunks():
            for step in steps:
                loss, ratio = self.loss(recorded, adv_N, rows, step)
                (loss.sum() / (NUM_IMAGES * NUM_TRAIN_STEPS)).backward()
                deviation = max(deviation, float((ratio.detach() - 1).abs().max()))
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), GRAD_CLIP)
        self.optimizer.step()
        return deviation

    def loss(
        self, recorded: Recorded, adv_N: torch.Tensor, rows: slice, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clipped surrogate and the ratio of one micro-batch at one step."""
        state = recorded.states_NS1CHW[rows, step].contiguous()
        mean, std = self.sde_mean_std(self.velocity(state, step, rows), state, step)
        logprob = gaussian_logprob(recorded.states_NS1CHW[rows, step + 1], mean, std)
        ratio = torch.exp(logprob - recorded.logprob_NS[rows, step])
        adv = adv_N[rows]
        return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)), ratio

    def epoch(self) -> float:
        """One epoch with its phases timed. Returns the largest |ratio - 1|."""
        marks = [time.perf_counter()]
        recorded = self.sample()
        marks.append(time.perf_counter())
        pictures = self.decode(recorded)
        marks.append(time.perf_counter())
        rewards = [jpeg_reward(picture) for picture in pictures]
        marks.append(time.perf_counter())
        adv_N = advantages(rewards)
        marks.append(time.perf_counter())
        deviation = self.train(recorded, adv_N)
        marks.append(time.perf_counter())
        for phase, (before, after) in zip(PHASES, itertools.pairwise(marks), strict=True):
            self.seconds[phase].append(after - before)
        return deviation


def shifted_sigmas() -> list[float]:
    """diffusers' noise levels for this model (FlowMatchEulerDiscreteScheduler), 1 down to 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler.sigmas.tolist()


def gaussian_logprob(value: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Log-density averaged over the latent's dimensions, (N,)."""
    density = -((value - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=(1, 2, 3))


def jpeg_reward(picture_HWC: np.ndarray) -> float:
    """Smaller files are better: minus kilobytes / 500."""
    buffer = io.BytesIO()
    Image.fromarray(picture_HWC).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return -buffer.tell() / 1000 / 500


def advantages(rewards: list[float]) -> torch.Tensor:
    """Group means taken off, divided by the deviation of all, (N,) fp32."""
    rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(-1, GROUP_SIZE)
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return (centred / (rewards_PG.std(correction=0) + 1e-4)).clamp(-ADV_CLIP, ADV_CLIP).float().flatten()


def count_flops(loop: Loop) -> dict[str, float]:
    """GFLOP of one epoch's matrix products and convolutions, by phase, counted once with torch's own counter.

    Attention is computed by plain matrix products while counting: the CPU's fused kernel is not in the counter.
    """
    counts: dict[str, float] = {}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            recorded = loop.sample()
        counts["sample"] = counter.get_total_flops() / 1e9
        with FlopCounterMode(display=False) as counter:
            loop.decode(recorded)
        counts["decode"] = counter.get_total_flops() / 1e9
        items = len(loop.chunks()) * NUM_TRAIN_STEPS
        with FlopCounterMode(display=False) as counter:
            loss, _ = loop.loss(recorded, torch.ones(NUM_IMAGES), loop.chunks()[0], 0)
        counts["train_forward"] = counter.get_total_flops() * items / 1e9
        with FlopCounterMode(display=False) as counter:
            loss.sum().backward()
        counts["train_backward"] = counter.get_total_flops() * items / 1e9
    loop.optimizer.zero_grad()
    return counts


def gemm_gflops(rows: int, inner: int, columns: int, seconds: float = 0.4) -> float:
    """The best speed of an fp32 matrix product of this shape within `seconds`, GFLOP/s, on torch's threads."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    best, ends = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * inner * columns / best / 1e9


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run(model_dir: Path, micro_batch: int, threads: int, epochs: int, seed: int) -> dict[str, Any]:
    """The whole measurement as plain data."""
    torch.set_num_threads(threads)
    loop = Loop.load(model_dir, micro_batch, seed)
    cpu_before = 0.0
    deviations: list[float] = []
    for epoch in range(epochs):
        if epoch == 1:
            cpu_before = time.process_time()
        deviations.append(loop.epoch())
    cpu_s = (time.process_time() - cpu_before) / (epochs - 1)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = {phase: values[1:] for phase, values in loop.seconds.items()}
    epoch_s = [math.fsum(values) for values in zip(*kept.values(), strict=True)]
    gflop = count_flops(loop)
    tokens = micro_batch * (loop.prompt_NLD.shape[1] + (LATENT[1] // 2) * (LATENT[2] // 2))
    speed = {"large_1024": gemm_gflops(1024, 1024, 1024), "model_feed_forward": gemm_gflops(tokens, 128, 512)}
    total = sum(gflop.values())
    return {
        "micro_batch": micro_batch,
        "threads": threads,
        "epochs_measured": epochs - 1,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "num_images": NUM_IMAGES,
        "context_tokens": loop.prompt_NLD.shape[1],
        "num_params": sum(p.numel() for p in loop.transformer.parameters()),
        "seconds": {phase: summary(values) for phase, values in kept.items()},
        "epoch_s": summary(epoch_s),
        "images_per_s": NUM_IMAGES / statistics.median(epoch_s),
        "cpu_s_per_epoch": cpu_s,
        "peak_rss_bytes": peak_rss_bytes,
        "ratio_deviation_max": max(deviations),
        "gflop_per_epoch": {**gflop, "total": total},
        "gemm_gflop_per_s": speed,
        "floor_s": {name: total / value for name, value in speed.items()},
    }


def main() -> None:
    """Parse the arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batch", type=int, choices=(4, 8, 16), default=16, help="images per forward")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1, help="compute threads")
    parser.add_argument("--epochs", type=int, default=6, help="the first one only warms up (at least 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="model directory, made when absent")
    parser.add_argument("--json", type=Path, default=None, help="also write the JSON to this file")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2: the first is not measured")
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = build_model_dir(arguments.model or Path(scratch) / "model")
        result = run(model_dir, arguments.micro_batch, arguments.threads, arguments.epochs, arguments.seed)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
