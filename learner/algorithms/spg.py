"""SPG, the sandwiched policy gradient (2510.09541): a lower bound for good samples, an upper one for bad samples.

    L = - sum over i of n_i A_i J_i / sum over i of n_i,    n_i: tokens up to the first end token
    J = LB where A >= 0,   w UB + (1 - w) LB where A < 0;   no ratio, no clip, no reference

Pushing a lower bound down says nothing of the likelihood; an upper bound does. Both come from T canvases masked block
by block: a block j that has counted tokens is drawn; n ~ U{1 .. its counted tokens} of it are masked, all later ones
and those after the first end token are masked, and 15 % of the prompt's and of the earlier blocks' are. Every counted
masked token is scored, as in the code:

    LB = mean over T of the mean over M of log p_k         (a plain mean, where the ELBO has 1/t)
    UB = 1/b mean over k of log( mean over T of [k in M] p_k^b / t ),   t: masked share; k that no canvas masks left out

T forwards per response and update, their graphs held together. Deviations: UB in the log domain, where the code raises
probabilities to b and drops tokens whose power underflows; canvases of fewer blocks than T draw a block again;
`kl_weight`, which the code refuses, adds the distance over scored tokens, in the same weighting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import TokenAlgorithm, TokenAlgorithmConfig, token_shares
from learner.batching import TokenBatch
from learner.noising import Ask, NoisedCanvas, Scorer, item_generators, prompt_mask, random_masks
from learner.token_losses import kl_penalty, sandwich_lower, sandwich_upper
from raylign.types import RolloutGroup


class SpgConfig(TokenAlgorithmConfig):
    """SPG with its released setting (G 6, 4 passes per step; 1.0 for `upper_beta` on Sudoku, 2.0 on Countdown)."""

    type: Literal["spg"] = "spg"
    negative: Literal["mix", "upper", "lower", "zero"] = "mix"
    """What stands for the likelihood of samples below the baseline: a mix, either bound alone, or nothing."""
    mix_weight: float = Field(default=0.5, ge=0, le=1)
    """w, the upper bound's share in the mix."""
    upper_beta: float = Field(default=1.5, ge=1)
    """b, the Rényi order of the upper bound."""
    num_canvases: int = Field(default=2, ge=1)
    """T, canvases per response."""
    block_length: int | None = Field(default=None, ge=1)
    """Tokens per block; the sampler's when not given."""
    hide_rate: float = Field(default=0.15, ge=0, lt=1)
    """Share of prompt tokens and of earlier blocks' tokens that are masked as well."""

    @property
    def uses_ratio(self) -> bool:
        return False


class Spg(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = ("bound/lower", "bound/gap")

    def __init__(self, config: SpgConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: SpgConfig = config
        self._block_length: int = config.block_length or setting.sampler.block_length

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Samples count by their number of tokens."""
        return token_shares(group, self.vocabulary)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        config, counted_NL = self.config, scorer.counted_NL
        length_N = counted_NL.sum(dim=1)
        canvases = block_canvases(batch, counted_NL, config.num_canvases, self._block_length, config.hide_rate)
        masked_TNL = torch.stack([canvas.selected_NL for canvas in canvases])

        def estimate(ask: Ask) -> torch.Tensor:
            return torch.stack([ask(canvas) for canvas in canvases])

        scores = self.scores(scorer, estimate)
        lower_N = sandwich_lower(scores.learner, masked_TNL)
        upper_N = sandwich_upper(scores.learner, masked_TNL, counted_NL, config.upper_beta)
        weight = {"mix": config.mix_weight, "upper": 1.0, "lower": 0.0, "zero": 0.0}[config.negative]
        below_N = torch.lerp(lower_N, upper_N, weight) if config.negative != "zero" else torch.zeros_like(lower_N)
        loss_N = -length_N * batch.adv_N * torch.where(batch.adv_N >= 0, lower_N, below_N)
        kl_N = None
        if scores.ref is not None:
            kl_TNL = kl_penalty(scores.learner, scores.ref, config.kl_estimator)
            kl_N = length_N * sandwich_lower(kl_TNL, masked_TNL)
        metrics = {"loss/policy": loss_N, "bound/lower": lower_N, "bound/gap": upper_N - lower_N}
        return self.with_kl(loss_N, metrics, kl_N)


def block_canvases(
    batch: TokenBatch, counted_NL: torch.Tensor, num_canvases: int, block: int, hide_rate: float
) -> list[NoisedCanvas]:
    """The canvases of the module's docstring, for each response, drawn by the sample's key, anew in each epoch."""
    draws = item_generators(batch, "spg_mask")
    length, device = counted_NL.shape[1], counted_NL.device
    counted_NL = counted_NL.cpu()
    num_blocks, place_L = -(-length // block), torch.arange(length)
    # The code's own draw: a permutation of all blocks, folded onto those that hold counted tokens.
    order_NK = torch.stack([torch.randperm(num_blocks, generator=draw) for draw in draws])
    order_NK = order_NK % -(-counted_NL.sum(dim=1, keepdim=True) // block)
    canvases: list[NoisedCanvas] = []
    for number in range(num_canvases):
        start_N1 = block * order_NK[:, number % num_blocks, None]
        inside_NL = (place_L >= start_N1) & (place_L < start_N1 + block) & counted_NL
        most_N = inside_NL.sum(dim=1).tolist()
        sizes = [int(torch.randint(1, most + 1, (), generator=draw)) for most, draw in zip(most_N, draws, strict=True)]
        chosen_NL = random_masks(inside_NL, torch.tensor(sizes), draws)
        hidden_NL = torch.stack([torch.rand(length, generator=draw) for draw in draws]) < hide_rate
        masked_NL = chosen_NL | (place_L >= start_N1 + block) | ((place_L < start_N1) & hidden_NL) | ~counted_NL
        hidden_NP = prompt_mask(batch, hide_rate, draws)
        canvases.append(NoisedCanvas(~masked_NL.to(device), (masked_NL & counted_NL).to(device), hidden_NP))
    return canvases
