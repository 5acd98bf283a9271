"""RLG: the two velocities combined, bit for bit at its ends, with guidance, adapters and weight swaps."""

from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ModelError
from raylign.models import load_policy
from raylign.models.base import DenoisingPolicy, guided_velocity
from raylign.models.rlg import RlgPolicy
from raylign.models.swapping import clone_tensors
from tests.fakes import TwoNumberPolicy
from tests.tiny_models import sd3_config

SIGMA_B = torch.tensor([0.9, 0.3])


def _state(policy: DenoisingPolicy) -> torch.Tensor:
    return torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def _tuned_by_hand() -> tuple[TwoNumberPolicy, dict[str, torch.Tensor]]:
    """Base: scale 0.5, shift 0.1. Tuned: scale 0.7, shift 0.4."""
    policy = TwoNumberPolicy()
    base = clone_tensors(policy)
    tuned = {"scale": torch.tensor([0.7]), "shift": torch.tensor([0.4])}
    policy.load_weights(policy.export_weights(5, tuned))
    return policy, base


@pytest.mark.parametrize(("weight", "scale", "shift"), [(0.5, 0.6, 0.25), (1.5, 0.8, 0.55), (2.0, 0.9, 0.7)])
def test_velocities_are_mixed_by_weight(weight: float, scale: float, shift: float) -> None:
    policy, base = _tuned_by_hand()
    conditioning, state = policy.encode("four", False).repeat(2), _state(policy)
    velocity = RlgPolicy(policy, base, weight).predict(state, SIGMA_B, conditioning)
    # The fake's velocity is linear in its two numbers, so theirs are mixed alike: 0.5 + w 0.2 and 0.1 + w 0.3.
    torch.testing.assert_close(velocity, scale * state + shift * 4)


def test_guidance_composes_with_it() -> None:
    policy, base = _tuned_by_hand()
    conditioning, state = policy.encode("four", True).repeat(2), _state(policy)
    velocity = guided_velocity(RlgPolicy(policy, base, 2.0), state, SIGMA_B, conditioning, 3.0)
    # Scale 0.9, shift 0.7; guidance 3 from the empty prompt is a prompt three times as long.
    torch.testing.assert_close(velocity, 0.9 * state + 0.7 * 12)


@pytest.fixture(scope="module")
def lora() -> tuple[DenoisingPolicy, dict[str, torch.Tensor]]:
    """A tiny SD3 with a tuned adapter, and the base's tensors."""
    policy = load_policy(sd3_config(), "rollout", seed=4)
    base = clone_tensors(policy)
    draw = torch.Generator().manual_seed(1)
    tuned = {name: 0.2 * torch.randn(tensor.shape, generator=draw) for name, tensor in base.items()}
    policy.load_weights(policy.export_weights(9, tuned))
    return policy, base


def test_the_ends_are_bit_for_bit_the_tuned_and_the_base_policy(
    lora: tuple[DenoisingPolicy, dict[str, torch.Tensor]],
) -> None:
    policy, base = lora
    untouched = load_policy(sd3_config(), "rollout", seed=4)
    conditioning, state = policy.encode("one", False).repeat(2), _state(policy)
    with torch.no_grad():
        tuned_velocity = policy.predict(state, SIGMA_B, conditioning)
        base_velocity = untouched.predict(state, SIGMA_B, conditioning)
    assert not torch.allclose(tuned_velocity, base_velocity, atol=1e-3)
    assert torch.equal(RlgPolicy(policy, base, 1.0).predict(state, SIGMA_B, conditioning), tuned_velocity)
    assert torch.equal(RlgPolicy(policy, base, 0.0).predict(state, SIGMA_B, conditioning), base_velocity)
    beyond = RlgPolicy(policy, base, 1.5).predict(state, SIGMA_B, conditioning)
    assert torch.equal(beyond, base_velocity + 1.5 * (tuned_velocity - base_velocity))


def test_the_tuned_tensors_stay_in_place_even_when_a_forward_fails(
    lora: tuple[DenoisingPolicy, dict[str, torch.Tensor]],
) -> None:
    policy, base = lora
    places = {name: (p.data_ptr(), p.clone()) for name, p in policy.trainable_parameters().items()}
    guided = RlgPolicy(policy, base, 2.0)
    guided.predict(_state(policy), SIGMA_B, policy.encode("one", False).repeat(2))
    with pytest.raises(RuntimeError):
        guided.predict(_state(policy), SIGMA_B, policy.encode("one", False).repeat(3))
    for name, parameter in guided.trainable_parameters().items():
        assert (parameter.data_ptr(), True) == (places[name][0], torch.equal(parameter, places[name][1]))


def test_weights_loaded_later_are_the_tuned_ones() -> None:
    policy, base = _tuned_by_hand()
    guided = RlgPolicy(policy, base, 2.0)
    guided.load_weights(guided.export_weights(6, {"scale": torch.tensor([0.6]), "shift": torch.tensor([0.1])}))
    state = _state(policy)
    velocity = guided.predict(state, SIGMA_B, policy.encode("four", False).repeat(2))
    torch.testing.assert_close(velocity, 0.7 * state + 0.1 * 4)
    assert not velocity.requires_grad


@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    policy, base = _tuned_by_hand()
    with pytest.raises(ModelError, match="RLG weight is at least 0"):
        RlgPolicy(policy, base, weight)


def test_folded_adapters_and_foreign_tensors_are_refused(
    lora: tuple[DenoisingPolicy, dict[str, torch.Tensor]],
) -> None:
    folded = load_policy(sd3_config(), "rollout", fold=True)
    with pytest.raises(ModelError, match="without folding the adapter"):
        RlgPolicy(folded, clone_tensors(folded), 2.0)
    with pytest.raises(ModelError, match="base tensors of another policy"):
        RlgPolicy(TwoNumberPolicy(), lora[1], 2.0)
