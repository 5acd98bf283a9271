"""What we read of an OpenAI-compatible server's answers. The server is not ours: unknown keys are ignored."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat

from rewards.judging.chat_text import content_tokens, shown_name, split_thinking
from rewards.judging.engine import JudgeReply, TokenAlternatives

Logprob = Annotated[FiniteFloat, Field(le=1e-3)]
"""A log-probability; servers compute it in low precision and may land a hair above 0."""


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class TopLogprob(_Foreign):
    """One candidate token and its log-probability."""

    token: str
    logprob: Logprob


class TokenLogprobs(TopLogprob):
    """The token that was generated, and the candidates at its place."""

    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(_Foreign):
    """Log-probs of one answer; some servers send the object without its list."""

    content: list[TokenLogprobs] | None = None


class ChatMessage(_Foreign):
    """The answer. vLLM calls the thinking `reasoning`; it and others also said `reasoning_content`."""

    content: str | None = None
    reasoning: str | None = Field(default=None, validation_alias=AliasChoices("reasoning", "reasoning_content"))


class ChatChoice(_Foreign):
    """One answer of `n`."""

    message: ChatMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class ChatAnswer(_Foreign):
    """Of POST /v1/chat/completions."""

    choices: list[ChatChoice] = Field(min_length=1)
    model: str = ""


class Model(_Foreign):
    """A served model; `root` is where vLLM loaded it from."""

    id: str
    root: str | None = None


class ModelList(_Foreign):
    """Of GET /v1/models."""

    data: list[Model]


class Tokens(_Foreign):
    """Of vLLM's POST /tokenize."""

    tokens: list[int]


def _rising(candidates: list[TopLogprob]) -> list[TopLogprob]:
    return sorted(candidates, key=lambda candidate: candidate.logprob)


def listed_tokens(answer: ChatAnswer) -> tuple[TokenAlternatives, ...]:
    """Every generated token with its alternatives, those of the thinking and of the stop too; empty if not given.

    Pieces of a character share one text (U+FFFD); the likeliest of them stands for all.
    """
    logprobs = answer.choices[0].logprobs
    return tuple(
        TokenAlternatives(entry.token, {top.token: top.logprob for top in (*_rising(entry.top_logprobs), entry)})
        for entry in (logprobs.content if logprobs else None) or ()
    )


def lists_as_many(answer: ChatAnswer, wanted: int) -> bool:
    """Whether every generated token has as many alternatives as were asked for."""
    logprobs = answer.choices[0].logprobs
    return all(len(entry.top_logprobs) >= wanted for entry in (logprobs.content if logprobs else None) or ())


def reply_of(answer: ChatAnswer) -> JudgeReply:
    """The first answer, with its thinking apart from its content whether or not the server separates them."""
    choice = answer.choices[0]
    content, thinking = choice.message.content or "", choice.message.reasoning or ""
    if not thinking:
        thinking, content = split_thinking(content)
    tokens = content_tokens(listed_tokens(answer), content)
    return JudgeReply(content, thinking, choice.finish_reason, tokens, shown_name(answer.model))
