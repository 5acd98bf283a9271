"""What a judge asks of an inference engine, and what it gets back. The engine speaks the OpenAI chat API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from raylign.types import JsonValue, RewardFailure

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class JudgeMessage:
    """One chat message; pictures (RGB uint8) come before the text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images_HWC: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question. `json_schema` and `choices` constrain the content where the engine can."""

    messages: tuple[JudgeMessage, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    seed: int = 0
    json_schema: Mapping[str, JsonValue] | None = None
    choices: tuple[str, ...] | None = None
    top_logprobs: int = 0
    """How many alternatives to report at every content token; 0 for none. Servers cap it at 20."""
    thinking: bool | None = None
    """Switch the model's thinking on or off through its chat template; None leaves it alone."""
    thinking_budget: int | None = None
    """Most thinking tokens, where the engine can bound them."""


@dataclass(frozen=True, slots=True)
class TokenAlternatives:
    """One generated token and the log-probs of the likeliest tokens at its place (itself among them)."""

    token: str
    logprob_by_token: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """An answer; `thinking` is kept apart from `content`, whatever the engine calls it."""

    content: str
    thinking: str = ""
    finish_reason: str = "stop"
    """"length" means that the answer was cut off."""
    tokens: tuple[TokenAlternatives, ...] = ()
    """Content tokens in order; empty when the engine gave no log-probs."""
    model: str = ""


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """Log-probs of the asked labels as the next thing said, over the full vocabulary; labels never seen are absent."""

    logprob_by_label: Mapping[str, float]
    source: Literal["logprobs", "decision"]
    """From a server's log-probs, or from the in-process decision pipeline."""
    details: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


class JudgeEngine(Protocol):
    """Answers questions. All failures are values."""

    @property
    def fingerprint(self) -> str:
        """Names the model behind it."""
        ...

    def load(self) -> None:
        """Whatever is slow to make. Raises ModelError or ConfigError."""
        ...

    async def ask(self, request: JudgeRequest) -> JudgeReply | RewardFailure:
        """One generated answer."""
        ...

    async def label_logprobs(self, request: JudgeRequest, labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        """How likely each label is as the first token of the answer, case and leading-space variants summed."""
        ...
