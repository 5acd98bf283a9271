"""Cutting a step's samples: shares, chunks, denominators, placeholders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages, group_rewards
from learner.batching import Row, StepData, TrainBatch, cut, share
from raylign.errors import ConfigError, NumericsError, ShapeError
from raylign.types import Needs, RolloutGroup
from tests.tiny_models import ToyPolicy, by_sibling, draw_groups, euler, flow_sde

COUPLED = Needs.STEPS | Needs.LOGPROBS | Needs.CHUNKS


def failing(group: int, sibling: int) -> float | None:
    return None if (group, sibling) in {(0, 1), (2, 0), (2, 3)} else by_sibling(group, sibling)


def step_data(needs: Needs, groups: Sequence[RolloutGroup] | None = None, trained: int = 2) -> StepData:
    if groups is None:
        sampler = flow_sde() if Needs.LOGPROBS in needs else euler()
        groups = draw_groups(ToyPolicy(), sampler, needs, num_groups=4, reward=failing)
    advantages = group_advantages([group_rewards(group) for group in groups])
    steps = [torch.arange(trained).expand(group.group_size, -1) for group in groups]
    shares = [torch.full((group.group_size,), float(trained)) for group in groups]
    return StepData(groups, advantages, steps, shares, needs)


def cuts(data: StepData, updates: int = 1, num_ranks: int = 1, size: int = 4) -> list[tuple[TrainBatch, ...]]:
    return [
        cut(data, num_epochs=1, num_updates=updates, rank=rank, num_ranks=num_ranks, micro_batch_size=size)
        for rank in range(num_ranks)
    ]


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_contiguous_complete_and_even(count: int, num_parts: int) -> None:
    parts = [list(share(range(count), part, num_parts)) for part in range(num_parts)]
    assert [item for part in parts for item in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 3, 4, 16, 99])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("updates", [1, 2])
def test_forward_process_batches_hold_each_valid_sample_once(updates: int, num_ranks: int, size: int) -> None:
    data = step_data(Needs.FINAL)
    per_rank = cuts(data, updates, num_ranks, size)
    rows = [row for batches in per_rank for batch in batches for block in batch.blocks for row in block]
    valid = [row for row in (Row(g, s) for g in range(4) for s in range(4)) if data.is_valid(row)]
    assert sorted(rows) == valid
    assert len(valid) == 13
    assert all(len(block) <= size for batches in per_rank for batch in batches for block in batch.blocks)
    for update in range(updates):
        counted = [sum(len(block) for block in batches[update].blocks) for batches in per_rank]
        assert {batches[update].num_items for batches in per_rank} == {2 * sum(counted)}
        assert max(counted) - min(counted) <= 1


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_coupled_batches_keep_rollout_chunks_whole(chunk: int) -> None:
    data = step_data(COUPLED)
    (batches,) = cuts(data, updates=2, size=chunk)
    blocks = [block for batch in batches for block in batch.blocks]
    everyone = [Row(g, s) for g in range(4) for s in range(4)]
    assert blocks == [tuple(everyone[start : start + chunk]) for start in range(0, 16, chunk)]
    assert sum(batch.num_items for batch in batches) == 2 * 13


def test_a_failed_row_is_a_masked_row_of_zeros() -> None:
    data = step_data(COUPLED)
    poisoned = data.groups[0].latents
    assert poisoned.states_GS1CHW is not None
    poisoned.final_GCHW[1] = math.nan
    poisoned.states_GS1CHW[1] = math.nan
    ((batch,),) = cuts(data)
    micro_batch = next(batch.micro_batches())
    assert micro_batch.valid_N.tolist() == [True, False, True, True]
    assert micro_batch.states_NS1CHW is not None
    assert micro_batch.states_NS1CHW[1].abs().max() == 0
    assert micro_batch.final_NCHW[1].abs().max() == 0
    assert torch.isfinite(micro_batch.states_NS1CHW).all()
    assert torch.equal(micro_batch.states_NS1CHW[2], poisoned.states_GS1CHW[2])


def test_a_block_without_a_valid_row_is_not_run() -> None:
    groups = draw_groups(
        ToyPolicy(), flow_sde(), COUPLED, reward=lambda group, sibling: None if group == 1 else float(sibling)
    )
    data = step_data(COUPLED, groups)
    ((batch,),) = cuts(data)
    assert len(batch.blocks) == 3
    assert {key.prompt_id for micro_batch in batch.micro_batches() for key in micro_batch.keys} == {"p0", "p2"}


def test_micro_batches_go_block_by_block_and_step_by_step() -> None:
    data = step_data(Needs.FINAL)
    ((batch,),) = cuts(data, size=8)
    seen = [(micro_batch.keys[0].prompt_id, micro_batch.item_N.tolist()) for micro_batch in batch.micro_batches()]
    assert seen == [("p0", [0] * 8), ("p0", [1] * 8), ("p2", [0] * 5), ("p2", [1] * 5)]


def test_each_row_carries_its_own_prompts_conditioning_and_credit() -> None:
    data = step_data(Needs.FINAL)
    ((batch,),) = cuts(data, size=99)
    micro_batch = next(batch.micro_batches())
    for place, row in enumerate(batch.blocks[0]):
        group = data.groups[row.group]
        assert micro_batch.keys[place] == group.rollouts[row.sibling].key
        assert torch.equal(micro_batch.conditioning.pooled_PD[place], group.conditioning.pooled_PD[0])
        assert torch.equal(micro_batch.final_NCHW[place], group.latents.final_GCHW[row.sibling])
        assert micro_batch.adv_N[place] == data.advantages[row.group].adv_G[row.sibling]


def test_a_valid_sample_that_is_not_finite_is_named() -> None:
    data = step_data(Needs.FINAL)
    data.groups[1].latents.final_GCHW[3, 0, 0, 0] = math.inf
    ((batch,),) = cuts(data)
    with pytest.raises(NumericsError, match=r"final_GCHW of sample \(11, 'p1', 0, 3\) is not finite"):
        list(batch.micro_batches())


def test_a_trajectory_without_what_the_algorithm_needs_is_refused() -> None:
    groups = draw_groups(ToyPolicy(), euler(), Needs.FINAL, num_groups=4)
    ((batch,),) = cuts(step_data(COUPLED, groups))
    with pytest.raises(ShapeError, match=r"group 'p0' has no states_GS1CHW"):
        list(batch.micro_batches())


def test_more_updates_than_units_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"updates_per_step is 5, but this step has only 4"):
        cuts(step_data(COUPLED), updates=5)


def test_a_loss_of_one_step_refuses_a_mixed_micro_batch() -> None:
    ((batch,),) = cuts(step_data(Needs.FINAL))
    micro_batch = next(batch.micro_batches())
    assert micro_batch.only_step() == 0
    with pytest.raises(ShapeError, match=r"got steps \[0, 1\]"):
        replace(micro_batch, item_N=torch.tensor([0, 1, 0, 1])).only_step()
