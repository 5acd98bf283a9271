"""Samplers against diffusers, against published numbers, and against a distribution known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raylign.samplers import IMAGE_SAMPLERS, Sampler, flow_sigmas
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from tests.tiny_models import euler, flow_sde

DATA_STD = 0.5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 6, 10, 25, 40])
def test_noise_levels_are_those_of_diffusers(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(flow_sigmas(num_steps, shift), scheduler.sigmas, rtol=0, atol=1e-7)


def test_the_levels_of_stable_diffusion_3_5() -> None:
    published = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    assert flow_sigmas(10, 3.0).tolist() == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_euler_step_is_that_of_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6)
    sampler = euler(6, shift)
    theirs: Any = torch.randn(2, 4, 4, 4)
    ours = theirs
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(ours * (step + 1))
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = sampler.transition(velocity, ours, step).mean_BCHW
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# Published for a = .7 over the ten levels above: s_t, injected std, std over the next level.
FLOW_SDE = [
    (3.51, 0.700, 0.73),
    (3.44, 0.743, 0.81),
    (2.27, 0.536, 0.63),
    (1.72, 0.446, 0.56),
    (1.36, 0.392, 0.55),
    (1.09, 0.353, 0.59),
    (0.861, 0.319, 0.69),
    (0.652, 0.282, 1.01),
    (0.434, 0.225, 25.2),
    (0.066, 0.006, None),
]


@pytest.mark.parametrize("step", range(10))
def test_flow_sde_injects_the_published_noise(step: int) -> None:
    sampler = flow_sde(10)
    sigma, following = sampler.sigmas_S1[step : step + 2].tolist()
    std = float(sampler.transition(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), step).std_B)
    noise_scale, published_std, relative = FLOW_SDE[step]
    assert std / math.sqrt(sigma - following) == pytest.approx(noise_scale, rel=4e-3, abs=5e-4)
    assert std == pytest.approx(published_std, abs=6e-4)
    if relative is not None:
        assert std / following == pytest.approx(relative, rel=1e-2)


def test_the_flow_sde_mean_of_one_pixel() -> None:
    # Two levels .5 -> .25 with a = 1: s² = .5/.5 = 1, dt = -.25;
    # mean = x (1 - .25) + v (1 + .5) (-.25) with s²/(2 sigma) = 1 and s² (1 - sigma)/(2 sigma) = .5.
    sampler = FlowSde(FlowSdeConfig(noise_level=1.0), torch.tensor([0.5, 0.25, 0.0]))
    transition = sampler.transition(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0), 0)
    assert transition.mean_BCHW.item() == pytest.approx(4 * 0.75 - 2 * 1.5 * 0.25)
    assert transition.std_B.item() == pytest.approx(0.5)


def final_std(sampler: Sampler) -> float:
    """Standard deviation of the chain's last state when data are N(0, DATA_STD²) and the velocity is exact.

    Then v = E[eps - x0 | x_t] is linear in x_t, every step is linear, and variances can be followed exactly.
    """
    variance = 1.0
    for step, sigma in enumerate(sampler.sigmas_S1[:-1].double().tolist()):
        marginal = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
        slope = (sigma - (1 - sigma) * DATA_STD**2) / marginal
        unit = torch.ones(1, 1, 1, 1)
        transition = sampler.transition(slope * unit, unit, step)
        variance = float(transition.mean_BCHW) ** 2 * variance + float(transition.std_B) ** 2
    return math.sqrt(variance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("config_cls", "cls"), IMAGE_SAMPLERS.items())
def test_with_many_steps_samples_spread_like_the_data(config_cls: type, cls: type, shift: float) -> None:
    # Not to zero for Flow-SDE: its first steps inject a noise of fixed size however short they are.
    few, many = (
        abs(final_std(cls(config_cls(num_steps=num_steps), flow_sigmas(num_steps, shift))) / DATA_STD - 1)
        for num_steps in (10, 1000)
    )
    assert many < few / 10
    assert many < 0.005
