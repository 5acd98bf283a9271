"""Models small enough for tests, and groups drawn from them by the real rollout engine.

`ToyPolicy` needs torch alone and answers in microseconds; `sd3_folder` is a random Stable Diffusion 3 pipeline of
stock diffusers parts. Neither can draw anything; both have every path the learner and the rollouts walk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from learner.learner import Learner
from raylign.keys import generator
from raylign.models.adapters import LoraSettings
from raylign.models.base import Conditioning, DenoisingPolicy
from raylign.models.sd3 import Sd3Config
from raylign.precision import Precision
from raylign.samplers import FlowSchedule, NoiseSchedule, Sampler, flow_sigmas
from raylign.samplers.euler_ode import EulerOde, EulerOdeConfig
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from raylign.types import Needs, Prompt, RewardBreakdown, RewardFailure, RolloutGroup, StepResult, WeightVersion
from raylign.weights import WeightSnapshot, make_snapshot, verify_snapshot
from rollout.engine import RolloutEngine, SamplerSetup, chunk_requests, join_parts
from rollout.prompts import GroupTask
from tests.tiny_parts import clip_text, clip_tokenizer, kl_vae, saved, seeded, t5_tokenizer

RUN_SEED = 11
Reward = Callable[[int, int], float | None]
"""(group, sibling) to a reward, or None for a failure."""


class ToyPolicy:
    """A DenoisingPolicy of a few hundred weights: convolution, time and text enter a hidden layer."""

    def __init__(self, seed: int = 0, latent_shape: tuple[int, int, int] = (2, 4, 4)) -> None:
        self.device = torch.device("cpu")
        self.schedule: NoiseSchedule = FlowSchedule(3.0)
        self.latent_shape = latent_shape
        channels = latent_shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = torch.nn.ModuleDict(
                {
                    "inward": torch.nn.Conv2d(channels, 8, 3, padding=1),
                    "told": torch.nn.Linear(5, 8),
                    "outward": torch.nn.Conv2d(8, channels, 3, padding=1),
                }
            )

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        told, negative = (torch.randn(1, 1, 4, generator=generator(words, "text")) for words in (text, ""))
        if not with_negative:
            return Conditioning(told, told[:, 0])
        return Conditioning(told, told[:, 0], negative=Conditioning(negative, negative[:, 0]))

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = self.network["told"](torch.cat([conditioning.need_pooled(), sigma_B[:, None]], dim=1))
        hidden = torch.tanh(self.network["inward"](state_BCHW) + told[:, :, None, None])
        return self.network["outward"](hidden).float()

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        return np.zeros((len(state_BCHW), 4, 4, 3), dtype=np.uint8)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.network.named_parameters())

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to save here."""

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return make_snapshot(dict(self.trainable_parameters()) if tensors is None else tensors, version, "full")

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        parameters = self.trainable_parameters()
        tensors = verify_snapshot(snapshot, {name: tuple(p.shape) for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


@functools.cache
def sd3_folder() -> Path:
    """A saved random SD3 pipeline, built once per test session: 2 layers 32 wide, 8 x 16 pixels and up, no T5 text."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    with seeded():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        vae = kl_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=clip_text(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=T5EncoderModel(
                T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            tokenizer_3=t5_tokenizer(),
        )
    return saved(pipeline, "sd3")


def sd3_config(tuning: Literal["lora", "full"] = "lora", **changes: object) -> Sd3Config:
    """The tiny pipeline as a [model] configuration."""
    return Sd3Config(
        path=str(sd3_folder()),
        height=16,
        width=16,
        tuning=tuning,
        lora=LoraSettings(rank=4, alpha=8.0),
        max_sequence_length=8,
    ).model_copy(update=changes)


def euler(num_steps: int = 4, shift: float = 3.0) -> EulerOde:
    return EulerOde(EulerOdeConfig(num_steps=num_steps), flow_sigmas(num_steps, shift))


def flow_sde(num_steps: int = 4, shift: float = 3.0) -> FlowSde:
    return FlowSde(FlowSdeConfig(num_steps=num_steps), flow_sigmas(num_steps, shift))


def by_sibling(group: int, sibling: int) -> float:
    """A reward that differs within and between groups."""
    return 0.1 * group + 0.3 * ((sibling * 7) % 5)


def draw_groups(
    policy: DenoisingPolicy,
    sampler: Sampler,
    needs: Needs,
    *,
    num_groups: int = 3,
    group_size: int = 4,
    chunk_size: int | None = None,
    guidance_scale: float = 1.0,
    reward: Reward = by_sibling,
    first_sequence: int = 0,
    latents: Precision = "fp32",
    learner_step: int = 0,
) -> list[RolloutGroup]:
    """Groups of the policy's samples, drawn by the real engine in chunks, and scored by `reward`."""
    engine = RolloutEngine(policy, {"rollout": SamplerSetup(sampler, guidance_scale, needs, latents)}, RUN_SEED)
    engine.pull(policy.export_weights(0))
    tasks = [
        GroupTask(Prompt(f"p{index}", f"word {index}"), 0, index, learner_step)
        for index in range(first_sequence, first_sequence + num_groups)
    ]
    parts: dict[int, list[RolloutGroup]] = {}
    for request in chunk_requests(tasks, group_size, chunk_size or group_size):
        for part in engine.generate(request):
            parts.setdefault(part.sequence, []).append(part)
    groups = [join_parts(parts[sequence]) for sequence in sorted(parts)]
    return [
        group.with_rewards([breakdown(reward(index, sibling)) for sibling in range(group_size)])
        for index, group in enumerate(groups)
    ]


def breakdown(total: float | None) -> RewardBreakdown:
    """A reward as its mix reports it."""
    if total is None:
        return RewardBreakdown(None, (), RewardFailure("internal", "failed on purpose"))
    return RewardBreakdown(total, ())


def train_step(learner: Learner, groups: Sequence[RolloutGroup], step: int) -> list[StepResult]:
    """One learner step with nothing in between, as the controller would take it."""
    credit = learner.begin_step(groups, step)
    results: list[StepResult] = []
    for update in range(learner.config.num_updates):
        learner.forward_backward(update)
        result = learner.optimise(update)
        results.append(StepResult({**credit, **result.metrics}, result.finite))
    learner.end_step(step)
    return results
