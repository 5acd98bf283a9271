"""What the U-Net families of Stable Diffusion share: adapted modules, sizes, noise levels, and asking the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from raylign.models.base import Conditioning
from raylign.models.image_policy import Geometry, ImageModelConfig, ImagePolicy
from raylign.models.pipeline_folder import component_config
from raylign.models.vp_schedule import VpSchedule, read_vp_schedule

# The targets of DDPO's published trainer and of diffusers' text-to-image scripts: self and cross attention.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def unet_geometry(config: ImageModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> Geometry:
    """See Architecture. The network pads odd sizes by itself, so the VAE alone sets the multiple."""
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Geometry((network["in_channels"], config.height // factor, config.width // factor), factor)


def unet_schedule(config: ImageModelConfig, folder: Path) -> VpSchedule:
    """See Architecture."""
    return read_vp_schedule(component_config(folder, "scheduler"))


def unet_velocity(
    policy: ImagePolicy,
    state_BCHW: torch.Tensor,
    sigma_B: torch.Tensor,
    conditioning: Conditioning,
    added: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """v = eps - x0 of flow states, fp32; see `vp_schedule`. added: what the network is told beside the text states."""
    schedule, dtype = cast("VpSchedule", policy.schedule), policy.network.dtype
    network_BCHW = schedule.network_state(state_BCHW.float(), sigma_B)
    answer = policy.network(
        network_BCHW.to(dtype),
        schedule.timestep_of(sigma_B),
        encoder_hidden_states=conditioning.prompt_embeds_PLD.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return schedule.velocity(answer.float(), network_BCHW, sigma_B)
