"""What keeps sharded ranks in step: equal numbers of micro-batches, the right shapes, and refusals before anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.algorithms import LossSetting, make_algorithm
from learner.algorithms.crd import CrdConfig
from learner.algorithms.nft import NftConfig
from learner.batching import StepData, TrainBatch, cut
from learner.learner import LearnerConfig
from raylign.config import ConfigError
from raylign.errors import WeightError
from raylign.models.swapping import clone_tensors, using
from raylign.types import Needs, RolloutGroup
from services.config import load_run_config
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler

FEW = {(0, 1): 0.2, (1, 2): 0.9, (1, 3): 0.1}
"""Three samples of eight have a reward."""


def step_data(needs: Needs = Needs.FINAL, few: bool = True) -> StepData:
    def reward(group: int, sibling: int) -> float | None:
        return FEW.get((group, sibling)) if few else 0.1 * sibling

    groups: list[RolloutGroup] = draw_groups(ToyPolicy(), euler(), needs, num_groups=2, reward=reward)
    algorithm = make_algorithm(NftConfig(num_train_times=2), LossSetting(euler()))
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    return StepData(groups, algorithm.credit(groups), items, [algorithm.shares(group) for group in groups], needs)


def batch_of(data: StepData, rank: int, num_ranks: int, level: bool, size: int = 1) -> TrainBatch:
    options: dict[str, Any] = {"num_epochs": 1, "num_updates": 1, "micro_batch_size": size, "level": level}
    return cut(data, rank=rank, num_ranks=num_ranks, **options)[0]


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 1), (5, 1), (5, 2)])
def test_level_ranks_take_as_many_micro_batches_and_count_what_they_counted(num_ranks: int, size: int) -> None:
    data = step_data()
    per_rank = [batch_of(data, rank, num_ranks, False, size) for rank in range(num_ranks)]
    level = [batch_of(data, rank, num_ranks, True, size) for rank in range(num_ranks)]
    longest = max(one.num_micro_batches for one in per_rank)
    assert min(one.num_micro_batches for one in per_rank) < longest, "the shares are uneven"
    for own, padded in zip(per_rank, level, strict=True):
        taken = list(padded.micro_batches())
        assert len(taken) == padded.num_micro_batches == longest
        real = list(own.micro_batches())
        assert len(real) == own.num_micro_batches
        assert [one.keys for one in taken[: len(real)]] == [one.keys for one in real]
        assert all(bool(one.valid_N.all()) for one in taken[: len(real)])
        assert not any(bool(one.valid_N.any()) for one in taken[len(real) :])
        assert (padded.denominator, padded.num_items) == (own.denominator, own.num_items)


def test_even_shares_are_left_as_they_are() -> None:
    data = step_data(few=False)
    for rank in range(2):
        plain, level = (list(batch_of(data, rank, 2, one, 2).micro_batches()) for one in (False, True))
        assert [one.keys for one in plain] == [one.keys for one in level]
        assert all(bool(one.valid_N.all()) for one in level)


def test_tensors_of_another_shape_are_never_swapped_in() -> None:
    policy = ToyPolicy()
    other = clone_tensors(policy)
    name = next(iter(other))
    other[name] = other[name][:1]
    before = clone_tensors(policy)
    with (
        pytest.raises(WeightError, match=rf"{name} is \(.*\) here, and \(1, .*\) was to be used"),
        using(policy, other),
    ):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in clone_tensors(policy).items())


def test_a_checkpoints_own_code_cannot_be_sharded() -> None:
    sharded = {"learner.sharding": "fsdp", "model.trust_remote_code": "true"}
    with pytest.raises(ConfigError, match=r"learner\.sharding = 'fsdp' shards native networks only"):
        load_run_config("quickstart_text", sharded)


def test_one_rank_may_be_told_to_shard() -> None:
    assert load_run_config("quickstart_image", {"learner.sharding": "fsdp"}).learner.num_ranks == 1
    assert LearnerConfig().sharding == "none"


def test_a_survey_needs_nothing_of_a_filler() -> None:
    # The table that ranks add up has each item once, whoever goes over it to keep step.
    data = step_data(CrdConfig(center_scope="batch").needs)
    rows = [
        (row.group, row.sibling, one.place)
        for rank in range(3)
        for one in batch_of(data, rank, 3, True).micro_batches()
        for row, valid in zip(one.rows, one.valid_N.tolist(), strict=True)
        if valid
    ]
    assert len(rows) == len(set(rows)) == len(FEW) * 2
