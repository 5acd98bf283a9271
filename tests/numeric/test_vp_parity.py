"""Stable Diffusion in flow time is diffusers' DDIM: steps of every stochasticity, one forward, and whole samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raylign.keys import normal, sample_generators
from raylign.models import load_policy
from raylign.models.base import DenoisingPolicy, guided_velocity
from raylign.models.schedule import initial_scale
from raylign.models.vp_schedule import read_vp_schedule
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.types import Needs, SampleKey
from rollout.engine import SamplerSetup
from rollout.images import denoise
from tests.tiny_stable_diffusion import (
    PUBLISHED_SCHEDULE,
    ZERO_SNR,
    ddim,
    sd15_config,
    sd15_folder,
    sdxl_config,
    sdxl_folder,
)

NUM_STEPS = 5
PROMPT = "glow 7"
KEYS = [SampleKey(3, "p", 0, 0)]
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Path], str]] = {
    "sd15": (sd15_config, sd15_folder, "StableDiffusionPipeline"),
    "sd2, v-prediction": (
        lambda: sd15_config(path=str(sd15_folder(v_prediction=True))),
        lambda: sd15_folder(v_prediction=True),
        "StableDiffusionPipeline",
    ),
    "sdxl": (sdxl_config, sdxl_folder, "StableDiffusionXLPipeline"),
}
ROWS = pytest.mark.parametrize("row", FAMILIES)


def policy_of(row: str) -> DenoisingPolicy:
    return load_policy(FAMILIES[row][0](), "rollout")


def diffusers_pipeline(row: str) -> Any:
    import diffusers

    _, folder, name = FAMILIES[row]
    pipeline = getattr(diffusers, name).from_pretrained(str(folder()), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_is_ddims_step(eta: float, prediction: str) -> None:
    config = PUBLISHED_SCHEDULE if prediction == "epsilon" else ZERO_SNR
    theirs = ddim(config)
    theirs.set_timesteps(NUM_STEPS)
    schedule = read_vp_schedule(config)
    ours = make_sampler(GddimConfig(num_steps=NUM_STEPS, eta=eta), schedule)
    draws = torch.Generator().manual_seed(0)
    for step, timestep in enumerate(theirs.timesteps):
        network, answer, noise = torch.randn(3, 2, 4, 3, 3, generator=draws, dtype=torch.float64)
        level = ours.sigmas_S1[step].double()
        if float(level) == 1.0:
            continue  # DDIM's own formula is 0 / 0 there
        state = network * torch.hypot(1 - level, level)
        velocity = schedule.velocity(answer, network, level.expand(2))
        found = ours.transition(velocity, state, step).sample(noise)
        following = ours.sigmas_S1[step + 1].double()
        expected = theirs.step(answer, timestep, network, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(
            found.double() / torch.hypot(1 - following, following), expected, rtol=1e-5, atol=2e-5
        )


@ROWS
def test_one_forward_is_the_networks(row: str) -> None:
    policy, pipeline = policy_of(row), diffusers_pipeline(row)
    abar = pipeline.scheduler.alphas_cumprod[501].double()
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    level = noise / (signal + noise)
    network = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    told = policy.encode(PROMPT, False)
    added: dict[str, torch.Tensor] | None = None
    if told.pooled_PD is not None:
        # Original size, crop and target size of a 16 x 16 picture.
        added = {"text_embeds": told.pooled_PD, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        state = (network / (signal + noise)).float()
        found = policy.predict(state, level.float().reshape(1), told)
        answer = pipeline.unet(network, 501, told.prompt_embeds_PLD, added_cond_kwargs=added).sample
    if row == "sd2, v-prediction":
        expected = (signal + noise) * answer + (noise - signal) * network
    else:
        expected = answer - (network - noise * answer) / signal
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@ROWS
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_whole_sample_is_diffusers_own(row: str, guidance_scale: float) -> None:
    policy, pipeline = policy_of(row), diffusers_pipeline(row)
    sampler = make_sampler(EulerOdeConfig(num_steps=NUM_STEPS, guidance_scale=guidance_scale), policy.schedule)
    told = policy.encode(PROMPT, with_negative=guidance_scale > 1)
    with torch.no_grad():
        ours = denoise(policy, SamplerSetup(sampler, guidance_scale, Needs.FINAL), told, KEYS).final_GCHW
    theirs = pipeline(
        PROMPT,
        height=16,
        width=16,
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        latents=normal(sample_generators(KEYS, "latent"), policy.latent_shape),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@ROWS
def test_latents_become_diffusers_pictures(row: str) -> None:
    policy, pipeline = policy_of(row), diffusers_pipeline(row)
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    theirs = (pipeline.image_processor.postprocess(decoded, output_type="np") * 255).round()
    assert (policy.decode(latents) == theirs).all()


def test_ancestral_samples_of_the_two_libraries_differ_only_by_their_noise() -> None:
    """The walk of the engine with eta 1 is DDIM's with the same step noise: states, not one step alone."""
    policy, pipeline = policy_of("sd15"), diffusers_pipeline("sd15")
    sampler = make_sampler(GddimConfig(num_steps=NUM_STEPS, eta=1.0, guidance_scale=5.0), policy.schedule)
    told = policy.encode(PROMPT, with_negative=True)
    with torch.no_grad():
        walk = denoise(policy, SamplerSetup(sampler, 5.0, Needs.STEPS), told, KEYS)
    assert walk.states_GS1CHW is not None
    scheduler, states = pipeline.scheduler, walk.states_GS1CHW[0]
    scheduler.set_timesteps(NUM_STEPS)
    step_noise = sample_generators(KEYS, "sde")
    state = states[:1] / initial_scale(sampler.sigmas_S1)
    for timestep in scheduler.timesteps:
        noise = normal(step_noise, policy.latent_shape)
        with torch.no_grad():
            both = told.need_negative().prompt_embeds_PLD, told.prompt_embeds_PLD
            without, answer = (pipeline.unet(state, timestep, embeds).sample for embeds in both)
        guided = without + 5.0 * (answer - without)
        state = scheduler.step(guided, timestep, state, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(walk.final_GCHW, state, rtol=1e-5, atol=1e-5 * float(state.abs().max()))


def test_guidance_of_noise_predictions_is_guidance_of_velocities() -> None:
    """The change of variables is linear with the state's coefficient alike on both sides, so scales mean the same."""
    policy = policy_of("sd15")
    told = policy.encode(PROMPT, with_negative=True)
    state = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(4))
    level = torch.tensor([0.6])
    with torch.no_grad():
        plain, without = policy.predict(state, level, told), policy.predict(state, level, told.need_negative())
        guided = guided_velocity(policy, state, level, told, 5.0)
    eps = [state + 0.4 * velocity for velocity in (plain, without, guided)]
    torch.testing.assert_close(eps[2], eps[1] + 5.0 * (eps[0] - eps[1]), rtol=1e-5, atol=1e-5)
