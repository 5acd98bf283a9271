"""Models small enough for tests, and groups drawn from them by the real rollout engine.

`ToyPolicy` needs torch alone and answers in microseconds; `sd3_folder` is a random Stable Diffusion 3 pipeline of
stock diffusers parts. Neither can draw anything; both have every path the learner and the rollouts walk.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

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
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    folder = Path(tempfile.mkdtemp(prefix="raylign-tiny-sd3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
        build_vae: Any = AutoencoderKL  # diffusers types its tuples as one long
        vae = build_vae(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=T5EncoderModel(
                T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            tokenizer_3=_t5_tokenizer(),
        )
    pipeline.save_pretrained(str(folder))
    return folder


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


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {
    token: 2 + place for place, token in enumerate([*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)])
}


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=_VOCABULARY, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=16
    )


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + place for place, letter in enumerate(_LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
