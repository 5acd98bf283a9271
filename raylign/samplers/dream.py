"""Dream's sampler (2508.15487): the whole canvas at once, a fixed number of calls, four orders.

Times fall linearly from 1 to `eps`. Between times t and s of the n positions still masked int(n (1 - s / t)) are
revealed, and all in the last call. Confidence is measured on the distribution as sampled (temperature and top-p
included): of the drawn token, as a margin, or as entropy. `alg_temp` draws positions in proportion to
exp(confidence / alg_temp), without replacement, instead of taking the largest.

Deviations: Dream averages n over its batch, here each row counts its own; calls that would reveal nothing are not
made; `origin` reveals that many positions at random, where Dream lets each one through with probability 1 - s / t.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator

from raylign.errors import ConfigError
from raylign.samplers.tokens import Candidates, TokenSamplerConfig, entropy, margin, of_tokens, top

Order = Literal["origin", "maskgit_plus", "topk_margin", "entropy"]


class DreamConfig(TokenSamplerConfig):
    """Dream's sampler: the same number of calls for every answer, no blocks."""

    type: Literal["dream"] = "dream"
    num_steps: int | None = Field(default=None, ge=1)
    """Times to go through, at most one per position; the canvas's length when not given."""
    order: Order = "entropy"
    """origin: random. maskgit_plus: likeliest drawn token. topk_margin: first less second. entropy: lowest."""
    alg_temp: float = Field(default=0.0, ge=0)
    """Temperature at which positions are drawn by their confidence; 0 takes the largest."""
    eps: float = Field(default=1e-3, gt=0, lt=1)
    """The last time."""

    @model_validator(mode="after")
    def _refuse_temperature_of_no_order(self) -> DreamConfig:
        if self.order == "origin" and self.alg_temp > 0:
            raise ValueError(f"order 'origin' is random already, alg_temp = {self.alg_temp} means nothing; remove it")
        return self


class Dream:
    """See the module's docstring."""

    stochastic = True

    def __init__(self, config: DreamConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = canvas_length
        self.draws_order = config.order == "origin" or config.alg_temp > 0
        num_steps = config.num_steps or canvas_length
        if num_steps > canvas_length:
            raise ConfigError(
                f"sampler.num_steps {num_steps} is more than the model's canvas of {canvas_length} tokens; lower it"
            )
        self.quotas = dream_quotas(canvas_length, num_steps, config.eps)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        return top(self._score(candidates), candidates.masked_BL, self.quotas[candidates.step])

    def _score(self, candidates: Candidates) -> torch.Tensor:
        sampled_BLV, order_BL = candidates.transition.sampled_BLV, candidates.order_BL
        if self.config.order == "origin":
            assert order_BL is not None
            return order_BL
        if self.config.order == "maskgit_plus":
            score_BL = of_tokens(sampled_BLV, candidates.tokens_BL).exp()
        elif self.config.order == "topk_margin":
            score_BL = margin(sampled_BLV)
        else:
            score_BL = -entropy(sampled_BLV)
        if self.config.alg_temp == 0:
            return score_BL
        assert order_BL is not None
        # The largest of score / temperature + Gumbel noise are a draw without replacement by exp(score / temperature).
        return score_BL.double() / self.config.alg_temp - torch.log(-torch.log(order_BL.double()))


def dream_quotas(count: int, num_steps: int, eps: float) -> list[int]:
    """Positions revealed in each call that reveals any."""
    times = torch.linspace(1, eps, num_steps + 1, dtype=torch.float64).tolist()
    quotas: list[int] = []
    for t, s in pairwise(times[:-1]):
        quotas.append(int((count - sum(quotas)) * (1 - s / t)))
    return [quota for quota in [*quotas, count - sum(quotas)] if quota > 0]
