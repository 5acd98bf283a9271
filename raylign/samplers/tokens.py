"""One step's distribution over tokens, and what a text sampler is: a rule that says which positions to reveal.

Every sampler draws a token for each masked position of the active block, each from that position's own distribution,
and reveals those its rule chooses; nothing revealed is ever masked again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import Field

from raylign.config import Config
from raylign.errors import ConfigError
from raylign.models.tokens import CacheKind
from raylign.shapes import check_shape

# Cumulative sums are taken in fp64, so many probabilities at a time: 256 MiB.
_MAX_FP64_ELEMENTS = 2**25


class TokenSamplerConfig(Config):
    """Keys that every text sampler has."""

    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits before a token is drawn; 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that hold this much probability; 1 is off."""
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance, logits = un + scale (cond - un), un with the prompt masked; 1 is off."""
    cache: CacheKind = "none"
    """Which keys and values are kept within a block: none, of what lies before it (prefix), of all but it (dual)."""
    cache_refresh: int | None = Field(default=None, ge=1)
    """Compute everything anew after so many calls in a block; when not given, at the start of each block only."""
    stop_at_eos: bool = True
    """Fill what follows a finished answer with end tokens, without calls."""


class BlockSamplerConfig(TokenSamplerConfig):
    """Keys of samplers that fill the canvas block by block."""

    block_length: int | None = Field(default=None, ge=1)
    """Positions per block, filled one block after the other; the whole canvas when not given."""


@dataclass(frozen=True, slots=True)
class TokenTransition:
    """The distribution of every position's token, all positions independent: what is sampled is what is scored.

    Each field is log-probs, fp32 (B, L, V), -inf at the mask token.
    sampled_BLV: as sampled, with guidance, temperature and top-p. untempered_BLV: with guidance only; confidence is
    measured on it. plain_BLV: the bare policy's. They are one tensor where they are equal.
    """

    sampled_BLV: torch.Tensor
    untempered_BLV: torch.Tensor
    plain_BLV: torch.Tensor

    @staticmethod
    def of(
        logits_BLV: torch.Tensor, temperature: float, top_p: float, plain_logits_BLV: torch.Tensor | None = None
    ) -> TokenTransition:
        """From logits (B, L, V); `plain_logits_BLV` are the unguided ones where the first are guided."""
        check_shape(logits_BLV, "logits_BLV")
        untempered = torch.log_softmax(logits_BLV.float(), dim=-1)
        plain = untempered if plain_logits_BLV is None else torch.log_softmax(plain_logits_BLV.float(), dim=-1)
        if temperature == 0:
            point = torch.full_like(untempered, -math.inf)
            return TokenTransition(point.scatter(-1, untempered.argmax(-1, keepdim=True), 0.0), untempered, plain)
        sampled = untempered if temperature == 1 else torch.log_softmax(untempered / temperature, dim=-1)
        if top_p < 1:
            sampled = torch.cat([_nucleus(part, top_p) for part in sampled.split(_rows_at_once(sampled))])
        return TokenTransition(sampled, untempered, plain)

    def sample(self, uniform_BL: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) int64 by inverse CDF in fp64: the first whose cumulative probability exceeds the uniform."""
        rows = _rows_at_once(self.sampled_BLV)
        parts = zip(self.sampled_BLV.split(rows), uniform_BL.double().split(rows), strict=True)
        return torch.cat([_inverse_cdf(logprob_BLV, part_BL) for logprob_BLV, part_BL in parts])

    def logprob(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Log-prob of each token as sampled, (B, L) fp32."""
        return of_tokens(self.sampled_BLV, tokens_BL)

    def plain_logprob(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Log-prob of each token under the bare policy, (B, L) fp32."""
        return of_tokens(self.plain_BLV, tokens_BL)

    def confidence(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Untempered probability of each token, (B, L) fp32: of the token drawn, as LLaDA measures it."""
        return of_tokens(self.untempered_BLV, tokens_BL).exp()


def of_tokens(logprob_BLV: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Each position's entry for its token, (B, L)."""
    return logprob_BLV.gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)


def entropy(logprob_BLV: torch.Tensor) -> torch.Tensor:
    """-sum p log p in nats, (B, L) fp32; tokens of probability 0 count nothing."""
    return torch.special.entr(logprob_BLV.exp()).sum(dim=-1)


def margin(logprob_BLV: torch.Tensor) -> torch.Tensor:
    """Probability of the likeliest token less that of the second, (B, L) fp32."""
    first_BL, second_BL = logprob_BLV.topk(2, dim=-1).values.exp().unbind(-1)
    return first_BL - second_BL


def guided_logits(cond_BLV: torch.Tensor, uncond_BLV: torch.Tensor, scale: float, mask_id: int) -> torch.Tensor:
    """un + scale (cond - un), -inf at the mask. LLaDA (2502.09992) writes un + (w + 1) (cond - un): scale = w + 1."""
    guided = uncond_BLV + scale * (cond_BLV - uncond_BLV)
    # Both are -inf at the mask, whose difference is not a number.
    guided[..., mask_id] = -math.inf
    return guided


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a rule chooses from: rows at the same call of the same block, L the positions of the block.

    tokens_BL: the token drawn for each position. masked_BL: positions that may be revealed, at least one per row.
    block, step: which block, and which call in it, from 0. gamma_B: entropy budgets, for samplers that have them.
    order_BL: fresh uniforms in [0, 1), for samplers with `draws_order`.
    """

    transition: TokenTransition
    tokens_BL: torch.Tensor
    masked_BL: torch.Tensor
    block: int
    step: int
    eos_id: int
    gamma_B: torch.Tensor | None = None
    order_BL: torch.Tensor | None = None


class TokenSampler(Protocol):
    """A rule bound to a canvas. Adding one: `samplers/__init__.py` holds the table."""

    stochastic: bool
    """Whether draws have a log-prob; always, for text."""
    draws_order: bool
    """Whether the rule itself draws: `Candidates.order_BL` is there."""
    block_length: int
    """Positions per block; divides the canvas."""

    @property
    def config(self) -> TokenSamplerConfig: ...

    def choose(self, candidates: Candidates) -> torch.Tensor:
        """Which masked positions are revealed now, (B, L) bool; at least one per row."""
        ...


def block_length(config: BlockSamplerConfig, canvas_length: int) -> int:
    """The configured length, or the canvas's. Raises ConfigError if blocks do not fill the canvas."""
    length = config.block_length or canvas_length
    if canvas_length % length:
        raise ConfigError(
            f"sampler.block_length {length} does not divide the model's canvas of {canvas_length} tokens; "
            "give a divisor, or leave it out for one block"
        )
    return length


def top(score_BL: torch.Tensor, masked_BL: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The `count` (one for all rows, or (B,)) masked positions of highest score, (B, L) bool; ties go to the left."""
    rank_BL = ranked(score_BL, masked_BL).argsort(dim=1)
    limit = count.unsqueeze(1) if isinstance(count, torch.Tensor) else count
    return (rank_BL < limit) & masked_BL


def ranked(score_BL: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
    """Positions by falling score, masked ones first, (B, L) int64; ties go to the left."""
    lowest = torch.finfo(score_BL.dtype).min
    return score_BL.clamp_min(lowest).masked_fill(~masked_BL, -math.inf).argsort(dim=1, descending=True, stable=True)


def _rows_at_once(logprob_BLV: torch.Tensor) -> int:
    return max(1, _MAX_FP64_ELEMENTS // max(1, logprob_BLV.shape[1] * logprob_BLV.shape[2]))


def _nucleus(logprob_BLV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep tokens while those likelier hold less than `top_p`, and renormalise."""
    ordered, order = logprob_BLV.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(dim=-1, dtype=torch.float64) - ordered.exp()
    kept = torch.where(before < top_p, ordered, -math.inf)
    return torch.log_softmax(torch.empty_like(kept).scatter(-1, order, kept), dim=-1)


def _inverse_cdf(logprob_BLV: torch.Tensor, uniform_BL: torch.Tensor) -> torch.Tensor:
    cumulative = logprob_BLV.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    # A uniform next to 1 must not round up to the total, past the last token that has any probability.
    wanted = torch.minimum(uniform_BL.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where the probabilities are not numbers the search runs off the end; such rows fail later, by their log-prob.
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_max(logprob_BLV.shape[-1] - 1)
