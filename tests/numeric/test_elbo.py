"""The evidence lower bound of a response, by enumeration, and the estimates that should have it as their mean."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from learner.algorithms.espo import elbo_estimator
from learner.batching import TokenBatch
from learner.noising import Scorer, masked_at, random_masks
from learner.policies import PolicySet
from raylign.keys import generator
from raylign.types import Needs, SampleKey, TokenTrajectory
from tests.toy_text import EOS_ID, FIRST_LETTER_ID, MASK_ID, ToyTextPolicy

LENGTH = 5
A, B, C = FIRST_LETTER_ID, FIRST_LETTER_ID + 1, FIRST_LETTER_ID + 2
RESPONSES = ((A, B, C, B, A), (C, EOS_ID, A, EOS_ID, EOS_ID))


def policy() -> ToyTextPolicy:
    return ToyTextPolicy(LENGTH, "abc", seed=3)


@functools.cache
def token_logprobs(response: tuple[int, ...]) -> dict[frozenset[int], torch.Tensor]:
    """log p(o_k | the tokens outside M) for every set M of masked positions, each (L,) float64."""
    sets = [frozenset(some) for n in range(1, LENGTH + 1) for some in itertools.combinations(range(LENGTH), n)]
    canvas = torch.tensor([[MASK_ID if k in some else response[k] for k in range(LENGTH)] for some in sets])
    with torch.no_grad():
        logits = policy().predict(canvas, policy().encode("ab").repeat(len(sets))).logits_BLV.double()
    logprob = torch.log_softmax(logits, dim=-1)
    tokens = torch.tensor(response).expand(len(sets), -1)
    return dict(zip(sets, logprob.gather(-1, tokens[..., None])[..., 0], strict=True))


def masked_sum(response: tuple[int, ...], some: frozenset[int]) -> float:
    return float(sum(token_logprobs(response)[some][k] for k in some))


def by_size(response: tuple[int, ...]) -> float:
    """sum over n of (1 / n) E over |M| = n of the masked tokens' log-prob."""
    total = 0.0
    for n in range(1, LENGTH + 1):
        sums = [masked_sum(response, some) for some in token_logprobs(response) if len(some) == n]
        total += sum(sums) / len(sums) / n
    return total


def by_time(response: tuple[int, ...]) -> float:
    """E over t of (1 / t) E over masks of rate t; Gauss-Legendre is exact for the polynomial in t."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        for some in token_logprobs(response):
            chance = t ** len(some) * (1 - t) ** (LENGTH - len(some))
            total += weight / t * chance * masked_sum(response, some)
    return float(total)


def by_order(response: tuple[int, ...]) -> float:
    """Mean over all reveal orders of the log-likelihood of revealing in that order."""
    orders = list(itertools.permutations(range(LENGTH)))
    return sum(
        float(token_logprobs(response)[frozenset(order[place:])][k])
        for order in orders
        for place, k in enumerate(order)
    ) / len(orders)


def batch_of(response: tuple[int, ...], keys: list[SampleKey]) -> TokenBatch:
    """As many rows of one response as there are keys."""
    count, toy = len(keys), policy()
    tokens = torch.tensor(response).repeat(count, 1)
    zeros, ints = torch.zeros(tokens.shape), torch.zeros(count, dtype=torch.int64)
    trajectory = TokenTrajectory(tokens, torch.zeros_like(tokens), zeros, zeros, ints, ints)
    prompts = toy.encode("ab").repeat(count)
    rows = torch.zeros(count)
    return TokenBatch(keys, ints, rows, rows == 0, 0, prompts, trajectory, rows)  # type: ignore[arg-type]


def scorer_of(batch: TokenBatch) -> Scorer:
    toy = policy()
    return Scorer(PolicySet(toy, "fp32", Needs.FINAL), batch, toy.vocabulary)


def within_three_errors(estimates_N: torch.Tensor, exact: float) -> bool:
    error = float(estimates_N.std()) / math.sqrt(len(estimates_N))
    assert 0 < error < 0.2
    return abs(float(estimates_N.mean()) - exact) < 3 * error


@pytest.mark.parametrize("response", RESPONSES)
def test_the_three_forms_are_one_number(response: tuple[int, ...]) -> None:
    assert by_time(response) == pytest.approx(by_size(response), rel=1e-9)
    assert by_order(response) == pytest.approx(by_size(response), rel=1e-9)


@pytest.mark.parametrize("response", RESPONSES)
def test_it_bounds_the_likelihood_of_random_orders(response: tuple[int, ...]) -> None:
    orders = list(itertools.permutations(range(LENGTH)))
    paths = [
        sum(float(token_logprobs(response)[frozenset(order[place:])][k]) for place, k in enumerate(order))
        for order in orders
    ]
    assert by_size(response) < math.log(sum(map(math.exp, paths)) / len(paths))


@pytest.mark.parametrize("response", RESPONSES)
def test_espo_has_it_as_its_mean(response: tuple[int, ...]) -> None:
    # Visits make rows independent; tokens after the first end token count like all others.
    batch = batch_of(response, [SampleKey(0, "p", visit, 0) for visit in range(3000)])
    with torch.no_grad():
        assert within_three_errors(elbo_estimator(batch, 1)(scorer_of(batch).learner), by_size(response))


def test_espo_over_siblings_is_stratified() -> None:
    response, exact = RESPONSES[0], by_size(RESPONSES[0])

    def errors(keys: list[SampleKey]) -> float:
        batch = batch_of(response, keys)
        with torch.no_grad():
            estimates = elbo_estimator(batch, 1)(scorer_of(batch).learner)
        return float((estimates.view(-1, 6).mean(dim=1) - exact).square().mean())

    siblings = [SampleKey(0, "p", visit, index) for visit in range(250) for index in range(6)]
    strangers = [SampleKey(0, "q", visit, 0) for visit in range(1500)]
    assert errors(siblings) < 0.7 * errors(strangers)


def test_more_pairs_mean_less_variance_and_the_same_mean() -> None:
    keys = [SampleKey(0, "p", visit, 0) for visit in range(1000)]
    batch = batch_of(RESPONSES[1], keys)
    with torch.no_grad():
        one, four = (elbo_estimator(batch, pairs)(scorer_of(batch).learner) for pairs in (1, 4))
    assert within_three_errors(four, by_size(RESPONSES[1]))
    assert four.var() < 0.5 * one.var()


@pytest.mark.parametrize("response", RESPONSES)
def test_plain_monte_carlo_has_it_as_its_mean(response: tuple[int, ...]) -> None:
    # n uniform on 1 .. L, weight L / n: the second form, one random mask per row.
    keys = [SampleKey(0, "p", visit, 0) for visit in range(3000)]
    batch = batch_of(response, keys)
    sizes = torch.randint(1, LENGTH + 1, (len(keys),), generator=generator("sizes"))
    everywhere = torch.ones(len(keys), LENGTH, dtype=torch.bool)
    masked = random_masks(everywhere, sizes, [generator(*key, "mask") for key in keys])
    with torch.no_grad():
        logprob = scorer_of(batch).learner(masked_at(masked)).sum(dim=1)
    assert within_three_errors(logprob * LENGTH / sizes, by_size(response))
