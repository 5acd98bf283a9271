"""GDPO's quadrature: nodes and weights by hand, its ELBO against every mask there is, its bias as it is documented."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from learner.algorithms.gdpo import Gdpo, GdpoConfig, Level, LevelWeights, draw_levels, quadrature_levels
from learner.noising import Scorer
from tests.text_groups import draw_text_groups, entropy_bounded, policies_for, text_algorithm, token_batches
from tests.toy_text import MASK_ID, ToyTextPolicy

LENGTH = 6


def gdpo(policy: ToyTextPolicy, **options: Any) -> Gdpo:
    algorithm = text_algorithm(GdpoConfig(**options), policy)
    assert isinstance(algorithm, Gdpo)
    return algorithm


def approx(levels: list[tuple[int, float]]) -> list[Any]:
    return [(count, pytest.approx(weight)) for count, weight in levels]


def test_nodes_and_weights_by_hand() -> None:
    # Two points: (1 -+ 1/sqrt 3) / 2 = .2113, .7887, weight 1/2 each. Three: (1 -+ sqrt(3/5)) / 2 and 1/2, weights
    # 5/18, 4/9, 5/18.
    low, high = (1 - 3**-0.5) / 2, (1 + 3**-0.5) / 2
    assert quadrature_levels(1, 8, "paper") == approx([(4, 2.0)])
    assert quadrature_levels(2, 8, "paper") == approx([(1, 0.5 / low), (6, 0.5 / high)])
    assert quadrature_levels(2, 8, "unbiased") == approx([(2, 0.5 * 8 / 2), (6, 0.5 * 8 / 6)])
    low, high = (1 - 0.6**0.5) / 2, (1 + 0.6**0.5) / 2
    assert quadrature_levels(3, 256, "paper") == approx([(28, 5 / 18 / low), (128, 4 / 9 / 0.5), (227, 5 / 18 / high)])


def test_a_level_that_masks_nothing_is_left_out_or_masks_one() -> None:
    # The lowest of five nodes is .0469: less than one of 8 positions.
    paper, unbiased = quadrature_levels(5, 8, "paper"), quadrature_levels(5, 8, "unbiased")
    assert [level.num_masked for level in paper] == [1, 4, 6, 7]
    assert [level.num_masked for level in unbiased] == [1, 2, 4, 6, 8]
    assert quadrature_levels(1, 1, "paper") == []
    assert quadrature_levels(1, 1, "unbiased") == approx([(1, 1.0)])


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5])
def test_the_unbiased_weights_integrate_a_constant_exactly_and_the_papers_lose_the_floor(num_nodes: int) -> None:
    # If every masked token costs one nat the ELBO is -L. A node adds weight * |M|: w L, or w floor(tL) / t.
    for length in (4, 8, 256):
        unbiased = sum(level.weight * level.num_masked for level in quadrature_levels(num_nodes, length, "unbiased"))
        paper = sum(level.weight * level.num_masked for level in quadrature_levels(num_nodes, length, "paper"))
        assert unbiased == pytest.approx(length)
        assert paper <= length * (1 + 1e-9)
    assert paper == pytest.approx(256, rel=0.03)
    eight = sum(level.weight * level.num_masked for level in quadrature_levels(2, 8, "paper"))
    assert (
        eight / 8 == pytest.approx((1 / 8 / 0.21132 + 6 / 8 / 0.78868) / 2, rel=1e-4) == pytest.approx(0.771, abs=1e-3)
    )


def mean_cost(policy: ToyTextPolicy, tokens: torch.Tensor, prompts: Any) -> list[float]:
    """g(n) = L / n times the mean over all masks of n positions of the sum of log-probs there, for n = 1..L."""
    found: list[float] = []
    for count in range(1, LENGTH + 1):
        masks = torch.zeros(math.comb(LENGTH, count), LENGTH, dtype=torch.bool)
        for row, places in enumerate(itertools.combinations(range(LENGTH), count)):
            masks[row, list(places)] = True
        with torch.no_grad():
            logits = policy.predict(torch.where(masks, MASK_ID, tokens), prompts.repeat(len(masks))).logits_BLV
        logprob = torch.log_softmax(logits, -1).gather(-1, tokens.expand(len(masks), -1)[..., None]).squeeze(-1)
        found.append(float((logprob * masks).sum(dim=1).mean()) * LENGTH / count)
    return found


def expected_score(costs: list[float], levels: list[Level]) -> float:
    """What the estimate is on average: a level's weight times |M| / L of g."""
    return sum(level.weight * level.num_masked / LENGTH * costs[level.num_masked - 1] for level in levels)


@pytest.mark.parametrize("weights", ["paper", "unbiased"])
def test_the_estimate_is_on_average_what_all_masks_say(weights: LevelWeights) -> None:
    policy = ToyTextPolicy(canvas_length=LENGTH)
    groups = draw_text_groups(policy, entropy_bounded(LENGTH), num_groups=1, group_size=2)
    algorithm, levels = gdpo(policy, level_weights=weights), quadrature_levels(3, LENGTH, weights)
    estimates: list[torch.Tensor] = []
    for batch in token_batches(algorithm, groups, epochs=400):
        scorer = Scorer(policies_for(algorithm, policy), batch, policy.vocabulary)
        with torch.no_grad():
            parts = [
                level.weight * scorer.learner(canvas).sum(dim=1)
                for level, canvas in zip(levels, draw_levels(batch, levels), strict=True)
            ]
        estimates.append(torch.stack(parts).sum(dim=0))
    found = torch.stack(estimates).double()
    for row in range(2):
        costs = mean_cost(policy, groups[0].tokens.tokens_GL[row], groups[0].conditioning)
        error = float(found[:, row].std()) / 400**0.5
        assert float(found[:, row].mean()) == pytest.approx(expected_score(costs, levels), abs=4 * error)
        # The ELBO itself is the mean of g over n = 1..L; three levels of six stand for all.
        elbo = sum(costs) / LENGTH
        assert expected_score(costs, quadrature_levels(3, LENGTH, "unbiased")) == pytest.approx(elbo, rel=0.1)
        # floor(6 t) = 0, 3, 5 of .676, 3, 5.324: the lowest of the nodes is lost, whose weight is 5/18.
        assert expected_score(costs, quadrature_levels(3, LENGTH, "paper")) / elbo < 0.85


def test_the_ratio_is_exactly_1_and_one_number_per_response_after_a_change() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = gdpo(policy)
    policies = policies_for(algorithm, policy)
    for batch in token_batches(algorithm, groups, on_policy=False):
        losses = algorithm.loss(policies, batch)
        assert float(losses.metrics["ratio/deviation_max"].max()) == 0.0
        torch.testing.assert_close(losses.loss_N, -batch.adv_N)
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.1)
    levels = quadrature_levels(3, 8, "paper")
    for batch in token_batches(algorithm, groups, on_policy=False):
        ratio = algorithm.loss(policies, batch).metrics["ratio/mean"]
        gap = torch.zeros(len(batch.keys))
        scorer = Scorer(policies, batch, policy.vocabulary)
        with torch.no_grad():
            for level, canvas in zip(levels, draw_levels(batch, levels), strict=True):
                change = scorer.learner(canvas) - scorer.rollout(canvas)
                gap += level.weight * change.sum(dim=1)
        torch.testing.assert_close(ratio, torch.exp(gap / 8))
        assert (ratio != 1).all()


def test_the_whole_canvas_is_scored_by_masks_of_the_sample_and_the_epoch_alone() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm, levels = gdpo(policy), quadrature_levels(3, 8, "paper")
    (whole,) = token_batches(algorithm, groups, size=64)
    canvases = draw_levels(whole, levels)
    assert [canvas.selected_NL.sum(dim=1).unique().tolist() for canvas in canvases] == [
        [level.num_masked] for level in levels if level.num_masked
    ]
    torch.manual_seed(3)
    parts = [draw_levels(batch, levels)[1].selected_NL for batch in token_batches(algorithm, groups, size=5)]
    assert torch.equal(torch.cat(parts), canvases[1].selected_NL)
    _, second = token_batches(algorithm, groups, size=64, epochs=2)
    assert not torch.equal(draw_levels(second, levels)[1].selected_NL, canvases[1].selected_NL)


def test_more_than_five_nodes_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_nodes"):
        GdpoConfig(num_nodes=6)
