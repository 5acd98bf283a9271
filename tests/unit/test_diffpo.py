"""DiFFPO: its two canvases, its truncated weights and the switch, and the joint training of the entropy budget."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.algorithms.diffpo import Diffpo, DiffpoConfig, draw_two_stages
from learner.batching import TokenBatch
from learner.noising import Scorer
from learner.token_losses import effective_sample_share, importance_weights
from raylign.models.tokens import response_mask
from raylign.types import RolloutGroup
from tests.text_groups import draw_text_groups, entropy_bounded, policies_for, text_algorithm, token_batches
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy


def diffpo(policy: ToyTextPolicy, **options: Any) -> Diffpo:
    algorithm = text_algorithm(DiffpoConfig(**options), policy)
    assert isinstance(algorithm, Diffpo)
    return algorithm


def only_batch(algorithm: Diffpo, groups: list[RolloutGroup], **options: Any) -> TokenBatch:
    (batch,) = token_batches(algorithm, groups, size=64, **options)
    return batch


def test_weights_are_capped_and_carry_no_gradient() -> None:
    surrogate = torch.tensor([0.5, 0.3, 0.01, 0.2]).log().requires_grad_()
    behaviour = torch.tensor([0.5, 0.1, 0.5, 0.1]).log()
    weights = importance_weights(surrogate, behaviour, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.02, 2.0])
    assert not weights.requires_grad
    # A ratio beyond the range of floats is capped like any other.
    assert importance_weights(torch.tensor(-1.0), torch.tensor(-500.0), 1.5).item() == 1.5


def test_the_effective_sample_size_by_hand() -> None:
    weights = torch.tensor([[2.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0], [1e-30, 1e-30, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4, [True] * 4, [True] * 4])
    # (2 + 1 + 1)² / (3 (4 + 1 + 1)) = 16 / 18; all equal: 1; one of four: 1/4; two of four, however small: 1/2.
    assert effective_sample_share(weights, mask).tolist() == pytest.approx([16 / 18, 1.0, 0.25, 0.5])
    assert effective_sample_share(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).tolist() == [0.0]


def surrogate_by_hand(policy: ToyTextPolicy, group: RolloutGroup, row: int, tau: int) -> list[float]:
    """log pi^ of one answer's tokens, one at a time."""
    tokens, steps = group.tokens.tokens_GL[row], group.tokens.reveal_step_GL[row]
    found: list[float] = []
    for k in range(int(response_mask(tokens[None], EOS_ID).sum())):
        shown = torch.full_like(tokens, MASK_ID) if steps[k] <= tau else torch.where(steps <= tau, tokens, MASK_ID)
        with torch.no_grad():
            logits = policy.predict(shown[None], group.conditioning).logits_BLV[0, k]
        found.append(float(torch.log_softmax(logits, 0)[tokens[k]]))
    return found


def test_the_loss_weighs_each_token_of_the_surrogate_by_hand() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = diffpo(policy, importance_cap=1.2)
    batch = only_batch(algorithm, groups)
    losses = algorithm.loss(policies_for(algorithm, policy), batch)
    _, late = draw_two_stages(batch, response_mask(batch.tokens.tokens_GL, EOS_ID))
    capped = 0
    loss_N = losses.loss_N.tolist()
    for place, (group, row) in enumerate((one, row) for one in groups for row in range(one.group_size)):
        tau = int(group.tokens.reveal_step_GL[row][late.visible_NL[place]].max())
        scores = surrogate_by_hand(policy, group, row, tau)
        behaviour = group.tokens.plain_logprob_GL[row].tolist()
        weights = [min(1.2, math.exp(new - old)) for new, old in zip(scores, behaviour, strict=False)]
        capped += weights.count(1.2)
        mean = sum(weights) / len(weights)
        ess = sum(weights) ** 2 / (len(weights) * sum(w**2 for w in weights))
        assert float(losses.metrics["is/mean"][place]) == pytest.approx(mean, rel=1e-4)
        assert float(losses.metrics["is/ess"][place]) == pytest.approx(ess, rel=1e-4)
        # On policy every ratio is 1, so the loss is -A times the mean weight.
        assert loss_N[place] == pytest.approx(-float(batch.adv_N[place]) * mean, rel=1e-4, abs=1e-7)
    assert capped > 3


def test_the_gradient_is_that_of_the_weighted_log_probs() -> None:
    # Were the weights differentiated too, it would be another.
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, num_groups=1)
    algorithm = diffpo(policy)
    batch = only_batch(algorithm, groups)
    policies = policies_for(algorithm, policy)
    algorithm.loss(policies, batch).loss_N.sum().backward()
    found = gradient(policy)
    scorer = Scorer(policies, batch, policy.vocabulary)
    early, late = draw_two_stages(batch, scorer.counted_NL)
    score = scorer.learner(early) + scorer.learner(late)
    weights = torch.exp(score.detach() - batch.tokens.plain_logprob_GL).clamp_max(2.0)
    counted = scorer.counted_NL.float()
    (-batch.adv_N * (weights * score * counted).sum(dim=1) / counted.sum(dim=1)).sum().backward()
    torch.testing.assert_close(found, gradient(policy), rtol=1e-4, atol=1e-7)
    assert found.abs().max() > 1e-3


def gradient(policy: ToyTextPolicy) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    for parameter in policy.trainable_parameters().values():
        assert parameter.grad is not None
        parts.append(parameter.grad.flatten())
        parameter.grad = None
    return torch.cat(parts)


def test_switched_off_every_weight_is_1() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = diffpo(policy, importance_weights=False)
    batch = only_batch(algorithm, groups)
    losses = algorithm.loss(policies_for(algorithm, policy), batch)
    assert losses.metrics["is/mean"].tolist() == losses.metrics["is/ess"].tolist() == [1.0] * 12
    torch.testing.assert_close(losses.loss_N, -batch.adv_N)


def test_the_behaviour_is_the_bare_policys_log_prob_not_the_tempered_one() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, entropy_bounded(temperature=0.7))
    algorithm = diffpo(policy)
    batch = only_batch(algorithm, groups)
    policies = policies_for(algorithm, policy)
    mean = algorithm.loss(policies, batch).metrics["is/mean"]
    tempered = replace(batch, tokens=replace(batch.tokens, rollout_logprob_GL=torch.zeros(12, 8)))
    assert torch.equal(algorithm.loss(policies, tempered).metrics["is/mean"], mean)
    plain = replace(batch, tokens=replace(batch.tokens, plain_logprob_GL=batch.tokens.rollout_logprob_GL))
    assert not torch.allclose(algorithm.loss(policies, plain).metrics["is/mean"], mean, atol=1e-3)


def test_tau_is_drawn_by_key_over_the_steps_that_wrote_the_answer() -> None:
    policy = ToyTextPolicy()
    algorithm = diffpo(policy)
    groups = draw_text_groups(policy, num_groups=2, group_size=8)
    seen: dict[int, set[int]] = {}
    for batch in token_batches(algorithm, groups, size=16, epochs=150):
        counted = response_mask(batch.tokens.tokens_GL, EOS_ID)
        early, late = draw_two_stages(batch, counted)
        assert torch.equal(early.selected_NL | late.selected_NL, counted)
        assert not (early.selected_NL & late.selected_NL).any()
        assert not early.visible_NL.any()
        for row in range(16):
            seen.setdefault(row, set()).add(int(late.visible_NL[row].sum()))
    # Every tau in 0..T-1 shows its own number of tokens, so T of them are seen.
    batch = only_batch(algorithm, groups)
    counted = response_mask(batch.tokens.tokens_GL, EOS_ID)
    for row in range(16):
        steps = batch.tokens.reveal_step_GL[row]
        last = int(steps[counted[row]].max())
        assert seen[row] == {int((steps <= tau).sum()) for tau in range(last + 1)}


def test_tau_depends_on_the_sample_and_the_epoch_alone() -> None:
    policy = ToyTextPolicy()
    algorithm = diffpo(policy)
    groups = draw_text_groups(policy)
    whole = only_batch(algorithm, groups)
    early, _ = draw_two_stages(whole, response_mask(whole.tokens.tokens_GL, EOS_ID))
    torch.manual_seed(5)
    rows: list[torch.Tensor] = []
    for batch in token_batches(algorithm, groups, size=5):
        rows += draw_two_stages(batch, response_mask(batch.tokens.tokens_GL, EOS_ID))[0].selected_NL
    assert torch.equal(torch.stack(rows), early.selected_NL)


def test_equal_policies_have_ratio_1_and_unequal_ones_are_clipped() -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = diffpo(policy, kl_weight=0.1)
    policies = policies_for(algorithm, policy)
    for epoch_batch in token_batches(algorithm, groups, epochs=2, on_policy=False):
        metrics = algorithm.loss(policies, epoch_batch).metrics
        assert float(metrics["ratio/deviation_max"].max()) == 0.0
        assert float(metrics["loss/kl"].max()) == 0.0
    with torch.no_grad():
        policy.trainable_parameters()["logits"].mul_(1.5)
    losses = algorithm.loss(policies, only_batch(algorithm, groups, on_policy=False))
    assert float(losses.metrics["ratio/clip_fraction"].mean()) > 0.2
    torch.testing.assert_close(losses.loss_N, losses.metrics["loss/policy"] + 0.1 * losses.metrics["loss/kl"])
    assert float(losses.metrics["loss/kl"].min()) > 0


def test_a_learned_budget_is_trained_beside_the_policy() -> None:
    policy = ToyTextPolicy(budget_head=True)
    groups = draw_text_groups(policy, entropy_bounded(budget="learned"))
    algorithm = text_algorithm(DiffpoConfig(), policy, "learned")
    (batch,) = token_batches(algorithm, groups, size=64)
    losses = algorithm.loss(policies_for(algorithm, policy), batch)
    torch.testing.assert_close(losses.loss_N, losses.metrics["loss/policy"] + losses.metrics["loss/budget"])
    losses.loss_N.sum().backward()
    for name in ("budget_head.weight", "tokens"):
        grad = policy.trainable_parameters()[name].grad
        assert grad is not None
        assert grad.abs().max() > 0
