"""What the rewards for verifiable text share: a rule judges one text against its prompt's metadata."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from raylign.errors import PromptError
from raylign.types import JsonValue, RewardSample, RewardScore
from rewards import base
from rewards.base import FailureCode, Reward

MAX_TEXT_CHARS = 2**18
"""A longer completion is no answer but an attack on the rule."""
MAX_SHOWN_CHARS = 500
"""Of an extracted answer in a score's details."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's answer: a finite value, and in the details what was extracted and why it got the value."""

    value: float
    details: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class NoVerdict:
    """Why a rule has no answer; the message may travel to clients."""

    code: FailureCode
    message: str
    retryable: bool = False


Rule = Callable[[RewardSample, str], Verdict | NoVerdict]
"""Judges a sample by its text, which is there; raises PromptError for a prompt that it cannot judge by."""


def verdict(value: float, answer: str | None, reason: str, **details: JsonValue) -> Verdict:
    """A verdict whose details name the extracted answer and the reason."""
    return Verdict(value, {"answer": shown(answer), "reason": reason, **details})


def shown(answer: str | None) -> str | None:
    """An extracted answer as far as a response carries it."""
    return answer if answer is None or len(answer) <= MAX_SHOWN_CHARS else answer[:MAX_SHOWN_CHARS] + "…"


def text_problem(sample: RewardSample) -> str | None:
    """Why a sample has no usable text, or None if it has one."""
    if sample.text is None:
        return "the sample has no text"
    if sample.image_HWC is not None or sample.more_images_HWC:
        return "this reward judges a text, got an image beside it"
    if len(sample.text) > MAX_TEXT_CHARS:
        return f"the text has {len(sample.text)} characters; at most {MAX_TEXT_CHARS} are judged"
    return None


async def score_texts(
    reward: Reward, samples: Sequence[RewardSample], rule: Rule, threads: ThreadPoolExecutor | None = None
) -> list[RewardScore]:
    """One score per sample, in order, computed off the event loop: in one thread, or side by side in `threads`."""
    if threads is None:
        return await asyncio.to_thread(lambda: [score_text(reward, sample, rule) for sample in samples])
    loop = asyncio.get_running_loop()
    return list(
        await asyncio.gather(*(loop.run_in_executor(threads, score_text, reward, sample, rule) for sample in samples))
    )


def score_text(reward: Reward, sample: RewardSample, rule: Rule) -> RewardScore:
    """One sample's score."""
    problem = text_problem(sample)
    if problem is not None or sample.text is None:
        return base.failure(reward, "invalid_input", problem or "the sample has no text")
    started = time.perf_counter()
    try:
        judged = rule(sample, sample.text)
    except PromptError as error:
        return base.failure(reward, "invalid_input", str(error))
    if isinstance(judged, NoVerdict):
        return base.failure(reward, judged.code, judged.message, judged.retryable)
    return base.success(reward, judged.value, time.perf_counter() - started, judged.details)
