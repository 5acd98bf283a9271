"""Stable Diffusion 3 and 3.5: any `StableDiffusion3Pipeline` directory of diffusers, tiny or real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from raylign.models.base import Conditioning
from raylign.models.flow_scheduler import euler_schedule
from raylign.models.image_policy import Architecture, Geometry, ImageModelConfig, ImagePolicy
from raylign.models.pipeline_folder import PipelineForm
from raylign.models.schedule import FlowSchedule

FORM = PipelineForm(
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    network_class="SD3Transformer2DModel",
    components=("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
)
# The targets of Flow-GRPO and DiffusionNFT: every attention projection of both streams.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class Sd3Config(ImageModelConfig):
    """A Stable Diffusion 3 / 3.5 model directory and how it is trained."""

    type: Literal["sd3"] = "sd3"
    path: str = "asset:glyphs"
    """diffusers pipeline directory; `asset:glyphs` and `asset:shapes` are the tiny models that ship with Raylign."""
    height: int = Field(default=32, ge=8)
    """Picture height in pixels."""
    width: int = Field(default=64, ge=8)
    """Picture width in pixels."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """T5 tokens per prompt, where the model has a T5."""


def _geometry(config: Sd3Config, network: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    # The tiny VAE class names its channels differently.
    channels = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
    factor = 2 ** (len(channels) - 1)
    shape = network["in_channels"], config.height // factor, config.width // factor
    return Geometry(shape, factor * network["patch_size"])


def _schedule(config: Sd3Config, folder: Path) -> FlowSchedule:
    return euler_schedule(folder)


def _encode(pipeline: Any, config: Sd3Config, text: str, device: torch.device, with_negative: bool) -> Conditioning:
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        text,
        None,
        None,
        device=device,
        do_classifier_free_guidance=with_negative,
        max_sequence_length=config.max_sequence_length,
    )
    return Conditioning(embeds, pooled, negative=Conditioning(negative, negative_pooled) if with_negative else None)


def _velocity(
    policy: ImagePolicy, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network is fed sigma * 1000 as a float, never truncated to an integer."""
    dtype = policy.network.dtype
    return policy.network(
        hidden_states=state_BCHW.to(dtype),
        timestep=sigma_B.float() * 1000.0,
        encoder_hidden_states=conditioning.prompt_embeds_PLD.to(dtype),
        pooled_projections=conditioning.need_pooled().to(dtype),
        return_dict=False,
    )[0]


# The VAE stays in fp32, as in Flow-GRPO and DiffusionNFT: a reward looks at its pictures.
SD3 = Architecture(FORM, LORA_TARGETS, _geometry, _schedule, _encode, _velocity, fp32_components=("vae",))
