"""A live run's rows from its Redis stream, where it has one: pushed, where a folder would have to be looked at.

What comes out of Redis is data: a row is a step and finite numbers under names, and whatever else is left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from services.dashboard.runs import raw_config
from services.run_events import EventsConfig, stream_of
from services.tracking_sinks import IDENTITY_FILE

CONNECT_S = 1.0
_MOST = 100


class RowStream:
    """The entries that follow the moment of `opened`. Must be closed."""

    def __init__(self, client: Any, stream: str, last_id: str) -> None:
        self._client = client
        self._stream = stream
        self._last_id = last_id

    @classmethod
    async def opened(cls, run: Path) -> RowStream | None:
        """The stream of a run, from now on; None where the run has none, or Redis does not answer."""
        found = events_of(run)
        if found is None:
            return None
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        config, stream = found
        client: Any = Redis.from_url(config.address(), socket_connect_timeout=CONNECT_S, decode_responses=True)
        try:
            newest = await client.xrevrange(stream, count=1)
        except (RedisError, OSError):
            await client.aclose()
            return None
        return cls(client, stream, newest[0][0] if newest else "0-0")

    async def rows(self, wait_s: float) -> list[dict[str, float]] | None:
        """What came since the last call, waiting so long for it; None once Redis is away."""
        from redis.exceptions import RedisError

        try:
            answer = await self._client.xread({self._stream: self._last_id}, count=_MOST, block=int(1000 * wait_s))
        except (RedisError, OSError):
            return None
        entries = answer[0][1] if answer else []
        if entries:
            self._last_id = entries[-1][0]
        rows = (read_row(fields.get("row")) for _, fields in entries)
        return [row for row in rows if row is not None]

    async def close(self) -> None:
        """Let the connection go."""
        await self._client.aclose()


def events_of(run: Path) -> tuple[EventsConfig, str] | None:
    """The Redis and the stream that a run directory names; None where it names none."""
    raw = raw_config(run).get("tracking", {}).get("events")
    try:
        identity = json.loads((run / IDENTITY_FILE).read_bytes())["events"]
        return (EventsConfig.model_validate(raw), stream_of(str(identity))) if isinstance(raw, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_row(text: str | None) -> dict[str, float] | None:
    """A row as it was logged; None for anything that is none."""
    try:
        row = json.loads(text or "")
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
