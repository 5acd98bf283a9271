"""Random Stable Diffusion 1.5 and XL pipelines of stock diffusers parts: a U-Net 8 and 16 wide, 8 x 8 pixels and up."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raylign.models.adapters import LoraSettings
from raylign.models.sdxl import SdxlConfig
from raylign.models.stable_diffusion import StableDiffusionConfig
from tests.tiny_parts import clip_text, clip_tokenizer, kl_vae, saved, seeded

# The keys of the published scheduler_config.json files that set the noise levels.
PUBLISHED_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Stable Diffusion 2.1 fine-tuned to end in pure noise (2305.08891).
ZERO_SNR: dict[str, Any] = PUBLISHED_SCHEDULE | {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def ddim(config: Mapping[str, Any]) -> Any:
    """diffusers' DDIMScheduler; its annotations are narrower than what it takes and gives."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(dict(config))
    return scheduler


@functools.cache
def sd15_folder(v_prediction: bool = False) -> Path:
    """A saved Stable Diffusion 1.5 pipeline without a safety checker, built once per test session."""
    from diffusers import StableDiffusionPipeline

    with seeded():
        pipeline = StableDiffusionPipeline(
            vae=kl_vae(),
            text_encoder=clip_text(projected=False),
            tokenizer=clip_tokenizer(),
            unet=_unet(cross_attention_dim=16),
            scheduler=ddim(ZERO_SNR if v_prediction else PUBLISHED_SCHEDULE),
            safety_checker=None,  # type: ignore[arg-type]  # optional, which its annotation does not say
            feature_extractor=None,  # type: ignore[arg-type]  # likewise
            requires_safety_checker=False,
        )
    return saved(pipeline, "sd15")


@functools.cache
def sdxl_folder() -> Path:
    """A saved Stable Diffusion XL pipeline, built once per test session."""
    from diffusers import StableDiffusionXLPipeline

    with seeded():
        unet = _unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=kl_vae(),
            text_encoder=clip_text(projected=False),
            text_encoder_2=clip_text(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet,
            scheduler=ddim(PUBLISHED_SCHEDULE),
            add_watermarker=False,
        )
    return saved(pipeline, "sdxl")


def sd15_config(tuning: Literal["lora", "full"] = "lora", **changes: object) -> StableDiffusionConfig:
    """The tiny pipeline as a [model] configuration."""
    path = str(sd15_folder())
    tiny = StableDiffusionConfig(path=path, height=16, width=16, tuning=tuning, lora=LoraSettings(rank=2, alpha=4.0))
    return tiny.model_copy(update=changes)


def sdxl_config(tuning: Literal["lora", "full"] = "lora", **changes: object) -> SdxlConfig:
    """The tiny pipeline as a [model] configuration."""
    path = str(sdxl_folder())
    tiny = SdxlConfig(path=path, height=16, width=16, tuning=tuning, lora=LoraSettings(rank=2, alpha=4.0))
    return tiny.model_copy(update=changes)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    build: Any = UNet2DConditionModel  # diffusers types its tuples as one long
    return build(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **changes,
    )
