"""The current policy's relatives: swapping them in, keeping them, letting them follow."""

from __future__ import annotations

import pytest
import torch

from learner.policies import PolicySet, check_names, decay_towards
from raylign.errors import WeightError
from raylign.models.swapping import clone_tensors, using
from raylign.precision import Precision
from raylign.types import Needs
from tests.tiny_models import ToyPolicy


def move(policy: ToyPolicy, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(by)


def ask(policy: ToyPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.8])


def test_using_swaps_tensors_in_and_back_even_after_an_error() -> None:
    policy = ToyPolicy()
    started = clone_tensors(policy)
    move(policy, 1.0)
    moved = clone_tensors(policy)

    def look_and_fail() -> None:
        with using(policy, started):
            assert not torch.is_grad_enabled()
            for name, parameter in policy.trainable_parameters().items():
                assert torch.equal(parameter, started[name])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    assert torch.is_grad_enabled()
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, moved[name])
        assert parameter.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_relative_answers_as_the_policy_did_when_it_was_taken(precision: Precision) -> None:
    # Under autocast too, whose cache of cast weights would otherwise answer for whoever asked first.
    policy = ToyPolicy()
    told = policy.encode("word", False).repeat(2)
    policies = PolicySet(policy, precision, Needs.OLD | Needs.REFERENCE)
    state, sigma = ask(policy)
    before = policies.velocity(state, sigma, told)
    move(policy, 0.1)
    after = policies.velocity(state, sigma, told)
    assert not torch.equal(before, after)
    assert after.requires_grad
    for relative in ("old", "reference"):
        answer = policies.velocity_of(relative, state, sigma, told)
        assert torch.equal(answer, before)
        assert not answer.requires_grad
    assert torch.equal(policies.velocity(state, sigma, told), after)


def test_asking_a_relative_leaves_a_gradient_as_it_was() -> None:
    policy = ToyPolicy()
    told = policy.encode("word", False).repeat(2)
    policies = PolicySet(policy, "fp32", Needs.OLD)
    move(policy, 0.1)
    state, sigma = ask(policy)
    policies.velocity(state, sigma, told).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in policy.trainable_parameters().items() if p.grad is not None}
    policy.network.zero_grad()
    policies.velocity_of("old", state, sigma, told)
    policies.velocity(state, sigma, told).square().sum().backward()
    assert len(expected) == len(policy.trainable_parameters())
    for name, parameter in policy.trainable_parameters().items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name])


def test_decay_mixes_and_at_0_copies_exactly() -> None:
    policy = ToyPolicy()
    old = clone_tensors(policy)
    start = clone_tensors(policy)
    move(policy, 1.0)
    decay_towards(policy, old, 0.75)
    for name, tensor in old.items():
        torch.testing.assert_close(tensor, start[name] + 0.25)
    decay_towards(policy, old, 0.0)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(old[name], parameter)
    decay_towards(policy, old, 1.0)
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(old[name], parameter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("told.bias"), r"a state lacks told\.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), r"a state has the foreign tensor extra"),
        (lambda t: t.update({"told.bias": torch.zeros(3)}), r"told\.bias must be \(8,\), got \(3,\)"),
    ],
)
def test_tensors_of_another_model_are_named(change: object, message: str) -> None:
    policy = ToyPolicy()
    tensors = clone_tensors(policy)
    check_names(tensors, policy, "a state")
    change(tensors)  # type: ignore[operator]
    with pytest.raises(WeightError, match=message):
        check_names(tensors, policy, "a state")
