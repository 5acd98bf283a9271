"""Posting to a server that may be busy: what may pass is tried again, what will not pass is an error at once.

Retried are 408, 429, 5xx and broken connections, with full jitter and the server's Retry-After.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx2
from pydantic import ValidationError

from raylign.types import RewardFailure
from rewards.wire import ErrorBody

RETRY_AFTER_MAX_S = 60.0
_RETRIED_STATUS = (408, 429)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and how long to wait in between: what the server asks for, and up to `base_s` * 2^attempt, at most
    `max_s`, at random."""

    max_attempts: int = 4
    base_s: float = 0.25
    max_s: float = 15.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: random.Random = field(default_factory=random.Random)

    async def wait(self, attempt: int, at_least_s: float) -> None:
        backoff = self.jitter.uniform(0, min(self.max_s, self.base_s * 2**attempt))
        # On top of what the server asks for: those it refused together would come back together.
        await self.sleep(at_least_s + backoff)


async def post_with_retries(
    post: Callable[[], Awaitable[httpx2.Response]], policy: RetryPolicy, server: str
) -> httpx2.Response | RewardFailure:
    """The first answer that is 2xx, or the failure that trying again would not change or did not.

    `post` sends the same request each time. `server` names the other side in messages. Cancellation passes through.
    """
    failure = RewardFailure("model_error", "no attempt was made")
    for attempt in range(policy.max_attempts):
        wait_s = 0.0
        try:
            response = await post()
        except httpx2.TimeoutException:
            failure = RewardFailure("timeout", f"{server} did not answer in time", retryable=True)
        except httpx2.RequestError as error:  # of the transport, or an answer whose encoding is broken
            failure = RewardFailure("model_error", f"{server} is unreachable: {type(error).__name__}", retryable=True)
        else:
            if response.is_success:
                return response
            failure = refusal(response, server)
            wait_s = retry_after_s(response)
        if not failure.retryable:
            return failure
        if attempt + 1 < policy.max_attempts:
            await policy.wait(attempt, wait_s)
    return failure


def refusal(response: httpx2.Response, server: str) -> RewardFailure:
    """An answer that is not 2xx, as a failure. Its body is shown as text, never interpreted."""
    status = response.status_code
    retryable = status in _RETRIED_STATUS or status >= 500
    code = {408: "timeout", 504: "timeout", 429: "overloaded", 503: "overloaded"}.get(status)
    if code is None:
        code = "model_error" if status >= 500 or status in (401, 403) else "invalid_input"
    return RewardFailure(code, f"{server} answered {status}: {_reason(response)}", retryable)


def _reason(response: httpx2.Response) -> str:
    """What a reward service says in its own words; anything else as it came, cut."""
    try:
        body = ErrorBody.model_validate_json(response.content)
    except ValidationError:
        return response.text[:300]
    return body.error.message + (f" (log id {body.log_id})" if body.log_id else "")


def retry_after_s(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; a date or nonsense counts as nothing."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), RETRY_AFTER_MAX_S) if text.isdecimal() else 0.0
