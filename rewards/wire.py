"""The reward service's requests and answers, shared by server and client. Strict: unknown keys are errors.

A request is JSON, or multipart with the same JSON in a part named `request` and each picture in a part of its own.
An answer is 200 even when samples failed: each sample has a status, and a reward that is a finite number or null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from raylign.types import RewardBreakdown, RewardFailure, RewardScore
from rewards.base import FailureCode, Modality, Reward, RewardConfig

SCHEMA_VERSION = 1
REQUEST_PART = "request"
"""Name of the multipart part with the JSON."""
Mime = Literal["image/png", "image/webp", "image/jpeg"]
Status = Literal["ok"] | FailureCode
_Id = Annotated[str, Field(min_length=1, max_length=200)]


class Wire(BaseModel):
    """Base class: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class InlineImage(Wire):
    """A picture in the JSON itself."""

    encoding: Literal["base64"] = "base64"
    mime: Mime
    data: str
    """The file, in standard base64 with padding and without line breaks."""
    sha256: str | None = None
    """Of the file; checked when given."""


class PartImage(Wire):
    """A picture in a multipart part."""

    encoding: Literal["part"] = "part"
    mime: Mime
    part: str
    """The part's name."""
    sha256: str | None = None
    """Of the file; checked when given."""


class ScoreSample(Wire):
    """One sample: a prompt, and the picture or the text that answers it."""

    id: _Id
    prompt: str
    metadata: dict[str, JsonValue] = {}
    """What rewards need to know beside the prompt, such as `target`."""
    image: Annotated[InlineImage | PartImage, Field(discriminator="encoding")] | None = None
    text: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _image_or_text(self) -> ScoreSample:
        if (self.image is None) == (self.text is None):
            raise ValueError("a sample needs either an image or a text")
        return self


class RewardChoice(Wire):
    """A reward to score with."""

    name: str


class ScoreRequest(Wire):
    """`POST /v1/score`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: Annotated[str, Field(max_length=200)] = ""
    """Echoed; made up by the server when empty."""
    rewards: tuple[RewardChoice, ...] | None = Field(default=None, min_length=1)
    """All that are served when not given."""
    samples: tuple[ScoreSample, ...] = Field(min_length=1)
    return_details: bool = True

    @model_validator(mode="after")
    def _ids_are_unique(self) -> ScoreRequest:
        twice = [sample_id for sample_id, count in Counter(s.id for s in self.samples).items() if count > 1]
        if twice:
            raise ValueError(f"sample ids must be unique; {twice[0]!r} occurs more than once")
        return self


class WireError(Wire):
    """Why something has no value."""

    code: str
    message: str
    retryable: bool = False


class Component(Wire):
    """One reward's answer for one sample."""

    value: float | None
    weight: float
    required: bool
    status: Status
    error: WireError | None = None
    version: str = ""
    seconds: float = 0.0
    details: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _value_or_error(self) -> Component:
        if (self.value is None) == (self.error is None):
            raise ValueError("a component has either a value or an error")
        return self


class SampleResult(Wire):
    """One sample's mix; `status` is "ok" exactly when `reward` is a number."""

    id: str
    status: Status
    reward: float | None
    components: dict[str, Component]
    """Empty when no reward was asked; `error` then says why."""
    error: WireError | None = None


class ServiceInfo(Wire):
    """Who answered."""

    name: str = "raylign"
    version: str


class ScoreResponse(Wire):
    """The answer of `POST /v1/score`, results in the order of the samples."""

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: str
    service: ServiceInfo
    results: tuple[SampleResult, ...]
    counts: dict[str, int]
    """Results per status."""


class RewardInfo(Wire):
    """A served reward."""

    name: str
    version: str
    modality: Modality
    range: tuple[float, float] | None
    higher_is_better: bool
    deterministic: bool
    weight: float
    required: bool


class RewardList(Wire):
    """The answer of `GET /v1/rewards`."""

    rewards: tuple[RewardInfo, ...]


class Readiness(Wire):
    """The answer of `GET /v1/readyz`."""

    ready: bool
    rewards: dict[str, bool]


class ErrorBody(Wire):
    """The body of every answer that is not 2xx."""

    error: WireError
    log_id: str | None = None
    """Where the server's log tells more."""


def describe(config: RewardConfig, reward: Reward) -> RewardInfo:
    """What clients may know about a reward."""
    return RewardInfo(
        name=config.name,
        version=reward.version,
        modality=reward.modality,
        range=reward.range,
        higher_is_better=reward.higher_is_better,
        deterministic=reward.deterministic,
        weight=config.weight,
        required=config.required,
    )


def result_of(
    sample_id: str, breakdown: RewardBreakdown, configs: Sequence[RewardConfig], details: bool
) -> SampleResult:
    """A breakdown as it is sent; `configs` in the order of its scores."""
    components = {
        config.name: Component(
            value=score.value,
            weight=config.weight,
            required=config.required,
            status=_status(score),
            error=_wire_error(score.error),
            version=score.version,
            seconds=score.seconds,
            details=cast("dict[str, JsonValue]", dict(score.details)) if details else {},
        )
        for config, score in zip(configs, breakdown.scores, strict=bool(breakdown.scores))
    }
    return SampleResult(
        id=sample_id,
        status=_overall(breakdown, components),
        reward=breakdown.total,
        components=components,
        error=_wire_error(breakdown.failure),
    )


def breakdown_of(result: SampleResult) -> RewardBreakdown:
    """A received result as the rest of the system knows it."""
    scores = tuple(
        RewardScore(
            name=name,
            value=component.value,
            error=_failure(component.error),
            version=component.version,
            seconds=component.seconds,
            details=component.details,
        )
        for name, component in result.components.items()
    )
    return RewardBreakdown(result.reward, scores, _failure(result.error))


def _overall(breakdown: RewardBreakdown, components: Mapping[str, Component]) -> Status:
    """The status that explains a missing total best."""
    if breakdown.total is not None:
        return "ok"
    if breakdown.failure is not None:
        return cast("Status", breakdown.failure.code)
    failed = [component for component in components.values() if component.status != "ok"]
    required = [component for component in failed if component.required]
    # Without a failed reward it was the weighted sum that overflowed.
    return (required or failed)[0].status if failed else "out_of_range"


def _status(score: RewardScore) -> Status:
    # Every code comes from rewards.base.FailureCode; Component refuses any other.
    return "ok" if score.error is None else cast("Status", score.error.code)


def _wire_error(error: RewardFailure | None) -> WireError | None:
    return None if error is None else WireError(code=error.code, message=error.message, retryable=error.retryable)


def _failure(error: WireError | None) -> RewardFailure | None:
    return None if error is None else RewardFailure(error.code, error.message, error.retryable)
