"""Which noised canvases of a response are scored, and what the policy says of them.

A *noised canvas* shows some response positions and masks the rest. Estimators draw them from generators keyed by
sample, epoch and item, so the current policy, the policy of the step's beginning and the reference answer the very
same question, and a ratio of two equal policies is exactly 1. Published trainers seed global randomness instead, or
draw another mask for each policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from learner.batching import TokenBatch
from learner.policies import PolicySet, Relative
from raylign.keys import generator
from raylign.models.tokens import Vocabulary, response_mask


@dataclass(frozen=True, slots=True)
class NoisedCanvas:
    """One question to the network about N responses.

    visible_NL: bool, the positions shown; the others are masked. selected_NL: bool, the masked positions whose token
    log-prob is asked for. hidden_NP: bool, prompt tokens that are masked too; None for a clean prompt.
    """

    visible_NL: torch.Tensor
    selected_NL: torch.Tensor
    hidden_NP: torch.Tensor | None = None


Ask = Callable[[NoisedCanvas], torch.Tensor]
"""One policy's log-probs of a canvas's selected tokens, (N, L) fp32; 0 elsewhere."""
Estimator = Callable[[Ask], torch.Tensor]
"""What a method makes of a policy's answers to the canvases it has drawn: per token, per response, or stacked."""


class Scorer:
    """Asks the policies of a learner about one batch. Ask relatives first: the current policy's graph reads the
    parameters that a relative's tensors are swapped into."""

    def __init__(self, policies: PolicySet, batch: TokenBatch, vocabulary: Vocabulary) -> None:
        self._policies = policies
        self._batch = batch
        self._vocabulary = vocabulary
        self.counted_NL = response_mask(batch.tokens.tokens_GL, vocabulary.eos_id)
        """True up to and including the first end token."""

    def learner(self, canvas: NoisedCanvas) -> torch.Tensor:
        """The current policy's log-probs of the selected tokens, (N, L) fp32, with gradient; 0 elsewhere."""
        return self._score(canvas, None)

    def both(self, estimator: Estimator) -> tuple[torch.Tensor, torch.Tensor]:
        """An estimate under the current policy, and under the policy at the beginning of the step, without gradient.

        With staleness 0 that is the policy that made the rollouts. In the first update of a step it is the current
        policy itself, so no second forward is spent.
        """
        if self._batch.on_policy:
            estimate = estimator(self.learner)
            return estimate, estimate.detach()
        rollout_estimate = estimator(self.rollout)
        return estimator(self.learner), rollout_estimate

    def rollout(self, canvas: NoisedCanvas) -> torch.Tensor:
        """The log-probs of the policy at the beginning of the step, without gradient."""
        return self._score(canvas, "old")

    def reference(self, canvas: NoisedCanvas) -> torch.Tensor:
        """The same of the reference policy, without gradient."""
        return self._score(canvas, "reference")

    def _score(self, canvas: NoisedCanvas, relative: Relative | None) -> torch.Tensor:
        tokens_NL, mask_id = self._batch.tokens.tokens_GL, self._vocabulary.mask_id
        prompts = self._batch.prompts
        if canvas.hidden_NP is not None:
            prompts = replace(prompts, ids_PL=torch.where(canvas.hidden_NP, mask_id, prompts.ids_PL))
        shown_NL = torch.where(canvas.visible_NL, tokens_NL, mask_id)
        logits_NLV = self._policies.predict_tokens(shown_NL, prompts, relative).logits_BLV.float()
        chosen_NL = logits_NLV.gather(-1, tokens_NL.unsqueeze(-1)).squeeze(-1)
        logprob_NL = chosen_NL - logits_NLV.logsumexp(dim=-1)
        # By index and not by product: the log-prob of a mask token in a row that only fills up is -inf.
        return torch.where(canvas.selected_NL, logprob_NL, torch.zeros((), device=logprob_NL.device))


def all_masked(batch: TokenBatch, prompt_mask_rate: float = 0.0) -> NoisedCanvas:
    """The one-step canvas of d1 (2504.12216): every response token masked, every prompt token with `prompt_mask_rate`.

    The prompt's mask is drawn from each sample's "prompt_mask" key, anew in each epoch.
    """
    draws = item_generators(batch, "prompt_mask", with_item=False)
    hidden_NP = prompt_mask(batch, prompt_mask_rate, draws) if prompt_mask_rate > 0 else None
    return masked_at(torch.ones_like(batch.tokens.tokens_GL, dtype=torch.bool), hidden_NP)


def masked_at(masked_NL: torch.Tensor, hidden_NP: torch.Tensor | None = None) -> NoisedCanvas:
    """The canvas that masks these positions, shows the others, and asks for every masked token."""
    return NoisedCanvas(~masked_NL, masked_NL, hidden_NP)


def random_masks(eligible_NL: torch.Tensor, count_N: torch.Tensor, draws: Sequence[torch.Generator]) -> torch.Tensor:
    """`count` of each row's eligible positions, every choice equally likely: (N, L) bool, one generator per row."""
    length = eligible_NL.shape[1]
    order_NL = torch.stack([torch.rand(length, generator=draw, dtype=torch.float64) for draw in draws])
    rank_NL = order_NL.to(eligible_NL.device).masked_fill(~eligible_NL, 2.0).argsort(dim=1).argsort(dim=1)
    return (rank_NL < count_N.to(eligible_NL.device)[:, None]) & eligible_NL


def prompt_mask(batch: TokenBatch, rate: float, draws: Sequence[torch.Generator]) -> torch.Tensor:
    """Prompt tokens to mask, (N, P) bool: each real one with probability `rate`, one generator per row."""
    hidden_NP = torch.zeros(batch.prompts.ids_PL.shape, dtype=torch.bool)
    for row, draw in enumerate(draws):
        count = int(batch.prompts.real_PL[row].sum())
        # Padding is on the left, so it moves no draw.
        hidden_NP[row, hidden_NP.shape[1] - count :] = torch.rand(count, generator=draw) < rate
    return hidden_NP.to(batch.prompts.ids_PL.device)


def item_generators(batch: TokenBatch, purpose: str, with_item: bool = True) -> list[torch.Generator]:
    """One generator per row, keyed by sample, epoch and (if wanted) item: the same for whoever scores the row."""
    items: Sequence[int] = batch.item_N.tolist() if with_item else [0] * len(batch.keys)
    return [generator(*key, purpose, batch.epoch, item) for key, item in zip(batch.keys, items, strict=True)]


def group_uniforms(batch: TokenBatch, purpose: str) -> torch.Tensor:
    """One number in [0, 1) that a row shares with its siblings in this epoch, (N,) fp64 on the CPU."""
    keys = [(key.run_seed, key.prompt_id, key.visit, purpose, batch.epoch) for key in batch.keys]
    return torch.stack([torch.rand((), generator=generator(*key), dtype=torch.float64) for key in keys])
