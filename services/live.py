"""How a live run's number of rollout actors changes: by command, and by itself. For `services/run.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from services.autoscaler import autoscaled
from services.config import RunConfig
from services.run_control import RunControl, control_server
from services.topology import Topology, most_actors

if TYPE_CHECKING:
    from services.controller import Observer


def answering(
    config: RunConfig, topology: Topology, run_dir: Path, step: Callable[[], int]
) -> AbstractAsyncContextManager[None]:
    """Within it `raylign scale`, `pause` and `unpause` reach the run. `step` tells the last completed one."""
    control = RunControl(
        topology.pool, config.rollout.bounds, lambda: most_actors(config), lambda: (step(), config.num_steps)
    )
    return control_server(control, run_dir)


def scaling(config: RunConfig, topology: Topology, observer: Observer, note: Callable[[str], None]) -> Observer:
    """The controller's observer, which also scales where the configuration gives bounds; `note` hears of it."""
    return autoscaled(observer, topology.pool, config.rollout.bounds, lambda: most_actors(config), note)
