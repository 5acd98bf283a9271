"""Entropy-bounded sampler (EB-Sampler, 2505.24857) and its budget per answer, which a head may choose (DiFFPO).

Masked positions are sorted by the entropy H of their untempered distribution, surest first. Revealed is the largest
prefix U with

    sum_U H - max_U H <= gamma

that is, the next position is taken while the entropies of those before it sum to at most gamma; the first always. The
left side bounds the error of drawing U's tokens independently. Budget 0 takes one call per position (positions of no
entropy at all come free), an infinite one a single call per block.

Budgets: `fixed` gives every answer gamma. `sampled` draws log gamma ~ N(log gamma, budget_std^2) for each. `learned`
adds the model's budget head to the mean: DiFFPO (2510.02212) trains such a head without saying how; the log-normal
form and the clamp are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from raylign.samplers.tokens import BlockSamplerConfig, Candidates, block_length, entropy, ranked

Budget = Literal["fixed", "sampled", "learned"]


class EntropyBoundedConfig(BlockSamplerConfig):
    """Reveals as much at once as an entropy budget allows; each answer takes as many calls as it needs."""

    type: Literal["entropy_bounded"] = "entropy_bounded"
    gamma: float = Field(default=0.15, ge=0)
    """Entropy budget in nats; the median of the budgets where they are drawn."""
    budget: Budget = "fixed"
    """fixed: gamma for all. sampled: log-normal around gamma. learned: around what the budget head says."""
    budget_std: float = Field(default=0.5, gt=0)
    """Standard deviation of a drawn budget's logarithm."""
    min_gamma: float = Field(default=0.005, gt=0)
    """Drawn budgets are at least this."""
    max_gamma: float = Field(default=1.5, gt=0)
    """Drawn budgets are at most this."""

    @model_validator(mode="after")
    def _refuse_what_cannot_be_drawn(self) -> EntropyBoundedConfig:
        if self.min_gamma > self.max_gamma:
            raise ValueError(f"min_gamma {self.min_gamma} is above max_gamma {self.max_gamma}; swap them")
        if self.budget != "fixed" and not self.min_gamma <= self.gamma <= self.max_gamma:
            raise ValueError(
                f"gamma {self.gamma} is the median of {self.budget} budgets and must lie in "
                f"[{self.min_gamma}, {self.max_gamma}]; change it, or min_gamma and max_gamma"
            )
        return self


class EntropyBounded:
    """See the module's docstring."""

    stochastic = True
    draws_order = False

    def __init__(self, config: EntropyBoundedConfig, canvas_length: int) -> None:
        self.config = config
        self.block_length = block_length(config, canvas_length)

    def choose(self, candidates: Candidates) -> torch.Tensor:
        assert candidates.gamma_B is not None, "an entropy-bounded step needs a budget per row"
        return within_budget(entropy(candidates.transition.untempered_BLV), candidates.masked_BL, candidates.gamma_B)


def within_budget(entropy_BL: torch.Tensor, masked_BL: torch.Tensor, gamma_B: torch.Tensor) -> torch.Tensor:
    """The prefix of the masked positions, by rising entropy, that each row's budget allows: (B, L) bool."""
    order_BL = ranked(-entropy_BL, masked_BL)
    rising_BL = entropy_BL.double().gather(1, order_BL)
    before_BL = rising_BL.cumsum(dim=1) - rising_BL
    # The first sum is exactly 0, whatever rounding does to the difference.
    before_BL[:, 0] = 0.0
    allowed_BL = before_BL <= gamma_B.double().unsqueeze(1)
    return torch.empty_like(masked_BL).scatter(1, order_BL, allowed_BL) & masked_BL


def draw_budgets(
    config: EntropyBoundedConfig, offset_B: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """exp N(log gamma + offset, std^2), clamped, (B,) fp32; one draw per generator."""
    noise_B = torch.stack([torch.randn((), generator=generator) for generator in generators])
    log_gamma_B = math.log(config.gamma) + offset_B + config.budget_std * noise_B.to(offset_B.device)
    return log_gamma_B.clamp(math.log(config.min_gamma), math.log(config.max_gamma)).exp()
