"""Image samplers against diffusers, against published numbers, and worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from raylign.samplers import FlowSchedule, Past, Sampler, flow_sigmas, make_sampler, num_steps
from raylign.samplers.cps import Cps, CpsConfig
from raylign.samplers.dance_sde import DanceSde, DanceSdeConfig
from raylign.samplers.dpm_solver import DpmSolver, DpmSolverConfig
from raylign.samplers.euler_ode import EulerOde, EulerOdeConfig
from raylign.samplers.flow_sde import FlowSde, FlowSdeConfig
from raylign.samplers.gddim import Gddim, GddimConfig, gddim_coefficients
from raylign.samplers.sa_solver import SaSolver, SaSolverConfig
from tests.tiny_models import euler, flow_sde


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


def pixel(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value)


LEVELS = torch.tensor([0.5, 0.25, 0.0])
"""For numbers by hand: at x = 4, v = 2 and level .5 the clean prediction is 3 and the noise prediction 5."""


def test_the_dance_sde_step_of_one_pixel() -> None:
    # eta = .4: 4 - .25 * 2 + .16 / (2 * .5) * (-.25) * 5 = 3.5 - .2, and .4 sqrt(.25) = .2; then the ODE to 3.
    sampler = DanceSde(DanceSdeConfig(num_steps=2, eta=0.4), LEVELS)
    transition = sampler.transition(pixel(2.0), pixel(4.0), 0)
    assert transition.mean_BCHW.item() == pytest.approx(3.3)
    assert transition.std_B.item() == pytest.approx(0.2)
    assert sampler.transition(pixel(2.0), pixel(4.0), 1).mean_BCHW.item() == pytest.approx(4 - 0.25 * 2)


def test_the_cps_step_of_one_pixel() -> None:
    # a = 1/3, an angle of 30 degrees: .75 * 3 + .25 * cos 30 * 5, and .25 * sin 30 = .125.
    transition = Cps(CpsConfig(num_steps=2, noise_level=1 / 3), LEVELS).transition(pixel(2.0), pixel(4.0), 0)
    assert transition.mean_BCHW.item() == pytest.approx(2.25 + 1.25 * math.sqrt(0.75))
    assert transition.std_B.item() == pytest.approx(0.125)
    assert transition.logprob(pixel(transition.mean_BCHW.item() + 0.3)).item() == pytest.approx(-0.09, rel=1e-5)


@pytest.mark.parametrize(
    ("eta", "mean", "std"),
    [
        # .25 * .5 / (.5 * .75) = 1/3 to the power eta^2: q = 1, 1/3, 1/81 for eta 0, 1, 2.
        (0.0, 0.75 * 3 + 0.25 * 5, 0.0),
        (1.0, 0.75 * 3 + 0.25 * 5 / 3, 0.25 * math.sqrt(8 / 9)),
        (2.0, 0.75 * 3 + 0.25 * 5 / 81, 0.25 * math.sqrt(1 - 1 / 6561)),
    ],
)
def test_the_gddim_step_of_one_pixel(eta: float, mean: float, std: float) -> None:
    transition = Gddim(GddimConfig(num_steps=2, eta=eta), LEVELS).transition(pixel(2.0), pixel(4.0), 0)
    assert transition.mean_BCHW.item() == pytest.approx(mean)
    assert transition.std_B.item() == pytest.approx(std)


def test_the_second_dpm_solver_step_of_one_pixel() -> None:
    # Levels .9, .5, .25: lambda rises by log 9 and log 3, so h / h0 = 1/2 and 1 - e^-h = 2/3. The clean predictions
    # were 1 - .9 * (-1) = 1.9 and are 3: Euler's 3.5, plus .75 * (2/3) * (1/2) / 2 * (3 - 1.9) = .1375.
    sampler = DpmSolver(DpmSolverConfig(num_steps=3), torch.tensor([0.9, 0.5, 0.25, 0.0]))
    past = [Past(pixel(1.0), pixel(-1.0))]
    assert sampler.transition(pixel(2.0), pixel(4.0), 1, past).mean_BCHW.item() == pytest.approx(3.5 + 0.1375)
    # The last step is Euler's, whatever came before.
    assert sampler.transition(pixel(2.0), pixel(4.0), 2, past).mean_BCHW.item() == pytest.approx(3.5)


def test_a_multistep_start_at_pure_noise_is_first_order() -> None:
    levels = flow_sigmas(5, 3.0)
    dpm, sa = DpmSolver(DpmSolverConfig(num_steps=5), levels), SaSolver(SaSolverConfig(num_steps=5, tau=0.0), levels)
    euler_mean = EulerOde(EulerOdeConfig(num_steps=5), levels).transition(pixel(2.0), pixel(4.0), 1).mean_BCHW
    for sampler in (dpm, sa):
        second = sampler.transition(pixel(2.0), pixel(4.0), 1, [Past(pixel(1.0), pixel(-1.0))])
        torch.testing.assert_close(second.mean_BCHW, euler_mean)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpm_solver_is_that_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(8)
    sampler = DpmSolver(DpmSolverConfig(num_steps=8), scheduler.sigmas)
    theirs = ours = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    past: list[Past] = []
    for step, timestep in enumerate(scheduler.timesteps):
        theirs_next = scheduler.step(torch.sin(theirs * (step + 1)), timestep, theirs, return_dict=False)[0]
        velocity = torch.sin(ours * (step + 1))
        ours, past = sampler.transition(velocity, ours, step, past).mean_BCHW, [Past(ours, velocity)]
        theirs = theirs_next
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_sa_solver_takes_awms_loop_with_the_predictor_and_corrector_of_diffusers(tau: float) -> None:
    from diffusers import SASolverScheduler

    scheduler: Any = SASolverScheduler(
        predictor_order=2, corrector_order=2, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    levels = scheduler.sigmas = torch.tensor([0.95, 0.85, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    sampler = SaSolver(SaSolverConfig(num_steps=5, tau=tau, tau_low=0.0, tau_high=1.0), levels.float())
    draw, theirs_tau = torch.Generator().manual_seed(1), torch.tensor(tau, dtype=torch.float64)
    predicted = torch.randn(1, 2, 4, 4, generator=draw, dtype=torch.float64)
    start, noise, clean = predicted, predicted, [predicted]
    past: list[Past] = []
    for step in range(5):
        scheduler._step_index = step  # the loop is AWM's, which differs from diffusers' in the first and last step
        noise_before, noise = noise, torch.randn(1, 2, 4, 4, generator=draw, dtype=torch.float64)
        velocity = torch.sin(predicted * (step + 1))
        clean = [*clean, predicted - levels[step] * velocity]
        if step < 2:
            start = predicted
        else:
            scheduler.model_outputs = clean[-3:-1]
            start = scheduler.stochastic_adams_moulton_update(
                this_model_output=clean[-1], last_sample=start, last_noise=noise_before, this_sample=predicted,
                order=2, tau=theirs_tau,
            )  # fmt: skip
        scheduler.model_outputs = clean[-2:]
        order = 1 if step in (0, 4) else 2
        theirs = scheduler.stochastic_adams_bashforth_update(
            model_output=clean[-1], sample=start, noise=noise, order=order, tau=theirs_tau
        )
        ours = sampler.transition(velocity, predicted, step, past).sample(noise.float())
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
        past = [*past, Past(predicted, velocity)][-2:]
        predicted = theirs


def test_sa_solver_without_history_is_gddim() -> None:
    levels = flow_sigmas(6, 3.0)
    sa = SaSolver(SaSolverConfig(num_steps=6, tau=0.7, tau_low=0.0, tau_high=1.0), levels)
    gddim = Gddim(GddimConfig(num_steps=6, eta=0.7), levels)
    for step in range(6):
        mine, theirs = (sampler.transition(pixel(2.0), pixel(4.0), step) for sampler in (sa, gddim))
        torch.testing.assert_close(mine.mean_BCHW, theirs.mean_BCHW)
        torch.testing.assert_close(mine.std_B, theirs.std_B)


def test_gddim_is_the_euler_step_at_eta_0_and_flow_sde_in_short_steps() -> None:
    ode = Gddim(GddimConfig(num_steps=6, eta=0.0), flow_sigmas(6, 3.0))
    for step in range(6):
        expected = euler(6).transition(pixel(2.0), pixel(4.0), step)
        torch.testing.assert_close(ode.transition(pixel(2.0), pixel(4.0), step).mean_BCHW, expected.mean_BCHW)
    # a = eta sqrt(2), on a step a thousandth long.
    short = torch.tensor([0.5, 0.499, 0.0])
    exact = Gddim(GddimConfig(num_steps=2, eta=0.5), short).transition(pixel(2.0), pixel(4.0), 0)
    by_euler = FlowSde(FlowSdeConfig(num_steps=2, noise_level=0.5 * math.sqrt(2)), short)
    by_euler_step = by_euler.transition(pixel(2.0), pixel(4.0), 0)
    assert exact.std_B.item() == pytest.approx(by_euler_step.std_B.item(), rel=4e-3)
    assert exact.mean_BCHW.item() == pytest.approx(by_euler_step.mean_BCHW.item(), abs=1e-5)


def variance_preserving(num_steps: int) -> tuple[Any, list[float]]:
    """Stable Diffusion 1.5's DDIM scheduler, and abar at the S + 1 states of a run."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    kept = [float(scheduler.alphas_cumprod[timestep]) for timestep in scheduler.timesteps]
    return scheduler, [*kept, float(scheduler.final_alpha_cumprod)]


def test_gddim_at_eta_1_is_the_ddim_chain_of_diffusers_in_flow_time() -> None:
    scheduler, kept = variance_preserving(20)
    levels = [math.sqrt(1 - abar) / (math.sqrt(abar) + math.sqrt(1 - abar)) for abar in kept]
    scale = [math.hypot(1 - level, level) for level in levels]  # x = x_vp |(1 - t, t)|
    sampler = Gddim(GddimConfig(num_steps=20, eta=1.0), torch.tensor(levels))
    assert all(sampler.stochastic_S)
    draw = torch.Generator().manual_seed(3)
    theirs: Any = torch.randn(2, 4, 4, 4, generator=draw)
    ours = theirs * scale[0]
    for step, timestep in enumerate(scheduler.timesteps):
        noise = torch.randn(2, 4, 4, 4, generator=draw)
        epsilon = torch.sin(theirs * (step + 1))
        clean = (theirs - math.sqrt(1 - kept[step]) * epsilon) / math.sqrt(kept[step])
        transition = sampler.transition(epsilon - clean, ours, step)
        theirs = scheduler.step(epsilon, timestep, theirs, eta=1.0, variance_noise=noise).prev_sample
        # At the first step v divides a difference by sqrt(abar) = .07, so fp32 keeps five digits.
        torch.testing.assert_close(transition.sample(noise) / scale[step + 1], theirs, rtol=2e-4, atol=2e-4)
        ours = theirs * scale[step + 1]


@pytest.mark.parametrize("eta", [0.3, 1.0, 1.5])
def test_gddims_noise_is_ddpos_at_eta_1_and_the_derived_one_at_any(eta: float) -> None:
    _, kept = variance_preserving(50)
    for abar, abar_next in pairwise(kept):
        sigma, following = (math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in (abar, abar_next))
        variance = (gddim_coefficients(sigma, following, eta)[1] / math.hypot(1 - following, following)) ** 2
        ratio = ((1 - abar_next) / (1 - abar)) ** eta**2 * (abar / abar_next) ** eta**2
        assert variance == pytest.approx((1 - abar_next) * (1 - ratio), rel=1e-9)
        if eta == 1.0:
            assert variance == pytest.approx((1 - abar_next) / (1 - abar) * (1 - abar / abar_next), rel=1e-9)


DATA_STD = 0.5


def exact_flow(state: torch.Tensor, sigma: float) -> torch.Tensor:
    """The velocity at a state if data are N(0, DATA_STD^2)."""
    marginal = (1 - sigma) ** 2 * DATA_STD**2 + sigma**2
    return state * (sigma - (1 - sigma) * DATA_STD**2) / marginal


def ode_error(sampler: Sampler) -> float:
    """Relative error of the last state; the exact one is the first times the ratio of the marginals' deviations."""
    past: list[Past] = []
    state = pixel(1.0)
    levels = sampler.sigmas_S1.tolist()
    for step, sigma in enumerate(levels[:-1]):
        velocity = exact_flow(state, sigma)
        transition = sampler.transition(velocity, state, step, past)
        past = [*past, Past(state, velocity)][-2:]
        state = transition.mean_BCHW
    first, last = (math.hypot((1 - sigma) * DATA_STD, sigma) for sigma in (levels[0], levels[-1]))
    return state.item() / (last / first) - 1


@pytest.mark.parametrize(
    ("config", "order"),
    [(EulerOdeConfig(), 1), (GddimConfig(eta=0.0), 1), (DpmSolverConfig(), 2), (SaSolverConfig(tau=0.0), 2)],
    ids=str,
)
def test_the_order_of_convergence_to_the_ode(config: Any, order: int) -> None:
    # Steps of equal length in log-SNR between two inner levels; twice as many divide the error by 2^order.
    errors: list[float] = []
    for steps in (40, 80):
        levels = torch.sigmoid(torch.linspace(4.0, -4.0, steps + 1))
        changed = config.model_copy(update={"num_steps": steps})
        cls = {EulerOdeConfig: EulerOde, GddimConfig: Gddim, DpmSolverConfig: DpmSolver, SaSolverConfig: SaSolver}
        errors.append(ode_error(cls[type(config)](changed, levels)))
    assert 0.9 * 2**order < errors[0] / errors[1] < 1.3 * 2**order


def test_raising_the_last_level_mends_what_multistep_solvers_overshoot() -> None:
    published, mended = (
        make_sampler(DpmSolverConfig(halve_last_level=halve), FlowSchedule(3.0)) for halve in (False, True)
    )
    assert num_steps(published) == num_steps(mended) == 10
    assert ode_error(published) == pytest.approx(0.405, abs=2e-3)
    assert abs(ode_error(mended)) < 0.06
