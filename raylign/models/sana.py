"""SANA (2410.10629, 2501.18427): any `SanaPipeline` directory of diffusers.

A transformer with linear attention over the latents of a DC-AE, which is 32 times smaller than the picture each way,
told what to draw by Gemma 2. Distilled models with other pipelines (SANA-Sprint) are not of this family.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from raylign.errors import ModelError
from raylign.models.base import Conditioning
from raylign.models.flow_scheduler import euler_or_solver_schedule
from raylign.models.image_policy import Architecture, Geometry, ImageModelConfig, ImagePolicy
from raylign.models.pipeline_folder import PipelineForm
from raylign.models.schedule import FlowSchedule

FORM = PipelineForm(
    pipeline="SanaPipeline",
    network="transformer",
    network_class="SanaTransformer2DModel",
    components=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
)
# Sol-RL's targets (configs/sol_rl/sana.py) by diffusers' names: all projections of linear self-attention (attn1) and
# of cross-attention to the text (attn2).
LORA_TARGETS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
)


class SanaConfig(ImageModelConfig):
    """A SANA model directory and how it is trained."""

    type: Literal["sana"] = "sana"
    height: int = Field(default=1024, ge=8)
    """Picture height in pixels; what the model was trained for, 512 or 1024."""
    width: int = Field(default=1024, ge=8)
    """Picture width in pixels."""
    max_sequence_length: int = Field(default=300, ge=2)
    """Gemma tokens per prompt that the network sees; the model's own number."""
    complex_human_instruction: bool = True
    """Put diffusers' instruction to enhance the prompt before it, as its pipeline does; slower to encode."""


def _geometry(config: SanaConfig, network: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    factor = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
    shape = network["in_channels"], config.height // factor, config.width // factor
    return Geometry(shape, factor * network["patch_size"])


def _schedule(config: SanaConfig, folder: Path) -> FlowSchedule:
    return euler_or_solver_schedule(folder)


def _check(config: SanaConfig, network: dict[str, Any]) -> None:
    if network.get("guidance_embeds"):
        raise ModelError(f"{config.path} embeds guidance, as SANA-Sprint does; only SANA's base models are supported")


def _encode(pipeline: Any, config: SanaConfig, text: str, device: torch.device, with_negative: bool) -> Conditioning:
    embeds, mask, negative, negative_mask = pipeline.encode_prompt(
        text,
        with_negative,
        device=device,
        max_sequence_length=config.max_sequence_length,
        complex_human_instruction=_instruction(pipeline) if config.complex_human_instruction else None,
    )
    untold = Conditioning(negative, mask_PL=negative_mask) if with_negative else None
    return Conditioning(embeds, mask_PL=mask, negative=untold)


def _instruction(pipeline: Any) -> list[str]:
    """The lines that diffusers puts before a prompt by default."""
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


def _velocity(
    policy: ImagePolicy, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network is fed sigma * 1000 as a float, never truncated to an integer; a learned variance is dropped."""
    network = policy.network
    velocity_BCHW = network(
        state_BCHW.to(network.dtype),
        encoder_hidden_states=conditioning.prompt_embeds_PLD.to(network.dtype),
        encoder_attention_mask=conditioning.mask_PL,
        timestep=sigma_B.float() * 1000.0 * network.config.timestep_scale,
        return_dict=False,
    )[0]
    return velocity_BCHW[:, : state_BCHW.shape[1]]


# Everything may be bf16: Sol-RL draws, encodes and decodes so, and Gemma and the DC-AE are published for it.
SANA = Architecture(FORM, LORA_TARGETS, _geometry, _schedule, _encode, _velocity, check=_check)
