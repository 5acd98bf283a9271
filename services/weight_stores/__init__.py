"""How weights travel from the learner to rollout actors; one protocol (`base.WeightStore`), one file per way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from raylign.weights import WeightSnapshot
from services.weight_stores.base import Fetched, Ticket, WeightStore, take
from services.weight_stores.collective import GONE, Backend, CollectiveStore, CollectiveStoreConfig, Seat
from services.weight_stores.direct import DirectStore, DirectStoreConfig, DirectTicket
from services.weight_stores.filesystem import FilesystemStore, FilesystemStoreConfig, FileTicket
from services.weight_stores.object_store import ObjectStore, ObjectStoreConfig

__all__ = [
    "GONE",
    "Backend",
    "CollectiveStore",
    "CollectiveStoreConfig",
    "DirectStore",
    "DirectStoreConfig",
    "DirectTicket",
    "Fetched",
    "FileTicket",
    "FilesystemStore",
    "FilesystemStoreConfig",
    "ObjectStore",
    "ObjectStoreConfig",
    "Seat",
    "Ticket",
    "WeightStore",
    "WeightStoreConfig",
    "make_weight_store",
    "take",
]

WeightStoreConfig = Annotated[
    ObjectStoreConfig | FilesystemStoreConfig | CollectiveStoreConfig | DirectStoreConfig,
    Field(discriminator="type"),
]

_STORES: dict[type[Any], Callable[[Any, Callable[[Any], WeightSnapshot]], WeightStore]] = {
    ObjectStoreConfig: lambda config, get: ObjectStore(),
    FilesystemStoreConfig: lambda config, get: FilesystemStore(
        config.path, config.keep, config.num_reads, config.first_wait_s
    ),
    CollectiveStoreConfig: lambda config, get: CollectiveStore(get),
    DirectStoreConfig: lambda config, get: DirectStore(),
}


def make_weight_store(config: WeightStoreConfig, get: Callable[[Any], WeightSnapshot]) -> WeightStore:
    """One process's end of the configured way; `get` resolves a reference into Ray's object store."""
    return _STORES[type(config)](config, get)
