"""What every row of the SAMPLERS table promises: of the image samplers here, of the text samplers further down."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributions import Normal

from raylign.config import Config
from raylign.errors import ShapeError
from raylign.samplers import (
    IMAGE_SAMPLERS,
    SAMPLERS,
    TOKEN_SAMPLERS,
    Candidates,
    FlowSchedule,
    ImageSamplerConfig,
    Past,
    Sampler,
    SamplerConfig,
    TokenSampler,
    TokenTransition,
    Transition,
    flow_sigmas,
    make_sampler,
    make_token_sampler,
    num_steps,
)
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.cps import CpsConfig
from raylign.samplers.dance_sde import DanceSdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.sa_solver import SaSolverConfig
from raylign.samplers.window import WindowConfig

ROWS = pytest.mark.parametrize("config_cls", IMAGE_SAMPLERS)
STATE, VELOCITY, NOISE = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
VARIANCE_PRESERVING = torch.tensor([0.936, 0.8, 0.6, 0.4, 0.2, 0.03])
"""Levels that neither start at pure noise nor end at none, as those of Stable Diffusion 1.5 do not."""


def make(config_cls: type[ImageSamplerConfig], num_steps: int = 6) -> Sampler:
    return make_sampler(config_cls(num_steps=num_steps), FlowSchedule(3.0))


def walk(sampler: Sampler, state: torch.Tensor = STATE, items: slice = slice(None)) -> list[Transition]:
    """The transitions of a whole run, with the history the sampler asks for."""
    draw = torch.Generator().manual_seed(7)
    transitions: list[Transition] = []
    past: list[Past] = []
    state = state[items]
    for step in range(num_steps(sampler)):
        velocity = torch.sin(state * (step + 1))
        noise = torch.randn(STATE.shape, generator=draw)[items]
        transitions.append(sampler.transition(velocity, state, step, past[len(past) - sampler.config.history :]))
        past.append(Past(state, velocity))
        state = transitions[-1].sample(noise)
    return transitions


@ROWS
def test_its_type_names_it_in_the_configuration(config_cls: type[ImageSamplerConfig]) -> None:
    tag = config_cls.model_fields["type"].default
    assert isinstance(TypeAdapter(SamplerConfig).validate_python({"type": tag}), config_cls)
    assert type(make(config_cls)) is IMAGE_SAMPLERS[config_cls]


@ROWS
def test_its_configuration_has_what_a_run_asks_of_it(config_cls: type[ImageSamplerConfig]) -> None:
    config = config_cls()
    assert issubclass(config_cls, SdeSamplerConfig) == config.has_density
    assert not (config.has_density and config.history)
    assert all(field.description for name, field in config_cls.model_fields.items() if name != "type")
    for bad in ({"num_steps": 0}, {"guidance_scale": 0.5}, {"shift": 0}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            config_cls.model_validate(bad)


@ROWS
@pytest.mark.parametrize("num_steps_", [2, 6, 25])
def test_it_walks_the_schedule(config_cls: type[ImageSamplerConfig], num_steps_: int) -> None:
    config = config_cls(num_steps=num_steps_, halve_last_level=False)
    sampler = make_sampler(config, FlowSchedule(3.0))
    assert num_steps(sampler) == len(sampler.stochastic_S) == num_steps_
    assert torch.equal(sampler.sigmas_S1, flow_sigmas(num_steps_, 3.0))
    assert sampler.config is config


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_is_an_fp32_distribution_that_is_finite(
    config_cls: type[ImageSamplerConfig], dtype: torch.dtype
) -> None:
    sampler = make(config_cls)
    for step in range(num_steps(sampler)):
        transition = sampler.transition(VELOCITY.to(dtype), STATE.to(dtype), step)
        assert transition.mean_BCHW.shape == STATE.shape
        assert transition.std_B.shape == (3,)
        assert transition.mean_BCHW.dtype == transition.std_B.dtype == torch.float32
        assert torch.isfinite(transition.mean_BCHW).all()
        assert (transition.std_B > 0).all() == sampler.stochastic_S[step]
        assert torch.isfinite(transition.std_B).all()


@ROWS
@pytest.mark.parametrize("levels", [flow_sigmas(5, 1.0), flow_sigmas(5, 12.0), VARIANCE_PRESERVING], ids=str)
def test_a_whole_run_is_finite_on_any_levels(config_cls: type[ImageSamplerConfig], levels: torch.Tensor) -> None:
    sampler = IMAGE_SAMPLERS[config_cls](config_cls(num_steps=5), levels)
    for step, transition in enumerate(walk(sampler)):
        assert torch.isfinite(transition.mean_BCHW).all()
        assert (transition.std_B > 0).all() == (transition.std_B > 0).any() == sampler.stochastic_S[step]


@ROWS
def test_the_step_to_no_noise_ends_at_the_clean_prediction_or_close_to_it(
    config_cls: type[ImageSamplerConfig],
) -> None:
    # Close: Flow-SDE alone shrinks and adds a little noise on its last step.
    sampler = make(config_cls)
    last, sigma = num_steps(sampler) - 1, float(sampler.sigmas_S1[-2])
    transition = sampler.transition(VELOCITY, STATE, last, [Past(STATE, VELOCITY)] * sampler.config.history)
    clean = STATE - sigma * VELOCITY
    tolerance = 0.02 if sampler.stochastic_S[last] else 1e-6
    torch.testing.assert_close(transition.mean_BCHW, clean, rtol=tolerance, atol=tolerance)
    assert (transition.std_B <= sigma).all()


@ROWS
def test_a_density_comes_from_the_object_that_sampled_or_not_at_all(config_cls: type[ImageSamplerConfig]) -> None:
    sampler = make(config_cls)
    for step, stochastic in enumerate(sampler.stochastic_S):
        transition = sampler.transition(VELOCITY, STATE, step)
        following = transition.sample(NOISE)
        if not stochastic:
            assert torch.equal(following, transition.mean_BCHW)
            with pytest.raises(ShapeError):
                transition.logprob(following)
            continue
        std = transition.std_B.view(-1, 1, 1, 1)
        if transition.density == "squared":
            expected = by_noise = -((std * NOISE) ** 2).mean(dim=(1, 2, 3))
        else:
            expected = Normal(transition.mean_BCHW, std).log_prob(following).mean(dim=(1, 2, 3))
            # The noise is what it was drawn from: mean log-density of standard normal noise, less log std.
            by_noise = (-0.5 * NOISE**2).mean(dim=(1, 2, 3)) - transition.std_B.log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(transition.logprob(following), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(transition.logprob(following), by_noise, rtol=1e-3, atol=1e-3)


@ROWS
def test_a_step_of_one_item_does_not_depend_on_its_neighbours(config_cls: type[ImageSamplerConfig]) -> None:
    sampler = make(config_cls)
    one = slice(1, 2)
    for together, alone in zip(walk(sampler), walk(sampler, items=one), strict=True):
        assert torch.equal(together.mean_BCHW[one], alone.mean_BCHW)
        assert torch.equal(together.std_B[one], alone.std_B)


@ROWS
def test_gradients_reach_the_velocity(config_cls: type[ImageSamplerConfig]) -> None:
    sampler = make(config_cls)
    for step in range(num_steps(sampler)):
        velocity = VELOCITY.clone().requires_grad_()
        sampler.transition(velocity, STATE, step).mean_BCHW.sum().backward()
        assert velocity.grad is not None
        assert (velocity.grad != 0).all()


@ROWS
def test_a_window_has_to_fit(config_cls: type[ImageSamplerConfig]) -> None:
    if not issubclass(config_cls, SdeSamplerConfig):
        assert "window" not in config_cls.model_fields
        return
    assert config_cls(num_steps=5, window=WindowConfig(size=4)).window is not None
    with pytest.raises(ValidationError, match="does not fit"):
        config_cls(num_steps=4, window=WindowConfig(size=4))


TEXT_ROWS = pytest.mark.parametrize("config_cls", TOKEN_SAMPLERS)
LENGTH, MASK_ID = 8, 2


def make_text(config_cls: type, **values: object) -> TokenSampler:
    return make_token_sampler(config_cls(**values), LENGTH)


def candidates(seed: int, masked_BL: torch.Tensor, step: int = 0) -> Candidates:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(masked_BL), LENGTH, 7, generator=draw).index_fill(2, torch.tensor([MASK_ID]), -torch.inf)
    transition = TokenTransition.of(2 * logits, 1.0, 1.0)
    tokens = transition.sample(torch.rand(len(masked_BL), LENGTH, generator=draw))
    gamma, order = torch.full((len(masked_BL),), 0.5), torch.rand(len(masked_BL), LENGTH, generator=draw)
    return Candidates(transition, tokens, masked_BL, 0, step, 1, gamma_B=gamma, order_BL=order)


@TEXT_ROWS
def test_a_text_sampler_is_named_in_the_configuration_and_has_the_common_keys(config_cls: type) -> None:
    tag = config_cls.model_fields["type"].default
    config = TypeAdapter(SamplerConfig).validate_python({"type": tag, "temperature": 0.5, "top_p": 0.9})
    assert isinstance(config, config_cls)
    assert isinstance(make_text(config_cls), TOKEN_SAMPLERS[config_cls])
    assert {"guidance_scale", "cache", "cache_refresh", "stop_at_eos"} <= config_cls.model_fields.keys()
    assert all(field.description for field in config_cls.model_fields.values() if field.default != tag)


@TEXT_ROWS
@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"guidance_scale": 0.5}])
def test_a_common_key_out_of_range_is_refused(config_cls: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        config_cls(**bad)


@TEXT_ROWS
def test_it_reveals_masked_positions_only_and_one_at_least(config_cls: type) -> None:
    sampler = make_text(config_cls)
    for seed in range(5):
        masked_BL = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.4
        masked_BL[:, seed] = True
        chosen = sampler.choose(candidates(seed, masked_BL))
        assert chosen.dtype == torch.bool
        assert not bool((chosen & ~masked_BL).any())
        assert bool(chosen.any(dim=1).all())


@TEXT_ROWS
def test_a_rows_choice_does_not_depend_on_its_neighbours(config_cls: type) -> None:
    sampler = make_text(config_cls)
    masked_BL = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(9)) < 0.6
    masked_BL[:, 0] = True
    together = candidates(3, masked_BL)
    one = slice(2, 3)
    alone = replace(
        together,
        transition=TokenTransition(*(getattr(together.transition, name)[one] for name in TokenTransition.__slots__)),
        **{name: getattr(together, name)[one] for name in ("tokens_BL", "masked_BL", "gamma_B", "order_BL")},
    )
    assert torch.equal(sampler.choose(together)[one], sampler.choose(alone))


@TEXT_ROWS
def test_its_calls_finish_every_block(config_cls: type) -> None:
    sampler = make_text(config_cls)
    masked_BL = torch.ones(3, LENGTH, dtype=torch.bool)
    masked_BL[:, sampler.block_length :] = False
    for step in range(LENGTH):
        if not bool(masked_BL.any()):
            break
        masked_BL &= ~sampler.choose(candidates(step, masked_BL, step))
    assert not bool(masked_BL.any())


@pytest.mark.parametrize("config_cls", [*SAMPLERS, WindowConfig])
def test_the_documentation_names_every_key_with_its_default(config_cls: type[Config]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, field in config_cls.model_fields.items():
        if name == "type":
            assert any(line.startswith(f"| `{field.default}` |") for line in rows)
            continue
        value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        default = "not set" if field.default is None else f"`{value}`"
        assert any(line.startswith(f"| `{name}` |") and default in line.split("|")[2] for line in rows), name


def spelled(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def test_the_documented_noise_is_what_the_samplers_add() -> None:
    configs = [
        FlowSdeConfig(),
        DanceSdeConfig(num_steps=10),
        CpsConfig(),
        *(GddimConfig(eta=eta) for eta in (0.5, 1.0, 1.5)),
        SaSolverConfig(num_steps=10, halve_last_level=False),
    ]
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    zero = torch.zeros(1, 1, 1, 1)
    for step, (sigma, following) in enumerate(pairwise(flow_sigmas(10, 3.0).tolist())):
        cells: list[str] = []
        for config in configs:
            std = float(make_sampler(config, FlowSchedule(3.0)).transition(zero, zero, step).std_B)
            share = f" · {spelled(std / following, 2)}" if following else ""
            cells.append(f"{spelled(std, 3)}{share}" if std else "–")
        levels = [f"{level:g}" if level in (0, 1) else spelled(level, 4) for level in (sigma, following)]
        assert f"| {step} | {' → '.join(levels)} | {' | '.join(cells)} |" in text
