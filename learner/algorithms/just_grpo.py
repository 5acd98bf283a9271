"""JustGRPO (2601.15165): write from left to right, train on the exact autoregressive likelihood.

    log pi(o_t | c, o_<t) = log softmax f(c, o_<t shown, the rest masked)_t [o_t]
    L = 1 / (number of responses with an advantage) sum over i of 1/L sum over t of -min(rho A, clip(rho) A)

rho compares a log-prob with its own detached value, so it is 1 and the gradient is the plain policy gradient's. Each
position is one item with a backward pass of its own: L forwards, memory for one. Parallel decoding still works after.

Rollouts must write from left to right, one token per call; that is what makes the likelihood theirs. Deviation:
positions after the first end token are not trained (the released code trains all L; ours may never have been drawn).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import SampleStd
from learner.algorithms.base import LossSetting
from learner.algorithms.token_base import RATIO_METRICS, TokenAlgorithm, TokenAlgorithmConfig, ratio_metrics
from learner.batching import ABSENT, TokenBatch
from learner.noising import NoisedCanvas, Scorer
from learner.token_losses import clipped_ratio_loss, kl_penalty
from raylign.errors import ConfigError
from raylign.models.tokens import response_mask
from raylign.samplers.left_to_right import LeftToRight
from raylign.types import RolloutGroup

# The released code adds it to the share of responses with an advantage, so that equal rewards are no 0 / 0.
_NO_ADVANTAGE_SHARE = 1e-5


class JustGrpoConfig(TokenAlgorithmConfig):
    """The released setting (full fine-tuning of LLaDA-8B at lr 5e-6, G 16, L 256, one update per step)."""

    type: Literal["just_grpo"] = "just_grpo"
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """Part of the paper's formula; the ratio is 1, so it does nothing."""
    advantage_std: SampleStd = "sample"
    """Divide by the group's deviation."""

    @property
    def uses_ratio(self) -> bool:
        return False

    def check_sampler(self, sampler: Any) -> None:
        # Blocks are filled from left to right, so blocks of one position are an order too.
        if not (isinstance(sampler, LeftToRight) or sampler.block_length == 1):
            raise ConfigError(
                f"algorithm.type 'just_grpo' needs rollouts from left to right, one token per call, got sampler.type "
                f"{sampler.config.type!r} with blocks of {sampler.block_length}; set sampler.type = 'left_to_right'"
            )


class JustGrpo(TokenAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = RATIO_METRICS

    def __init__(self, config: JustGrpoConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: JustGrpoConfig = config

    def items(self, group: RolloutGroup, run_seed: int, step: int) -> torch.Tensor:
        """The positions up to the first end token, (G, L); ABSENT after it."""
        counted_GL = response_mask(group.tokens.tokens_GL, self.vocabulary.eos_id)
        return torch.where(counted_GL, torch.arange(counted_GL.shape[1]), ABSENT)

    def shares(self, group: RolloutGroup) -> torch.Tensor:
        """Responses of groups with equal rewards have no advantage and hardly count."""
        (advantage,) = self.credit([group])
        return (advantage.adv_G != 0).float().clamp_min(_NO_ADVANTAGE_SHARE)

    def policy_loss(self, scorer: Scorer, batch: TokenBatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        clip, length = self.config.clip_range, batch.tokens.tokens_GL.shape[1]
        canvas = prefix_canvas(batch.item_N.to(batch.tokens.tokens_GL.device), length)
        # The score is 0 everywhere but at the one position asked for.
        scores = self.scores(scorer, lambda ask: ask(canvas).sum(dim=1))
        policy_N, ratio_N = clipped_ratio_loss(scores.learner, scores.rollout, batch.adv_N, clip, clip)
        loss_N = policy_N / length
        metrics = {"loss/policy": loss_N, **ratio_metrics(ratio_N, clip, clip)}
        if scores.ref is None:
            return loss_N, metrics
        return self.with_kl(loss_N, metrics, kl_penalty(scores.learner, scores.ref, self.config.kl_estimator) / length)


def prefix_canvas(position_N: torch.Tensor, length: int) -> NoisedCanvas:
    """Everything before each row's position is shown, the position itself is asked for, the rest is masked."""
    place_L = torch.arange(length, device=position_N.device)
    return NoisedCanvas(place_L < position_N[:, None], place_L == position_N[:, None])
