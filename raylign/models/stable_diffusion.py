"""Stable Diffusion 1.x and 2.x: any `StableDiffusionPipeline` directory of diffusers, eps- or v-prediction."""

from __future__ import annotations

from typing import Any, Literal

import torch

from raylign.models.base import Conditioning
from raylign.models.image_policy import Architecture, ImageModelConfig
from raylign.models.pipeline_folder import PipelineForm
from raylign.models.unet import LORA_TARGETS, unet_geometry, unet_schedule, unet_velocity

FORM = PipelineForm(
    pipeline="StableDiffusionPipeline",
    network="unet",
    network_class="UNet2DConditionModel",
    components=("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    # Rewards judge the pictures; a checker would blacken some, and many directories come without one.
    left_out=("safety_checker", "feature_extractor", "image_encoder"),
)


class StableDiffusionConfig(ImageModelConfig):
    """A Stable Diffusion 1.x or 2.x model directory and how it is trained. 2.x is made for 768 x 768."""

    type: Literal["sd15"] = "sd15"


def _encode(
    pipeline: Any, config: StableDiffusionConfig, text: str, device: torch.device, with_negative: bool
) -> Conditioning:
    embeds, negative = pipeline.encode_prompt(text, device, 1, with_negative)
    return Conditioning(embeds, negative=Conditioning(negative) if with_negative else None)


STABLE_DIFFUSION = Architecture(FORM, LORA_TARGETS, unet_geometry, unet_schedule, _encode, unet_velocity)
