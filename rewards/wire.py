"""The reward service's requests and answers, shared by server and client. Strict: unknown keys are errors.

A request is JSON, or multipart with the same JSON in a part named `request` and each picture in a part of its own.
An answer is 200 even when samples failed: each sample has a status, and a reward that is a finite number or null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from raylign.types import RewardBreakdown, RewardFailure, RewardScore
from rewards.base import FailureCode, HasCanaries, Modality, Reward, RewardConfig, ScoresGroups, TakesParams

SCHEMA_VERSION = 1
REQUEST_PART = "request"
"""Name of the multipart part with the JSON."""
LATEST = "latest"
MAX_IMAGES = 16
"""Most pictures of one sample."""
Mime = Literal["image/png", "image/webp", "image/jpeg"]
Status = Literal["ok"] | FailureCode
Flag = Literal["renormalised"]
_Id = Annotated[str, Field(min_length=1, max_length=200)]


def _only_finite(data: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Raise ValueError for a NaN or an infinity anywhere inside: JSON has neither, but its readers know both."""
    left: list[JsonValue] = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"numbers must be finite, got {value}")
    return data


JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_only_finite)]


class Wire(BaseModel):
    """Base class: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ImageFile(Wire):
    """A picture as a file, wherever its bytes are."""

    mime: Mime
    sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """Of the file; checked when given."""
    width: int | None = Field(default=None, ge=1)
    """In pixels, as the file's header has it; checked when given."""
    height: int | None = Field(default=None, ge=1)


class InlineImage(ImageFile):
    """A picture in the JSON itself."""

    encoding: Literal["base64"]
    data: str
    """The file, in standard base64 with padding and without line breaks."""


class PartImage(ImageFile):
    """A picture in a multipart part."""

    encoding: Literal["part"]
    part: str = Field(min_length=1, max_length=200)
    """The part's name."""


AnyImage = Annotated[InlineImage | PartImage, Field(discriminator="encoding")]


class Candidate(Wire):
    """A picture, several pictures or a text that answers a prompt."""

    id: _Id
    """Echoed; unique in the request."""
    image: AnyImage | None = None
    images: tuple[AnyImage, ...] | None = Field(default=None, min_length=1, max_length=MAX_IMAGES)
    """Several pictures that make up one answer, for rewards that look at several."""
    text: str | None = None
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """For rewards that draw: equal samples with equal seeds score the same."""

    @model_validator(mode="after")
    def _image_or_text(self) -> Candidate:
        if sum(answer is not None for answer in (self.image, self.images, self.text)) != 1:
            raise ValueError("a sample needs either an image or a text: exactly one of image, images and text")
        return self

    @property
    def all_images(self) -> tuple[InlineImage | PartImage, ...]:
        """Its pictures, under whichever key they came."""
        return (self.image,) if self.image is not None else self.images or ()


class ScoreSample(Candidate):
    """One sample: a prompt and what answers it."""

    prompt: str
    metadata: JsonObject = {}
    """What rewards need to know beside the prompt, such as `target`."""
    reference: str | None = None
    """The right answer, for rewards that compare with one."""
    group_id: str = Field(default="", max_length=200)
    """Names the siblings of one prompt; `group_normalised` needs it."""


class RewardChoice(Wire):
    """A reward to score with."""

    name: str
    version: str = LATEST
    """The exact version that must answer, or "latest"."""
    weight: float | None = None
    """Its share in the sum; the operator's when not given."""
    required: bool | None = None
    """Whether a sample fails when this reward fails; the operator's choice when not given."""
    params: JsonObject = {}
    """What this request sets for the reward; `GET /v1/rewards` has the schema."""


class Aggregate(Wire):
    """How components become one reward."""

    method: Literal["weighted_sum", "none", "group_normalised"] = "weighted_sum"
    """none leaves `reward` null; group_normalised is a weighted sum of what each reward says against its group."""
    normalise: Literal["none", "affine"] = "none"
    """affine maps each reward's declared range onto [0, 1], the better end on 1, before weighing."""

    @model_validator(mode="after")
    def _normalises_once(self) -> Aggregate:
        if self.method == "group_normalised" and self.normalise != "none":
            raise ValueError("group_normalised normalises by itself; leave `normalise` at 'none'")
        return self


class RequestHead(Wire):
    """What the requests for scores have in common."""

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: str = Field(default="", max_length=200)
    """Echoed; made up by the server when empty. Repeating a request under its id repeats the answer."""
    deadline_ms: int | None = Field(default=None, ge=1, le=86_400_000)
    """What is not scored this long after the request came in has status `timeout`."""
    rewards: tuple[RewardChoice, ...] | None = Field(default=None, min_length=1)
    """All that are served when not given."""
    aggregate: Aggregate = Aggregate()
    return_details: bool = True

    @model_validator(mode="after")
    def _reward_names_are_unique(self) -> RequestHead:
        _refuse_repeats("rewards", [choice.name for choice in self.rewards or ()])
        return self


class ScoreRequest(RequestHead):
    """`POST /v1/score`."""

    samples: tuple[ScoreSample, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _samples_fit_together(self) -> ScoreRequest:
        _refuse_repeats("sample ids", [sample.id for sample in self.samples])
        if self.aggregate.method == "group_normalised" and not all(sample.group_id for sample in self.samples):
            raise ValueError("group_normalised needs a group_id for every sample")
        return self


class ScoreGroupRequest(RequestHead):
    """`POST /v1/score_group`."""

    prompt: str
    metadata: JsonObject = {}
    """What rewards need to know beside the prompt, such as `target`."""
    reference: str | None = None
    """The right answer, for rewards that compare with one."""
    candidates: tuple[Candidate, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_are_unique(self) -> ScoreGroupRequest:
        _refuse_repeats("candidate ids", [candidate.id for candidate in self.candidates])
        return self


class WireError(Wire):
    """Why something has no value."""

    code: str
    message: str
    retryable: bool = False


class Component(Wire):
    """One reward's answer for one sample."""

    raw: float | None
    """What the reward said."""
    value: float | None
    """What entered the sum, before its weight: `raw`, or `raw` normalised."""
    weight: float
    required: bool
    status: Status
    error: WireError | None = None
    version: str = ""
    model_fingerprint: str = ""
    """Hash of the model files behind it; empty when `version` says it all."""
    cache: Literal["hit", "miss", "bypass"] = "bypass"
    latency_ms: float = 0.0
    """Time the reward took for this sample."""
    details: JsonObject = {}

    @model_validator(mode="after")
    def _value_or_error(self) -> Component:
        if (self.raw is None) == (self.error is None) or (self.status == "ok") != (self.error is None):
            raise ValueError("a component has either a value or an error")
        return self


class SampleResult(Wire):
    """One sample's rewards. Its status is "ok" exactly when nothing that it needs failed."""

    id: str
    status: Status
    reward: float | None
    """The mix; null when the status is not "ok", or with the method "none"."""
    components: dict[str, Component]
    """By reward, in the order asked. Empty when no reward was asked; `error` then says why."""
    flags: tuple[Flag, ...] = ()
    """renormalised: an optional reward has no value, and the other weights grew in its place."""
    error: WireError | None = None


class ServiceInfo(Wire):
    """Who answered."""

    name: str = "raylign"
    version: str
    git_sha: str | None = None
    config_hash: str = ""
    """Equal for services that are configured alike."""


class ScoreResponse(Wire):
    """The answer of `POST /v1/score`, results in the order of the samples."""

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: str
    service: ServiceInfo
    results: tuple[SampleResult, ...]
    counts: dict[str, int]
    """Results per status."""


class ScoreGroupResponse(ScoreResponse):
    """The answer of `POST /v1/score_group`, results in the order of the candidates."""

    ranking: tuple[str, ...]
    """Ids by falling reward, equal ones in the order sent; those without a reward are left out."""


class CanaryInfo(Wire):
    """A sample that deserves nothing, with the most that a sound judge gives it."""

    name: str
    highest: float


class RewardInfo(Wire):
    """A served reward."""

    name: str
    type: str
    version: str
    model_fingerprint: str
    modality: Modality
    range: tuple[float | None, float | None] | None
    """Least and greatest value, null where there is no bound."""
    higher_is_better: bool
    deterministic: bool
    uses_seed: bool
    weight: float
    required: bool
    metadata_keys: dict[str, str]
    """Every key of a sample's metadata that the score depends on, with its meaning."""
    params_schema: dict[str, JsonValue] | None
    """JSON schema of what a request may set, or null."""
    scores_groups: bool
    """Whether it compares candidates in `POST /v1/score_group`; the others score them one by one."""
    canaries: tuple[CanaryInfo, ...]


class RewardList(Wire):
    """The answer of `GET /v1/rewards`."""

    rewards: tuple[RewardInfo, ...]


class Health(Wire):
    """The answer of `GET /v1/healthz`."""

    status: Literal["ok"] = "ok"


class Readiness(Wire):
    """The answer of `GET /v1/readyz`."""

    ready: bool
    rewards: dict[str, bool]
    problems: dict[str, str]
    """Why a reward is not ready, by name."""


class ErrorBody(Wire):
    """The body of every answer that is not 2xx."""

    error: WireError
    log_id: str | None = None
    """Where the server's log tells more."""


def describe(config: RewardConfig, reward: Reward) -> RewardInfo:
    """What clients may know about a reward."""
    bounds = reward.range
    canaries = reward.canaries() if isinstance(reward, HasCanaries) else ()
    return RewardInfo(
        name=config.name,
        type=getattr(config, "type", ""),
        version=reward.version,
        model_fingerprint=reward.fingerprint,
        modality=reward.modality,
        range=None if bounds is None else (_bound(bounds[0]), _bound(bounds[1])),
        higher_is_better=reward.higher_is_better,
        deterministic=reward.deterministic,
        uses_seed=reward.uses_seed,
        weight=config.weight,
        required=config.required,
        metadata_keys=dict(reward.metadata_keys),
        params_schema=reward.params_model.model_json_schema() if isinstance(reward, TakesParams) else None,
        scores_groups=isinstance(reward, ScoresGroups),
        canaries=tuple(CanaryInfo(name=canary.name, highest=canary.highest) for canary in canaries),
    )


def wire_error(error: RewardFailure | None) -> WireError | None:
    """A failure as it is sent."""
    return None if error is None else WireError(code=error.code, message=error.message, retryable=error.retryable)


def breakdown_of(result: SampleResult) -> RewardBreakdown:
    """A received result as the rest of the system knows it: what each reward said, and the mix."""
    scores = tuple(
        RewardScore(
            name=name,
            value=component.raw,
            error=_failure(component.error),
            version=component.version,
            seconds=component.latency_ms / 1000,
            details=component.details,
            fingerprint=component.model_fingerprint,
            cache=component.cache,
        )
        for name, component in result.components.items()
    )
    weights = tuple(component.weight for component in result.components.values())
    return RewardBreakdown(result.reward, scores, _failure(result.error), weights)


def plain_json(value: Any, as_is: bool = False) -> JsonValue:
    """Any sequence and mapping of scalars as JSON's own types.

    NaN and infinities become null, and halves of surrogate pairs, which models' JSON may have, "?"; unless `as_is`.
    """
    if isinstance(value, str):
        return value if as_is else value.encode(errors="replace").decode()
    if isinstance(value, int) or value is None:
        return value
    if isinstance(value, float):
        return value if as_is or math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(plain_json(str(key), as_is)): plain_json(item, as_is) for key, item in items}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain_json(item, as_is) for item in cast("Sequence[Any]", value)]
    return str(value)


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} must be unique; {twice[0]!r} occurs more than once")


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _failure(error: WireError | None) -> RewardFailure | None:
    return None if error is None else RewardFailure(error.code, error.message, error.retryable)
