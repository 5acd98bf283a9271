"""Centered Reward Distillation (2603.14128): regress the implicit reward on the reward, both centred per prompt.

The optimum of reward under a KL has r = beta log(pi / pi_old) + beta log Z(prompt); what only depends on the prompt
goes when the prompt's mean is subtracted. The log-ratio of a final sample is told by how well v and v_old explain it:

    r = e(v_old) - e(v),  e(v) = mean (v - v*)², or self-normalised (adaptive); same noise and level for both
    R = clamp(A / 2 adv_clip + 1/2, 0, 1)
    L = adv_clip / beta [ beta (r - r̄) - (R - R̄) ]²  +  kl_i mean (v - v_ref)²
    v_ref = u + kl_guidance (c - u) of the frozen base;  kl_i = kl_floor + R_i (kl_weight - kl_floor)

r̄ is the mean over the siblings at the same level, without gradient. A first pass over the whole update without gradient
finds every r; the second trains micro-batches against the settled means. So the gradient is that of all siblings at
once, on any cut and any number of ranks, and nothing but numbers is kept in between. See `learner.forward_losses` for
bce and the temperature's weights.

Two slow copies: "old" inside r, and "sampling", which makes the rollouts. Defaults are the paper's OCR setting (its
Table 3, as in the author's code). Where that code departs from the mathematics we follow the latter:
- it centres over whatever its devices hold of one micro-batch, samples of eight prompts, and Z does not cancel;
  `center_scope = "batch"` centres over all samples of an update instead of each group.
- its devices draw levels of their own; here siblings share them. Levels are of the 1000-level grid of shift 3; the code
  takes those the last sampler left, which are 10 after a rollout, and the last of them never.
- temperature 0 selects R > 0 and R < 0, and R is in [0, 1]; here R > 1/2 and R < 1/2.
- the KL's R is the advantage there ("advantage01"), so its mean stays 1/2. "raw" takes the reward itself, which the
  abstract's words suggest: little KL early, more as rewards rise. It is clamped to [0, 1]: scale rewards to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from learner.advantages import r_from_advantage
from learner.algorithms.base import LossSetting, RolloutPolicy, SurveyedItems
from learner.algorithms.forward_base import ForwardAlgorithm, ForwardConfig, Noised
from learner.batching import MicroBatch
from learner.decay import DECAY_PRESETS, Decay, DecaySchedule
from learner.forward_losses import CrdLoss, centres, crd_loss, denoising_error, rewarded_kl_weight
from learner.noise_levels import TrainTimes
from learner.policies import PolicySet, Relative
from raylign.errors import ConfigError, ShapeError
from raylign.types import Needs


class CrdConfig(ForwardConfig):
    """CRD with its setting for OCR on Stable Diffusion 3.5 Medium (K 24, 48 prompts, 2 updates per step)."""

    type: Literal["crd"] = "crd"
    beta: float = Field(default=1.0, gt=0)
    """What the implicit reward is multiplied by."""
    loss: CrdLoss = "mse"
    """Squared residual, or cross-entropy of the two centred rewards' sigmoids."""
    adaptive: bool = True
    """Divide each error by its own mean |v - v*|, which keeps implicit rewards of one size at all levels."""
    center_scope: Literal["group", "batch"] = "group"
    """Centre over the siblings, or over all samples of an update (the published code's, up to the batch's size)."""
    weight_temp: float = -1.0
    """Temperature of the weights in the means: below 0 uniform, above 0 softmax(±R / T), 0 the better or worse half."""
    num_train_times: int | None = Field(default=20, ge=1)
    """Noise levels trained per sample."""
    times: TrainTimes = TrainTimes(grid="dense", draw="stratified", fraction=0.99, shift=3.0)
    """Which levels."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Weight of mean (v - v_ref)², for the best samples if it follows rewards; 0 needs no reference."""
    kl_guidance: float = Field(default=4.5, ge=1)
    """Guidance of the reference, which makes the anchor a good sampler without guidance; 1 is off."""
    kl_rewarded: bool = True
    """Weigh each sample's KL by its reward: the anchor bites where exploitation would happen."""
    kl_floor: float = Field(default=1e-4, ge=0)
    """Weight for the worst samples then; at most kl_weight."""
    kl_reward_source: Literal["advantage01", "raw"] = "advantage01"
    """The reward of that weight: R, or the raw mixed reward clamped to [0, 1]."""
    old_decay: Decay = DecaySchedule(start_value=0.25, slope=0.005, end=0.999)
    """How slowly the old policy follows; a table, a preset 0 to 6, or "start-start_value-slope-end"."""
    sampling_decay: Decay = DECAY_PRESETS[2]
    """How slowly the policy that makes the rollouts follows."""

    @property
    def needs(self) -> Needs:
        needs = super().needs | Needs.OLD | Needs.SAMPLING
        if self.center_scope == "group":
            needs |= Needs.GROUPS
        return needs | Needs.NEGATIVE if self.kl_weight > 0 and self.kl_guidance > 1 else needs

    @property
    def rollout_policy(self) -> RolloutPolicy:
        return "sampling"

    def check_group_size(self, group_size: int) -> None:
        if group_size < 2:
            raise ConfigError("crd compares the siblings of a prompt, and group_size 1 has none; raise it")


class Crd(ForwardAlgorithm):
    """See the module's docstring."""

    policy_metrics: ClassVar[tuple[str, ...]] = ("implicit/mean", "implicit/spread", "r/mean")
    num_surveyed: ClassVar[int] = 2

    def __init__(self, config: CrdConfig, setting: LossSetting) -> None:
        super().__init__(config, setting)
        self.config: CrdConfig = config
        if config.kl_weight > 0:
            self.metrics += ("kl/weight",)

    def survey(self, policies: PolicySet, batch: MicroBatch) -> torch.Tensor:
        """Each item's implicit reward and the old policy's error, (N, 2)."""
        noised = self.noised(batch)
        old_N = self._error(policies.velocity_of("old", *noised.question), noised)
        return torch.stack([old_N - self._error(policies.velocity(*noised.question), noised), old_N], dim=1)

    def settle(self, items: SurveyedItems) -> torch.Tensor:
        """Each item's old error and its set's `centres`, (P, G, K, 5)."""
        implicit_PGK, old_PGK = items.numbers_PGKF.unbind(dim=3)
        target_PG = r_from_advantage(items.adv_PG, self.config.adv_clip)
        target_PGK, present_PGK = target_PG[:, :, None].expand_as(implicit_PGK), items.present_PGK

        def rows(table_PGK: torch.Tensor) -> torch.Tensor:
            """What is centred together lies along the last axis: (P, K, G), or (K, P G)."""
            return table_PGK.transpose(1, 2) if grouped else table_PGK.permute(2, 0, 1).flatten(1)

        grouped = self.config.center_scope == "group"
        found = centres(rows(implicit_PGK), rows(target_PGK), rows(present_PGK), self.config.weight_temp)
        settled = found.unsqueeze(-3).expand(*implicit_PGK.shape, -1)
        return torch.cat([old_PGK[..., None], settled], dim=3)

    def policy_loss(
        self, policies: PolicySet, batch: MicroBatch, noised: Noised
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]]:
        config, settled_NF = self.config, batch.settled_NF
        if settled_NF is None:
            raise ShapeError("crd compares siblings, and this batch was not surveyed; use learner.survey")
        velocity = policies.velocity(*noised.question)
        implicit_N = settled_NF[:, 0] - self._error(velocity, noised)
        target_N = r_from_advantage(batch.adv_N.double(), config.adv_clip)
        match_N = crd_loss(implicit_N, target_N, settled_NF[:, 1:], config.beta, config.loss)
        policy_N = config.adv_clip / config.beta * match_N
        metrics = {
            "loss/policy": policy_N,
            "implicit/mean": implicit_N,
            "implicit/spread": (implicit_N - settled_NF[:, 1]).abs(),
            "r/mean": target_N,
        }
        if config.kl_weight > 0:
            metrics["kl/weight"] = self.kl_weight(batch)
        return policy_N, velocity, metrics

    def reference(self, policies: PolicySet, noised: Noised) -> torch.Tensor:
        return policies.velocity_of("reference", *noised.question, guidance_scale=self.config.kl_guidance)

    def kl_weight(self, batch: MicroBatch) -> torch.Tensor:
        """What each item's KL counts, (N,)."""
        config = self.config
        if not config.kl_rewarded:
            return torch.full_like(batch.adv_N, config.kl_weight)
        advantage01_N = r_from_advantage(batch.adv_N, config.adv_clip)
        reward_N = advantage01_N if config.kl_reward_source == "advantage01" else batch.reward_N
        return rewarded_kl_weight(reward_N, min(config.kl_floor, config.kl_weight), config.kl_weight)

    def decay(self, relative: Relative, num_optimiser_steps: int, step: int) -> float:
        if relative == "old":
            return self.config.old_decay.at(num_optimiser_steps)
        return self.config.sampling_decay.at(num_optimiser_steps) if relative == "sampling" else 1.0

    def _error(self, velocity: torch.Tensor, noised: Noised) -> torch.Tensor:
        return denoising_error(velocity, noised.target_NCHW, self.config.adaptive)
