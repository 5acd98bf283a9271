"""Raylign's sample is diffusers' sample: the same noise, prompt and steps give the same latents and the same picture.

diffusers' side is the pipeline's own call with the scheduler of its directory, nothing of it replaced; Raylign's is
the rollout engine's loop. One step of either is one forward of the network (two with guidance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from raylign.keys import normal, sample_generators
from raylign.models import DenoisingPolicy, load_policy
from raylign.samplers import make_sampler
from raylign.samplers.dpm_solver import DpmSolverConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import LatentTrajectory, Needs, SampleKey
from rollout.images import SamplerSetup, denoise
from tests.tiny_image_families import (
    TINY_FAMILIES,
    draw_with_diffusers,
    flux_config,
    flux_folder,
    load_with_diffusers,
    sana_config,
    sana_folder,
)

PROMPT = "a cat 7"
KEYS = [SampleKey(3, "p", 0, 0)]
# What else a family's configuration can say that changes the sample.
VARIANTS: dict[str, Callable[[], Any]] = {
    "flux with other guidance": lambda: flux_config(guidance=1.0),
    "flux without guidance or dynamic shift": lambda: flux_config(path=str(flux_folder(guidance_embeds=False))),
    "flux of another size": lambda: flux_config(height=32, width=12),
    "sana without the instruction": lambda: sana_config(complex_human_instruction=False),
}
CONFIGS = {family.__name__: tiny.config for family, tiny in TINY_FAMILIES.items()} | VARIANTS
EVERY = pytest.mark.parametrize("name", CONFIGS)


def setting(name: str) -> tuple[Any, DenoisingPolicy]:
    config = CONFIGS[name]()
    return config, load_policy(config.model_copy(update={"tuning": "full"}), "rollout")


def noise_of(policy: DenoisingPolicy) -> torch.Tensor:
    return normal(sample_generators(KEYS, "latent"), policy.latent_shape)


def ours(policy: DenoisingPolicy, num_steps: int, guidance_scale: float = 1.0) -> LatentTrajectory:
    sampler = make_sampler(EulerOdeConfig(num_steps=num_steps), policy.schedule)
    told = policy.encode(PROMPT, with_negative=guidance_scale > 1)
    with torch.no_grad():
        return denoise(policy, SamplerSetup(sampler, guidance_scale, Needs.FINAL), told, KEYS)


@EVERY
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("num_steps", [1, 6])
def test_latents_are_those_of_the_pipeline(name: str, num_steps: int, guidance_scale: float) -> None:
    config, policy = setting(name)
    noise = noise_of(policy)
    theirs = draw_with_diffusers(
        load_with_diffusers(config.path), config, PROMPT, noise, num_steps, guidance_scale=guidance_scale
    )
    drawn = ours(policy, num_steps, guidance_scale).final_GCHW
    torch.testing.assert_close(drawn, theirs, rtol=1e-5, atol=1e-5)
    assert (drawn - noise).abs().max() > 1e-3  # the network did something


@EVERY
def test_pictures_are_those_of_the_pipeline(name: str) -> None:
    config, policy = setting(name)
    theirs = draw_with_diffusers(
        load_with_diffusers(config.path), config, PROMPT, noise_of(policy), 3, output_type="np"
    )
    pictures = policy.decode(ours(policy, 3).final_GCHW)
    # Bytes here, floats there: half a grey level, and the rounding of fp32.
    assert np.abs(pictures / 255 - theirs).max() < 0.51 / 255
    assert pictures.std() > 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under NumPy 2
@pytest.mark.parametrize("num_steps", [2, 3, 20])
def test_the_second_order_solver_is_that_of_sanas_scheduler(num_steps: int) -> None:
    # The network is asked here, not by the pipeline: diffusers' solver truncates 1000 sigma to an integer for it.
    from diffusers import DPMSolverMultistepScheduler

    policy = load_policy(sana_config("full", path=str(sana_folder(solver=True))), "rollout")
    sampler = make_sampler(DpmSolverConfig(num_steps=num_steps), policy.schedule)
    told = policy.encode(PROMPT, with_negative=False)
    scheduler: Any = DPMSolverMultistepScheduler.from_pretrained(str(sana_folder(solver=True)), subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    with torch.no_grad():
        trajectory = denoise(policy, SamplerSetup(sampler, 1.0, Needs.FINAL | Needs.STEPS), told, KEYS)
        assert trajectory.states_GS1CHW is not None
        state = trajectory.states_GS1CHW[:, 0]
        for step, timestep in enumerate(scheduler.timesteps):
            velocity = policy.predict(state, scheduler.sigmas[step : step + 1], told)
            state = scheduler.step(velocity, timestep, state, return_dict=False)[0]
            torch.testing.assert_close(trajectory.states_GS1CHW[:, step + 1], state, rtol=1e-5, atol=1e-5)
