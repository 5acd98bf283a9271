"""What CRD asks the network and keeps, and how its configuration decides what is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from learner.algorithms import AlgorithmConfig
from learner.algorithms.base import LossSetting
from learner.algorithms.crd import Crd, CrdConfig
from learner.algorithms.nft import NftConfig
from learner.batching import StepData, cut
from learner.learner import Learner, LearnerConfig
from learner.policies import PolicySet
from raylign.errors import ConfigError, ShapeError
from raylign.models.base import Conditioning
from raylign.types import Needs
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler, train_step

SMALL = CrdConfig(num_train_times=2)


class CountingToy(ToyPolicy):
    """Counts the rows it is asked about, with and without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = {True: 0, False: 0}

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        self.rows[torch.is_grad_enabled()] += len(state_BCHW)
        return super().predict(state_BCHW, sigma_B, conditioning)


def one_pass(config: AlgorithmConfig, policy: ToyPolicy) -> Learner:
    learner = Learner(LearnerConfig(), config, policy, euler(), 1.0, 4, RUN_SEED)
    learner.begin_step(draw_groups(ToyPolicy(), euler(), config.needs), 1)
    learner.forward_backward(0)
    return learner


@pytest.mark.parametrize(
    ("options", "without_gradient"),
    [
        ({}, 4),  # old and policy in the survey, both halves of the guided reference
        ({"kl_guidance": 1.0}, 3),
        ({"kl_weight": 0.0}, 2),
    ],
)
def test_each_item_costs_one_forward_with_gradient_and_few_without(
    options: dict[str, Any], without_gradient: int
) -> None:
    policy = CountingToy()
    one_pass(SMALL.model_copy(update=options), policy)
    num_items = 3 * 4 * 2
    assert policy.rows == {True: num_items, False: num_items * without_gradient}


def test_it_keeps_no_more_for_the_backward_pass_than_nft() -> None:
    def kept(config: AlgorithmConfig) -> int:
        """Most bytes that one loss's graph holds on to."""
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        policy = ToyPolicy(latent_shape=(2, 16, 16))
        learner = Learner(LearnerConfig(), config, policy, euler(), 1.0, 4, RUN_SEED)
        groups = draw_groups(ToyPolicy(latent_shape=(2, 16, 16)), euler(), config.needs, num_groups=1)
        learner.begin_step(groups, 1)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            learner.forward_backward(0)
        return sum(found.values())

    assert kept(CrdConfig(num_train_times=1)) <= 1.1 * kept(NftConfig(num_train_times=1))


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, Needs.GROUPS | Needs.NEGATIVE | Needs.OLD | Needs.SAMPLING | Needs.REFERENCE, Needs.LOGPROBS),
        ({"kl_guidance": 1.0}, Needs.REFERENCE, Needs.NEGATIVE),
        ({"kl_weight": 0.0}, Needs.OLD | Needs.SAMPLING, Needs.NEGATIVE | Needs.REFERENCE),
        ({"center_scope": "batch"}, Needs.OLD, Needs.GROUPS),
    ],
)
def test_the_configuration_alone_says_what_is_needed(options: dict[str, Any], present: Needs, absent: Needs) -> None:
    needs = CrdConfig(**options).needs
    assert needs & present == present
    assert not needs & absent


def test_the_anchor_is_guided_even_when_the_policy_is_the_reference() -> None:
    (guided,) = train_step(learner(SMALL), groups(SMALL), 1)
    plain = SMALL.model_copy(update={"kl_guidance": 1.0})
    (unguided,) = train_step(learner(plain), groups(plain), 1)
    assert guided.metrics["loss/kl"] > 1e-4
    assert unguided.metrics["loss/kl"] == 0


def test_rewards_weigh_the_anchor_by_rank_in_the_group_or_as_they_are() -> None:
    # Rewards .5 .5 1 7 (which counts as 1): the raw weight is floor + mean R (weight - floor), R = .75.
    values = (0.5, 0.5, 1.0, 7.0)
    for options, expected in (
        ({"kl_reward_source": "raw"}, 0.01 + 0.75 * 0.09),
        ({"kl_reward_source": "advantage01"}, 0.01 + 0.5 * 0.09),
        ({"kl_rewarded": False}, 0.1),
        ({"kl_floor": 0.3, "kl_reward_source": "raw"}, 0.1),
    ):
        config = CrdConfig.model_validate({"num_train_times": 2, "kl_floor": 0.01, **options})
        drawn = draw_groups(ToyPolicy(), euler(), config.needs, num_groups=1, reward=lambda group, s: values[s])
        (result,) = train_step(learner(config), drawn, 1)
        assert result.metrics["kl/weight"] == pytest.approx(expected, rel=1e-5), options


def test_a_sample_without_siblings_is_refused() -> None:
    CrdConfig().check_group_size(2)
    with pytest.raises(ConfigError, match="group_size 1 has none"):
        CrdConfig().check_group_size(1)


def test_it_cannot_be_asked_about_a_batch_that_nobody_surveyed() -> None:
    crd = Crd(SMALL, LossSetting(euler()))
    drawn = groups(SMALL)
    items, shares = [crd.items(g, RUN_SEED, 1) for g in drawn], [crd.shares(g) for g in drawn]
    data = StepData(drawn, crd.credit(drawn), items, shares, crd.needs)
    (batch,) = cut(data, num_epochs=1, num_updates=1, rank=0, num_ranks=1, micro_batch_size=4)
    with pytest.raises(ShapeError, match="not surveyed"):
        crd.loss(PolicySet(ToyPolicy(), "fp32", crd.needs), next(batch.micro_batches()))


def test_groups_stay_whole_in_updates() -> None:
    # Three updates of three groups: each has one whole group, whatever the micro-batch.
    config = LearnerConfig(updates_per_step=3)
    results = train_step(Learner(config, SMALL, ToyPolicy(), euler(), 1.0, 3, RUN_SEED), groups(SMALL), 1)
    assert [result.metrics["batch/num_items"] for result in results] == [8, 8, 8]


def learner(config: CrdConfig) -> Learner:
    return Learner(LearnerConfig(), config, ToyPolicy(), euler(), 1.0, 4, RUN_SEED)


def groups(config: CrdConfig) -> list[Any]:
    return list(draw_groups(ToyPolicy(), euler(), config.needs))
