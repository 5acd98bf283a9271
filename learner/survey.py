"""The two passes of an algorithm whose loss of one item depends on the others (`learner.algorithms.base.Surveys`).

    every micro-batch, no gradient ──▶ one table of numbers per item, summed over ranks ──▶ settle ──▶ every micro-batch

Between the passes only these numbers are kept, so memory does not grow with the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from learner.algorithms.base import Algorithm, SurveyedItems, Surveys
from learner.batching import TrainBatch
from learner.parallel import RankGroup
from learner.policies import PolicySet


def surveyed_batches(
    algorithm: Algorithm[Any], policies: PolicySet, batch: TrainBatch, ranks: RankGroup
) -> Iterator[Any]:
    """This rank's micro-batches of an update, on the policy's device, with what a survey of them all settled."""
    device = policies.policy.device
    table_PGKF = _survey(algorithm, policies, batch, ranks) if isinstance(algorithm, Surveys) else None
    for on_cpu in batch.micro_batches():
        one = on_cpu.to(device)
        if table_PGKF is not None:
            settled_NF = torch.stack([table_PGKF[row.group, row.sibling, one.place] for row in one.rows])
            one = replace(one, settled_NF=settled_NF.to(device))
        yield one


def _survey(algorithm: Surveys[Any], policies: PolicySet, batch: TrainBatch, ranks: RankGroup) -> torch.Tensor:
    """What the algorithm settled for every item of the update, (P, G, K, any), on the CPU; the same on every rank."""
    sizes = batch.data.sizes
    numbers_PGKF = torch.zeros(*sizes, algorithm.num_surveyed, dtype=torch.float64)
    present_PGK = torch.zeros(*sizes, dtype=torch.float64)
    for on_cpu in batch.micro_batches():
        with torch.no_grad():
            found_NF = algorithm.survey(policies, on_cpu.to(policies.policy.device)).cpu()
        for n, (row, valid) in enumerate(zip(on_cpu.rows, on_cpu.valid_N.tolist(), strict=True)):
            if valid:
                numbers_PGKF[row.group, row.sibling, on_cpu.place] = found_NF[n]
                present_PGK[row.group, row.sibling, on_cpu.place] = 1
    # Each item is one rank's, so the sum over ranks is every rank's table, whole.
    for table in (numbers_PGKF, present_PGK):
        ranks.sum_(table)
    return algorithm.settle(SurveyedItems(numbers_PGKF, present_PGK > 0, batch.data.advantage_table()))
