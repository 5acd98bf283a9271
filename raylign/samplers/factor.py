"""Factor rule of Fast-dLLM (2505.22618): the more tokens at once, the surer each must be.

With confidences c_1 >= c_2 >= ... the tokens of ranks 1 .. n are revealed for the largest n with

    c_n >= 1 - factor / (n + 1)

and the surest one always. The bound rises with the rank while confidences fall, so ranks pass up to some n and none
after.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.tokens import BlockSamplerConfig, Candidates, block_length, ranked, top


class FactorConfig(BlockSamplerConfig):
    """Reveals as many tokens as their joint confidence allows."""

    type: Literal["factor"] = "factor"
    factor: float = Field(default=1.0, ge=0)
    """How unsure n tokens may be together: the larger, the fewer calls. Fast-dLLM's 1."""


class Factor:
    """See the module's docstring."""

    stochastic = True
    draws_order = False

    def __init__(self, config: FactorConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = block_length(config, canvas_length)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        confidence_BL = candidates.transition.confidence(candidates.tokens_BL)
        rank_BL = ranked(confidence_BL, candidates.masked_BL).argsort(dim=1)
        passes_BL = confidence_BL >= 1 - self.config.factor / (rank_BL + 2)
        return (passes_BL & candidates.masked_BL) | top(confidence_BL, candidates.masked_BL, 1)
