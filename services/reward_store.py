"""Where remembered scores are kept: in this process, or in Redis for all processes and runs.

A store maps keys to bytes and never raises: one that is away answers None, and its caller scores without it.
Redis has a breaker: after a failure or a call over its time it is left alone for a while, so that an outage costs
one short wait and not one per request.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from services.reward_config import CacheConfig

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEY_PREFIX = "raylign:reward:"
_LOCK = ":lock"
# A lock that expired may belong to somebody else by now; only its owner may delete it.
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.2


class Store(Protocol):
    """Remembers bytes by key."""

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        """What is known, in order; None when the store is away."""
        ...

    async def claim(self, keys: Sequence[str]) -> list[bool]:
        """Which keys the caller is the one to work out; the others somebody else is working out already."""
        ...

    async def put_many(self, values: Mapping[str, bytes]) -> bool:
        """Remember; whether it did."""
        ...

    async def release(self, keys: Sequence[str]) -> None:
        """Give claims back."""
        ...

    async def await_others(self, keys: Sequence[str], seconds: float) -> list[bytes | None]:
        """What others worked out within this time; None where they gave up."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def make_store(config: CacheConfig) -> Store | None:
    """The configured store, or None. Raises ConfigError for an address that is none."""
    if config.type == "none":
        return None
    return MemoryStore(config) if config.type == "memory" else RedisStore(config)


class MemoryStore:
    """The last used values, bounded in number and in bytes."""

    def __init__(self, config: CacheConfig) -> None:
        self._values: OrderedDict[str, bytes] = OrderedDict()
        self._num_bytes = 0
        self._max_entries = config.max_entries
        self._max_bytes = config.max_bytes

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        found = [self._values.get(key) for key in keys]
        for key, value in zip(keys, found, strict=True):
            if value is not None:
                self._values.move_to_end(key)
        return found

    async def claim(self, keys: Sequence[str]) -> list[bool]:
        return [True] * len(keys)

    async def put_many(self, values: Mapping[str, bytes]) -> bool:
        for key, value in values.items():
            self._num_bytes += len(value) - len(self._values.pop(key, b""))
            self._values[key] = value
        while self._num_bytes > self._max_bytes or len(self._values) > self._max_entries:
            _, oldest = self._values.popitem(last=False)
            self._num_bytes -= len(oldest)
        return True

    async def release(self, keys: Sequence[str]) -> None:
        """Claims are not kept."""

    async def await_others(self, keys: Sequence[str], seconds: float) -> list[bytes | None]:
        return [None] * len(keys)

    async def close(self) -> None:
        """Nothing is open."""


class RedisStore:
    """Redis with a short patience. `SET EX NX` remembers; `SET NX PX` with an owner's token claims."""

    def __init__(self, config: CacheConfig) -> None:
        # Imported here and not at the first call, whose time would be up when the import is done.
        from redis import asyncio as redis_asyncio

        self._connect = redis_asyncio.Redis.from_url
        self._url = config.address()
        self._config = config
        self._token = uuid.uuid4().hex
        self._client: Redis | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._away = False
        self._retry_at_s = 0.0

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None] | None:
        return await self._read([KEY_PREFIX + key for key in keys])

    async def claim(self, keys: Sequence[str]) -> list[bool]:
        def send(client: Redis) -> Awaitable[list[Any]]:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                lock_ms = int(1000 * self._config.lock_ttl_s)
                pipeline.set(KEY_PREFIX + key + _LOCK, self._token, nx=True, px=lock_ms)
            return pipeline.execute()

        # A server that is away hands out no claims; everybody works for himself.
        taken = await self._attempt(send)
        return [True] * len(keys) if taken is None else [bool(one) for one in taken]

    async def put_many(self, values: Mapping[str, bytes]) -> bool:
        def send(client: Redis) -> Awaitable[list[Any]]:
            pipeline = client.pipeline(transaction=False)
            for key, value in values.items():
                pipeline.set(KEY_PREFIX + key, value, nx=True, px=int(1000 * self._config.ttl_s))
            return pipeline.execute()

        return await self._attempt(send) is not None

    async def release(self, keys: Sequence[str]) -> None:
        def send(client: Redis) -> Awaitable[list[Any]]:
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.eval(_RELEASE, 1, KEY_PREFIX + key + _LOCK, self._token)
            return pipeline.execute()

        await self._attempt(send)

    async def await_others(self, keys: Sequence[str], seconds: float) -> list[bytes | None]:
        values = [KEY_PREFIX + key for key in keys]
        locks = [key + _LOCK for key in values]
        deadline_s = time.monotonic() + seconds
        pause_s = _FIRST_PAUSE_S
        while True:
            both = await self._read([*values, *locks])
            if both is None:
                return [None] * len(keys)
            found, owners = both[: len(keys)], both[len(keys) :]
            decided = all(value is not None or owner is None for value, owner in zip(found, owners, strict=True))
            if decided or time.monotonic() >= deadline_s:
                return found
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def close(self) -> None:
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = None

    async def _read(self, keys: Sequence[str]) -> list[bytes | None] | None:
        return await self._attempt(lambda client: cast("Awaitable[list[bytes | None]]", client.mget(keys)))

    async def _attempt(self, call: Callable[[Redis], Awaitable[T]]) -> T | None:
        """The call's result, or None when Redis is away or has not answered in time."""
        from redis.exceptions import RedisError

        now_s = time.monotonic()
        if self._away:
            if now_s < self._retry_at_s:
                return None
            self._retry_at_s = now_s + self._config.retry_after_s  # one caller tries, the others go on without
        client = self._connected()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                result = await call(client)
        except (RedisError, OSError, TimeoutError) as error:
            if not self._away:
                logger.warning("the score cache's Redis is away (%s); scoring without it", type(error).__name__)
            self._away, self._retry_at_s = True, time.monotonic() + self._config.retry_after_s
            return None
        if self._away:
            logger.warning("the score cache's Redis is back")
        self._away = False
        return result

    def _connected(self) -> Redis:
        """The client of the running event loop; connections of another loop cannot be used."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff

            self._client = self._connect(
                self._url,
                socket_timeout=self._config.timeout_s,
                socket_connect_timeout=self._config.timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
            self._loop = loop
        return self._client
