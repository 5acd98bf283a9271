"""Scoring along a recorded trajectory: its sum is the rollout's log-prob, its average the paper's; limits of 2-MF."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.algorithms.trajectory import Trajectory, TrajectoryConfig
from learner.batching import ABSENT, TokenBatch
from learner.noising import Scorer, all_masked
from learner.policies import PolicySet
from learner.trajectory_canvases import last_steps, merged_steps, step_canvas, two_stage_canvases
from raylign.models.tokens import response_mask
from raylign.samplers import TokenSampler
from raylign.samplers.left_to_right import LeftToRight, LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidence, LowConfidenceConfig
from raylign.types import Needs, RolloutGroup
from tests.text_groups import draw_text_groups, entropy_bounded, policies_for, text_algorithm, token_batches
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy

LENGTH = 8
SAMPLERS: dict[str, TokenSampler] = {
    "entropy_bounded": entropy_bounded(),
    "stopping_early": entropy_bounded(gamma=1.5, stop_at_eos=True),
    "blocks": LowConfidence(LowConfidenceConfig(block_length=4, num_steps=4), LENGTH),
    "left_to_right": LeftToRight(LeftToRightConfig(), LENGTH),
}


def trajectory(policy: ToyTextPolicy, **options: Any) -> Trajectory:
    algorithm = text_algorithm(TrajectoryConfig(**options), policy)
    assert isinstance(algorithm, Trajectory)
    return algorithm


def whole(groups: list[RolloutGroup]) -> TokenBatch:
    """All samples as one batch."""
    algorithm = trajectory(ToyTextPolicy(), merge_steps=LENGTH)
    (batch,) = token_batches(algorithm, groups, size=64)
    return batch


def scorer_for(policy: ToyTextPolicy, batch: TokenBatch) -> Scorer:
    return Scorer(PolicySet(policy, "fp32", Needs.FINAL), batch, policy.vocabulary)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_scores_along_the_trajectory_are_the_rollouts_own(name: str) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, SAMPLERS[name])
    algorithm = trajectory(policy, merge_steps=1)
    expected = {
        rollout.key: torch.where(response_mask(tokens_L, EOS_ID), plain_L, 0.0)
        for group in groups
        for rollout, tokens_L, plain_L in zip(
            group.rollouts,
            group.tokens.tokens_GL.unsqueeze(1),
            group.tokens.plain_logprob_GL.unsqueeze(1),
            strict=True,
        )
    }
    found = {key: torch.zeros(1, LENGTH) for key in expected}
    for batch in token_batches(algorithm, groups):
        scorer = scorer_for(policy, batch)
        merged_NL = merged_steps(batch.tokens.reveal_step_GL, scorer.counted_NL, 1)
        score_NL = scorer.learner(step_canvas(batch.tokens.reveal_step_GL, merged_NL, batch.item_N)).detach()
        for key, score_L in zip(batch.keys, score_NL, strict=True):
            found[key] += score_L
    for key, score in found.items():
        torch.testing.assert_close(score, expected[key], atol=1e-5, rtol=0)
        assert float(score.sum()) == pytest.approx(float(expected[key].sum()), abs=1e-5)
    assert all(float(score.sum()) < 0 for score in found.values())


def test_the_groups_have_early_ends_and_unequal_numbers_of_steps() -> None:
    # What the tests above and below would not test otherwise.
    groups = draw_text_groups(ToyTextPolicy(), SAMPLERS["stopping_early"])
    lengths = {int(n) for group in groups for n in response_mask(group.tokens.tokens_GL, EOS_ID).sum(dim=1)}
    assert len(lengths) > 2
    assert min(lengths) < LENGTH
    items = trajectory(ToyTextPolicy(), merge_steps=1).items(groups[0], 0, 1)
    assert (items == ABSENT).any()


def test_steps_are_merged_in_the_order_of_those_that_revealed_what_counts() -> None:
    reveal = torch.tensor([[3, 0, 0, 5, 1, 5], [2, 2, 0, 1, 0, 1]])
    counted = torch.tensor([[True, True, True, True, True, False], [True, True, False, False, False, False]])
    # Row 0: counted steps 0, 1, 3, 5 become 0, 0, 1, 1 two at a time. Row 1: only step 2 counts.
    assert merged_steps(reveal, counted, 2).tolist() == [[1, 0, 0, 1, 0, -1], [0, 0, -1, -1, -1, -1]]
    assert merged_steps(reveal, counted, 1).tolist() == [[2, 0, 0, 3, 1, -1], [0, 0, -1, -1, -1, -1]]
    assert merged_steps(reveal, counted, 9).amax(dim=1).tolist() == [0, 0]
    canvas = step_canvas(reveal, merged_steps(reveal, counted, 2), torch.tensor([1, 0]))
    # Row 0, second item: steps 0 and 1 are shown. Row 1: steps 0 and 1 had been revealed, though they do not count.
    assert canvas.visible_NL.int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert canvas.selected_NL.int().tolist() == [[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert last_steps(reveal, counted).tolist() == [5, 2]


def test_two_stages_at_the_last_step_are_d1_without_prompt_masking() -> None:
    policy = ToyTextPolicy()
    batch = whole(draw_text_groups(policy))
    scorer = scorer_for(policy, batch)
    counted = scorer.counted_NL
    reveal = batch.tokens.reveal_step_GL
    early, late = two_stage_canvases(reveal, counted, last_steps(reveal, counted))
    score = scorer.learner(early) + scorer.learner(late)
    d1 = torch.where(counted, scorer.learner(all_masked(batch)), 0.0)
    assert not late.selected_NL.any()
    torch.testing.assert_close(score, d1, atol=0, rtol=0)


def test_two_stages_just_before_each_token_are_the_trajectory() -> None:
    policy = ToyTextPolicy()
    batch = whole(draw_text_groups(policy))
    scorer = scorer_for(policy, batch)
    counted, reveal = scorer.counted_NL, batch.tokens.reveal_step_GL
    found = torch.zeros(reveal.shape)
    for tau in range(-1, int(reveal.max())):
        _, late = two_stage_canvases(reveal, counted, torch.full((len(reveal),), tau))
        found = torch.where(reveal == tau + 1, scorer.learner(late).detach(), found)
    torch.testing.assert_close(found, torch.where(counted, batch.tokens.plain_logprob_GL, 0.0), atol=1e-5, rtol=0)


def written_out(policy: ToyTextPolicy, groups: list[RolloutGroup], algorithm: Trajectory) -> torch.Tensor:
    """-A log p of every trained token with the weight its normaliser gives it, from canvases filled in by hand."""
    merge, normaliser = algorithm.config.merge_steps, algorithm.config.normaliser
    responses: list[list[torch.Tensor]] = []
    for group, advantage in zip(groups, algorithm.credit(groups), strict=True):
        for row, adv in enumerate(advantage.adv_G):
            tokens, steps = group.tokens.tokens_GL[row].tolist(), group.tokens.reveal_step_GL[row].tolist()
            end = tokens.index(EOS_ID) + 1 if EOS_ID in tokens else LENGTH
            order = sorted(set(steps[:end]))
            canvases: list[torch.Tensor] = []
            for start in range(0, len(order), merge):
                steps_here = order[start : start + merge]
                shown = [t if s < steps_here[0] else MASK_ID for t, s in zip(tokens, steps, strict=True)]
                logits = policy.predict(torch.tensor([shown]), group.conditioning).logits_BLV[0]
                places = [k for k in range(end) if steps[k] in steps_here]
                canvases.append(torch.stack([-adv * torch.log_softmax(logits[k], 0)[tokens[k]] for k in places]))
            responses.append(canvases)
    if normaliser == "canvases":
        return torch.stack([canvas.mean() for canvases in responses for canvas in canvases]).mean()
    if normaliser == "steps":
        return torch.stack(
            [torch.stack([canvas.mean() for canvas in canvases]).mean() for canvases in responses]
        ).mean()
    return torch.stack([torch.cat(canvases).mean() for canvases in responses]).mean()


@pytest.mark.parametrize("merge", [1, 3])
@pytest.mark.parametrize("normaliser", ["canvases", "steps", "tokens"])
def test_streamed_items_give_the_gradient_of_the_objective_written_out(normaliser: str, merge: int) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, SAMPLERS["stopping_early"])
    algorithm = trajectory(policy, normaliser=normaliser, merge_steps=merge)
    policies = policies_for(algorithm, policy)
    shares = sum(float(algorithm.shares(group).sum()) for group in groups)
    for batch in token_batches(algorithm, groups, size=5):
        (algorithm.loss(policies, batch).loss_N.sum() / shares).backward()
    streamed = gradient(policy)
    written_out(policy, groups, algorithm).backward()
    torch.testing.assert_close(streamed, gradient(policy), rtol=1e-4, atol=1e-6)
    assert streamed.abs().max() > 1e-3


def test_an_items_loss_does_not_depend_on_its_micro_batch() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, SAMPLERS["stopping_early"])
    algorithm = trajectory(policy, merge_steps=2)
    policies = policies_for(algorithm, policy)

    def losses(size: int) -> dict[tuple[object, int], float]:
        found: dict[tuple[object, int], float] = {}
        for batch in token_batches(algorithm, groups, size):
            values = algorithm.loss(policies, batch).loss_N.tolist()
            found |= {(k, i): v for k, i, v in zip(batch.keys, batch.item_N.tolist(), values, strict=True)}
        return found

    together = losses(12)
    expected = sum(int((algorithm.items(group, 0, 1) != ABSENT).sum()) for group in groups)
    assert len(together) == expected
    assert losses(1) == pytest.approx(together, rel=1e-4, abs=1e-6)
    assert losses(5) == pytest.approx(together, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kl_to", ["rollout", "reference"])
def test_the_policy_stays_near_the_one_that_is_named(kl_to: str) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = trajectory(policy, kl_to=kl_to, kl_weight=0.5, normaliser="tokens", merge_steps=1)
    assert (Needs.REFERENCE in algorithm.needs) == (kl_to == "reference")
    policies = policies_for(algorithm, policy)
    for batch in token_batches(algorithm, groups):
        assert float(algorithm.loss(policies, batch).metrics["loss/kl"].abs().max()) == 0.0
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.3)
    near: dict[object, float] = {}
    loss: dict[object, float] = {}
    policy_part: dict[object, float] = {}
    for batch in token_batches(algorithm, groups, on_policy=False):
        losses = algorithm.loss(policies, batch)
        for key, value, kl, term in zip(
            batch.keys, losses.loss_N.tolist(), losses.metrics["loss/kl"].tolist(),
            losses.metrics["loss/policy"].tolist(), strict=True,
        ):  # fmt: skip
            near[key] = near.get(key, 0.0) + kl
            loss[key] = loss.get(key, 0.0) + value
            policy_part[key] = policy_part.get(key, 0.0) + term
    expected = k3_along_the_trajectory(policy, groups)
    assert near == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx({key: policy_part[key] + 0.5 * near[key] for key in near}, rel=1e-5)
    assert min(near.values()) > 1e-3


def k3_along_the_trajectory(policy: ToyTextPolicy, groups: list[RolloutGroup]) -> dict[object, float]:
    """Mean over each answer's tokens of exp(d) - d - 1, d = rollout's log-prob less the policy's; token by token."""
    found: dict[object, float] = {}
    for group in groups:
        for row, rollout in enumerate(group.rollouts):
            tokens, steps = group.tokens.tokens_GL[row], group.tokens.reveal_step_GL[row]
            counted = response_mask(tokens[None], EOS_ID)[0].nonzero().squeeze(1).tolist()
            terms: list[float] = []
            for k in counted:
                shown = torch.where(steps < steps[k], tokens, MASK_ID)
                with torch.no_grad():
                    logits = policy.predict(shown[None], group.conditioning).logits_BLV[0, k]
                gap = group.tokens.plain_logprob_GL[row, k] - torch.log_softmax(logits, 0)[tokens[k]]
                terms.append(float(torch.exp(gap) - gap - 1))
            found[rollout.key] = sum(terms) / len(terms)
    return found


def gradient(policy: ToyTextPolicy) -> torch.Tensor:
    """The accumulated gradient, which is taken away."""
    parts: list[torch.Tensor] = []
    for parameter in policy.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)
