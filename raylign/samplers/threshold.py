"""Confidence threshold of Fast-dLLM (2505.22618): every token that is sure enough, and always the surest one."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from raylign.samplers.tokens import BlockSamplerConfig, Candidates, block_length, top


class ThresholdConfig(BlockSamplerConfig):
    """Reveals what exceeds a fixed confidence."""

    type: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Smallest untempered probability of the drawn token at which it is revealed; Fast-dLLM's .9."""


class Threshold:
    """See the module's docstring."""

    stochastic = True
    draws_order = False

    def __init__(self, config: ThresholdConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = block_length(config, canvas_length)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        confidence_BL = candidates.transition.confidence(candidates.tokens_BL)
        sure_BL = (confidence_BL >= self.config.threshold) & candidates.masked_BL
        return sure_BL | top(confidence_BL, candidates.masked_BL, 1)
