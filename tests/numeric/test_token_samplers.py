"""Text samplers against numbers worked out by hand, and against the definitions they implement."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from raylign.samplers import Candidates, TokenSampler, TokenSamplerConfig, TokenTransition, make_token_sampler
from raylign.samplers.dream import DreamConfig, dream_quotas
from raylign.samplers.entropy_bounded import EntropyBoundedConfig, draw_budgets, within_budget
from raylign.samplers.factor import FactorConfig
from raylign.samplers.left_to_right import LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidenceConfig, ascending_quotas, eos_factor, even_quotas
from raylign.samplers.threshold import ThresholdConfig
from raylign.samplers.tokens import entropy, guided_logits, margin

MASK_ID, EOS_ID = 3, 1


def transition_of(probabilities: list[list[float]], temperature: float = 1.0, top_p: float = 1.0) -> TokenTransition:
    """One row of positions with these token probabilities, and a mask token that has none."""
    padded = [[*row, 0.0] for row in probabilities]
    return TokenTransition.of(torch.tensor([padded]).log(), temperature, top_p)


def choose(sampler: TokenSampler, probabilities: list[list[float]], tokens: list[int], **changes: object) -> list[int]:
    """The positions a rule reveals in one row, all masked unless `masked` says otherwise."""
    masked = changes.pop("masked", [True] * len(tokens))
    fields = {"block": 0, "step": 0, "eos_id": EOS_ID, **changes}
    transition = transition_of(probabilities)
    chosen = sampler.choose(Candidates(transition, torch.tensor([tokens]), torch.tensor([masked]), **fields))  # type: ignore[arg-type]
    return chosen[0].nonzero().squeeze(1).tolist()


def sampler_of(config: TokenSamplerConfig, length: int = 4) -> TokenSampler:
    return make_token_sampler(config, length)


# Drawn token 0 everywhere; its probabilities are .9, .2, .6, .8.
FOUR = [[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.8, 0.1, 0.1]]


def test_frequencies_of_draws_are_the_probabilities() -> None:
    transition = transition_of([[0.5, 0.3, 0.2]] * 20_000)
    uniforms = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(transition.sample(uniforms)[0], minlength=4) / 20_000
    # Three standard errors of a share of .5 among 20 000 draws are .011.
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.011)
    assert counts[MASK_ID] == 0


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_uniform() -> None:
    transition = transition_of([[0.5, 0.25, 0.25]] * 6)
    uniforms = torch.tensor([[0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-53]], dtype=torch.float64)
    assert transition.sample(uniforms).tolist() == [[0, 0, 1, 1, 2, 2]]
    # A token without probability is skipped at its very edge, at either end.
    assert transition_of([[0.0, 1.0, 0.0]] * 2).sample(torch.tensor([[0.0, 1 - 2**-53]])).tolist() == [[1, 1]]


def test_a_tempered_draw_is_scored_as_drawn_and_plainly() -> None:
    # Temperature 1/2 squares the probabilities: .64 and .04 of .68; .8 and .2 remain the bare policy's.
    transition = transition_of([[0.8, 0.2, 0.0]], temperature=0.5)
    tokens = torch.tensor([[1]])
    assert float(transition.logprob(tokens)) == pytest.approx(math.log(0.04 / 0.68), abs=1e-6)
    assert float(transition.plain_logprob(tokens)) == pytest.approx(math.log(0.2), abs=1e-6)
    assert float(transition.confidence(tokens)) == pytest.approx(0.2, abs=1e-6)


def test_top_p_keeps_the_fewest_likeliest_tokens_and_renormalises() -> None:
    probabilities = [[0.5, 0.2, 0.3]]
    # .5 < .6, .5 + .3 >= .6: two tokens, 5/8 and 3/8.
    assert transition_of(probabilities, top_p=0.6).sampled_BLV.exp()[0, 0].tolist() == pytest.approx(
        [0.625, 0.0, 0.375, 0.0]
    )
    assert transition_of(probabilities, top_p=0.4).sampled_BLV.exp()[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert torch.equal(transition_of(probabilities, top_p=0.6).plain_BLV, transition_of(probabilities).plain_BLV)


def test_temperature_0_takes_the_likeliest_with_certainty() -> None:
    transition = transition_of([[0.2, 0.5, 0.3]] * 2, temperature=0.0)
    tokens = transition.sample(torch.tensor([[0.01, 0.99]]))
    assert tokens.tolist() == [[1, 1]]
    assert transition.logprob(tokens).tolist() == [[0.0, 0.0]]
    assert transition.plain_logprob(tokens)[0].tolist() == pytest.approx([math.log(0.5)] * 2)


def test_entropy_and_margin() -> None:
    transition = transition_of([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    assert entropy(transition.untempered_BLV)[0].tolist() == pytest.approx([1.5 * math.log(2), 0.0])
    assert margin(transition.untempered_BLV)[0].tolist() == pytest.approx([0.25, 1.0])


def test_guidance_extrapolates_logits_and_never_answers_the_mask() -> None:
    cond = torch.tensor([[[1.0, 2.0, -math.inf]]])
    uncond = torch.tensor([[[0.0, 4.0, -math.inf]]])
    # un + 3 (cond - un): 0 + 3 = 3 and 4 - 6 = -2; the paper's w is 2.
    assert guided_logits(cond, uncond, 3.0, 2)[0, 0].tolist() == [3.0, -2.0, -math.inf]
    assert torch.equal(guided_logits(cond, uncond, 1.0, 2), cond)
    transition = TokenTransition.of(guided_logits(cond, uncond, 3.0, 2), 1.0, 1.0, cond)
    token = torch.tensor([[1]])
    assert float(transition.logprob(token)) == pytest.approx(-math.log(1 + math.exp(5)), abs=1e-6)
    assert float(transition.plain_logprob(token)) == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize(
    ("count", "num_steps", "expected"),
    [(8, 4, [2, 2, 2, 2]), (8, 3, [3, 3, 2]), (7, 2, [4, 3]), (4, 4, [1, 1, 1, 1]), (5, 1, [5])],
)
def test_even_quotas_give_the_remainder_to_the_first_calls(count: int, num_steps: int, expected: list[int]) -> None:
    assert even_quotas(count, num_steps) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1]), (7, [1, 2, 4]), (8, [1, 2, 4, 1]), (32, [1, 2, 4, 8, 16, 1])]
)
def test_ascending_steps_double(count: int, expected: list[int]) -> None:
    assert ascending_quotas(count) == expected


def test_low_confidence_reveals_the_surest_drawn_tokens() -> None:
    sampler = sampler_of(LowConfidenceConfig(num_steps=2))
    assert choose(sampler, FOUR, [0, 0, 0, 0]) == [0, 3]
    assert choose(sampler, FOUR, [0, 0, 0, 0], masked=[False, True, True, False]) == [1, 2]
    # It is the drawn token's probability: .1 at position 0 and .5 at position 1 now.
    assert choose(sampler, FOUR, [1, 1, 0, 0]) == [2, 3]


def test_early_end_tokens_are_held_back_and_late_ones_are_not() -> None:
    assert [eos_factor(step, 5, 0.2) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert eos_factor(0, 1, 0.2) == 1.0
    sampler = sampler_of(LowConfidenceConfig(eos_rejection=True, eos_factor_min=0.5))
    # An end token of .9: at .5 * .9 = .45 less sure than .6 in the first call; at 5/6 * .9 = .75 in the third.
    probabilities = [[0.1, 0.9, 0.0], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.5, 0.3]]
    assert choose(sampler, probabilities, [EOS_ID, 0, 0, 0], step=0) == [1]
    assert choose(sampler, probabilities, [EOS_ID, 0, 0, 0], step=2) == [0]
    blocks = sampler_of(LowConfidenceConfig(eos_rejection=True, eos_factor_min=0.5, block_length=2))
    # Two blocks of two calls: the factor goes on where the block before it ended, 1/2, 2/3 | 5/6, 1.
    assert choose(blocks, probabilities[:2], [EOS_ID, 0], block=1, step=0) == [0]
    assert choose(blocks, probabilities[:2], [EOS_ID, 0], block=0, step=0) == [1]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.95, [0]), (0.9, [0]), (0.7, [0, 3]), (0.5, [0, 2, 3]), (0.0, [0, 1, 2, 3])]
)
def test_the_threshold_reveals_what_is_sure_and_always_the_surest(threshold: float, expected: list[int]) -> None:
    assert choose(sampler_of(ThresholdConfig(threshold=threshold)), FOUR, [0, 0, 0, 0]) == expected


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        # Bounds 1 - f/2, 1 - f/3, 1 - f/4, 1 - f/5 for confidences .9, .8, .6, .2.
        (0.1, [0]),  # .95: none passes, the surest is taken
        (0.3, [0]),  # .85, .9
        (0.7, [0, 3]),  # .65, .767, .825
        (1.0, [0, 3]),  # .5, .667, .75
        (2.0, [0, 2, 3]),  # 0, .333, .5, .6
        (4.5, [0, 1, 2, 3]),  # the last bound is .1
    ],
)
def test_the_factor_asks_for_more_confidence_the_more_it_reveals(factor: float, expected: list[int]) -> None:
    assert choose(sampler_of(FactorConfig(factor=factor)), FOUR, [0, 0, 0, 0]) == expected


def test_the_factors_ranks_count_masked_positions_only() -> None:
    # Without position 0 the ranks are .8, .6, .2 with bounds .5, .667, .75.
    masked = [False, True, True, True]
    assert choose(sampler_of(FactorConfig(factor=1.0)), FOUR, [0, 0, 0, 0], masked=masked) == [3]


@pytest.mark.parametrize(
    ("gamma", "expected"),
    # Rising entropies .125, .25, .5, 1 at positions 1, 3, 0, 2; sums of those before each are 0, .125, .375, .875.
    [(0.0, [1]), (0.124, [1]), (0.125, [1, 3]), (0.374, [1, 3]), (0.375, [0, 1, 3]), (0.875, [0, 1, 2, 3])],
)
def test_the_budget_bounds_the_sum_less_the_maximum(gamma: float, expected: list[int]) -> None:
    entropies = torch.tensor([[0.5, 0.125, 1.0, 0.25]])
    chosen = within_budget(entropies, torch.ones(1, 4, dtype=torch.bool), torch.tensor([gamma]))
    assert chosen[0].nonzero().squeeze(1).tolist() == expected


def test_the_budgets_prefix_is_the_largest_that_the_definition_allows() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        entropies, gamma = torch.rand(1, 6, generator=draw), torch.rand(1, generator=draw) * 2
        masked = torch.rand(1, 6, generator=draw) < 0.7
        masked[0, 0] = True
        rising = sorted(entropies[masked].double().tolist())
        sizes = [n for n in range(1, len(rising) + 1) if sum(rising[:n]) - rising[n - 1] <= float(gamma)]
        chosen = within_budget(entropies, masked, gamma)
        assert int(chosen.sum()) == max(sizes)
        assert sorted(entropies[chosen].double().tolist()) == rising[: max(sizes)]
        assert not bool((chosen & ~masked).any())


def test_an_infinite_budget_reveals_all_and_certain_positions_are_free() -> None:
    everything = torch.ones(1, 4, dtype=torch.bool)
    budgets = torch.tensor([0.0])
    assert within_budget(torch.tensor([[0.0, 0.7, 0.0, 0.9]]), everything, budgets).tolist() == [
        [True, True, True, False]
    ]
    assert bool(within_budget(torch.rand(1, 4), everything, torch.tensor([math.inf])).all())
    sampler = sampler_of(EntropyBoundedConfig())
    assert choose(sampler, FOUR, [0, 0, 0, 0], gamma_B=torch.tensor([0.0])) == [0]


def test_drawn_budgets_are_log_normal_and_clamped() -> None:
    config = EntropyBoundedConfig(gamma=0.2, budget="sampled", budget_std=0.5)
    draws = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    logs = draw_budgets(config, torch.full((4000,), 0.3), draws).double().log()
    # Three standard errors of the mean are .024; the clamps are 3.1 and 6.5 deviations away.
    assert float(logs.mean()) == pytest.approx(math.log(0.2) + 0.3, abs=0.024)
    assert float(logs.std()) == pytest.approx(0.5, abs=0.024)
    high = draw_budgets(config, torch.full((5,), 99.0), draws[:5])
    assert high.tolist() == pytest.approx([1.5] * 5)
    assert draw_budgets(config, torch.full((5,), -99.0), draws[:5]).tolist() == pytest.approx([0.005] * 5)


@pytest.mark.parametrize(
    ("count", "num_steps", "expected"),
    [
        # 8 * .24975 = 1.998, 7 * .33289 = 2.33, 5 * .49900 = 2.495, and the rest.
        (8, 4, [1, 2, 2, 3]),
        # 8 * .124875 = .999 reveals nothing: that call is not made.
        (8, 8, [1, 1, 1, 1, 1, 1, 2]),
        (8, 1, [8]),
    ],
)
def test_dreams_schedule(count: int, num_steps: int, expected: list[int]) -> None:
    assert dream_quotas(count, num_steps, 1e-3) == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("maskgit_plus", [0, 2]),  # drawn tokens' probabilities .9, .1, .7, .4
        ("topk_margin", [0, 3]),  # margins .8, .05, .4, .5
        ("entropy", [0, 2]),  # entropies .33, 1.06, .61, .94
    ],
)
def test_dreams_orders(order: str, expected: list[int]) -> None:
    sampler = sampler_of(DreamConfig(order=order, num_steps=2, eps=0.5))  # type: ignore[arg-type]
    probabilities = [[0.9, 0.1, 0.0], [0.45, 0.4, 0.15], [0.7, 0.3, 0.0], [0.65, 0.15, 0.2]]
    tokens = [0, 2, 0, 2]
    # Times 1, .75, .5: one position first, three last.
    assert dream_quotas(4, 2, 0.5) == [1, 3]
    assert choose(sampler, probabilities, tokens) == [0]
    masked = [False, True, True, True]
    left = make_token_sampler(DreamConfig(order=order, num_steps=2, eps=0.5), 4)  # type: ignore[arg-type]
    assert [0, *choose(left, probabilities, tokens, masked=masked)] == expected


def test_dreams_random_orders_follow_their_draws() -> None:
    order_BL = torch.tensor([[0.2, 0.9, 0.4, 0.1]], dtype=torch.float64)
    origin = sampler_of(DreamConfig(order="origin", num_steps=2, eps=0.5))
    assert origin.draws_order
    assert choose(origin, FOUR, [0, 0, 0, 0], order_BL=order_BL) == [1]
    assert not sampler_of(DreamConfig()).draws_order
    # At temperature 1 with one position to reveal, position k is taken with probability exp(c_k) / sum exp(c).
    drawn = sampler_of(DreamConfig(order="maskgit_plus", alg_temp=1.0, num_steps=2, eps=0.5))
    transition = transition_of(FOUR)
    confidences = torch.tensor([0.9, 0.2, 0.6, 0.8])
    count = 6000
    everyone = TokenTransition(*(getattr(transition, f).expand(count, -1, -1) for f in TokenTransition.__slots__))
    noise = torch.rand(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zeros = torch.zeros(count, 4, dtype=torch.int64)
    chosen = drawn.choose(Candidates(everyone, zeros, zeros == 0, 0, 0, EOS_ID, order_BL=noise))
    assert bool((chosen.sum(dim=1) == 1).all())
    shares = chosen.double().mean(dim=0).tolist()
    assert shares == pytest.approx(torch.softmax(confidences, dim=0).tolist(), abs=0.018)


def test_left_to_right_takes_the_leftmost_mask() -> None:
    sampler = sampler_of(LeftToRightConfig(block_length=4))
    assert choose(sampler, FOUR, [0, 0, 0, 0]) == [0]
    assert choose(sampler, FOUR, [0, 0, 0, 0], masked=[False, False, True, True]) == [2]


def test_equal_scores_go_to_the_left() -> None:
    sampler = sampler_of(LowConfidenceConfig(num_steps=2))
    for masked in itertools.combinations(range(4), 3):
        flags = [place in masked for place in range(4)]
        assert choose(sampler, [[0.5, 0.5, 0.0]] * 4, [0] * 4, masked=flags) == list(masked[:2])
