"""Semi-autoregressive low-confidence remasking of LLaDA (2502.09992): a fixed number of tokens per call, surest first.

Each block gets num_steps / num_blocks calls; call i of a block of B positions reveals B // steps of them, one more in
the first B % steps calls: those whose drawn token has the largest untempered probability.

Two options from CJ-GRPO (2509.23924): EOS early rejection multiplies the confidence of a drawn end token by a factor
that rises linearly from `eos_factor_min` at the first call to 1 at the last; ascending steps reveal 2^i tokens at call
i of a block, so that a block of B positions takes about log2 B calls.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from raylign.errors import ConfigError
from raylign.samplers.tokens import BlockSamplerConfig, Candidates, block_length, top


class LowConfidenceConfig(BlockSamplerConfig):
    """LLaDA's sampler: the same number of calls for every answer."""

    type: Literal["low_confidence"] = "low_confidence"
    num_steps: int | None = Field(default=None, ge=1)
    """Calls for the whole canvas, a multiple of the number of blocks; one per position when not given."""
    ascending_steps: bool = False
    """Reveal 1, 2, 4, ... tokens in the calls of a block, instead of equal numbers."""
    eos_rejection: bool = False
    """Scale down the confidence of end tokens in early calls."""
    eos_factor_min: float = Field(default=0.01, gt=0, le=1)
    """What the confidence of an end token is multiplied by at the first call; .01 trained, .4 evaluated."""

    @model_validator(mode="after")
    def _refuse_two_schedules(self) -> LowConfidenceConfig:
        if self.ascending_steps and self.num_steps is not None:
            raise ValueError(
                f"ascending_steps sets the number of calls, so num_steps = {self.num_steps} means nothing; "
                "give one of the two"
            )
        return self


class LowConfidence:
    """See the module's docstring."""

    stochastic = True
    draws_order = False

    def __init__(self, config: LowConfidenceConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = block_length(config, canvas_length)
        num_blocks = canvas_length // self.block_length
        if config.ascending_steps:
            self.quotas = ascending_quotas(self.block_length)
        else:
            num_steps = config.num_steps or canvas_length
            if num_steps % num_blocks or num_steps > canvas_length:
                raise ConfigError(
                    f"sampler.num_steps {num_steps} must be a multiple of the {num_blocks} block(s) of "
                    f"{self.block_length} tokens and at most the canvas of {canvas_length}; change either"
                )
            self.quotas = even_quotas(self.block_length, num_steps // num_blocks)
        self.num_steps = len(self.quotas) * num_blocks

    def choose(self, candidates: Candidates) -> torch.Tensor:
        score_BL = candidates.transition.confidence(candidates.tokens_BL)
        if self.config.eos_rejection:
            call = candidates.block * len(self.quotas) + candidates.step
            factor = eos_factor(call, self.num_steps, self.config.eos_factor_min)
            score_BL = torch.where(candidates.tokens_BL == candidates.eos_id, score_BL * factor, score_BL)
        return top(score_BL, candidates.masked_BL, self.quotas[candidates.step])


def even_quotas(count: int, num_steps: int) -> list[int]:
    """Positions revealed per call: as equal as can be, the larger ones first."""
    return [count // num_steps + (step < count % num_steps) for step in range(num_steps)]


def ascending_quotas(count: int) -> list[int]:
    """1, 2, 4, ... and what is left."""
    quotas: list[int] = []
    while (left := count - sum(quotas)) > 0:
        quotas.append(min(2 ** len(quotas), left))
    return quotas


def eos_factor(step: int, num_steps: int, lowest: float) -> float:
    """From `lowest` at the first call to 1 at the last; 1 where there is one call only."""
    return lowest + (1 - lowest) * step / (num_steps - 1) if num_steps > 1 else 1.0
