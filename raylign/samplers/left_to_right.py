"""Left to right, one token per call: the order of autoregressive models, whose likelihood is exact.

It is the rollout of JustGRPO (2601.15165). With a block of one position each call asks for one position's logits;
longer blocks are for caches.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.tokens import BlockSamplerConfig, Candidates, block_length, top


class LeftToRightConfig(BlockSamplerConfig):
    """Reveals the leftmost masked token; as many calls as tokens."""

    type: Literal["left_to_right"] = "left_to_right"
    block_length: int | None = Field(default=1, ge=1)
    """Positions whose logits a call computes; more than 1 helps only caches, which last for a block."""


class LeftToRight:
    """See the module's docstring."""

    stochastic = True
    draws_order = False

    def __init__(self, config: LeftToRightConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = block_length(config, canvas_length)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        masked_BL = candidates.masked_BL
        leftness_BL = -torch.arange(masked_BL.shape[1], device=masked_BL.device).float().expand_as(masked_BL)
        return top(leftness_BL, masked_BL, 1)
