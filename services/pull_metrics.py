"""Numbers of one hand-off of weights, from what every actor says its pull took. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.drawn import Pulled


def pull_metrics(pulled: Sequence[Pulled]) -> dict[str, float]:
    """The slowest actor's seconds and the bytes of one pull; of low-precision copies only where there are any.

    `pull/bytes` is the snapshot, `pull/packed_bytes` the low-precision weights made from it. `pull/detours` counts,
    where there are any, actors that took it from the object store because the configured store failed. Empty when no
    actor answered.
    """
    if not pulled:
        return {}
    metrics = {
        "pull/load_s": max(one.load_s for one in pulled),
        "pull/bytes": float(max(one.num_bytes for one in pulled)),
    }
    if any(one.packed_bytes for one in pulled):
        metrics["pull/requantise_s"] = max(one.requantise_s for one in pulled)
        metrics["pull/packed_bytes"] = float(max(one.packed_bytes for one in pulled))
    detours = sum(bool(one.detour) for one in pulled)
    return metrics | ({"pull/detours": float(detours)} if detours else {})
