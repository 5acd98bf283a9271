"""wd1 (2507.08838): weighted log-likelihood, without a ratio and without the policy of the rollouts.

    l_i = sum over k up to the first end token of log p(o_k), scored as d1 does (response masked, 15 % of the prompt)
    W+ = softmax(A), W- = softmax(-A)                L = sum over i of (W-_i - W+_i) l_i

One forward per response and update. `credit` hands out n (W+ - W-) for the n samples the softmax runs over, so the mean
over samples that the learner takes is the sum above (over several groups, the mean of their sums). The released code
takes the softmax over whatever one device holds, which with its setting is one group; "step" takes it over all samples
of the step. Variant "psr", also the code's, keeps W+ alone and therefore pushes even where all rewards are equal.
As published, nothing divides by the length, so long answers dominate; `normalise_length` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import TokenAlgorithm, TokenAlgorithmConfig
from learner.batching import TokenBatch
from learner.noising import Scorer, all_masked
from learner.token_losses import masked_sum
from raylign.types import Advantage, RolloutGroup


class Wd1Config(TokenAlgorithmConfig):
    """wd1 with its released setting (G 6, 8 or 12 passes per step at lr 3e-6 on LLaDA-8B, no reference)."""

    type: Literal["wd1"] = "wd1"
    variant: Literal["wd1", "psr"] = "wd1"
    """Weights of good and bad samples, or of good ones alone."""
    softmax_over: Literal["group", "step"] = "group"
    """Which samples share a softmax."""
    normalise_length: bool = False
    """Divide each sample's log-prob by its number of tokens; the paper does not."""
    prompt_mask_rate: float = Field(default=0.15, ge=0, lt=1)
    """Share of prompt tokens masked while scoring; 0 scores the prompt as it is."""

    @property
    def uses_ratio(self) -> bool:
        return False


class Wd1(TokenAlgorithm):
    """See the module's docstring."""

    def __init__(self, config: Wd1Config, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: Wd1Config = config

    def credit(self, groups: Sequence[RolloutGroup]) -> list[Advantage]:
        """n (W+ - W-) in place of advantages; the credit of budgets stays what it is."""
        credit = super().credit(groups)
        together = [credit] if self.config.softmax_over == "step" else [[one] for one in credit]
        return [weighted for some in together for weighted in self._weigh(some)]

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        counted_NL = scorer.counted_NL
        canvas = all_masked(batch, self.config.prompt_mask_rate)
        scores = self.scores(scorer, lambda ask: ask(canvas))
        score_N, kl_N = masked_sum(scores.learner, counted_NL), self.token_kl(scores, counted_NL)
        if self.config.normalise_length:
            length_N = counted_NL.sum(dim=1)
            score_N, kl_N = score_N / length_N, None if kl_N is None else kl_N / length_N
        loss_N = -batch.adv_N * score_N
        return self.with_kl(loss_N, {"loss/policy": loss_N}, kl_N)

    def _weigh(self, credit: Sequence[Advantage]) -> list[Advantage]:
        """Advantages turned into weights, over all of `credit` together."""
        adv_B = torch.cat([one.adv_G for one in credit])
        valid_B = torch.cat([one.valid_G for one in credit])
        weight_B = signed_weights(adv_B, valid_B, positive_only=self.config.variant == "psr")
        parts = weight_B.split([len(one.adv_G) for one in credit])
        return [replace(one, adv_G=part) for one, part in zip(credit, parts, strict=True)]


def signed_weights(adv_B: torch.Tensor, valid_B: torch.Tensor, positive_only: bool = False) -> torch.Tensor:
    """n (softmax(A) - softmax(-A)) over the n valid samples, or n softmax(A) alone; (B,) fp32, 0 for failed ones."""
    adv, weight_B = adv_B[valid_B].double(), torch.zeros_like(adv_B, dtype=torch.float64)
    weight = torch.softmax(adv, dim=0)
    if not positive_only:
        weight = weight - torch.softmax(-adv, dim=0)
    weight_B[valid_B] = len(adv) * weight
    return weight_B.float()
