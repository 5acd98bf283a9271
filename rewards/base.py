"""What a reward is: a scorer of samples that answers every one of them, with a finite value or with an error.

A reward knows nothing of Ray, HTTP or advantages. It is scored through `score_totally`, in this process and in a
replica of the reward service alike, so both give the same answers.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from raylign.config import Config
from raylign.types import JsonValue, Prompt, RewardFailure, RewardSample, RewardScore

logger = logging.getLogger(__name__)

FailureCode = Literal[
    "invalid_input", "unparseable", "out_of_range", "truncated", "timeout", "overloaded", "model_error", "cancelled"
]
"""Every way to have no value; together with "ok" the statuses of the wire."""
Modality = Literal["image", "text"]
MAX_ASPECT = 64
"""Longest side over shortest side; beyond it a picture is no picture but an attack on a resizer."""


class RewardConfig(Config):
    """What every reward's configuration has; a subclass adds `type` (a literal with a default) and its own keys."""

    is_light: ClassVar[bool] = False
    """Whether it takes milliseconds and no model, so that as a held-out metric it needs no process of its own."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """The reward's name in scores, metrics and the service; its type when not given. Unique in a run."""
    weight: float = 1.0
    """Its share in the mix; negative when lower values are better."""
    required: bool = True
    """Whether a sample fails when this reward fails; otherwise the others share its weight."""
    only_eval: bool = False
    """Scored in evaluations only, never part of the reward: a held-out metric, with weight 0 and never required."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """A name, and what a held-out metric weighs, where they are not given."""
        if not isinstance(data, Mapping):
            return data
        filled: dict[str, Any] = {"weight": 0.0, "required": False} if data.get("only_eval") is True else {}
        filled |= data
        filled["name"] = data.get("name") or cls.model_fields["type"].default
        return filled

    @model_validator(mode="after")
    def _held_out_metrics_stay_out(self) -> RewardConfig:
        if self.only_eval and (self.weight or self.required):
            raise ValueError(
                f"reward {self.name!r} is only_eval, a held-out metric, so it cannot have weight {self.weight:g} or "
                f"required = {str(self.required).lower()}; leave both out, or set only_eval = false to train on it"
            )
        return self


class Params(Config):
    """Base of what a request may set for one reward, within the bounds that its operator configured."""


@dataclass(frozen=True, slots=True)
class RewardAsk:
    """One reward in a request: which, how much it counts, and what the request sets for it."""

    name: str
    weight: float = 1.0
    required: bool = True
    params: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class Canary:
    """A sample that deserves nothing; a judge that gives it more than `highest` can be fooled."""

    name: str
    sample: RewardSample
    highest: float


class Reward(Protocol):
    """One reward. Adding one: a file with its config and class, and a row in `rewards/__init__.py`.

    A reward may also have what `TakesParams`, `ScoresGroups` and `HasCanaries` describe.
    """

    @property
    def name(self) -> str:
        """As configured."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever equal samples may score differently: rule, model and library versions."""
        ...

    @property
    def modality(self) -> Modality:
        """What it looks at."""
        ...

    @property
    def range(self) -> tuple[float, float] | None:
        """Least and greatest value, or None when unbounded."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """False asks for a negative weight."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether equal samples, their seeds among them, always score the same; only such scores are remembered."""
        ...

    @property
    def uses_seed(self) -> bool:
        """Whether a score depends on the sample's seed."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the model files behind it, known after `load`; empty when `version` says it all."""
        ...

    @property
    def metadata_keys(self) -> Mapping[str, str]:
        """Every key of a prompt's metadata that a score depends on, with what it means."""
        ...

    def probe(self) -> RewardSample | None:
        """A small sample that a healthy replica gives a value; None when scoring one would cost somebody else."""
        ...

    def load(self) -> None:
        """Build what is slow to build; `score` does so itself if nobody did."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError, naming the prompt and the remedy, if samples of this prompt can never be scored."""
        ...

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """One score per sample, in order. A bad sample gets an error in its score and leaves the others alone."""
        ...


@runtime_checkable
class TakesParams(Protocol):
    """A reward that a request may adjust."""

    @property
    def params_model(self) -> type[Params]:
        """What may be set; its JSON schema is published."""
        ...

    def with_params(self, params: Params) -> Reward:
        """The same reward, engine and all, adjusted. Its name stays; its version need not say the parameters."""
        ...


@runtime_checkable
class ScoresGroups(Protocol):
    """A reward that compares the candidates of one prompt; the values are comparable within one call only."""

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """One score per candidate, in order; an error in a candidate's score leaves the others their own."""
        ...


@runtime_checkable
class HasCanaries(Protocol):
    """A judge that ships the samples that fool judges."""

    def canaries(self) -> Sequence[Canary]:
        """Scored when the service starts; one above its limit is reported as a failed readiness check."""
        ...


def success(
    reward: Reward, value: float, seconds: float = 0.0, details: Mapping[str, JsonValue] | None = None
) -> RewardScore:
    """A reward's value for one sample."""
    return RewardScore(
        name=reward.name,
        value=value,
        version=reward.version,
        seconds=seconds,
        details=dict(details or {}),
        fingerprint=reward.fingerprint,
    )


def failure(reward: Reward, code: FailureCode, message: str, retryable: bool = False) -> RewardScore:
    """A reward's error for one sample. The message may travel to clients: no exception text, no paths."""
    return RewardScore(
        name=reward.name,
        value=None,
        error=RewardFailure(code, message, retryable),
        version=reward.version,
        fingerprint=reward.fingerprint,
    )


def image_problem(sample: RewardSample) -> str | None:
    """Why a sample has no usable picture (RGB, uint8, (height, width, 3), not empty), or None if it has one."""
    image_HWC = sample.image_HWC
    if image_HWC is None:
        return "the sample has no image"
    if sample.more_images_HWC:
        return f"this reward looks at one image, got {1 + len(sample.more_images_HWC)}"
    if image_HWC.dtype.name != "uint8" or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        return f"the image must be uint8 (height, width, 3), got {image_HWC.dtype.name} {image_HWC.shape}"
    height, width = image_HWC.shape[:2]
    if not height or not width or max(height, width) > MAX_ASPECT * min(height, width):
        return f"the image must have sides within a factor of {MAX_ASPECT}, got {width}x{height}"
    return None


async def score_totally(reward: Reward, samples: Sequence[RewardSample]) -> list[RewardScore]:
    """As `reward.score`, but a call that raises is repeated sample by sample and costs only those that raise alone.

    The error names a log entry; the exception itself goes to the log and nowhere else.
    """
    if not samples:
        return []
    try:
        scores = await reward.score(samples)
        if len(scores) != len(samples):
            raise ValueError(f"reward {reward.name!r} answered {len(samples)} samples with {len(scores)} scores")
    except Exception:  # a scorer runs foreign models on any input; a failure there is a value here
        if len(samples) > 1:
            return [score for sample in samples for score in await score_totally(reward, [sample])]
        log_id = uuid.uuid4().hex[:12]
        logger.exception("reward %r failed on sample %r (log id %s)", reward.name, samples[0].id, log_id)
        return [failure(reward, "model_error", f"the scorer failed; see its log, id {log_id}")]
    return scores
