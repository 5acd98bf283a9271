"""Every image family on a tiny random pipeline, how diffusers draws with it, and the pipelines of FLUX.1 and SANA.

A new family adds a row to `TINY_FAMILIES`; the contract tests run over it and fail until it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raylign.models.adapters import LoraSettings
from raylign.models.flux import FluxConfig, pack, unpack
from raylign.models.sana import SanaConfig
from raylign.models.sd3 import Sd3Config
from raylign.models.sdxl import SdxlConfig
from raylign.models.stable_diffusion import StableDiffusionConfig
from tests.tiny_models import sd3_config, sd3_folder
from tests.tiny_parts import saved, seeded
from tests.tiny_stable_diffusion import sd15_config, sdxl_config


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """A family's tiny model and how to ask diffusers' own pipeline for a picture.

    config(tuning="lora", **changes): the [model] configuration. arguments(config, latents_BCHW, guidance_scale): what
    the pipeline's call takes besides prompt, size and steps, 1 being no guidance. latents(config, output): (B, C, H, W)
    of what the call returns for output_type "latent".
    """

    config: Callable[..., Any]
    arguments: Callable[[Any, torch.Tensor, float], dict[str, Any]]
    latents: Callable[[Any, torch.Tensor], torch.Tensor] = lambda _, output: output


def load_with_diffusers(folder: str | Path) -> Any:
    """A pipeline directory as diffusers loads it by itself."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_diffusers(
    pipeline: Any,
    config: Any,
    prompt: str,
    latents_BCHW: torch.Tensor,
    num_steps: int,
    guidance_scale: float = 1.0,
    output_type: str = "latent",
) -> Any:
    """What diffusers' pipeline makes of this noise: latents (B, C, H, W), or pictures (B, height, width, 3)."""
    family = TINY_FAMILIES[type(config)]
    result = pipeline(
        prompt,
        height=config.height,
        width=config.width,
        num_inference_steps=num_steps,
        output_type=output_type,
        **family.arguments(config, latents_BCHW, guidance_scale),
    ).images
    return family.latents(config, result) if output_type == "latent" else result


@functools.cache
def flux_folder(guidance_embeds: bool = True) -> Path:
    """A saved random FLUX.1 pipeline: one double and one single block 32 wide; parts of the tiny SD3. Two kinds.

    With guidance it has a dynamic time shift, as FLUX.1-dev; without, none at all, as FLUX.1-schnell.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    parts = str(sd3_folder())
    with seeded(1):
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        )
    dev: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 64}
    schnell: dict[str, Any] = {"shift": 1.0}
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dev if guidance_embeds else schnell)),
        vae=AutoencoderKL.from_pretrained(parts, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts, subfolder="text_encoder"),
        tokenizer=_tokenizer("tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(parts, subfolder="text_encoder_3"),
        tokenizer_2=_tokenizer("tokenizer_3"),
    )
    return saved(pipeline, "flux")


def flux_config(tuning: Literal["lora", "full"] = "lora", **changes: object) -> FluxConfig:
    """The tiny pipeline as a [model] configuration, with 4 x 6 tokens of 2 x 2 latents."""
    return FluxConfig(
        path=str(flux_folder()),
        height=16,
        width=24,
        tuning=tuning,
        lora=LoraSettings(rank=4, alpha=8.0),
        max_sequence_length=8,
    ).model_copy(update=changes)


@functools.cache
def sana_folder(solver: bool = False) -> Path:
    """A saved random SANA pipeline: two blocks 32 wide, a DC-AE of factor 4, one layer of Gemma 2.

    Its scheduler is Euler's, or with `solver` DPM-Solver's, as SANA's checkpoints have it.
    """
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    solving: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    with seeded(2):
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            timestep_scale=0.5,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),  # type: ignore[arg-type]
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),  # type: ignore[arg-type]
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),  # type: ignore[arg-type]  # diffusers types its tuples as six long
            decoder_layers_per_block=(1, 1, 1),  # type: ignore[arg-type]
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        )
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
            )
        )
    pipeline = SanaPipeline(
        tokenizer=_tokenizer("tokenizer_3"),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**solving) if solver else FlowMatchEulerDiscreteScheduler(shift=3.0),  # type: ignore[arg-type]  # either kind will do
    )
    return saved(pipeline, "sana")


def sana_config(tuning: Literal["lora", "full"] = "lora", **changes: object) -> SanaConfig:
    """The tiny pipeline as a [model] configuration, with 8 x 16 latents; its pipeline wants multiples of 32 pixels."""
    return SanaConfig(
        path=str(sana_folder()),
        height=32,
        width=64,
        tuning=tuning,
        lora=LoraSettings(rank=4, alpha=8.0),
        max_sequence_length=8,
    ).model_copy(update=changes)


def _sd3_arguments(config: Sd3Config, latents_BCHW: torch.Tensor, guidance_scale: float) -> dict[str, Any]:
    return {
        "latents": latents_BCHW,
        "guidance_scale": guidance_scale,
        "max_sequence_length": config.max_sequence_length,
    }


def _flux_arguments(config: FluxConfig, latents_BCHW: torch.Tensor, guidance_scale: float) -> dict[str, Any]:
    chosen = {} if config.guidance is None else {"guidance_scale": config.guidance}
    return {
        **chosen,
        "latents": pack(latents_BCHW),
        "negative_prompt": "",
        "true_cfg_scale": guidance_scale,
        "max_sequence_length": config.max_sequence_length,
    }


def _flux_latents(config: FluxConfig, tokens_BLD: torch.Tensor) -> torch.Tensor:
    return unpack(tokens_BLD, config.height // 2, config.width // 2)


def _sana_arguments(config: SanaConfig, latents_BCHW: torch.Tensor, guidance_scale: float) -> dict[str, Any]:
    instruction = {} if config.complex_human_instruction else {"complex_human_instruction": None}
    return {
        **instruction,
        "latents": latents_BCHW,
        "guidance_scale": guidance_scale,
        "max_sequence_length": config.max_sequence_length,
        "use_resolution_binning": False,
    }


def _unet_arguments(config: Any, latents_BCHW: torch.Tensor, guidance_scale: float) -> dict[str, Any]:
    return {"latents": latents_BCHW, "guidance_scale": guidance_scale}


TINY_FAMILIES: dict[type, TinyFamily] = {
    Sd3Config: TinyFamily(sd3_config, _sd3_arguments),
    StableDiffusionConfig: TinyFamily(sd15_config, _unet_arguments),
    SdxlConfig: TinyFamily(sdxl_config, _unet_arguments),
    FluxConfig: TinyFamily(flux_config, _flux_arguments, _flux_latents),
    SanaConfig: TinyFamily(sana_config, _sana_arguments),
}


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(sd3_folder() / name))
