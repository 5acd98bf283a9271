"""Which weight store goes with which run, checked when its configuration is read."""

from __future__ import annotations

from raylign.errors import ConfigError
from services.weight_stores import Backend, CollectiveStoreConfig, ObjectStoreConfig, WeightStoreConfig

# Waiting to be seated, for a group to form and for a part to come are three waits of at most the timeout.
_WAITS_BEFORE_HUNG = 3


def check_weight_store(
    store: WeightStoreConfig,
    placement: str,
    max_staleness: int,
    gpus_per_actor: float,
    gpus_per_rank: float,
    hung_after_s: float,
) -> None:
    """Raise ConfigError, with the remedy, for a store that this run cannot use."""
    if placement == "in_process" and not isinstance(store, ObjectStoreConfig):
        raise ConfigError(
            f"in_process hands weights over in memory, so weight_store.type = {store.type!r} has nothing to send; "
            "remove [weight_store], or set placement = 'separate'"
        )
    if not isinstance(store, CollectiveStoreConfig):
        return
    if placement == "colocated":
        raise ConfigError(
            "weight_store.type = 'collective' has learner and actors wait for each other, and a colocated worker is "
            "both; set placement = 'separate', or weight_store.type = 'object_store' or 'filesystem'"
        )
    if max_staleness:
        raise ConfigError(
            "weight_store.type = 'collective' begins when every actor is there, and with max_staleness "
            f"{max_staleness} some are still drawing; set weight_store.type = 'object_store', 'filesystem' or "
            "'direct', or max_staleness = 0"
        )
    if _WAITS_BEFORE_HUNG * store.timeout_s > hung_after_s:
        raise ConfigError(
            f"weight_store.timeout_s {store.timeout_s:g} must be at most a third of rollout.hung_after_s "
            f"{hung_after_s:g}, or actors that wait for one another count as hung"
        )
    if store.backend == "nccl" and not _have_gpus(gpus_per_actor, gpus_per_rank):
        raise ConfigError(
            "weight_store.backend = 'nccl' needs a whole GPU for each member, and rollout.num_gpus is "
            f"{gpus_per_actor:g}, learner.num_gpus_per_rank {gpus_per_rank:g}; set both to 1, or backend = 'gloo'"
        )


def broadcast_backend(store: CollectiveStoreConfig, gpus_per_actor: float, gpus_per_rank: float) -> Backend:
    """What "auto" stands for."""
    if store.backend != "auto":
        return store.backend
    return "nccl" if _have_gpus(gpus_per_actor, gpus_per_rank) else "gloo"


def _have_gpus(gpus_per_actor: float, gpus_per_rank: float) -> bool:
    return gpus_per_actor >= 1 and gpus_per_rank >= 1
