"""What a run is called on a cluster that it shares, and what of dead runs lies there. Pure.

A run's Serve applications are `<name>-<reward>`, and its workers are actors called `<name>/<number>`. Ray ends the
actors when the driver is gone, however it ended; Serve keeps applications. Those of a run without actors are left over.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Iterable

_NAME = re.compile(r"raylign-[0-9a-f]{8}(?=-)")


def new_run_name() -> str:
    """A name that no other run has: runs must not share, replace or delete each other's rewards."""
    return f"raylign-{uuid.uuid4().hex[:8]}"


def left_behind(apps: Iterable[str], living: Collection[str]) -> list[str]:
    """The applications of runs that are not among the living."""
    owners = {app: found.group() for app in apps if (found := _NAME.match(app))}
    return sorted(app for app, owner in owners.items() if owner not in living)
