"""Client of a reward service somewhere else. Whatever goes wrong comes back as an error per sample, never a number."""

from __future__ import annotations

import asyncio
import difflib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import httpx2
from pydantic import ValidationError

from raylign.errors import ConfigError, RewardError
from raylign.types import RewardBreakdown, RewardFailure, RewardSample
from rewards.images import ImageFormat
from rewards.remote_encode import Encoded, Form, body_of, encode, split
from rewards.retry import RetryPolicy, post_with_retries
from rewards.wire import (
    Aggregate,
    Candidate,
    Readiness,
    RewardChoice,
    RewardInfo,
    RewardList,
    ScoreGroupRequest,
    ScoreGroupResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreSample,
    breakdown_of,
)

OnFailure = Literal["mask_sample", "drop_group", "raise"]
"""What a sample without a reward means: an error in its breakdown, the same for all its siblings, or a RewardError."""
_SERVER = "the reward service"


@dataclass(frozen=True, slots=True)
class GroupScores:
    """What a service says of one prompt's candidates."""

    breakdowns: list[RewardBreakdown]
    """In the order of the candidates."""
    ranking: tuple[str, ...]
    """Ids, best first, without those that failed."""


class RewardClient:
    """Scores samples over HTTP; usable as `async with RewardClient(url) as client`, within one event loop.

    Only what may pass is retried: 408, 429, 5xx and broken connections, with full jitter and the server's
    Retry-After, under one request id.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        form: Form = "multipart",
        *,
        image_format: ImageFormat = "png",
        on_failure: OnFailure = "mask_sample",
        timeout_s: float = 150.0,
        max_attempts: int = 4,
        max_samples: int = 64,
        max_bytes: int = 2**25,
        max_in_flight: int = 4,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`timeout_s` should exceed the server's. A request carries at most `max_samples` samples and `max_bytes` of
        raw pixels and text, and `max_in_flight` requests run at a time."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx2.Timeout(timeout_s, connect=min(10.0, timeout_s))
        self._http = httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self._url = url
        self._form: Form = form
        self._image_format: ImageFormat = image_format
        self._on_failure: OnFailure = on_failure
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._retry = RetryPolicy(max_attempts, sleep=sleep)

    async def __aenter__(self) -> RewardClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def rewards(self) -> RewardList:
        """What the service offers. Raises httpx2.HTTPError or ValidationError: this is asked once, by a person."""
        response = await self._http.get("/v1/rewards")
        response.raise_for_status()
        return RewardList.model_validate_json(response.content)

    async def reward(self, name: str) -> RewardInfo:
        """What the service says of one reward. Raises ConfigError if it cannot be asked, or does not serve it."""
        try:
            served = {info.name: info for info in (await self.rewards()).rewards}
        except httpx2.HTTPStatusError as error:
            raise ConfigError(
                f"{self._url} answered {error.response.status_code} to GET /v1/rewards; check the url and the token"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValidationError) as error:
            raise ConfigError(
                f"{self._url} is no reward service that can be reached ({type(error).__name__}); check the url"
            ) from None
        if name not in served:
            near = difflib.get_close_matches(name, served, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{self._url} has no reward {name!r}; {hint}served: {', '.join(served)}")
        return served[name]

    async def ready(self) -> Readiness:
        """Whether every reward answers, and what is wrong if not. Raises as `rewards` does."""
        response = await self._http.get("/v1/readyz")
        if response.status_code != 503:  # not ready is an answer, too
            response.raise_for_status()
        return Readiness.model_validate_json(response.content)

    async def score(
        self,
        samples: Sequence[RewardSample],
        only: Sequence[str | RewardChoice] | None = None,
        *,
        normalise: Literal["none", "affine"] = "none",
        deadline_s: float | None = None,
    ) -> list[RewardBreakdown]:
        """One breakdown per sample, in order.

        `only` says which rewards to ask for: by name, or as a choice with a version, a weight or parameters. What is
        not scored within `deadline_s`, retries and all, is an error. Raises RewardError where `on_failure` is raise.
        """
        head = _head(only, Aggregate(normalise=normalise), deadline_s)

        async def ask(part: Sequence[RewardSample]) -> list[RewardBreakdown]:
            return _join(*await self._ask(part, lambda sent: ScoreRequest(**head(), samples=tuple(sent)), until))

        until = _until(deadline_s)
        answers = await asyncio.gather(*map(ask, split(samples, self._max_samples, self._max_bytes)))
        return settle([breakdown for answer in answers for breakdown in answer], samples, self._on_failure)

    async def score_group(
        self,
        samples: Sequence[RewardSample],
        only: Sequence[str | RewardChoice] | None = None,
        *,
        method: Literal["weighted_sum", "group_normalised"] = "weighted_sum",
        normalise: Literal["none", "affine"] = "none",
        deadline_s: float | None = None,
    ) -> GroupScores:
        """The candidates of one prompt, in one request. As `score`, and ValueError for different prompts.

        The request says prompt, metadata and reference once for all.
        """
        asked = [(sample.prompt.text, sample.prompt.metadata, sample.reference) for sample in samples]
        num_prompts = sum(one not in asked[:place] for place, one in enumerate(asked))
        if num_prompts != 1:
            raise ValueError(
                "score_group takes the candidates of one prompt, with one metadata and reference; "
                f"got {num_prompts} different ones"
            )
        head = _head(only, Aggregate(method=method, normalise=normalise), deadline_s)
        encoded, answer = await self._ask(samples, lambda sent: _group_request(head(), sent), _until(deadline_s))
        breakdowns = _join(encoded, answer)
        ranking: tuple[str, ...] = ()
        if isinstance(answer, ScoreGroupResponse):
            pairs = zip(encoded.samples, samples, strict=True)
            names = {wired.id: sample.id for wired, sample in pairs if isinstance(wired, ScoreSample)}
            ranking = tuple(names[wire_id] for wire_id in answer.ranking if wire_id in names)
        return GroupScores(settle(breakdowns, samples, self._on_failure), ranking)

    async def _ask(
        self,
        samples: Sequence[RewardSample],
        make: Callable[[list[ScoreSample]], ScoreRequest | ScoreGroupRequest],
        until: float | None,
    ) -> tuple[Encoded, ScoreResponse | RewardFailure]:
        """One request: what was sent, and the answer or the failure that trying again did not change."""
        encoded = Encoded()
        try:
            async with asyncio.timeout_at(until), self._in_flight:
                encoded = await asyncio.to_thread(encode, samples, self._form, self._image_format)
                if not encoded.sent:
                    return encoded, RewardFailure("invalid_input", "no sample can be sent")
                return encoded, await self._post(make(encoded.sent), encoded)
        except TimeoutError:
            late = RewardFailure("timeout", f"{_SERVER} did not answer before the deadline", retryable=True)
            return encoded if encoded.samples else Encoded([late] * len(samples)), late

    async def _post(self, request: ScoreRequest | ScoreGroupRequest, encoded: Encoded) -> ScoreResponse | RewardFailure:
        content, content_type = body_of(request, encoded.files, self._form)
        headers = {"Content-Type": content_type}
        path, model = _ROUTES[type(request)]
        answer = await post_with_retries(
            lambda: self._http.post(path, content=content, headers=headers), self._retry, _SERVER
        )
        if isinstance(answer, RewardFailure):
            return answer
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            problems = error.error_count()
            message = f"the answer breaks the schema in {problems} place(s); check the versions"
            return RewardFailure("model_error", message)


_ROUTES: dict[type[ScoreRequest] | type[ScoreGroupRequest], tuple[str, type[ScoreResponse]]] = {
    ScoreRequest: ("/v1/score", ScoreResponse),
    ScoreGroupRequest: ("/v1/score_group", ScoreGroupResponse),
}


def settle(
    breakdowns: Sequence[RewardBreakdown], samples: Sequence[RewardSample], on_failure: OnFailure
) -> list[RewardBreakdown]:
    """What a sample without a reward means for the others.

    mask_sample leaves it a sample without a total. drop_group takes the total from every sample of its group (its
    `group_id`, or else its prompt) too. Raises RewardError with the counts and the first cause for raise.
    """
    failed = [place for place, breakdown in enumerate(breakdowns) if breakdown.total is None]
    if not failed or on_failure == "mask_sample":
        return list(breakdowns)
    if on_failure == "raise":
        first = failed[0]
        cause = _cause(breakdowns[first])
        raise RewardError(
            f"{len(failed)} of {len(breakdowns)} samples have no reward; the first, {samples[first].id!r}: {cause}"
        )
    dropped = {_group(samples[place]) for place in failed}
    sibling = RewardFailure("cancelled", "another sample of its group has no reward")
    return [
        RewardBreakdown(None, breakdown.scores, sibling, breakdown.weights)
        if breakdown.total is not None and _group(sample) in dropped
        else breakdown
        for breakdown, sample in zip(breakdowns, samples, strict=True)
    ]


def _head(
    only: Sequence[str | RewardChoice] | None, aggregate: Aggregate, deadline_s: float | None
) -> Callable[[], dict[str, Any]]:
    """What all requests of one call share; each gets an id of its own."""
    choices = [RewardChoice(name=choice) if isinstance(choice, str) else choice for choice in only or ()]
    shared: dict[str, Any] = {
        "rewards": tuple(choices) if only is not None else None,
        "aggregate": aggregate,
        "deadline_ms": None if deadline_s is None else max(1, round(deadline_s * 1000)),
    }
    return lambda: {**shared, "request_id": uuid.uuid4().hex}


def _group_request(head: dict[str, Any], sent: Sequence[ScoreSample]) -> ScoreGroupRequest:
    first = sent[0]
    candidates = tuple(Candidate(**{key: getattr(sample, key) for key in Candidate.model_fields}) for sample in sent)
    return ScoreGroupRequest(
        **head, prompt=first.prompt, metadata=first.metadata, reference=first.reference, candidates=candidates
    )


def _until(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s


def _join(encoded: Encoded, answer: ScoreResponse | RewardFailure) -> list[RewardBreakdown]:
    """One breakdown per sample, whether it was sent or not."""
    if isinstance(answer, ScoreResponse) and [r.id for r in answer.results] != [s.id for s in encoded.sent]:
        answer = RewardFailure("model_error", f"{_SERVER} answered with other samples than it was asked about")
    results = iter(answer.results if isinstance(answer, ScoreResponse) else ())
    breakdowns: list[RewardBreakdown] = []
    for sample in encoded.samples:
        problem = sample if isinstance(sample, RewardFailure) else answer
        failed = isinstance(problem, RewardFailure)
        breakdowns.append(RewardBreakdown(None, (), problem) if failed else breakdown_of(next(results)))
    return breakdowns


def _cause(breakdown: RewardBreakdown) -> str:
    errors = [(score.name, score.error) for score in breakdown.scores if score.error is not None]
    name, error = ("", breakdown.failure) if breakdown.failure is not None or not errors else errors[0]
    where = f"reward {name!r}: " if name else ""
    return f"{where}{error.code}: {error.message}" if error is not None else "its mix is not finite"


def _group(sample: RewardSample) -> str:
    return sample.group_id or sample.prompt.id
