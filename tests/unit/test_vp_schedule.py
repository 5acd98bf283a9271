"""Noise levels of Stable Diffusion in flow time: diffusers' own, and the algebra of velocities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raylign.errors import ConfigError, ModelError
from raylign.models.schedule import final_scale, initial_scale
from raylign.models.vp_schedule import VpSchedule, read_vp_schedule
from raylign.samplers import IMAGE_SAMPLERS, make_sampler
from raylign.samplers.base import Past
from tests.tiny_stable_diffusion import PUBLISHED_SCHEDULE, ZERO_SNR, ddim

NAME = {"_class_name": "DDIMScheduler"}
COSINE = NAME | {"beta_schedule": "squaredcos_cap_v2"}
LINEAR = NAME | {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
TRAINED = NAME | {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3}


def schedule(**changes: Any) -> VpSchedule:
    return read_vp_schedule(PUBLISHED_SCHEDULE | changes)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps_are_those_of_diffusers(spacing: str, steps_offset: int) -> None:
    config = PUBLISHED_SCHEDULE | {"timestep_spacing": spacing, "steps_offset": steps_offset}
    ours, theirs = read_vp_schedule(config), ddim(config)
    for num_steps in (1, 2, 3, 7, 20, 30, 50, 333, 999):
        theirs.set_timesteps(num_steps)
        assert ours.timesteps(num_steps) == theirs.timesteps.tolist()


@pytest.mark.parametrize("config", [PUBLISHED_SCHEDULE, ZERO_SNR, COSINE, LINEAR, TRAINED])
def test_training_levels_are_those_of_diffusers(config: dict[str, Any]) -> None:
    scheduler = ddim(config)
    abar = scheduler.alphas_cumprod.double()
    t = read_vp_schedule(config | {"prediction_type": "v_prediction"}).training_sigmas
    torch.testing.assert_close((1 - t) ** 2 / ((1 - t) ** 2 + t**2), abar, rtol=2e-4, atol=1e-9)


def test_levels_by_hand() -> None:
    # Betas .1, .2, .4: abar .9, .72, .432; t = 1 / (1 + sqrt(abar / (1 - abar))) is 1 / 4, .38409, .53416.
    short = read_vp_schedule(TRAINED | {"set_alpha_to_one": False})
    expected = torch.tensor([0.53416, 0.38409, 0.25])
    torch.testing.assert_close(short.levels(2), torch.tensor([0.38409, 0.25, 0.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(short.training_sigmas.flip(0).float(), expected, rtol=0, atol=1e-5)
    late = read_vp_schedule(TRAINED | {"set_alpha_to_one": False, "timestep_spacing": "trailing"})
    torch.testing.assert_close(late.levels(1), expected[[0, 2]], rtol=0, atol=1e-5)


def test_the_published_schedule_starts_short_of_noise_and_ends_short_of_none() -> None:
    levels = schedule().levels(50)
    assert len(levels) == 51
    assert bool((levels.diff() < 0).all())
    assert float(levels[0]) == pytest.approx(0.9292, abs=1e-4)  # timestep 981
    assert float(levels[-1]) == pytest.approx(0.0283, abs=1e-4)  # timestep 0: beta_0 = .00085
    abar_0 = 1 - 0.00085
    # Unit noise of x_vp at the start; x itself has x_vp / (sqrt(abar) + sqrt(1 - abar)).
    assert initial_scale(levels) == pytest.approx(math.hypot(1 - float(levels[0]), float(levels[0])))
    assert final_scale(levels) == pytest.approx(math.sqrt(abar_0) + math.sqrt(1 - abar_0), abs=1e-6)
    assert schedule(set_alpha_to_one=True).levels(50)[-1] == 0.0
    assert read_vp_schedule(ZERO_SNR).levels(10)[0] == 1.0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("config", [PUBLISHED_SCHEDULE, ZERO_SNR, PUBLISHED_SCHEDULE | {"steps_offset": 0}])
def test_levels_fall_and_every_sampler_walks_them(config: dict[str, Any], spacing: str) -> None:
    known = read_vp_schedule(config | {"timestep_spacing": spacing})
    for sampler_config in IMAGE_SAMPLERS:
        sampler = make_sampler(sampler_config(num_steps=4), known)
        assert bool((sampler.sigmas_S1.diff() < 0).all())
        state, past = torch.ones(1, 1, 2, 2), []
        for step, stochastic in enumerate(sampler.stochastic_S):
            velocity = 0.5 * state
            transition = sampler.transition(velocity, state, step, past)
            assert bool((transition.std_B > 0).all()) or not stochastic
            past = [Past(state, velocity)]
            state = transition.mean_BCHW
            assert bool(torch.isfinite(state).all())


def test_every_level_finds_its_timestep_and_none_is_truncated() -> None:
    for config in (PUBLISHED_SCHEDULE, ZERO_SNR):
        known = read_vp_schedule(config)
        everything = known.timestep_of(known.training_sigmas.float())
        assert torch.equal(everything, torch.arange(1000.0))
        assert known.timestep_of(known.levels(50))[:50].tolist() == known.timesteps(50)
    known = schedule()
    between = known.training_sigmas[500:502].mean().reshape(1)
    assert float(known.timestep_of(between)) == pytest.approx(500.5, abs=1e-3)
    assert known.timestep_of(torch.tensor([0.0, 0.001, 0.97, 1.0])).tolist() == [0, 0, 999, 999]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_answer_gives_the_exact_velocity(prediction: str) -> None:
    known = schedule(prediction_type=prediction)
    draws = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 1, 3, 3, generator=draws, dtype=torch.float64)
    t_B = torch.tensor([0.0, 0.03, 0.4, 0.8, 0.935], dtype=torch.float64)
    t = t_B.view(-1, 1, 1, 1)
    norm = torch.hypot(1 - t, t)
    a, s = (1 - t) / norm, t / norm
    network = known.network_state((1 - t) * clean + t * noise, t_B)
    torch.testing.assert_close(network, a * clean + s * noise)
    answer = noise if prediction == "epsilon" else a * noise - s * clean
    torch.testing.assert_close(known.velocity(answer, network, t_B), noise - clean)


def test_beyond_the_last_trained_level_an_answer_is_read_as_one_of_that_level() -> None:
    known = schedule()
    clean, noise = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([1.0], dtype=torch.float64)
    found = known.velocity(noise, known.network_state(noise, t), t)
    # Pure noise that is recognised leaves x0 = (1 - s) / a eps = .034 eps: the velocity is eps, nearly.
    torch.testing.assert_close(found, (1 - 0.0342) * noise, rtol=0, atol=1e-3)
    just_below, last = known.training_sigmas[-1] - 1e-9, known.training_sigmas[-1] + 1e-9
    near = [known.velocity(noise, 0.9 * noise + 0.1 * clean, level.reshape(1)) for level in (just_below, last)]
    torch.testing.assert_close(near[0], near[1], rtol=1e-5, atol=1e-5)


def test_a_level_without_signal_is_no_singularity_of_v_prediction() -> None:
    known = read_vp_schedule(ZERO_SNR)
    clean, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    # At t = 1 the network sees eps and answers u = a eps - s x0 = -x0.
    torch.testing.assert_close(known.velocity(-clean, noise, torch.ones(1)), noise - clean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not one of epsilon, v_prediction"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not one of"),
        ({"rescale_betas_zero_snr": True}, "epsilon says nothing at a last level without signal"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a FlowMatchEulerDiscreteScheduler, of another"),
        ({"trained_betas": [0.1, 0.0]}, "betas must be above 0"),
    ],
)
def test_a_schedule_that_is_none_of_these_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        schedule(**changes)


def test_a_shift_and_too_many_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shift is for flow models.*got 3\.0"):
        schedule().levels(10, 3.0)
    for num_steps in (1000, 1001):  # `steps_offset` needs one level more
        with pytest.raises(ConfigError, match="num_steps must be below 1000"):
            schedule().levels(num_steps)
