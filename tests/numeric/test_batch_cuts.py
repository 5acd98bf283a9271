"""How a step's samples are cut (micro-batches, ranks) must not change its gradient."""

from __future__ import annotations

import pytest
import torch

from learner.algorithms import AlgorithmConfig
from learner.algorithms.awm import AwmConfig
from learner.algorithms.crd import CrdConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.nft import NftConfig
from learner.learner import Learner, LearnerConfig
from learner.parallel import RankGroup
from raylign.samplers import Sampler
from raylign.types import RolloutGroup
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, euler, flow_sde

CASES = [
    (NftConfig(), euler(5)),
    (CrdConfig(num_train_times=3), euler(5)),
    (AwmConfig(num_train_times=3), euler(5)),
    (FlowGrpoConfig(), flow_sde(5)),
]


class LonelyRank(RankGroup):
    """One of several ranks that never hears from the others, so that its own gradient can be looked at."""

    def sum_(self, tensor: torch.Tensor) -> None:
        """The others add nothing."""

    def max_(self, tensor: torch.Tensor) -> None:
        """The others have nothing larger."""

    def broadcast(self, tensors: object, source: int = 0) -> None:
        """Everyone starts alike."""


def reward(group: int, sibling: int) -> float | None:
    return None if (group, sibling) == (1, 2) else by_sibling(group, sibling)


def drawn(config: AlgorithmConfig, sampler: Sampler) -> list[RolloutGroup]:
    return draw_groups(ToyPolicy(), sampler, config.needs, num_groups=4, reward=reward)


def gradient(
    config: AlgorithmConfig,
    sampler: Sampler,
    micro_batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
    updates: int = 1,
) -> torch.Tensor:
    """The last update's gradient of one rank at weights that have left the old and reference ones."""
    policy = ToyPolicy()
    ranks = LonelyRank(rank, num_ranks)
    learner_config = LearnerConfig(updates_per_step=updates)
    learner = Learner(learner_config, config, policy, sampler, 1.0, micro_batch_size, RUN_SEED, ranks)
    moved = ToyPolicy(seed=5).trainable_parameters()
    for name, parameter in policy.trainable_parameters().items():
        parameter.data = 0.9 * parameter.data + 0.1 * moved[name].data
    learner.begin_step(drawn(config, sampler), 1)
    learner.forward_backward(updates - 1)
    return torch.cat([p.grad.flatten().clone() for p in policy.trainable_parameters().values() if p.grad is not None])


@pytest.mark.parametrize(("config", "sampler"), CASES)
def test_the_micro_batch_size_does_not_change_the_gradient(config: AlgorithmConfig, sampler: Sampler) -> None:
    whole = gradient(config, sampler, 16)
    assert whole.abs().max() > 1e-3
    for size in (1, 2, 5, 8):
        torch.testing.assert_close(gradient(config, sampler, size), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("config", "sampler"), CASES)
def test_ranks_add_up_to_the_single_ranks_gradient(config: AlgorithmConfig, sampler: Sampler, num_ranks: int) -> None:
    whole = gradient(config, sampler, 4, updates=2)
    parts = [gradient(config, sampler, 4, rank, num_ranks, updates=2) for rank in range(num_ranks)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), whole, rtol=1e-4, atol=1e-6)
