"""What every row of the SAMPLERS table promises: of the image samplers here, of the text samplers further down."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.distributions import Normal

from raylign.errors import ShapeError
from raylign.samplers import (
    IMAGE_SAMPLERS,
    SAMPLERS,
    TOKEN_SAMPLERS,
    Candidates,
    Sampler,
    SamplerConfig,
    TokenSampler,
    TokenTransition,
    flow_sigmas,
    make_sampler,
    make_token_sampler,
)

ROWS = pytest.mark.parametrize("config_cls", IMAGE_SAMPLERS)
STATE, VELOCITY, NOISE = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))


def make(config_cls: type, num_steps: int = 6) -> Sampler:
    return make_sampler(config_cls(num_steps=num_steps), 3.0)


@ROWS
def test_its_type_names_it_in_the_configuration(config_cls: type) -> None:
    tag = config_cls.model_fields["type"].default
    assert isinstance(TypeAdapter(SamplerConfig).validate_python({"type": tag}), config_cls)
    assert isinstance(make(config_cls), SAMPLERS[config_cls])


@ROWS
def test_its_configuration_has_what_a_run_asks_of_it(config_cls: type) -> None:
    assert {"num_steps", "guidance_scale", "shift"} <= config_cls.model_fields.keys()
    assert isinstance(SAMPLERS[config_cls].stochastic, bool)


@ROWS
@pytest.mark.parametrize("num_steps", [2, 6, 25])
def test_it_walks_the_shared_schedule(config_cls: type, num_steps: int) -> None:
    sampler = make(config_cls, num_steps)
    assert sampler.num_steps == num_steps
    assert torch.equal(sampler.sigmas_S1, flow_sigmas(num_steps, 3.0))


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_is_an_fp32_distribution_that_is_finite(config_cls: type, dtype: torch.dtype) -> None:
    sampler = make(config_cls)
    for step in range(sampler.num_steps):
        transition = sampler.transition(VELOCITY.to(dtype), STATE.to(dtype), step)
        assert transition.mean_BCHW.shape == STATE.shape
        assert transition.std_B.shape == (3,)
        assert transition.mean_BCHW.dtype == transition.std_B.dtype == torch.float32
        assert torch.isfinite(transition.mean_BCHW).all()
        assert (transition.std_B > 0).all() == sampler.stochastic


@ROWS
def test_a_density_comes_from_the_object_that_sampled_or_not_at_all(config_cls: type) -> None:
    sampler = make(config_cls)
    for step in range(sampler.num_steps):
        transition = sampler.transition(VELOCITY, STATE, step)
        following = transition.sample(NOISE)
        if not sampler.stochastic:
            assert torch.equal(following, transition.mean_BCHW)
            with pytest.raises(ShapeError):
                transition.logprob(following)
            continue
        std = transition.std_B.view(-1, 1, 1, 1)
        expected = Normal(transition.mean_BCHW, std).log_prob(following).mean(dim=(1, 2, 3))
        torch.testing.assert_close(transition.logprob(following), expected, rtol=1e-4, atol=1e-4)
        # The noise is what it was drawn from: mean log-density of standard normal noise, less log std.
        by_noise = (-0.5 * NOISE**2).mean(dim=(1, 2, 3)) - transition.std_B.log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(transition.logprob(following), by_noise, rtol=1e-3, atol=1e-3)


@ROWS
def test_a_step_of_one_item_does_not_depend_on_its_neighbours(config_cls: type) -> None:
    sampler = make(config_cls)
    for step in range(sampler.num_steps):
        together = sampler.transition(VELOCITY, STATE, step)
        alone = sampler.transition(VELOCITY[1:2], STATE[1:2], step)
        assert torch.equal(together.mean_BCHW[1:2], alone.mean_BCHW)
        assert torch.equal(together.std_B[1:2], alone.std_B)


@ROWS
def test_gradients_reach_the_velocity(config_cls: type) -> None:
    sampler = make(config_cls)
    for step in range(sampler.num_steps):
        velocity = VELOCITY.clone().requires_grad_()
        sampler.transition(velocity, STATE, step).mean_BCHW.sum().backward()
        assert velocity.grad is not None
        assert (velocity.grad != 0).all()


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


@TEXT_ROWS
def test_the_documentation_names_every_key_with_its_default(config_cls: type) -> None:
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, field in config_cls.model_fields.items():
        if name == "type":
            assert any(line.startswith(f"| `{field.default}` |") for line in rows)
            continue
        spelled = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        default = "not set" if field.default is None else f"`{spelled}`"
        assert any(line.startswith(f"| `{name}` |") and default in line.split("|")[2] for line in rows), name
