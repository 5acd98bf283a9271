"""Schedules, transitions and sampler configurations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.distributions import Normal

from raylign.config import parse_config
from raylign.errors import ConfigError, ShapeError
from raylign.samplers import IMAGE_SAMPLERS, FlowSchedule, SamplerConfig, flow_sigmas, make_sampler
from raylign.samplers.base import Transition, halve_last_level
from raylign.samplers.cps import CpsConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.sa_solver import SaSolverConfig


@given(st.integers(1, 60), st.floats(0.2, 8.0))
def test_levels_fall_from_1_to_0(num_steps: int, shift: float) -> None:
    sigmas = flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float32
    assert float(sigmas[0]) == pytest.approx(1.0)
    assert float(sigmas[-1]) == 0.0
    assert (sigmas.diff() < 0).all()


def test_a_larger_shift_spends_more_steps_on_noise() -> None:
    assert (flow_sigmas(10, 3.0)[1:-1] > flow_sigmas(10, 1.0)[1:-1]).all()


def test_a_sampler_takes_the_models_shift_unless_it_has_its_own() -> None:
    assert torch.equal(make_sampler(EulerOdeConfig(num_steps=5), FlowSchedule(3.0)).sigmas_S1, flow_sigmas(5, 3.0))
    assert torch.equal(
        make_sampler(EulerOdeConfig(num_steps=5, shift=1.0), FlowSchedule(3.0)).sigmas_S1, flow_sigmas(5, 1.0)
    )


def test_the_log_density_is_the_gaussians_averaged_over_the_latent() -> None:
    mean, following = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    std_B = torch.tensor([0.3, 2.0])
    expected = Normal(mean, std_B.view(-1, 1, 1, 1)).log_prob(following).mean(dim=(1, 2, 3))
    torch.testing.assert_close(Transition(mean, std_B).logprob(following), expected)


def test_the_log_density_of_half_precision_states_is_computed_in_fp32() -> None:
    mean = torch.randn(1, 3, 4, 4)
    following = (mean + 0.1).to(torch.bfloat16)
    logprob = Transition(mean, torch.ones(1)).logprob(following)
    assert logprob.dtype == torch.float32
    assert torch.equal(logprob, Transition(mean, torch.ones(1)).logprob(following.float()))


def test_a_sample_without_noise_is_the_mean() -> None:
    transition = Transition(torch.randn(2, 1, 2, 2), torch.tensor([0.5, 1.5]))
    assert torch.equal(transition.sample(torch.zeros(2, 1, 2, 2)), transition.mean_BCHW)
    spread = transition.sample(torch.ones(2, 1, 2, 2)) - transition.mean_BCHW
    torch.testing.assert_close(spread[:, 0, 0, 0], torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_a_point_mass_has_no_density(std: float) -> None:
    with pytest.raises(ShapeError, match="deterministic step"):
        Transition(torch.zeros(2, 1, 2, 2), torch.tensor([1.0, std])).logprob(torch.zeros(2, 1, 2, 2))


def test_a_state_of_the_wrong_rank_is_refused() -> None:
    with pytest.raises(ShapeError, match="next_BCHW"):
        Transition(torch.zeros(2, 1, 2, 2), torch.ones(2)).logprob(torch.zeros(2, 4))


def test_a_larger_noise_level_is_noisier_step_by_step() -> None:
    calm, wild = (make_sampler(FlowSdeConfig(noise_level=level), FlowSchedule(3.0)) for level in (0.3, 1.2))
    zeros = torch.zeros(1, 1, 1, 1)
    for step in range(10):
        ratio = wild.transition(zeros, zeros, step).std_B / calm.transition(zeros, zeros, step).std_B
        assert float(ratio) == pytest.approx(4.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "euler_ode", "num_steps": 0},
        {"type": "flow_sde", "num_steps": 1},
        {"type": "flow_sde", "noise_level": 0},
        {"type": "euler_ode", "noise_level": 0.5},
        {"type": "euler_ode", "guidance_scale": 0.5},
        {"type": "euler_ode", "shift": 0},
        {"type": "dpm"},
        {"type": "dance_sde", "eta": 0},
        {"type": "cps", "noise_level": 1.1},
        {"type": "cps", "density": "log"},
        {"type": "gddim", "eta": -0.1},
        {"type": "gddim", "eta_end": -1},
        {"type": "sa_solver", "tau": -1},
        {"type": "sa_solver", "window": {}},
        {"type": "dpm_solver", "shared_noise": True},
        {"type": "flow_sde", "window": {"size": 10}},
    ],
)
def test_a_sampler_configuration_that_means_nothing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SamplerConfig).validate_python(bad)


def test_negative_stochasticity_is_refused_with_what_to_choose_instead() -> None:
    with pytest.raises(ConfigError, match=r"eta: .*cannot be negative; 0 is the deterministic ODE.*got -0\.5"):
        parse_config(GddimConfig, {"eta": -0.5}, "the test")


def test_the_ode_as_gddim_has_no_density_and_no_stochastic_step() -> None:
    config = GddimConfig(eta=0.0)
    assert not config.has_density
    sampler = make_sampler(config, FlowSchedule(3.0))
    assert not any(sampler.stochastic_S)
    with pytest.raises(ShapeError, match="deterministic step"):
        sampler.transition(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 3).logprob(torch.ones(1, 1, 2, 2))


def test_decaying_stochasticity_falls_in_a_line_and_need_not_start_or_end_above_0() -> None:
    falling = make_sampler(GddimConfig(num_steps=5, eta=1.0, eta_end=0.0), FlowSchedule(3.0))
    rising = make_sampler(GddimConfig(num_steps=5, eta=0.0, eta_end=1.0), FlowSchedule(3.0))
    assert falling.stochastic_S == (True, True, True, True, False)
    assert rising.stochastic_S == (False, True, True, True, False)
    assert rising.config.has_density
    # The third of five steps has half of either, so the two agree there and nowhere before.
    stds = [
        [float(one.transition(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), step).std_B) for step in range(5)]
        for one in (falling, rising)
    ]
    half = make_sampler(GddimConfig(num_steps=5, eta=0.5), FlowSchedule(3.0))
    expected = float(half.transition(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 2).std_B)
    assert stds[0][2] == pytest.approx(stds[1][2])
    assert stds[0][2] == pytest.approx(expected)
    assert stds[0][1] > stds[1][1]
    assert stds[0][3] < stds[1][3]


@pytest.mark.parametrize("eta", [1e-200, 1e-4, 0.5, 1.0, 3.0, 30.0])
def test_no_stochasticity_gives_nan_or_more_noise_than_the_level_holds(eta: float) -> None:
    sampler = make_sampler(GddimConfig(eta=eta), FlowSchedule(3.0))
    for step, following in enumerate(sampler.sigmas_S1[1:].tolist()):
        transition = sampler.transition(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), step)
        assert torch.isfinite(transition.mean_BCHW).all()
        assert 0 <= float(transition.std_B) <= following * (1 + 1e-6)
        assert sampler.stochastic_S[step] == (float(transition.std_B) > 0)


@pytest.mark.parametrize("start", [1.0, 1 - 6e-8])
@pytest.mark.parametrize("config", [FlowSdeConfig(num_steps=4), GddimConfig(num_steps=4, eta=0.1)], ids=str)
def test_a_first_level_that_misses_1_by_rounding_is_1(config: FlowSdeConfig | GddimConfig, start: float) -> None:
    levels = flow_sigmas(4, 3.0)
    levels[0] = start
    state, velocity = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), -0.4)
    transition = IMAGE_SAMPLERS[type(config)](config, levels).transition(velocity, state, 0)
    exact = make_sampler(config, FlowSchedule(3.0)).transition(velocity, state, 0)
    torch.testing.assert_close(transition.mean_BCHW, exact.mean_BCHW, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transition.std_B, exact.std_B, rtol=1e-5, atol=1e-5)


def test_the_published_and_the_true_density_of_cps_differ_by_scale_and_constant() -> None:
    published, true = (
        make_sampler(CpsConfig(density=density), FlowSchedule(3.0)).transition(
            torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 4
        )
        for density in ("squared", "gaussian")
    )
    assert torch.equal(published.std_B, true.std_B)
    near, far = torch.full((1, 1, 2, 2), 0.1), torch.full((1, 1, 2, 2), 0.4)
    assert float(published.logprob(near) - published.logprob(far)) == pytest.approx(0.4**2 - 0.1**2)
    difference = float(true.logprob(near) - true.logprob(far))
    assert difference == pytest.approx((0.4**2 - 0.1**2) / (2 * float(true.std_B) ** 2), rel=1e-4)


def test_sa_solver_is_stochastic_between_its_levels_only() -> None:
    sampler = make_sampler(SaSolverConfig(), FlowSchedule(3.0))
    for following, stochastic in zip(sampler.sigmas_S1[1:].tolist(), sampler.stochastic_S, strict=True):
        assert stochastic == (0.3 <= following <= 0.9)
    assert 0 < sum(sampler.stochastic_S) < 14
    assert not sampler.config.has_density
    assert not any(make_sampler(SaSolverConfig(tau=0.0), FlowSchedule(3.0)).stochastic_S)


def test_the_last_level_is_halved_only_where_it_is_lower_and_in_a_copy() -> None:
    levels = torch.tensor([1.0, 0.5, 0.01, 0.0])
    assert halve_last_level(levels).tolist() == [1.0, 0.5, 0.25, 0.0]
    assert float(levels[2]) == pytest.approx(0.01)
    # Stable Diffusion 1.5 ends short of 0, and just as steeply.
    assert halve_last_level(torch.tensor([0.9, 0.5, 0.0625, 0.03125])).tolist()[1:] == [0.5, 0.25, 0.03125]
    for untouched in ([1.0, 0.5, 0.4, 0.0], [0.9, 0.5, 0.25, 0.02], [1.0, 0.01, 0.0], [1.0, 0.0]):
        assert torch.equal(halve_last_level(torch.tensor(untouched)), torch.tensor(untouched))
    sampler = make_sampler(SaSolverConfig(), FlowSchedule(3.0))
    assert float(sampler.sigmas_S1[-2]) == pytest.approx(float(sampler.sigmas_S1[-3]) / 2)
