"""Stable Diffusion XL: any `StableDiffusionXLPipeline` of diffusers (2307.01952), not the refiner."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from raylign.models.base import Conditioning
from raylign.models.image_policy import Architecture, ImageModelConfig, ImagePolicy
from raylign.models.pipeline_folder import PipelineForm
from raylign.models.unet import LORA_TARGETS, unet_geometry, unet_schedule, unet_velocity

FORM = PipelineForm(
    pipeline="StableDiffusionXLPipeline",
    network="unet",
    network_class="UNet2DConditionModel",
    components=("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    left_out=("feature_extractor", "image_encoder"),
)


class SdxlConfig(ImageModelConfig):
    """A Stable Diffusion XL model directory and how it is trained."""

    type: Literal["sdxl"] = "sdxl"
    height: int = Field(default=1024, ge=8)
    """Picture height in pixels."""
    width: int = Field(default=1024, ge=8)
    """Picture width in pixels."""
    original_size: tuple[int, int] | None = None
    """(height, width) that the network is told its training picture had before it was resized; the picture's own when
    not given."""
    crop: tuple[int, int] = (0, 0)
    """(top, left) that the network is told its training picture was cropped at."""


def _encode(pipeline: Any, config: SdxlConfig, text: str, device: torch.device, with_negative: bool) -> Conditioning:
    """The negative is all zeros where the model was trained so (`force_zeros_for_empty_prompt`)."""
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        text, device=device, do_classifier_free_guidance=with_negative
    )
    return Conditioning(embeds, pooled, negative=Conditioning(negative, negative_pooled) if with_negative else None)


def _velocity(
    policy: ImagePolicy, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    config, dtype = policy.config, policy.network.dtype
    size = (config.height, config.width)
    sizes = [float(one) for one in (*(config.original_size or size), *config.crop, *size)]
    ids_B6 = torch.tensor([sizes] * len(state_BCHW), device=state_BCHW.device)
    added = {"text_embeds": conditioning.need_pooled().to(dtype), "time_ids": ids_B6}
    return unet_velocity(policy, state_BCHW, sigma_B, conditioning, added)


SDXL = Architecture(
    FORM,
    LORA_TARGETS,
    unet_geometry,
    unet_schedule,
    _encode,
    _velocity,
    fp32_components=("vae",),  # activations of the published VAE leave the range of half precision (`force_upcast`)
)
