"""Ages of trained items, in versions between the weights that drew them and those the step began with, as buckets.

A metric told by age is a mean over the items of one bucket, named `<metric>/age_2`; a bucket without items is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

AGES = ("age_0", "age_1", "age_2", "age_3", "age_4", "age_5_up")
"""Buckets in order; the last one is open."""
COUNTED = "items"
"""The name under which a bucket's items are counted."""


def bucket(age: int) -> str:
    """The bucket of an age."""
    return AGES[min(age, len(AGES) - 1)]


def names_by_age(names: Sequence[str]) -> tuple[str, ...]:
    """What `by_age` reports for metrics of these names."""
    return tuple(f"{name}/{age}" for name in (COUNTED, *names) for age in AGES)


def by_age(values: Mapping[str, torch.Tensor], age_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each metric (N,) by bucket, 0 for items of others, and 1 for each item under `items/<bucket>`, all (N,)."""
    place_N = age_N.clamp_max(len(AGES) - 1)
    told: dict[str, torch.Tensor] = {}
    for place, age in enumerate(AGES):
        for name, value_N in values.items():
            inside_N = (place_N == place).to(value_N.device)
            told[f"{name}/{age}"] = torch.where(inside_N, value_N, 0.0)
            told[f"{COUNTED}/{age}"] = inside_N.double()
    return told


def bucket_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means of the buckets that have items, from the sums over all items of what `by_age` told; other names dropped."""
    means: dict[str, float] = {}
    for name, total in sums.items():
        metric, _, age = name.rpartition("/")
        if age in AGES and metric != COUNTED and sums[f"{COUNTED}/{age}"] > 0:
            means[name] = total / sums[f"{COUNTED}/{age}"]
    return means
