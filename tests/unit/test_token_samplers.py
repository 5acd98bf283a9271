"""Text samplers' configurations, what a canvas must fit, and the pieces that a step is made of."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from raylign.config import Config, parse_config
from raylign.errors import ConfigError, ShapeError
from raylign.samplers import SamplerConfig, TokenSamplerConfig, TokenTransition, make_token_sampler
from raylign.samplers.dream import DreamConfig
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.left_to_right import LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidence, LowConfidenceConfig
from raylign.samplers.threshold import ThresholdConfig
from raylign.samplers.tokens import ranked, top


class Holder(Config):
    """A configuration with a sampler, as a run's."""

    sampler: SamplerConfig = EulerOdeConfig()


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"type": "entropy_bounded", "gamma": -0.1}, "sampler.entropy_bounded.gamma.*greater than or equal to 0"),
        ({"type": "entropy_bounded", "gamma": 2.0, "budget": "sampled"}, "gamma 2.0 is the median of sampled budgets"),
        ({"type": "entropy_bounded", "gamma": 0, "budget": "learned"}, "must lie in"),
        ({"type": "entropy_bounded", "min_gamma": 2.0}, "min_gamma 2.0 is above max_gamma 1.5"),
        ({"type": "entropy_bounded", "num_steps": 4}, "unknown key"),
        ({"type": "low_confidence", "num_steps": 0}, "num_steps"),
        ({"type": "low_confidence", "num_steps": 4, "ascending_steps": True}, "num_steps = 4 means nothing"),
        ({"type": "low_confidence", "top_p": 1.5}, "top_p"),
        ({"type": "low_confidence", "cache": "full"}, "cache"),
        ({"type": "threshold", "threshold": 1.5}, "threshold"),
        ({"type": "threshold", "eos_rejection": True}, "unknown key"),
        ({"type": "factor", "factor": -1}, "factor"),
        ({"type": "dream", "block_length": 4}, "unknown key"),
        ({"type": "dream", "order": "origin", "alg_temp": 0.5}, "'origin' is random already"),
        ({"type": "left_to_right", "temperature": -0.5}, "temperature"),
    ],
)
def test_a_text_sampler_that_means_nothing_is_refused_when_it_is_read(bad: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(Holder, {"sampler": bad}, "the test")


def test_a_sampler_table_without_a_type_is_still_the_image_default() -> None:
    assert parse_config(Holder, {"sampler": {"num_steps": 3}}, "the test").sampler == EulerOdeConfig(num_steps=3)
    assert isinstance(TypeAdapter(SamplerConfig).validate_python({"type": "dream"}), DreamConfig)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (ThresholdConfig(block_length=3), "block_length 3 does not divide the model's canvas of 8"),
        (LeftToRightConfig(block_length=16), "block_length 16 does not divide"),
        (LowConfidenceConfig(block_length=4, num_steps=3), r"num_steps 3 must be a multiple of the 2 block\(s\)"),
        (LowConfidenceConfig(num_steps=9), "at most the canvas of 8"),
        (DreamConfig(num_steps=9), "more than the model's canvas of 8"),
    ],
)
def test_what_does_not_fit_the_models_canvas_is_refused(config: TokenSamplerConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_token_sampler(config, 8)


def test_steps_are_shared_out_among_blocks() -> None:
    sampler = make_token_sampler(LowConfidenceConfig(block_length=4, num_steps=6), 8)
    assert isinstance(sampler, LowConfidence)
    assert (sampler.block_length, sampler.quotas, sampler.num_steps) == (4, [2, 1, 1], 6)
    unset = make_token_sampler(LowConfidenceConfig(), 8)
    assert isinstance(unset, LowConfidence)
    assert (unset.block_length, unset.quotas) == (8, [1] * 8)
    assert make_token_sampler(LeftToRightConfig(), 8).block_length == 1
    assert make_token_sampler(DreamConfig(), 8).block_length == 8


def test_the_defaults_are_the_papers() -> None:
    assert ThresholdConfig().threshold == 0.9
    budget = EntropyBoundedConfig()
    assert (budget.budget, budget.budget_std, budget.min_gamma, budget.max_gamma) == ("fixed", 0.5, 0.005, 1.5)
    assert (DreamConfig().eps, DreamConfig().alg_temp) == (1e-3, 0.0)


def test_one_tensor_serves_where_distributions_are_equal() -> None:
    logits = torch.randn(2, 3, 5)
    plain = TokenTransition.of(logits, 1.0, 1.0)
    assert plain.sampled_BLV is plain.untempered_BLV is plain.plain_BLV
    assert TokenTransition.of(logits, 0.5, 1.0).sampled_BLV is not plain.sampled_BLV


def test_the_distribution_of_half_precision_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(2, 3, 5).to(torch.bfloat16)
    transition = TokenTransition.of(logits, 0.7, 0.9)
    exact = TokenTransition.of(logits.float(), 0.7, 0.9)
    assert transition.sampled_BLV.dtype == torch.float32
    assert torch.equal(transition.sampled_BLV, exact.sampled_BLV)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.3, 1.0), (1.7, 0.8), (1.0, 0.2), (0.0, 1.0)])
def test_what_is_drawn_has_the_log_prob_of_the_distribution_it_was_drawn_from(temperature: float, top_p: float) -> None:
    logits = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0))
    transition = TokenTransition.of(logits, temperature, top_p)
    torch.testing.assert_close(transition.sampled_BLV.exp().sum(dim=-1), torch.ones(4, 6))
    tokens = transition.sample(torch.rand(4, 6, generator=torch.Generator().manual_seed(1)))
    logprob = transition.logprob(tokens)
    assert bool(torch.isfinite(logprob).all())
    for row, place in [(0, 0), (1, 5), (3, 2)]:
        expected = transition.sampled_BLV[row, place, tokens[row, place]]
        assert logprob[row, place] == expected
        bare = torch.log_softmax(logits[row, place], dim=0)[tokens[row, place]]
        torch.testing.assert_close(transition.plain_logprob(tokens)[row, place], bare)


def test_large_vocabularies_are_sampled_in_parts_that_do_not_show() -> None:
    # 3 rows of 4 x 2^22 probabilities are more than one part holds.
    row = torch.randn(1, 1, 2**22, generator=torch.Generator().manual_seed(0)).expand(3, 4, -1)
    transition = TokenTransition(row, row, row)
    uniforms = torch.tensor([[0.1, 0.4, 0.7, 0.9]]).repeat(3, 1)
    tokens = transition.sample(uniforms)
    assert torch.equal(tokens[0], tokens[2])
    assert bool((tokens[0].diff() > 0).all())


def test_probabilities_that_are_no_numbers_give_some_token_and_no_log_prob() -> None:
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 2] = torch.nan
    transition = TokenTransition.of(logits, 1.0, 1.0)
    tokens = transition.sample(torch.full((2, 1), 0.6))
    assert int(tokens[1]) == 2
    assert torch.isfinite(transition.logprob(tokens)).tolist() == [[False], [True]]


def test_logits_of_the_wrong_rank_are_refused() -> None:
    with pytest.raises(ShapeError, match="logits_BLV"):
        TokenTransition.of(torch.zeros(2, 4), 1.0, 1.0)


def test_the_best_are_taken_per_row_and_from_masked_positions_only() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7], [-torch.inf, 0.2, -torch.inf]])
    masked = torch.tensor([[False, True, True], [True, False, True]])
    assert top(scores, masked, 1).tolist() == [[False, True, False], [True, False, False]]
    assert top(scores, masked, torch.tensor([2, 1])).tolist() == [[False, True, True], [True, False, False]]
    # A masked position comes before every other, even one with the worst of scores.
    assert ranked(scores, masked).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert top(scores, masked, 3).tolist() == masked.tolist()


def test_a_negative_budget_is_a_validation_error() -> None:
    with pytest.raises(ValidationError):
        EntropyBoundedConfig(gamma=-1.0)
