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

AdvantageStd = Literal["global", "group", "gdpo", "per_reward"]
STD_EPS = 1e-4
"""Added to the standard deviation, as in Flow-GRPO and DiffusionNFT (DDPO uses 1e-6, DanceGRPO 1e-8)."""


def credit_groups(
    groups: Sequence[RolloutGroup],
    std: AdvantageStd,
    clip: float,
    eps: float = STD_EPS,
    unbiased: bool = False,
    min_count: int = 0,
) -> list[Advantage]:
    """One Advantage per group from its siblings' mixed rewards: the credit that the GRPO and NFT families share.

    eps, unbiased and min_count as in `group_advantages`; gdpo and per_reward have groups of any size.
    """
    if std == "gdpo":
        return decoupled_advantages([_weighed_rewards(group) for group in groups], clip, eps, unbiased)
    if std == "per_reward":
        return summed_advantages([_weighed_rewards(group) for group in groups], clip, eps, unbiased)
    return group_advantages([group_rewards(group) for group in groups], std, clip, eps, unbiased, min_count)


def group_rewards(group: RolloutGroup) -> list[float | None]:
    """The mixed reward of each sibling; None for one that failed to generate or to be scored."""
    return [rollout.total if rollout.status is RolloutStatus.OK else None for rollout in group.rollouts]


def group_advantages(
    rewards: Sequence[Sequence[float | None]],
    std: Literal["global", "group"] = "global",
    clip: float | None = None,
    eps: float = STD_EPS,
    unbiased: bool = False,
    min_count: int = 0,
) -> list[Advantage]:
    """A = (r - mean of the group) / (std + eps), clipped to ±clip: one Advantage (adv_G fp32, valid_G bool) per group.

    None and NaN mean "failed": such a sample enters no mean and no deviation and carries 0. "global" takes the
    deviation of every valid sample given, "group" that of each group; biased (numpy's default) or `unbiased` (torch's).
    A group with fewer than `min_count` valid samples is compared with all samples: their mean, their deviation.
    Equal rewards give exactly 0. Raises NumericsError for an infinite reward or advantage.
    """
    rewards_G = [_rewards_tensor(values) for values in rewards]
    valid_G = [~torch.isnan(values) for values in rewards_G]
    pooled = torch.cat([v[ok] for v, ok in zip(rewards_G, valid_G, strict=True)]) if rewards_G else torch.empty(0)
    shared = _std(pooled, unbiased)
    advantages: list[Advantage] = []
    for values, ok in zip(rewards_G, valid_G, strict=True):
        alone = int(ok.sum()) >= min_count
        centred = _centred(values, ok, None if alone else pooled)
        scale = _std(values[ok], unbiased) if alone and std == "group" else shared
        advantages.append(_advantage(centred / (scale + eps), ok, scale, clip))
    return advantages


def keep_best_and_worst(advantage: Advantage, count: int) -> Advantage:
    """Only the count / 2 valid samples of the largest advantage and the count / 2 of the smallest stay valid.

    DanceGRPO's (2505.07818) best-of-n. Equal ones are told apart by their place: the first count as worse. All stay if
    there are no more than `count`. Who stays keeps the advantage that was found among all.
    """
    places = advantage.valid_G.nonzero().flatten()
    if len(places) <= count:
        return advantage
    ranked = places[advantage.adv_G[places].argsort(stable=True)]
    kept_G = torch.zeros_like(advantage.valid_G)
    kept_G[torch.cat([ranked[: count // 2], ranked[len(ranked) - count // 2 :]])] = True
    return Advantage(torch.where(kept_G, advantage.adv_G, 0.0), kept_G)


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
            spread = _std(values[ok])
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
    rewards: Sequence[Sequence[WeighedRewards | None]],
    clip: float | None = None,
    eps: float = STD_EPS,
    unbiased: bool = False,
) -> list[Advantage]:
    """GDPO (2601.05242): per reward k, A_k = (r_k - mean of the group) / (std of the group + eps); then
    A = sum over k of w_k A_k, and (A - mean of the batch) / (std of the batch + eps), clipped to ±clip.

    None is a failed sample: it enters no mean and no deviation and carries 0. A sample that lacks an optional reward
    has its other weights grown to the same sum of magnitudes, as in the mix. Deviations are biased, or `unbiased`;
    equal rewards give exactly 0. Raises NumericsError for an infinite reward or advantage.
    """
    sums_G = [_weighed_mean(group, eps, unbiased) * _weight_all(group) for group in rewards]
    valid_G = [torch.tensor([sample is not None for sample in group], dtype=torch.bool) for group in rewards]
    pooled = torch.cat([s[ok] for s, ok in zip(sums_G, valid_G, strict=True)]) if rewards else torch.empty(0)
    mean, scale = (pooled.mean() if len(pooled) else torch.zeros(())), _std(pooled, unbiased) + eps
    return [
        _advantage(torch.where(ok, (sums - mean) / scale, 0.0), ok, scale, clip)
        for sums, ok in zip(sums_G, valid_G, strict=True)
    ]


def summed_advantages(
    rewards: Sequence[Sequence[WeighedRewards | None]],
    clip: float | None = None,
    eps: float = STD_EPS,
    unbiased: bool = False,
) -> list[Advantage]:
    """MixGRPO's (2507.21802) credit for several rewards: A = sum of w_k A_k, clipped to ±clip, with
    A_k = (r_k - mean of the group) / (std of the group + eps). As GDPO, without its normalisation over the batch.

    A single reward of weight 1 gives `group_advantages` with std "group".
    """
    return [
        _advantage(
            _weighed_mean(group, eps, unbiased) * _weight_all(group),
            torch.tensor([sample is not None for sample in group], dtype=torch.bool),
            None,
            clip,
        )
        for group in rewards
    ]


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
            within.append(float(_std(torch.tensor(valid, dtype=torch.float64))))
            zero_variance += within[-1] == 0.0
    return {
        "advantage/abs_mean": _mean(magnitudes),
        "reward/std_within_group": _mean(within),
        "reward/zero_variance_groups": float(zero_variance),
        "batch/valid_samples": float(len(magnitudes)),
    }


def _weighed_rewards(group: RolloutGroup) -> list[WeighedRewards | None]:
    """Each sibling's values and weights by reward; None for one without a total. A total without parts is one."""
    found: list[WeighedRewards | None] = []
    for rollout, total in zip(group.rollouts, group_rewards(group), strict=True):
        if total is None or rollout.reward is None:
            found.append(None)
            continue
        pairs = zip(rollout.reward.scores, rollout.reward.weights, strict=True)
        parts = {score.name: (score.value, weight) for score, weight in pairs if score.value is not None}
        found.append(parts or {"total": (total, 1.0)})
    return found


def _weights(group: Sequence[WeighedRewards | None]) -> dict[str, float]:
    return {name: weight for sample in group if sample for name, (_, weight) in sample.items()}


def _weight_all(group: Sequence[WeighedRewards | None]) -> float:
    """Sum of the weights' magnitudes."""
    return math.fsum(abs(weight) for weight in _weights(group).values())


def _weighed_mean(group: Sequence[WeighedRewards | None], eps: float, unbiased: bool) -> torch.Tensor:
    """Sum of weight * group-relative advantage over the sum of |weight|, of the rewards each has: (G,) float64; 0 for
    failed samples."""
    total_G = torch.zeros(len(group), dtype=torch.float64)
    present_G = torch.zeros(len(group), dtype=torch.float64)
    for name, weight in _weights(group).items():
        values_G = _rewards_tensor([sample[name][0] if sample and name in sample else None for sample in group])
        has_G = ~torch.isnan(values_G)
        total_G += weight * _centred(values_G, has_G) / (_std(values_G[has_G], unbiased) + eps)
        present_G += abs(weight) * has_G
    return torch.where(present_G > 0, total_G / present_G, 0.0)


def _advantage(adv_G: torch.Tensor, valid_G: torch.Tensor, scale: torch.Tensor | None, clip: float | None) -> Advantage:
    """The clipped advantages. Raises NumericsError where one, or what they were divided by, is not finite."""
    # An infinite deviation would make every advantage a plausible 0.
    if not bool(torch.isfinite(adv_G).all()) or (scale is not None and not bool(torch.isfinite(scale))):
        raise NumericsError(f"advantages {adv_G.tolist()} are not finite; rescale the reward")
    return Advantage((adv_G if clip is None else adv_G.clamp(-clip, clip)).float(), valid_G)


def _rewards_tensor(values: Sequence[float | None]) -> torch.Tensor:
    rewards = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    if bool(torch.isinf(rewards).any()):
        raise NumericsError(f"rewards {rewards.tolist()} hold an infinity; a reward is finite or an error")
    return rewards


def _centred(rewards_G: torch.Tensor, valid_G: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Rewards minus the mean of the valid ones, or of `others`; 0 where invalid, and exactly 0 when all are equal."""
    valid = rewards_G[valid_G]
    compared = valid if others is None else others
    centred = torch.zeros_like(rewards_G)
    # Rounding of the mean would otherwise turn equal rewards into 1e-17 / eps.
    if len(valid) and bool((compared != compared[0]).any()):
        centred[valid_G] = valid - compared.mean()
    return centred


def _std(values: torch.Tensor, unbiased: bool = False) -> torch.Tensor:
    """Standard deviation, exactly 0 for equal values; of one value alone 0 too."""
    if len(values) == 0 or bool((values == values[0]).all()):
        return torch.zeros((), dtype=torch.float64)
    return values.std(correction=int(unbiased))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
