"""Which noised canvases of a response are scored, and what the policy says of them.

A *noised canvas* shows some response positions and masks the rest. Estimators draw them from generators keyed by
sample, epoch and item, so the current policy, the policy of the step's beginning and the reference answer the very
same question, and a ratio of two equal policies is exactly 1. Published trainers seed global randomness instead, or
draw another mask for each policy.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def learner_and_rollout(self, canvas: NoisedCanvas) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and those of the policy at the beginning of the step, without gradient.

        With staleness 0 that is the policy that made the rollouts. In the first update of a step it is the current
        policy itself, so no second forward is spent.
        """
        if self._batch.on_policy:
            logprob_NL = self.learner(canvas)
            return logprob_NL, logprob_NL.detach()
        rollout_logprob_NL = self._score(canvas, "old")
        return self.learner(canvas), rollout_logprob_NL

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
    shape = batch.tokens.tokens_GL.shape
    device = batch.tokens.tokens_GL.device
    selected_NL = torch.ones(shape, dtype=torch.bool, device=device)
    hidden_NP = prompt_mask(batch, prompt_mask_rate) if prompt_mask_rate > 0 else None
    return NoisedCanvas(torch.zeros(shape, dtype=torch.bool, device=device), selected_NL, hidden_NP)


def prompt_mask(batch: TokenBatch, rate: float) -> torch.Tensor:
    """Prompt tokens to mask, (N, P) bool: each real one with probability `rate`, by the sample's key and the epoch."""
    hidden_NP = torch.zeros(batch.prompts.ids_PL.shape, dtype=torch.bool)
    for row, draw in enumerate(item_generators(batch, "prompt_mask", with_item=False)):
        count = int(batch.prompts.real_PL[row].sum())
        # Padding is on the left, so it moves no draw.
        hidden_NP[row, hidden_NP.shape[1] - count :] = torch.rand(count, generator=draw) < rate
    return hidden_NP.to(batch.prompts.ids_PL.device)


def item_generators(batch: TokenBatch, purpose: str, with_item: bool = True) -> list[torch.Generator]:
    """One generator per row, keyed by sample, epoch and (if wanted) item: the same for whoever scores the row."""
    items: Sequence[int] = batch.item_N.tolist() if with_item else [0] * len(batch.keys)
    return [generator(*key, purpose, batch.epoch, item) for key, item in zip(batch.keys, items, strict=True)]
