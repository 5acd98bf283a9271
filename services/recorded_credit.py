"""What each sibling's credit was, for people to see: the algorithm's own rule, without the model it belongs to.

The learner's processes hold the algorithm; a run's driver, which writes the record, holds its configuration and the
groups. Credit is a function of these alone, so it is worked out again here, and tests compare it with every algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence

from learner.advantages import credit_groups, group_rewards, keep_best_and_worst, relative_advantages
from learner.algorithms import AlgorithmUnion
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.forward_base import ForwardConfig
from learner.algorithms.step_base import StepAlgorithmConfig
from learner.algorithms.token_base import TokenAlgorithmConfig
from learner.algorithms.wd1 import Wd1Config, signed_weights
from raylign.types import Advantage, RolloutGroup


def credit_of(config: AlgorithmUnion, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
    """The credit of each sibling of each group, all groups of one step together; None for a failed one."""
    advantages = _advantages(config, groups)
    if isinstance(config, Wd1Config):
        together = [advantages] if config.softmax_over == "step" else [[one] for one in advantages]
        return [values for some in together for values in _weighed(config, some)]
    return [_listed(one.adv_G.tolist(), one) for one in advantages]


def _advantages(config: AlgorithmUnion, groups: Sequence[RolloutGroup]) -> list[Advantage]:
    if isinstance(config, TokenAlgorithmConfig):
        rewards = [group_rewards(group) for group in groups]
        return relative_advantages(rewards, config.baseline, config.advantage_std)
    if isinstance(config, StepAlgorithmConfig):
        fewest = config.min_count if isinstance(config, DdpoConfig) else 0
        advantages = credit_groups(
            groups, config.advantage_std, config.adv_clip, config.advantage_eps, config.advantage_unbiased, fewest
        )
        kept = config.train_best_worst if isinstance(config, DanceGrpoConfig) else None
        return advantages if kept is None else [keep_best_and_worst(one, kept) for one in advantages]
    assert isinstance(config, ForwardConfig), f"credit of {config.type} is not known here; add its rule"
    return credit_groups(groups, config.advantage_std, config.adv_clip)


def _weighed(config: Wd1Config, advantages: Sequence[Advantage]) -> list[list[float | None]]:
    """Advantages that became weights, over all given together."""
    import torch

    adv_B, valid_B = torch.cat([one.adv_G for one in advantages]), torch.cat([one.valid_G for one in advantages])
    weights = signed_weights(adv_B, valid_B, positive_only=config.variant == "psr")
    parts = weights.split([len(one.adv_G) for one in advantages])
    return [_listed(part.tolist(), one) for part, one in zip(parts, advantages, strict=True)]


def _listed(values: Sequence[float], advantage: Advantage) -> list[float | None]:
    return [value if ok else None for value, ok in zip(values, advantage.valid_G.tolist(), strict=True)]
