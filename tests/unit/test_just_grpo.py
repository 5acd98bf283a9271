"""JustGRPO: the exact likelihood from left to right, streamed over positions, and rollouts that must be written so."""

from __future__ import annotations

import itertools

import pytest
import torch

from learner.algorithms import make_algorithm
from learner.algorithms.base import LossSetting
from learner.algorithms.just_grpo import JustGrpo, JustGrpoConfig, prefix_canvas
from learner.batching import ABSENT, TokenBatch
from learner.noising import Scorer
from learner.policies import PolicySet
from raylign.errors import ConfigError
from raylign.models.tokens import response_mask
from raylign.samplers import TokenSampler
from raylign.samplers.left_to_right import LeftToRight, LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidence, LowConfidenceConfig
from raylign.types import Needs, RolloutGroup, SampleKey, TokenTrajectory
from tests.text_groups import draw_text_groups, entropy_bounded, policies_for, token_batches
from tests.tiny_models import by_sibling
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy

LENGTH = 8


def just_grpo(policy: ToyTextPolicy, sampler: TokenSampler | None = None) -> JustGrpo:
    chosen = sampler or LeftToRight(LeftToRightConfig(), policy.canvas_length)
    algorithm = make_algorithm(JustGrpoConfig(), LossSetting(chosen, 1.0, policy.vocabulary))
    assert isinstance(algorithm, JustGrpo)
    return algorithm


def written_from_left_to_right(policy: ToyTextPolicy, **options: object) -> list[RolloutGroup]:
    return draw_text_groups(policy, LeftToRight(LeftToRightConfig(), policy.canvas_length), **options)  # type: ignore[arg-type]


def test_the_items_scores_add_up_to_the_rollouts_likelihood() -> None:
    policy = ToyTextPolicy()
    groups = written_from_left_to_right(policy)
    algorithm = just_grpo(policy)
    total: dict[object, float] = {}
    for batch in token_batches(algorithm, groups, size=3):
        scorer = Scorer(policies_for(algorithm, policy), batch, policy.vocabulary)
        score_NL = scorer.learner(prefix_canvas(batch.item_N, LENGTH)).detach()
        assert ((score_NL != 0).sum(dim=1) == 1).all()
        for key, score in zip(batch.keys, score_NL.sum(dim=1).tolist(), strict=True):
            total[key] = total.get(key, 0.0) + score
    expected = {
        rollout.key: float(plain_L[response_mask(tokens_L[None], EOS_ID)[0]].sum())
        for group in groups
        for rollout, plain_L, tokens_L in zip(
            group.rollouts, group.tokens.plain_logprob_GL, group.tokens.tokens_GL, strict=True
        )
    }
    assert total == pytest.approx(expected, abs=1e-5)


def test_the_probabilities_of_all_texts_add_up_to_1() -> None:
    # 4 tokens (pad, end, a, b) on 3 positions: 64 texts. No sum of masked-canvas scores but this one is a likelihood.
    policy = ToyTextPolicy(canvas_length=3, letters="ab")
    alphabet = [token for token in range(policy.vocabulary.size) if token != MASK_ID]
    texts = torch.tensor(list(itertools.product(alphabet, repeat=3)))
    scorer = Scorer(PolicySet(policy, "fp32", Needs.FINAL), batch_of(policy, texts), policy.vocabulary)
    with torch.no_grad():
        score_N = torch.stack(
            [scorer.learner(prefix_canvas(torch.full((len(texts),), place), 3)).sum(dim=1) for place in range(3)]
        ).sum(dim=0)
    assert len(texts) == 64
    assert float(score_N.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert score_N.max() < 0


def batch_of(policy: ToyTextPolicy, tokens_NL: torch.Tensor) -> TokenBatch:
    count, zeros = len(tokens_NL), torch.zeros(len(tokens_NL))
    told = policy.encode("ab").repeat(count)
    blank = torch.zeros(tokens_NL.shape)
    trajectory = TokenTrajectory(tokens_NL, blank.long(), blank, blank, zeros.long(), zeros.long())
    keys = tuple(SampleKey(0, "p", 0, index) for index in range(count))
    valid = torch.ones(count, dtype=torch.bool)
    return TokenBatch(keys, zeros.long(), zeros, valid, 0, told, trajectory, zeros)


def test_positions_after_the_first_end_token_are_no_items() -> None:
    policy = ToyTextPolicy()
    algorithm = just_grpo(policy)
    for group in written_from_left_to_right(policy):
        items = algorithm.items(group, 0, 1)
        for row, tokens in zip(items.tolist(), group.tokens.tokens_GL.tolist(), strict=True):
            end = tokens.index(EOS_ID) + 1 if EOS_ID in tokens else LENGTH
            assert row == [*range(end), *[ABSENT] * (LENGTH - end)]


def test_the_ratio_is_exactly_1_whatever_the_update_and_no_old_policy_is_kept() -> None:
    policy = ToyTextPolicy()
    groups = written_from_left_to_right(policy)
    algorithm = just_grpo(policy)
    assert Needs.OLD not in algorithm.needs
    policies = policies_for(algorithm, policy)
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.5)
    for batch in token_batches(algorithm, groups, on_policy=False):
        losses = algorithm.loss(policies, batch)
        assert losses.metrics["ratio/mean"].tolist() == [1.0] * len(batch.keys)
        assert losses.metrics["ratio/clip_fraction"].tolist() == [0.0] * len(batch.keys)
        torch.testing.assert_close(losses.loss_N, -batch.adv_N / LENGTH)


def test_the_streamed_gradient_is_the_policy_gradient_over_responses_with_an_advantage() -> None:
    # The first group's rewards are equal: its responses neither push nor count.
    policy = ToyTextPolicy()
    groups = written_from_left_to_right(policy, reward=lambda group, sibling: group and by_sibling(group, sibling))
    algorithm = just_grpo(policy)
    shares = [algorithm.shares(group) for group in groups]
    advantages = algorithm.credit(groups)
    assert shares[0].tolist() == pytest.approx([1e-5] * 4)
    assert shares[1].tolist() == [1.0] * 4
    total = float(torch.cat(shares).sum())
    for batch in token_batches(algorithm, groups, size=5):
        (algorithm.loss(policies_for(algorithm, policy), batch).loss_N.sum() / total).backward()
    streamed = gradient(policy)
    terms: list[torch.Tensor] = []
    for group, advantage in zip(groups[1:], advantages[1:], strict=True):
        for tokens, adv in zip(group.tokens.tokens_GL, advantage.adv_G, strict=True):
            for place in range(int(response_mask(tokens[None], EOS_ID).sum())):
                shown = torch.cat([tokens[:place], torch.full((LENGTH - place,), MASK_ID)])
                logits = policy.predict(shown[None], group.conditioning).logits_BLV[0, place]
                terms.append(-adv * torch.log_softmax(logits, 0)[tokens[place]])
    (torch.stack(terms).sum() / (8 * LENGTH)).backward()
    torch.testing.assert_close(streamed, gradient(policy), rtol=1e-3, atol=1e-6)
    assert streamed.abs().max() > 1e-4


def gradient(policy: ToyTextPolicy) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    for parameter in policy.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)


def test_advantages_are_divided_by_the_sample_deviation() -> None:
    # Rewards 0, 0, 0, 1: mean .25, deviation sqrt(3 (.25)^2 + .75^2) / sqrt 3 = .5, so 1.5 up and .5 down.
    policy = ToyTextPolicy()
    groups = written_from_left_to_right(policy, num_groups=1, reward=lambda group, sibling: float(sibling == 3))
    (advantage,) = just_grpo(policy).credit(groups)
    assert advantage.adv_G.tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-3)


def test_rollouts_in_another_order_are_refused() -> None:
    policy = ToyTextPolicy()
    with pytest.raises(ConfigError, match=r"needs rollouts from left to right.*got sampler.type 'entropy_bounded'"):
        just_grpo(policy, entropy_bounded())
    with pytest.raises(ConfigError, match="blocks of 4"):
        just_grpo(policy, LowConfidence(LowConfidenceConfig(block_length=4, num_steps=LENGTH), LENGTH))
    # One position per block is left to right too, as in the released code; so are longer blocks of the sampler itself.
    just_grpo(policy, LowConfidence(LowConfidenceConfig(block_length=1, num_steps=LENGTH), LENGTH))
    just_grpo(policy, LeftToRight(LeftToRightConfig(block_length=4), LENGTH))
