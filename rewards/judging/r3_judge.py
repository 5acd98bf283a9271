"""One question to an R3 judge: asked, asked again when the answer is unusable, and settled by a verdict or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from raylign.types import RewardFailure
from rewards.base import RewardConfig
from rewards.judging.draws import ask_until_usable
from rewards.judging.engine import JudgeEngine, JudgeReply, JudgeRequest
from rewards.judging.engines import EngineUnion, OpenAIEngineConfig
from rewards.judging.guard import delimit, sanitise
from rewards.judging.probability import SoftMark, soft_mark
from rewards.judging.r3_parse import HalfScores, NoVerdict, Verdict, parse_reply
from rewards.judging.r3_prompts import Layout, Mode, Question, answer_schema, messages, option_order
from rewards.judging.rubrics import Rubric

if TYPE_CHECKING:
    import numpy as np

BYTES_PER_TOKEN = 3
"""Fewer than any common text has (English about 4), so that the estimate of a prompt's tokens errs high."""


class R3Config(RewardConfig):
    """A judge that marks by a rubric, as R3 models do; sampling settings are R3's for Qwen3."""

    type: Literal["r3"] = "r3"
    engine: EngineUnion = OpenAIEngineConfig()
    """Where the judge runs."""
    layout: Layout = "r3"
    """Prompt layout the model was trained on: r3, or mr3 (system and user message, multilingual models)."""
    mode: Mode = "point"
    """point: marks from 1 to 5. binary: true or false. pair: a choice between two, in both orders."""
    modality: Literal["text", "image"] = "text"
    """What is judged: the sample's text, or its picture (needs a judge that sees)."""
    rubric: str = "reasoning_quality"
    """Name in the library, or path of an own file that ends in .toml."""
    task: str = ""
    """Replaces the rubric's task when given."""
    num_samples: int = Field(default=1, ge=1)
    """Answers to average; more make fewer ties."""
    max_samples: int = Field(default=8, ge=1)
    """The most answers that a request may ask for."""
    soft: bool = False
    """Point mode: the mean mark under the probabilities of 1 to 5 instead of the mark; needs log-probs."""
    low_confidence_below: float = Field(default=0.5, ge=0, le=1)
    """Soft marks whose five labels have less probability together are flagged. A server that constrains the answer to
    its schema (vllm, openai) leaves no other label any, so that it flags nothing there."""
    half_scores: HalfScores = "reject"
    """What becomes of a mark such as 3.5: an unusable answer, or rounded down or up."""
    max_retries: int = Field(default=2, ge=0)
    """How often an unusable answer is asked for again, each time with a new seed."""
    prefilter: bool = True
    """Give texts that say nothing (empty, symbols, a bare opener) the lowest score without asking."""
    delimit: bool = False
    """Put candidates between tags. R3 was trained without: its headers delimit, and candidates cannot forge them."""
    thinking: bool | None = True
    """Whether the model thinks first; None leaves it to its chat template."""
    thinking_budget: int | None = Field(default=None, ge=1)
    """Most thinking tokens, where the engine can bound them."""
    max_tokens: int = Field(default=8192, ge=1)
    """Most tokens of an answer, thinking included."""
    context_tokens: int = Field(default=32768, ge=2)
    """The engine's context length; prompts that leave no room for an answer are refused."""
    temperature: float = Field(default=0.6, ge=0)
    """Sampling temperature."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int | None = Field(default=20, ge=1)
    """Likeliest tokens that are sampled from."""
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    """Least probability relative to the likeliest token's."""
    max_group: int = Field(default=16, ge=2)
    """Largest group that is compared; n candidates take n (n - 1) questions."""
    canary_tolerance: float = Field(default=0.25, ge=0, lt=1)
    """How much a canary may score; 0.25 is a mark of 2."""
    repeatable: bool = False
    """Whether the engine answers equal questions with equal seeds equally (vLLM: VLLM_BATCH_INVARIANT=1). Only then
    are scores remembered."""

    @model_validator(mode="after")
    def _possible(self) -> R3Config:
        if self.soft and self.mode != "point":
            raise ValueError(f"soft marks exist in point mode only, got mode {self.mode!r}; drop `soft`")
        if self.num_samples > self.max_samples:
            raise ValueError(
                f"num_samples {self.num_samples} is above max_samples {self.max_samples}; raise the latter"
            )
        if self.max_tokens >= self.context_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} leaves no room for a prompt in context_tokens {self.context_tokens}"
            )
        return self

    def settings(self) -> str:
        """Everything that may change a score, beside the rubric: part of the reward's version."""
        left_out = {"name", "weight", "required", "engine", "rubric", "max_samples", "canary_tolerance", "repeatable"}
        return f"{self.engine.version}/{self.model_dump_json(exclude=left_out)}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response under judgement."""

    text: str
    images_HWC: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """One usable answer."""

    verdict: Verdict
    soft: SoftMark | None = None


class R3Judge:
    """Asks by one rubric. Shares its engine with other judges."""

    def __init__(self, config: R3Config, rubric: Rubric, engine: JudgeEngine) -> None:
        """Raises ConfigError when the rubric has no criteria for the configured mode."""
        self._config = config
        self._task = config.task or rubric.task
        self._options = rubric.options(config.mode, config.layout)
        self._engine = engine
        self.max_chars = BYTES_PER_TOKEN * (config.context_tokens - config.max_tokens)
        """Of one text; a longer one cannot fit and is not even looked at."""

    def request(self, input_text: str, candidates: Sequence[Candidate]) -> JudgeRequest | RewardFailure:
        """What the engine is asked, or `invalid_input` when it is longer than the judge can read."""
        config = self._config
        input_text = sanitise(input_text)
        labels = list(self._options)
        if config.layout == "mr3":
            labels = option_order(labels, input_text)
        question = Question(
            task=self._task,
            input=input_text,
            responses=tuple(self._shown(candidate, i, len(candidates)) for i, candidate in enumerate(candidates)),
            options={label: self._options[label] for label in labels},
        )
        images = tuple(image_HWC for candidate in candidates for image_HWC in candidate.images_HWC)
        chat = messages(config.layout, config.mode, question, images)
        num_tokens = sum(len(message.text.encode()) for message in chat) // BYTES_PER_TOKEN
        room = config.context_tokens - config.max_tokens
        if num_tokens > room:
            return RewardFailure(
                "invalid_input", f"the judge's prompt has about {num_tokens} tokens; {room} are left beside its answer"
            )
        return JudgeRequest(
            messages=chat,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            json_schema=answer_schema(config.layout, config.mode),
            top_logprobs=20 if config.soft else 0,
            thinking=config.thinking,
            thinking_budget=config.thinking_budget,
        )

    async def draw(self, input_text: str, candidates: Sequence[Candidate], key: str) -> Draw | RewardFailure:
        """One verdict; the key seeds it."""
        request = self.request(input_text, candidates)
        if isinstance(request, RewardFailure):
            return request
        return await ask_until_usable(self._engine, request, key, self._read, self._config.max_retries)

    def _read(self, reply: JudgeReply) -> Draw | RewardFailure:
        config = self._config
        verdict = parse_reply(reply, config.layout, config.mode, config.half_scores)
        if isinstance(verdict, NoVerdict):
            return RewardFailure(verdict.code, verdict.message)
        if not config.soft:
            return Draw(verdict)
        if not reply.tokens:
            return RewardFailure("model_error", "the engine gave no log-probs, which soft marks need; set soft = false")
        soft = soft_mark(reply.tokens)
        if soft is None or soft.chosen != verdict.score:
            return RewardFailure("unparseable", "the judge's mark is not a token of its own")
        return Draw(verdict, soft)

    def _shown(self, candidate: Candidate, place: int, count: int) -> str:
        if self._config.modality == "image":
            which = "" if count == 1 else ("first ", "second ")[place]
            return f"(the {which}picture of this message)"
        text = sanitise(candidate.text)
        tag = "candidate" if count == 1 else f"candidate_{place + 1}"
        return delimit(text, tag) if self._config.delimit else text
