"""What the rewards for verifiable text share: a rule judges one text against its prompt's metadata."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Reward

MAX_TEXT_CHARS = 2**18
"""A longer completion is no answer but an attack on the rule."""
MAX_SHOWN_CHARS = 500
"""Of an extracted answer in a score's details."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule's answer: a finite value, and in the details what was extracted and why it got the value."""

    value: float
    details: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


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


def score_texts(
    reward: Reward, samples: Sequence[RewardSample], rule: Callable[[Prompt, str], Verdict]
) -> list[RewardScore]:
    """One score per sample, in order; `rule` raises PromptError for a prompt that it cannot judge by."""
    return [_score_one(reward, sample, rule) for sample in samples]


def _score_one(reward: Reward, sample: RewardSample, rule: Callable[[Prompt, str], Verdict]) -> RewardScore:
    problem = text_problem(sample)
    if problem is not None or sample.text is None:
        return base.failure(reward, "invalid_input", problem or "the sample has no text")
    started = time.perf_counter()
    try:
        judged = rule(sample.prompt, sample.text)
    except PromptError as error:
        return base.failure(reward, "invalid_input", str(error))
    return base.success(reward, judged.value, time.perf_counter() - started, judged.details)
