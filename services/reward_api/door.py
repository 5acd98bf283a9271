"""Who may come in, how often, and who has been here with the same request before."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable

from fastapi import Request

from services.reward_api.refusals import ApiError, retry_after

MAX_CLIENTS = 4096
"""Addresses whose rate is remembered; the longest unseen is forgotten first."""
REPLAY_MAX_BYTES = 8 * 2**20
"""All kept answers together; the oldest are dropped first."""


def token_digest(token: str) -> str:
    """What the service keeps of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


class Door:
    """Lets a request in, or raises ApiError 401 or 429."""

    def __init__(
        self, digest: str | None, max_requests_per_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`digest` is the `token_digest` that clients must match; None lets everyone in. No rate is no limit."""
        self._digest = digest
        self._rate = None if max_requests_per_s is None else _RateLimit(max_requests_per_s, clock)

    async def __call__(self, request: Request) -> None:
        # The rate comes first, so that it also bounds how fast tokens can be guessed.
        if self._rate is not None:
            wait_s = self._rate.wait_s(request.client.host if request.client else "")
            if wait_s > 0:
                raise ApiError(429, "rate_limited", "too many requests from this address", retry_after(wait_s))
        if self._digest is None:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Digests have one length, so the comparison takes the same time for every wrong token.
        matches = hmac.compare_digest(token_digest(given.strip()), self._digest)
        if not (scheme.lower() == "bearer" and matches):
            message = "send the service's token as 'Authorization: Bearer ...'"
            raise ApiError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})


class _RateLimit:
    """A token bucket per client: it holds a second's worth of requests, at least one, and fills at the rate."""

    def __init__(self, per_s: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._capacity = max(1.0, per_s)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str) -> float:
        """0 and one request less, or the seconds until there is one."""
        now = self._clock()
        left, seen = self._buckets.pop(client, (self._capacity, now))
        left = min(self._capacity, left + (now - seen) * self._per_s)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_s


class Replay:
    """Finished answers by request id, for clients that lost theirs on the way and ask again."""

    def __init__(
        self, keep_s: float, max_bytes: int = REPLAY_MAX_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, bytes, bytes]] = OrderedDict()
        self._num_bytes = 0

    def find(self, request_id: str, digest: bytes) -> bytes | None:
        """The answer to the same request, if kept. Raises ApiError 409 if the id came with another request."""
        self._forget()
        if request_id not in self._kept:
            return None
        _, kept_digest, answer = self._kept[request_id]
        if kept_digest != digest:
            raise ApiError(409, "conflict", f"request_id {request_id!r} was used for a different request")
        return answer

    def keep(self, request_id: str, digest: bytes, answer: bytes) -> None:
        """Remember an answer; a request without an id is not repeated."""
        if not request_id or not self._keep_s or request_id in self._kept:
            return
        self._kept[request_id] = (self._clock(), digest, answer)
        self._num_bytes += len(answer)
        self._forget()

    def _forget(self) -> None:
        """Drop what is too old, then the oldest until the rest fits. Entries are in the order of their age."""
        too_old = self._clock() - self._keep_s
        while self._kept:
            request_id, (since, _, answer) = next(iter(self._kept.items()))
            if since >= too_old and self._num_bytes <= self._max_bytes:
                return
            del self._kept[request_id]
            self._num_bytes -= len(answer)
