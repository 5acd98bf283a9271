"""Asking a judge until its answer can be read, each time with another seed, and never longer than agreed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from raylign.types import RewardFailure
from rewards.judging.engine import JudgeEngine, JudgeReply, JudgeRequest

_NUM_SEEDS = 2**31
AnswerT = TypeVar("AnswerT")


async def ask_until_usable(
    engine: JudgeEngine,
    request: JudgeRequest,
    key: str,
    read: Callable[[JudgeReply], AnswerT | RewardFailure],
    max_retries: int,
) -> AnswerT | RewardFailure:
    """The first answer that `read` makes sense of, or what was wrong with the last one. The key seeds the attempts.

    A failure of the engine is final: it has repeated what failed in transport itself.
    """
    result: AnswerT | RewardFailure = RewardFailure("model_error", "the judge was not asked")
    for attempt in range(1 + max_retries):
        reply = await engine.ask(replace(request, seed=draw_seed(key, attempt)))
        if isinstance(reply, RewardFailure):
            return reply
        result = read(reply)
        if not isinstance(result, RewardFailure):
            return result
    return result


def draw_seed(key: str, attempt: int) -> int:
    """A 31-bit seed, the same everywhere for equal keys and attempts."""
    return int.from_bytes(hashlib.sha256(f"{key}/{attempt}".encode()).digest()[:8], "big") % _NUM_SEEDS
