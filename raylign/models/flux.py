"""FLUX.1 (dev, schnell and tunes of them): any `FluxPipeline` directory of diffusers.

Latents stay (B, C, H, W) outside; the network reads them as tokens of 2 x 2, packed here. It has learned a guidance
scale as an input (`model.guidance`); classifier-free guidance on top (`sampler.guidance_scale`, diffusers'
`true_cfg_scale`) is a second matter and costs a doubled batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from raylign.errors import ModelError
from raylign.models.base import Conditioning
from raylign.models.flow_scheduler import resolution_schedule
from raylign.models.image_policy import Architecture, Geometry, ImageModelConfig, ImagePolicy
from raylign.models.pipeline_folder import PipelineForm, component_config
from raylign.models.schedule import FlowSchedule

FORM = PipelineForm(
    pipeline="FluxPipeline",
    network="transformer",
    network_class="FluxTransformer2DModel",
    components=("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
)
# Flow-GRPO's targets (scripts/train_flux.py): every attention projection, the single blocks' included, and both
# streams' feed-forward layers.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
GUIDANCE = 3.5
"""FluxPipeline's own default."""


class FluxConfig(ImageModelConfig):
    """A FLUX.1 model directory and how it is trained."""

    type: Literal["flux"] = "flux"
    guidance: float | None = Field(default=None, ge=0)
    """The guidance the network is told, an input of it; 3.5 when not given. FLUX.1-schnell takes none."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """T5 tokens per prompt; shorter is faster. FLUX.1-schnell knows 256."""


def _geometry(config: FluxConfig, network: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    shape = network["in_channels"] // 4, config.height // factor, config.width // factor
    return Geometry(shape, 2 * factor)


def _schedule(config: FluxConfig, folder: Path) -> FlowSchedule:
    geometry = _geometry(config, component_config(folder, FORM.network), component_config(folder, "vae"))
    _, height, width = geometry.latent_shape
    return resolution_schedule(folder, (height // 2) * (width // 2))


def _check(config: FluxConfig, network: dict[str, Any]) -> None:
    if config.guidance is not None and not network.get("guidance_embeds"):
        raise ModelError(
            f"model.guidance = {config.guidance}, but this network takes no guidance (guidance_embeds is false); "
            "remove the key"
        )


def _encode(pipeline: Any, config: FluxConfig, text: str, device: torch.device, with_negative: bool) -> Conditioning:
    def told(words: str) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(words, device=device, max_sequence_length=config.max_sequence_length)
        return Conditioning(embeds, pooled)

    prompt = told(text)
    negative = told("") if with_negative else None
    return Conditioning(prompt.prompt_embeds_PLD, prompt.pooled_PD, negative=negative)


def _velocity(
    policy: ImagePolicy, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """The network is fed sigma itself as a float and multiplies by 1000; in bf16 it rounds it to bf16 on the way."""
    network, device = policy.network, state_BCHW.device
    dtype, (_, height, width) = network.dtype, policy.latent_shape
    guidance = None
    if network.config.guidance_embeds:
        told = GUIDANCE if policy.config.guidance is None else policy.config.guidance
        guidance = torch.full((len(state_BCHW),), told, device=device)
    tokens_BLD = network(
        hidden_states=pack(state_BCHW).to(dtype),
        timestep=sigma_B.float(),
        guidance=guidance,
        pooled_projections=conditioning.need_pooled().to(dtype),
        encoder_hidden_states=conditioning.prompt_embeds_PLD.to(dtype),
        txt_ids=torch.zeros(conditioning.prompt_embeds_PLD.shape[1], 3, device=device),
        img_ids=token_places(height, width).to(device),
        return_dict=False,
    )[0]
    return unpack(tokens_BLD, height, width)


def pack(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, D) of 2 x 2 places, L = H/2 * W/2 row by row; in each, D = 4 C: channel, then row, then column."""
    size, channels, height, width = latents_BCHW.shape
    folded = latents_BCHW.reshape(size, channels, height // 2, 2, width // 2, 2)
    return folded.permute(0, 2, 4, 1, 3, 5).reshape(size, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens_BLD: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The latents (B, C, H, W) that `pack` made these tokens of."""
    size, _, token_width = tokens_BLD.shape
    folded = tokens_BLD.reshape(size, height // 2, width // 2, token_width // 4, 2, 2)
    return folded.permute(0, 3, 1, 4, 2, 5).reshape(size, token_width // 4, height, width)


def token_places(height: int, width: int) -> torch.Tensor:
    """Where each token of an H x W latent lies, for the rotary embedding: (L, 3), columns 0, row, column."""
    rows, columns = (torch.arange(size // 2, dtype=torch.float32) for size in (height, width))
    return torch.cartesian_prod(torch.zeros(1), rows, columns)


# The VAE stays in fp32, as in Flow-GRPO: a reward looks at its pictures, and it is under 1 % of the weights.
FLUX = Architecture(
    FORM, LORA_TARGETS, _geometry, _schedule, _encode, _velocity, fp32_components=("vae",), check=_check
)
