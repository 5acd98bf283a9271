"""Which canvases are drawn, by which keys, and what a scorer says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learner.algorithms.d1 import D1Config
from learner.algorithms.spg import SpgConfig, block_canvases
from learner.algorithms.unigrpo import UniGrpoConfig
from learner.batching import TokenBatch
from learner.noising import (
    Ask,
    Scorer,
    all_masked,
    group_uniforms,
    item_generators,
    masked_at,
    prompt_mask,
    random_masks,
)
from learner.policies import PolicySet
from raylign.keys import generator
from raylign.types import Needs
from tests.text_groups import draw_text_groups, policies_for, text_algorithm, token_batches
from tests.toy_text import EOS_ID, FIRST_LETTER_ID, MASK_ID, ToyTextPolicy


def batch_of(policy: ToyTextPolicy, num_groups: int = 3, epochs: int = 1) -> list[TokenBatch]:
    """One batch per epoch of every row."""
    algorithm = text_algorithm(D1Config(), policy, epochs=epochs)
    return token_batches(algorithm, draw_text_groups(policy, num_groups=num_groups), 4 * num_groups, epochs=epochs)


def scorer_of(policy: ToyTextPolicy, batch: TokenBatch) -> Scorer:
    return Scorer(PolicySet(policy, "fp32", Needs.OLD | Needs.REFERENCE), batch, policy.vocabulary)


def test_random_masks_are_of_the_size_and_inside() -> None:
    eligible = torch.tensor([[True, True, False, True]] * 300)
    count = torch.tensor([0, 1, 3] * 100)
    masks = random_masks(eligible, count, [generator(index) for index in range(300)])
    assert torch.equal(masks.sum(dim=1), count)
    assert not bool((masks & ~eligible).any())
    # Of the hundred single ones, each eligible position has its share.
    assert masks[1::3].sum(dim=0).tolist() == pytest.approx([33, 33, 0, 33], abs=14)


def test_prompts_are_hidden_by_key_whatever_padding_is_beside_them() -> None:
    policy = ToyTextPolicy()
    (batch,) = batch_of(policy)
    hidden = prompt_mask(batch, 0.5, item_generators(batch, "prompt_mask"))
    assert not bool((hidden & ~batch.prompts.real_PL).any())
    assert bool(hidden.any())
    assert bool((batch.prompts.real_PL & ~hidden).any())
    wider = replace(
        batch.prompts,
        ids_PL=torch.nn.functional.pad(batch.prompts.ids_PL, (3, 0)),
        real_PL=torch.nn.functional.pad(batch.prompts.real_PL, (3, 0)),
    )
    padded = prompt_mask(replace(batch, prompts=wider), 0.5, item_generators(batch, "prompt_mask"))
    assert torch.equal(padded[:, 3:], hidden)
    assert not bool(padded[:, :3].any())


def test_all_masked_hides_the_response_and_some_of_the_prompt_anew_in_each_epoch() -> None:
    first, second = batch_of(ToyTextPolicy(), epochs=2)
    assert (first.epoch, second.epoch) == (0, 1)
    canvas = all_masked(first, 0.3)
    assert not bool(canvas.visible_NL.any())
    assert bool(canvas.selected_NL.all())
    again, later = all_masked(first, 0.3).hidden_NP, all_masked(second, 0.3).hidden_NP
    assert canvas.hidden_NP is not None
    assert again is not None
    assert later is not None
    assert torch.equal(canvas.hidden_NP, again)
    assert not torch.equal(canvas.hidden_NP, later)
    assert all_masked(first).hidden_NP is None


def test_generators_are_keyed_by_sample_purpose_epoch_and_item() -> None:
    (batch,) = batch_of(ToyTextPolicy())

    def draws(some: TokenBatch, purpose: str = "a", with_item: bool = True) -> list[float]:
        return [float(torch.rand((), generator=one)) for one in item_generators(some, purpose, with_item)]

    base = draws(batch)
    assert draws(batch) == base
    assert len(set(base)) == 12
    later, other = replace(batch, epoch=1), replace(batch, item_N=batch.item_N + 1)
    for changed in (draws(batch, "b"), draws(later), draws(other)):
        assert not set(base) & set(changed)
    assert draws(other, with_item=False) == base


def test_siblings_share_a_draw_and_prompts_do_not() -> None:
    first, second = batch_of(ToyTextPolicy(), epochs=2)
    values = group_uniforms(first, "rate").view(3, 4)
    assert bool((values == values[:, :1]).all())
    assert len(values[:, 0].unique()) == 3
    assert not bool((group_uniforms(second, "rate").view(3, 4) == values).any())
    assert not bool((group_uniforms(first, "other").view(3, 4) == values).any())


def test_a_scorer_scores_selected_tokens_of_the_canvas_alone() -> None:
    policy = ToyTextPolicy()
    (batch,) = batch_of(policy)
    scorer = scorer_of(policy, batch)
    masked = random_masks(torch.ones(12, 8, dtype=torch.bool), torch.full((12,), 3), item_generators(batch, "some"))
    scores = scorer.learner(masked_at(masked))
    tokens = batch.tokens.tokens_GL
    shown = torch.where(masked, MASK_ID, tokens)
    logprob = torch.log_softmax(policy.predict(shown, batch.prompts).logits_BLV, dim=-1)
    expected = logprob.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(scores[masked], expected[masked])
    assert not bool(scores[~masked].any())
    # The log-prob of the mask token is -inf; a row that only fills up may hold it, and must not spoil a gradient.
    filler = replace(batch, tokens=replace(batch.tokens, tokens_GL=tokens.index_fill(0, torch.tensor([3]), MASK_ID)))
    values = scorer_of(policy, filler).learner(masked_at(masked & (torch.arange(12) != 3)[:, None]))
    values.sum().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters().values()]
    assert all(torch.isfinite(one).all() for one in gradients if one is not None)


def test_counted_tokens_end_with_the_first_end_token() -> None:
    policy = ToyTextPolicy()
    (batch,) = batch_of(policy, num_groups=1)
    tokens = torch.full((4, 8), FIRST_LETTER_ID)
    tokens[1, 2], tokens[1, 5], tokens[2, 0], tokens[3, 7] = EOS_ID, EOS_ID, EOS_ID, EOS_ID
    scorer = scorer_of(policy, replace(batch, tokens=replace(batch.tokens, tokens_GL=tokens)))
    assert scorer.counted_NL.sum(dim=1).tolist() == [8, 3, 1, 8]
    assert scorer.counted_NL[1].tolist() == [True] * 3 + [False] * 5


def test_relatives_answer_with_their_own_weights_and_without_gradient() -> None:
    policy = ToyTextPolicy()
    (batch,) = batch_of(policy)
    scorer, canvas = scorer_of(policy, batch), all_masked(batch)
    before = scorer.learner(canvas).detach()
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.5)
    for relative in (scorer.reference, scorer.rollout):
        assert torch.equal(relative(canvas), before)
        assert not relative(canvas).requires_grad
    now = scorer.learner(canvas)
    assert now.requires_grad
    assert not torch.allclose(now, before)


@pytest.mark.parametrize("on_policy", [True, False])
def test_both_estimates_cost_a_forward_less_while_they_are_one_policy(on_policy: bool) -> None:
    policy = ToyTextPolicy()
    (batch,) = batch_of(policy)
    scorer = scorer_of(policy, replace(batch, on_policy=on_policy))
    canvases = [all_masked(batch), masked_at(torch.arange(8).expand(12, 8) < 4)]

    def estimate(ask: Ask) -> torch.Tensor:
        return torch.stack([ask(canvas) for canvas in canvases]).mean(dim=0)

    calls = policy.num_calls
    learner, rollout = scorer.both(estimate)
    assert policy.num_calls - calls == (2 if on_policy else 4)
    assert torch.equal(learner, rollout)
    assert learner.requires_grad
    assert not rollout.requires_grad


def test_unigrpo_masks_grow_over_the_passes_to_all() -> None:
    policy = ToyTextPolicy()
    algorithm = text_algorithm(UniGrpoConfig(kl_weight=0), policy, epochs=4)
    policies = policies_for(algorithm, policy)
    batches = token_batches(algorithm, draw_text_groups(policy), 12, epochs=4)
    shares = torch.stack([algorithm.loss(policies, batch).metrics["mask/share"] for batch in batches])
    assert bool((shares.diff(dim=0) >= 0).all())
    assert bool((shares[-1] == 1).all())
    assert bool((shares > 0).all())
    assert len(shares[0].unique()) > 3


def test_spg_canvases_are_causal_in_blocks() -> None:
    policy = ToyTextPolicy(canvas_length=12)
    (batch,) = batch_of(policy, num_groups=6)
    tokens = torch.full((24, 12), FIRST_LETTER_ID)
    tokens[1::2, 5] = EOS_ID
    scorer = scorer_of(policy, replace(batch, tokens=replace(batch.tokens, tokens_GL=tokens)))
    canvases = block_canvases(batch, scorer.counted_NL, 2, 4, 0.0)
    starts: list[set[int]] = [set() for _ in range(24)]
    for canvas in canvases:
        assert canvas.hidden_NP is not None
        assert not bool(canvas.hidden_NP.any())
        assert torch.equal(canvas.selected_NL, ~canvas.visible_NL & scorer.counted_NL)
        for row in range(24):
            masked = (~canvas.visible_NL[row]).tolist()
            counted = 6 if row % 2 else 12
            assert all(masked[counted:])
            block = masked.index(True) // 4
            starts[row].add(block)
            assert block * 4 < counted
            assert all(masked[(block + 1) * 4 :])
    # Two canvases take two blocks where that many hold counted tokens in three; blocks vary between rows.
    assert all(len(some) == 2 for some in starts[::2])
    assert {0, 1, 2} == set().union(*starts)
    assert {0, 1} == set().union(*starts[1::2])


def test_spg_hides_some_of_the_prompt_and_of_earlier_blocks() -> None:
    policy = ToyTextPolicy(canvas_length=12)
    (batch,) = batch_of(policy, num_groups=6)
    everywhere = torch.ones(24, 12, dtype=torch.bool)
    clean = block_canvases(batch, everywhere, 1, 4, 0.0)[0]
    noisy = block_canvases(batch, everywhere, 1, 4, 0.5)[0]
    assert not bool((noisy.visible_NL & ~clean.visible_NL).any())
    assert bool((clean.visible_NL & ~noisy.visible_NL).any())
    assert noisy.hidden_NP is not None
    assert bool(noisy.hidden_NP.any())
    assert not bool((noisy.hidden_NP & ~batch.prompts.real_PL).any())


def test_spg_takes_blocks_from_the_sampler_unless_told() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    found: list[torch.Tensor] = []
    for config in (SpgConfig(), SpgConfig(block_length=8), SpgConfig(block_length=2)):
        algorithm = text_algorithm(config, policy)
        (batch,) = token_batches(algorithm, groups, 12)
        found.append(algorithm.loss(policies_for(algorithm, policy), batch).loss_N)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
