"""Metrics of one optimiser step, added up over micro-batches and ranks without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from learner.ages import AGES, bucket_means
from learner.parallel import RankGroup

MAX_SUFFIX = "_max"


class MetricTally:
    """Sums of per-item values (and maxima of those named `*_max`), over valid items only.

    What is told by age (`learner.ages`) becomes the mean over the items of its bucket.
    Every rank must be given the same names, whether or not it had items: ranks reduce by position.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = tuple(names)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._maxima = torch.full_like(self._sums, -torch.inf)

    def add(self, values: Mapping[str, torch.Tensor], valid_N: torch.Tensor) -> None:
        """Count one micro-batch: one (N,) tensor per name. One without a valid item counts nothing."""
        if not bool(valid_N.any()):
            return
        valid = torch.stack([values[name].detach().double() for name in self._names])[:, valid_N]
        self._sums += valid.sum(dim=1)
        self._maxima = torch.maximum(self._maxima, valid.amax(dim=1))

    def reduce(self, ranks: RankGroup, num_items: int) -> dict[str, float]:
        """Means over `num_items` items of all ranks or over those of a bucket, or maxima; the same on every rank."""
        ranks.sum_(self._sums)
        ranks.max_(self._maxima)
        means, maxima = (self._sums / num_items).tolist(), self._maxima.tolist()
        reduced = {
            name: maximum if name.endswith(MAX_SUFFIX) else mean
            for name, mean, maximum in zip(self._names, means, maxima, strict=True)
            if name.rpartition("/")[2] not in AGES
        }
        return reduced | bucket_means(dict(zip(self._names, self._sums.tolist(), strict=True)))
