"""Rewards to advantages: pure functions over plain numbers, in float64.

The group-relative advantage of GRPO, as Flow-GRPO (2505.05470, "group relative advantage") and DiffusionNFT
(2509.16117, "optimality reward") use it. Their papers divide by the group's own deviation; both codebases, and our
default, divide by the deviation of *all* samples of the step. GDPO (2601.05242) is for several rewards of unlike
scale: each gets its own group-relative advantage before it is weighed, so that none drowns the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from raylign.errors import NumericsError
from raylign.types import Advantage, RolloutGroup, RolloutStatus

AdvantageStd = Literal["global", "group", "gdpo"]
STD_EPS = 1e-4
"""Added to the standard deviation, as in Flow-GRPO and DiffusionNFT (DDPO uses 1e-6, DanceGRPO 1e-8)."""


def credit_groups(groups: Sequence[RolloutGroup], std: AdvantageStd, clip: float) -> list[Advantage]:
    """One Advantage per group from its siblings' mixed rewards: the credit that the GRPO and NFT families share."""
    if std == "gdpo":
        return decoupled_advantages([_weighed_rewards(group) for group in groups], clip)
    return group_advantages([group_rewards(group) for group in groups], std, clip)


def group_rewards(group: RolloutGroup) -> list[float | None]:
    """The mixed reward of each sibling; None for one that failed to generate or to be scored."""
    return [rollout.total if rollout.status is RolloutStatus.OK else None for rollout in group.rollouts]


def group_advantages(
    rewards: Sequence[Sequence[float | None]],
    std: AdvantageStd = "global",
    clip: float | None = None,
    eps: float = STD_EPS,
) -> list[Advantage]:
    """A = (r - mean of the group) / (std + eps), clipped to ±clip: one Advantage (adv_G fp32, valid_G bool) per group.

    None and NaN mean "failed": such a sample enters no mean and no deviation and carries 0. Deviations are biased
    (numpy's default). "global" takes the deviation of every valid sample given, "group" that of each group.
    Equal rewards give exactly 0. Raises NumericsError for an infinite reward or advantage.
    """
    rewards_G = [_rewards_tensor(values) for values in rewards]
    valid_G = [~torch.isnan(values) for values in rewards_G]
    pooled = torch.cat([v[ok] for v, ok in zip(rewards_G, valid_G, strict=True)]) if rewards_G else torch.empty(0)
    shared = _biased_std(pooled)
    advantages: list[Advantage] = []
    for values, ok in zip(rewards_G, valid_G, strict=True):
        centred = _centred(values, ok)
        scale = shared if std == "global" else _biased_std(values[ok])
        adv = centred / (scale + eps)
        if clip is not None:
            adv = adv.clamp(-clip, clip)
        # An infinite deviation would make every advantage a plausible 0.
        if not bool(torch.isfinite(adv).all() and torch.isfinite(scale)):
            raise NumericsError(f"advantages of rewards {values.tolist()} are not finite; rescale the reward")
        advantages.append(Advantage(adv.float(), ok))
    return advantages


Baseline = Literal["mean", "leave_one_out"]
"""What a sample is compared with: the mean of its group, or of its siblings alone."""
SampleStd = Literal["none", "population", "sample"]
"""What its advantage is divided by: nothing, or the group's deviation (biased, or with one degree less)."""


def relative_advantages(
    rewards: Sequence[Sequence[float | None]],
    baseline: Baseline = "mean",
    std: SampleStd = "none",
    eps: float = STD_EPS,
) -> list[Advantage]:
    """A = (r - baseline) / (std + eps): the advantages of the diffusion-LM papers, one Advantage per group.

    "leave_one_out" is n / (n - 1) times "mean" over the n valid siblings. A deviation of 0 gives 0, as in dLLM-RL.
    Failed samples (None, NaN) enter nothing and carry 0. Raises NumericsError for an infinite reward.
    """
    advantages: list[Advantage] = []
    for group in rewards:
        values = _rewards_tensor(group)
        ok = ~torch.isnan(values)
        count = int(ok.sum())
        adv = _centred(values, ok)
        if baseline == "leave_one_out" and count > 1:
            adv = adv * count / (count - 1)
        if std != "none":
            spread = _biased_std(values[ok])
            if std == "sample" and count > 1:
                spread = spread * math.sqrt(count / (count - 1))
            adv = adv / (spread + eps)
        if not bool(torch.isfinite(adv).all()):
            raise NumericsError(f"advantages of rewards {values.tolist()} are not finite; rescale the reward")
        advantages.append(Advantage(adv.float(), ok))
    return advantages


WeighedRewards = Mapping[str, tuple[float, float]]
"""One sample's rewards: (value, weight) by name."""


def decoupled_advantages(
    rewards: Sequence[Sequence[WeighedRewards | None]], clip: float | None = None, eps: float = STD_EPS
) -> list[Advantage]:
    """GDPO (2601.05242): per reward k, A_k = (r_k - mean of the group) / (std of the group + eps); then
    A = sum over k of w_k A_k, and (A - mean of the batch) / (std of the batch + eps), clipped to ±clip.

    None is a failed sample: it enters no mean and no deviation and carries 0. A sample that lacks an optional reward
    has its other weights grown to the same sum of magnitudes, as in the mix. Deviations are biased; equal rewards
    give exactly 0. Raises NumericsError for an infinite reward or advantage.
    """
    sums_G = [_weighed_sum(group, eps) for group in rewards]
    valid_G = [torch.tensor([sample is not None for sample in group], dtype=torch.bool) for group in rewards]
    pooled = torch.cat([s[ok] for s, ok in zip(sums_G, valid_G, strict=True)]) if rewards else torch.empty(0)
    mean, scale = (pooled.mean() if len(pooled) else torch.zeros(())), _biased_std(pooled) + eps
    advantages: list[Advantage] = []
    for sums, ok in zip(sums_G, valid_G, strict=True):
        adv = torch.where(ok, (sums - mean) / scale, 0.0)
        if clip is not None:
            adv = adv.clamp(-clip, clip)
        if not bool(torch.isfinite(adv).all() and torch.isfinite(scale)):
            raise NumericsError(f"advantages from sums {sums.tolist()} are not finite; rescale the rewards")
        advantages.append(Advantage(adv.float(), ok))
    return advantages


def r_from_advantage(adv_N: torch.Tensor, clip: float) -> torch.Tensor:
    """DiffusionNFT's optimality reward (2509.16117), r = clamp(clip(A, ±c) / 2c + 1/2, 0, 1), (N,).

    0 is the worst sample, 1/2 an average one, 1 the best.
    """
    return (adv_N.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0.0, 1.0)


def credit_metrics(groups: Sequence[RolloutGroup], advantages: Sequence[Advantage]) -> dict[str, float]:
    """What the credit of one step looked like, over valid samples and over groups with at least two of them."""
    within: list[float] = []
    zero_variance = 0
    magnitudes: list[float] = []
    for group, advantage in zip(groups, advantages, strict=True):
        valid = [value for value in group_rewards(group) if value is not None and not math.isnan(value)]
        magnitudes += advantage.adv_G[advantage.valid_G].abs().tolist()
        if len(valid) > 1:
            within.append(float(_biased_std(torch.tensor(valid, dtype=torch.float64))))
            zero_variance += within[-1] == 0.0
    return {
        "advantage/abs_mean": _mean(magnitudes),
        "reward/std_within_group": _mean(within),
        "reward/zero_variance_groups": float(zero_variance),
        "batch/valid_samples": float(len(magnitudes)),
    }


def _weighed_rewards(group: RolloutGroup) -> list[WeighedRewards | None]:
    """Each sibling's values and weights by reward; None for one without a total."""
    found: list[WeighedRewards | None] = []
    for rollout, total in zip(group.rollouts, group_rewards(group), strict=True):
        if total is None or rollout.reward is None:
            found.append(None)
            continue
        pairs = zip(rollout.reward.scores, rollout.reward.weights, strict=True)
        found.append({score.name: (score.value, weight) for score, weight in pairs if score.value is not None})
    return found


def _weighed_sum(group: Sequence[WeighedRewards | None], eps: float) -> torch.Tensor:
    """Sum over rewards of weight * group-relative advantage, (G,) float64; 0 for failed samples."""
    total_G = torch.zeros(len(group), dtype=torch.float64)
    weight_by_name = {name: weight for sample in group if sample for name, (_, weight) in sample.items()}
    weight_all = math.fsum(abs(weight) for weight in weight_by_name.values())
    present_G = torch.zeros(len(group), dtype=torch.float64)
    for name, weight in weight_by_name.items():
        values_G = _rewards_tensor([sample[name][0] if sample and name in sample else None for sample in group])
        has_G = ~torch.isnan(values_G)
        total_G += weight * _centred(values_G, has_G) / (_biased_std(values_G[has_G]) + eps)
        present_G += abs(weight) * has_G
    return torch.where(present_G > 0, total_G * weight_all / present_G, 0.0)


def _rewards_tensor(values: Sequence[float | None]) -> torch.Tensor:
    rewards = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    if bool(torch.isinf(rewards).any()):
        raise NumericsError(f"rewards {rewards.tolist()} hold an infinity; a reward is finite or an error")
    return rewards


def _centred(rewards_G: torch.Tensor, valid_G: torch.Tensor) -> torch.Tensor:
    """Rewards minus the mean of the valid ones; 0 where invalid, and exactly 0 when all valid ones are equal."""
    valid = rewards_G[valid_G]
    centred = torch.zeros_like(rewards_G)
    # Rounding of the mean would otherwise turn equal rewards into 1e-17 / eps.
    if len(valid) and bool((valid != valid[0]).any()):
        centred[valid_G] = valid - valid.mean()
    return centred


def _biased_std(values: torch.Tensor) -> torch.Tensor:
    if len(values) == 0 or bool((values == values[0]).all()):
        return torch.zeros((), dtype=torch.float64)
    return values.std(correction=0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
