"""Two real learner processes over gloo: the same step as one, and one rank's NaN refused by both."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithms.crd import CrdConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.nft import NftConfig
from learner.learner import Learner, LearnerConfig
from learner.parallel import GradientBucket, RankGroup
from learner.tally import MetricTally
from raylign.errors import ConfigError
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler, flow_sde, train_step

ROOT = Path(__file__).parents[2]
ALGORITHMS = {
    "nft": (NftConfig(), euler()),
    "crd": (CrdConfig(num_train_times=3), euler()),
    "crd over batches": (CrdConfig(num_train_times=3, center_scope="batch", weight_temp=0.3), euler()),
    "flow_grpo": (FlowGrpoConfig(), flow_sde()),
}
RANK = """
import json, sys
import torch
torch.set_num_threads(1)
from learner.parallel import RankGroup
from tests.unit.test_learner_parallel import ALGORITHMS, three_steps

ranks = RankGroup.connect(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], timeout_s=60)
answers = {name: three_steps(name, ranks) for name in ALGORITHMS}
ranks.barrier()
ranks.close()
print(json.dumps(answers))
"""


def three_steps(algorithm: str, ranks: RankGroup) -> Any:
    """A healthy step, one whose NaN lies in the last rank's shard only, and a healthy one again.

    Each rank starts from other weights, which rank 0's must replace. Returns (finite, metrics) by step, the hash
    and the weights.
    """
    config, sampler = ALGORITHMS[algorithm]
    learner = Learner(LearnerConfig(), config, ToyPolicy(seed=ranks.rank), sampler, 1.0, 4, RUN_SEED, ranks)
    results: list[Any] = []
    for step in (1, 2, 3):
        groups = draw_groups(ToyPolicy(), sampler, config.needs, num_groups=4, first_sequence=step)
        if step == 2:
            told = groups[3].conditioning
            groups[3] = replace(groups[3], conditioning=replace(told, pooled_PD=told.need_pooled() * math.inf))
        (result,) = train_step(learner, groups, step)
        results.append([result.finite, dict(result.metrics)])
    weights = torch.cat([p.detach().flatten() for p in learner.policy.trainable_parameters().values()])
    return [results, learner.weights_sha256(), weights.tolist()]


def run_ranks(code: str, num_ranks: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(num_ranks), address],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    answers: list[Any] = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert process.returncode == 0, err
            answers.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return answers


def test_two_ranks_train_as_one() -> None:
    first, second = run_ranks(RANK, 2)
    assert json.dumps(first) == json.dumps(second)  # metrics, hash and weights; NaN compares as text
    for name in ALGORITHMS:
        together, alone = first[name], three_steps(name, RankGroup.single())
        assert [finite for finite, _ in together[0]] == [True, False, True]
        torch.testing.assert_close(torch.tensor(together[2]), torch.tensor(alone[2]), rtol=1e-3, atol=1e-5)
        for (finite, metrics), (_, by_itself) in zip(together[0], alone[0], strict=True):
            assert metrics.keys() == by_itself.keys()
            if finite:
                assert metrics == pytest.approx(by_itself, rel=1e-2, abs=1e-4)
            else:
                assert not math.isfinite(metrics["loss"])


def test_a_single_rank_needs_no_process_group() -> None:
    ranks = RankGroup.connect(0, 1, "tcp://nowhere:1")
    tensor = torch.tensor([1.0, 2.0])
    ranks.sum_(tensor)
    ranks.max_(tensor)
    ranks.broadcast([tensor])
    ranks.barrier()
    ranks.close()
    assert tensor.tolist() == [1.0, 2.0]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_group_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"must be in \[0, 2\)"):
        RankGroup.connect(rank, 2, "tcp://nowhere:1")


def test_the_bucket_is_where_gradients_live() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    bucket = GradientBucket([used, unused])
    (used * 2).sum().backward()
    (used * 3).sum().backward()
    assert bucket.flat.tolist() == [5.0] * 4 + [0.0] * 3
    assert unused.grad is not None
    bucket.flat.mul_(2)
    assert used.grad is not None
    assert used.grad.tolist() == [[10.0, 10.0], [10.0, 10.0]]
    bucket.zero()
    assert used.grad.abs().sum() == 0


def test_mixed_parameter_dtypes_are_refused() -> None:
    mixed = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    with pytest.raises(ConfigError, match="share one dtype and device"):
        GradientBucket(mixed)


def test_a_parameter_the_loss_does_not_reach_is_decayed_alike_on_any_number_of_ranks() -> None:
    # Its gradient is 0, not None, so AdamW treats it the same whether or not another rank reached it.
    policy = ToyPolicy()
    unused = policy.network["unused"] = torch.nn.Linear(2, 2)
    learner = Learner(LearnerConfig(lr=0.1, weight_decay=0.5), NftConfig(), policy, euler(), 1.0, 4, RUN_SEED)
    before = unused.weight.detach().clone()
    train_step(learner, draw_groups(ToyPolicy(), euler(), NftConfig().needs), 1)
    torch.testing.assert_close(unused.weight.detach(), before * (1 - 0.1 * 0.5))


def test_a_tally_takes_means_and_maxima_over_valid_items() -> None:
    tally = MetricTally(("loss", "gap_max"), torch.device("cpu"))
    valid = torch.tensor([True, False, True])
    tally.add({"loss": torch.tensor([1.0, 100.0, 2.0]), "gap_max": torch.tensor([3.0, 100.0, 1.0])}, valid)
    tally.add({"loss": torch.tensor([6.0]), "gap_max": torch.tensor([2.0])}, torch.tensor([True]))
    assert tally.reduce(RankGroup.single(), 3) == {"loss": 3.0, "gap_max": 3.0}
