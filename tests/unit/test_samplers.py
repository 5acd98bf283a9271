"""Schedules, transitions and sampler configurations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.distributions import Normal

from raylign.errors import ShapeError
from raylign.samplers import SamplerConfig, flow_sigmas, make_sampler
from raylign.samplers.base import Transition
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig


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
    assert torch.equal(make_sampler(EulerOdeConfig(num_steps=5), 3.0).sigmas_S1, flow_sigmas(5, 3.0))
    assert torch.equal(make_sampler(EulerOdeConfig(num_steps=5, shift=1.0), 3.0).sigmas_S1, flow_sigmas(5, 1.0))


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
    calm, wild = (make_sampler(FlowSdeConfig(noise_level=level), 3.0) for level in (0.3, 1.2))
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
    ],
)
def test_a_sampler_configuration_that_means_nothing_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SamplerConfig).validate_python(bad)
