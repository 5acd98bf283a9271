"""Image samplers on data whose velocity is known exactly: do they arrive at the data as steps grow?

Gaussian data make every step linear, so that variances are followed exactly, without drawing. A mixture of two
Gaussians is not linear and is drawn from, with a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from raylign.samplers import FlowSchedule, Past, Sampler, make_sampler, num_steps
from raylign.samplers.base import ImageSamplerConfig
from raylign.samplers.cps import CpsConfig
from raylign.samplers.dance_sde import DanceSdeConfig
from raylign.samplers.dpm_solver import DpmSolverConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.sa_solver import SaSolverConfig

DATA_STD = 0.5
SHIFT = 3.0
CONVERGENT: list[ImageSamplerConfig] = [
    EulerOdeConfig(),
    DpmSolverConfig(),
    FlowSdeConfig(),
    DanceSdeConfig(),
    *(GddimConfig(eta=eta) for eta in (0.0, 0.5, 1.0, 1.5)),
    SaSolverConfig(),
    SaSolverConfig(tau=1.0, tau_low=0.0, tau_high=1.0),
]


def name(config: ImageSamplerConfig) -> str:
    changed = config.model_dump(exclude_defaults=True)
    return "-".join([type(config).__name__, *map(str, changed.values())])


def with_steps(config: ImageSamplerConfig, steps: int, shift: float = SHIFT) -> Sampler:
    return make_sampler(config.model_copy(update={"num_steps": steps}), FlowSchedule(shift))


def walk(
    sampler: Sampler,
    state: torch.Tensor,
    velocity_at: Callable[[torch.Tensor, float], torch.Tensor],
    add: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """A whole run; `add(std_B, step)` is the noise of a step."""
    past: list[Past] = []
    for step, sigma in enumerate(sampler.sigmas_S1[:-1].tolist()):
        velocity = velocity_at(state, sigma)
        transition = sampler.transition(velocity, state, step, past)
        past = [*past, Past(state, velocity)][-sampler.config.history :] if sampler.config.history else []
        state = transition.mean_BCHW + add(transition.std_B, step)
    return state


def relative_std(sampler: Sampler) -> float:
    """Deviation of the last state over DATA_STD, exactly.

    Each batch item stands for one independent unit draw, the first state or a step's noise, and holds the state's
    coefficient of it; all steps are linear maps of the coefficients.
    """
    count = num_steps(sampler) + 1

    def velocity_at(state: torch.Tensor, sigma: float) -> torch.Tensor:
        marginal = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
        return state * (sigma - (1 - sigma) * DATA_STD**2) / marginal

    def add(std_B: torch.Tensor, step: int) -> torch.Tensor:
        noise = torch.zeros(count, 1, 1, 1)
        noise[step + 1] = std_B[0]
        return noise

    start = torch.zeros(count, 1, 1, 1)
    start[0] = 1.0
    return float(walk(sampler, start, velocity_at, add).norm()) / DATA_STD


@pytest.mark.parametrize("config", CONVERGENT, ids=name)
def test_with_many_steps_samples_spread_like_gaussian_data(config: ImageSamplerConfig) -> None:
    # First order: ten times the steps, about a tenth of the error. Flow-SDE's falls slower towards the end, since its
    # first steps inject a noise of fixed size however short they are.
    errors = [abs(relative_std(with_steps(config, steps)) - 1) for steps in (10, 100, 1000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < errors[1] / 5
    assert errors[2] < 0.016


@pytest.mark.parametrize(("eta", "published"), [(0.0, 0.997), (1.0, 0.992), (1.5, 0.985), (2.0, 0.973), (3.0, 0.938)])
def test_gddim_has_the_derived_spread_at_1000_steps(eta: float, published: float) -> None:
    assert relative_std(with_steps(GddimConfig(eta=eta), 1000)) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("config", [GddimConfig(eta=0.5), FlowSdeConfig(), SaSolverConfig()], ids=name)
def test_it_holds_on_an_unshifted_schedule_too(config: ImageSamplerConfig) -> None:
    assert relative_std(with_steps(config, 400, shift=1.0)) == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("config", [FlowSdeConfig(), DanceSdeConfig(), GddimConfig(), DpmSolverConfig()], ids=name)
def test_it_holds_on_levels_that_start_short_of_noise(config: ImageSamplerConfig, shift: float) -> None:
    # SANA's checkpoints walk these, from .9997 or .999: almost 1 is as singular as 1.
    few, many = (
        make_sampler(config.model_copy(update={"num_steps": steps}), FlowSchedule(shift, "solver"))
        for steps in (10, 200)
    )
    assert 0.6 < relative_std(few) < 1.6
    assert relative_std(many) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("noise_level", [0.1, 0.8, 1.0])
def test_cps_never_holds_more_noise_than_the_level_and_has_no_limit(noise_level: float) -> None:
    config = CpsConfig(noise_level=noise_level)
    for steps in (10, 1000):
        sampler = with_steps(config, steps)
        zero = torch.zeros(1, 1, 1, 1)
        for step, following in enumerate(sampler.sigmas_S1[1:].tolist()):
            std = float(sampler.transition(zero, zero, step).std_B)
            assert std == pytest.approx(following * math.sin(noise_level * math.pi / 2), rel=1e-6)
            assert std <= following
    if noise_level == 0.8:
        assert relative_std(with_steps(config, 1000)) == pytest.approx(0.80, abs=0.01)


PARTICLES, STEPS = 8000, 300
WEIGHTS, MEANS, STDS = torch.tensor([0.3, 0.7]), torch.tensor([-1.2, 0.8]), torch.tensor([0.25, 0.35])


def mixture_velocity(state: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[eps - x0 | x] for data of the mixture."""
    means, variances = (1 - sigma) * MEANS, ((1 - sigma) * STDS) ** 2 + sigma**2
    distance = state - means  # the components lie along the last axis
    belongs = torch.softmax(torch.log(WEIGHTS) - 0.5 * torch.log(variances) - distance**2 / (2 * variances), dim=-1)
    each = (sigma - (1 - sigma) * STDS**2) / variances * distance - MEANS
    return (belongs * each).sum(dim=-1, keepdim=True)


def distance_to_mixture(sampler: Sampler) -> float:
    """The largest gap between the samples' and the data's cumulative distributions (Kolmogorov-Smirnov)."""
    draw = torch.Generator().manual_seed(5)
    start = torch.randn(PARTICLES, 1, 1, 1, generator=draw)

    def add(std_B: torch.Tensor, step: int) -> torch.Tensor:
        return std_B.view(-1, 1, 1, 1) * torch.randn(PARTICLES, 1, 1, 1, generator=draw)

    samples = walk(sampler, start, mixture_velocity, add).flatten().sort().values
    assert torch.isfinite(samples).all()
    exact = (WEIGHTS * torch.special.ndtr((samples[:, None] - MEANS) / STDS)).sum(dim=1)
    ranks = torch.arange(1, PARTICLES + 1) / PARTICLES
    return float((exact - ranks).abs().max())


@pytest.mark.parametrize("config", CONVERGENT, ids=name)
def test_with_many_steps_samples_are_those_of_a_mixture(config: ImageSamplerConfig) -> None:
    # Draws of the mixture itself stay below 1.95 / sqrt(8000) = .022 in 999 cases of 1000; .008 are left for steps.
    assert distance_to_mixture(with_steps(config, STEPS)) < 0.03


@pytest.mark.parametrize("config", [EulerOdeConfig(), FlowSdeConfig(), GddimConfig(eta=1.5)], ids=name)
def test_few_steps_are_told_apart_from_the_mixture(config: ImageSamplerConfig) -> None:
    assert distance_to_mixture(with_steps(config, 8)) > 0.05
