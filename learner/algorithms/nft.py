"""DiffusionNFT (2509.16117): contrast the policy with its old self on the forward process; no likelihoods.

Good samples pull v towards their x0, bad ones push its reflection about v_old there; see
`learner.forward_losses.nft_loss`. The old policy makes the rollouts too, and follows slowly. A KL, mean (v - v_ref)²,
keeps v near the reference's.

The loss is the released code's: self-normalised, times adv_clip, levels of the rollouts' own grid in a random order of
each sample. The paper's other weightings of levels are there to compare: it finds those that favour large t stable, and
1 - t to collapse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import r_from_advantage
from learner.algorithms.base import LossSetting, RolloutPolicy
from learner.algorithms.forward_base import ForwardAlgorithm, ForwardConfig, Noised
from learner.batching import MicroBatch
from learner.decay import Decay, DecaySchedule
from learner.forward_losses import AdvMode, NftWeighting, nft_loss, shaped_advantage
from learner.losses import velocity_mse
from learner.policies import PolicySet, Relative
from raylign.types import Needs


class NftConfig(ForwardConfig):
    """DiffusionNFT with its released single-reward setting."""

    type: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0)
    """How far v± lie from v_old; .1 for multi-reward in the paper."""
    adv_clip: float = Field(default=5.0, gt=0)
    """Advantages of this size become r = 0 or 1; also the policy loss's factor. Smaller is sharper."""
    adv_mode: AdvMode = "all"
    """Which advantages count: without the worse ones the paper's runs collapse."""
    weighting: NftWeighting = "adaptive"
    """What each level counts."""
    old_decay: Decay = DecaySchedule()
    """How slowly the old policy, which also makes the rollouts, follows; preset 1, and 2 in the paper's OCR runs."""

    @property
    def needs(self) -> Needs:
        return super().needs | Needs.OLD

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return "old"


class Nft(ForwardAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = ("velocity/old_gap", "r/mean")
    shares_levels: ClassVar[bool] = False

    def __init__(self, config: NftConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: NftConfig = config

    def policy_loss(
        self, policies: PolicySet, batch: MicroBatch, noised: Noised
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
        config = self.config
        old = policies.velocity_of("old", *noised.question)
        velocity = policies.velocity(*noised.question)
        r_N = r_from_advantage(shaped_advantage(batch.adv_N, config.adv_mode), config.adv_clip)
        contrast_N = nft_loss(
            velocity, old, noised.state_NCHW, batch.final_NCHW, noised.sigma_N, r_N, config.beta, config.weighting
        )
        policy_N = config.adv_clip * contrast_N
        metrics = {"loss/policy": policy_N, "velocity/old_gap": velocity_mse(velocity, old), "r/mean": r_N}
        return policy_N, velocity, metrics

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        return self.config.old_decay.at(num_optimiser_steps) if relative == "old" else 1.0
