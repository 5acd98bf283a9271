"""A run's rows as a Redis stream, for whoever wants them at once: the dashboard, or a program of one's own.

    raylign:run:<identity>    an entry per logged row, {"row": <JSON of step and finite numbers>}; {"end": ""} last

The run directory has everything anyway, so a Redis that is away costs rows in the stream and nothing else: it is told
once, left alone for a while, and tried again. The stream keeps about the newest MAX_ENTRIES entries, and goes KEEP_S
after the last of them. The identity lies in `tracking.json` of the run directory, so a resumed run goes on in its
stream; rows that are trained again follow those that were there.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from raylign.config import Config

if TYPE_CHECKING:
    import numpy as np

MAX_ENTRIES = 2000
KEEP_S = 7 * 86400
PATIENCE_S = 0.2
"""Longest wait for Redis: the loop waits too."""
RETRY_AFTER_S = 5.0
SCHEMES = ("redis", "rediss", "unix")


class EventsConfig(Config):
    """A Redis stream of the run's rows."""

    url: str = "redis://127.0.0.1:6379/0"
    """The Redis server's address; `rediss://` and `unix://` work too."""
    url_env: str = Field(default="RAYLIGN_EVENTS_URL", min_length=1)
    """Environment variable with the address, where it has a password in it; stands above `url`."""

    @field_validator("url")
    @classmethod
    def _check_address(cls, value: str) -> str:
        if urlsplit(value).scheme not in SCHEMES:
            raise ValueError("url must be an address such as redis://127.0.0.1:6379/0")
        return value

    def address(self) -> str:
        """The Redis server's address."""
        return os.environ.get(self.url_env, "").strip() or self.url


def stream_of(identity: str) -> str:
    """The name of a run's stream."""
    return f"raylign:run:{identity}"


class EventSink:
    """See the module. Of the calls of a sink only `log` and `close` put something into the stream."""

    def __init__(
        self,
        config: EventsConfig,
        identity: str,
        note: Callable[[str], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`note` hears when Redis goes away and when it is back. Nothing is asked of it yet."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._client: Any = redis.Redis.from_url(
            config.address(),
            socket_timeout=PATIENCE_S,
            socket_connect_timeout=PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._errors = (redis.RedisError, OSError)
        self._stream = stream_of(identity)
        self._note = note
        self._clock_s = clock_s
        self._away_until_s = -math.inf
        self._away = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._add({"row": json.dumps({"step": step, **finite}, allow_nan=False)})

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Nothing: pictures are in the run directory."""

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Nothing."""

    def texts(self, step: int, name: str, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Tell that no more comes. Calling it twice tells it twice, which is fine."""
        self._add({"end": ""})
        self._client.close()

    def _add(self, entry: Mapping[str, str]) -> None:
        if self._clock_s() < self._away_until_s:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.xadd(self._stream, dict(entry), maxlen=MAX_ENTRIES, approximate=True)
                pipe.expire(self._stream, KEEP_S)
                pipe.execute()
        except self._errors as error:
            if not self._away:
                self._note(
                    f"the Redis of tracking.events is away ({type(error).__name__}); metrics.jsonl has every row"
                )
            self._away, self._away_until_s = True, self._clock_s() + RETRY_AFTER_S
            return
        if self._away:
            self._away = False
            self._note("the Redis of tracking.events is back")
