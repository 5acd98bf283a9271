"""The reward service's HTTP face. Ray is behind the `RewardBackend`; `services.reward_api` has the contract's parts.

request ─▶ token, rate, room ─▶ body ─▶ schema ─▶ rewards ─▶ pictures ─▶ backend ─▶ one result per sample
           401  429   503    408 413 415  400 422   422    413, or a result  429 504   200, whatever failed
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request, Response

import raylign
from raylign.types import RewardSample, RewardScore
from rewards import make_reward
from rewards.base import Reward, RewardAsk, RewardConfig
from rewards.wire import (
    Health,
    Readiness,
    RewardInfo,
    RewardList,
    ScoreGroupRequest,
    ScoreGroupResponse,
    ScoreRequest,
    ScoreResponse,
    ServiceInfo,
)
from services.reward_api.answer import (
    counts_of,
    deadline_passed,
    ranking_of,
    refuse_if_nothing_answered,
    results_of,
)
from services.reward_api.asks import Catalogue
from services.reward_api.body import parse, read_body
from services.reward_api.document import READ_STATUSES, SCORE_STATUSES, body_of, document, refusals
from services.reward_api.door import Door, Replay, token_digest
from services.reward_api.pictures import check_parts, read_samples, samples_of
from services.reward_api.refusals import (
    ApiError,
    ClientGone,
    add_handlers,
    invalid,
    json_answer,
    raw_answer,
    retry_after,
)
from services.reward_config import ServiceConfig

GRACE_S = 0.5
"""How much longer than the deadline a backend may take to say what it has."""
GIT_SHA_ENV = "RAYLIGN_GIT_SHA"
"""Environment variable in which an image's build leaves its revision."""
AnswerT = TypeVar("AnswerT")
Score = Callable[[Sequence[RewardSample], Sequence[RewardAsk], float | None], Awaitable[dict[str, list[RewardScore]]]]

__all__ = ["RewardBackend", "build_api", "token_digest"]


class RewardBackend(Protocol):
    """What scores for the HTTP face. It never raises for a reward that fails: each sample gets an error."""

    async def score(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        """Scores by the name of the reward, each in sample order; late ones are errors `timeout`."""
        ...

    async def score_group(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        """The same for one prompt's candidates, which rewards may compare."""
        ...

    async def describe(self) -> list[RewardInfo]:
        """The served rewards."""
        ...

    async def ready(self) -> Mapping[str, str]:
        """By reward: "" when it answers, else the problem."""
        ...


def build_api(
    backend: RewardBackend,
    rewards: Sequence[RewardConfig],
    limits: ServiceConfig,
    digest: str | None,
    config_hash: str = "",
    make: Callable[[Any], Reward] = make_reward,
) -> FastAPI:
    """The application. `digest` is the `token_digest` that clients must match; None lets everyone in.

    `make` builds an unloaded reward from its configuration; it tells what parameters a request may set.
    """
    app = FastAPI(title="Raylign rewards", version=raylign.__version__, docs_url=None, redoc_url=None)
    add_handlers(app)
    service = ServiceInfo(
        version=raylign.__version__, git_sha=os.environ.get(GIT_SHA_ENV) or None, config_hash=config_hash
    )
    catalogue = Catalogue(rewards, make, backend.describe, limits.retry_after_s)
    slowest_s = max(limits.serving(config.name).timeout_s for config in rewards)
    scoring = _Scoring(catalogue, limits, service, slowest_s)
    readiness = _Together(backend.ready)
    guarded = [Depends(Door(digest, limits.max_requests_per_s))]

    @app.post(
        "/v1/score",
        dependencies=guarded,
        response_model=ScoreResponse,
        openapi_extra=body_of(ScoreRequest),
        responses=refusals(*SCORE_STATUSES),
    )
    async def score(request: Request) -> Response:
        """Score samples one by one."""
        return await scoring.answer(request, ScoreRequest, backend.score)

    @app.post(
        "/v1/score_group",
        dependencies=guarded,
        response_model=ScoreGroupResponse,
        openapi_extra=body_of(ScoreGroupRequest),
        responses=refusals(*SCORE_STATUSES),
    )
    async def score_group(request: Request) -> Response:
        """Score the candidates of one prompt, against each other where a reward can, and rank them."""
        return await scoring.answer(request, ScoreGroupRequest, backend.score_group)

    @app.get("/v1/rewards", dependencies=guarded, response_model=RewardList, responses=refusals(*READ_STATUSES))
    async def list_rewards() -> Response:
        """What is served."""
        return json_answer(RewardList(rewards=tuple(await catalogue.fetch())))

    @app.get("/v1/healthz", response_model=Health)
    async def healthz() -> Response:
        """Whether this process answers."""
        return json_answer(Health())

    @app.get("/v1/readyz", response_model=Readiness, responses={503: {"model": Readiness}, **refusals(500)})
    async def readyz() -> Response:
        """Whether every reward answers, and soundly; 503 says which does not and why."""
        found = await readiness.ask()
        problems = {name: problem for name, problem in found.items() if problem}
        body = Readiness(
            ready=not problems, rewards={name: not problem for name, problem in found.items()}, problems=problems
        )
        return json_answer(body, 503 if problems else 200)

    about = "Rewards for generated images and text. A failed sample has a status and no number; docs/reward_service.md."
    document(app, (ScoreRequest, ScoreGroupRequest), about, with_token=digest is not None)
    return app


class _Together(Generic[AnswerT]):
    """A question that everybody gets the running answer to: who may ask without a token must not fill queues."""

    def __init__(self, question: Callable[[], Awaitable[AnswerT]]) -> None:
        self._question = question
        self._running: asyncio.Future[AnswerT] | None = None

    async def ask(self) -> AnswerT:
        """The answer that is on its way, else a new one; raises what the question raises."""
        if self._running is None or self._running.done():
            self._running = asyncio.ensure_future(self._question())
        return await asyncio.shield(self._running)  # one who leaves takes it from nobody else


class _Scoring:
    """A request for scores from its first byte to its answer."""

    def __init__(self, catalogue: Catalogue, limits: ServiceConfig, service: ServiceInfo, slowest_s: float) -> None:
        """`slowest_s` is the time limit of the slowest reward, after which nothing more comes."""
        self._slowest_s = slowest_s
        self._catalogue = catalogue
        self._limits = limits
        self._service = service
        self._replay = Replay(limits.replay_s)
        self._num_inside = 0

    async def answer(
        self, request: Request, model: type[ScoreRequest] | type[ScoreGroupRequest], score: Score
    ) -> Response:
        """The answer to a request whose body is still to be read. Raises ApiError, or ClientGone."""
        if self._num_inside >= self._limits.max_requests:
            raise ApiError(503, "overloaded", "the service is full", retry_after(self._limits.retry_after_s))
        self._num_inside += 1
        try:
            return await self._answer(request, model, score)
        finally:
            self._num_inside -= 1

    async def _answer(
        self, request: Request, model: type[ScoreRequest] | type[ScoreGroupRequest], score: Score
    ) -> Response:
        started = time.monotonic()
        body = await read_body(request, self._limits)
        wire = await parse(model, body)
        digest = await body.digest(request.url.path) if wire.request_id else b""
        kept = self._replay.find(wire.request_id, digest) if wire.request_id else None
        if kept is not None:
            return raw_answer(kept, headers={"Idempotent-Replayed": "true"})
        samples = samples_of(wire)
        if len(samples) > self._limits.max_samples:
            raise invalid(f"at most {self._limits.max_samples} samples, got {len(samples)}")
        check_parts(samples, body.parts)
        deadline = time.monotonic() + self._slowest_s
        if wire.deadline_ms is not None:
            deadline = min(deadline, started + wire.deadline_ms / 1000)
        answer = await _unless_gone(request, self._score(wire, samples, body.parts, score, deadline))
        written = answer.model_dump_json().encode()
        self._replay.keep(wire.request_id, digest, written)
        return raw_answer(written)

    async def _score(
        self,
        wire: ScoreRequest | ScoreGroupRequest,
        samples: Sequence[Any],
        parts: Mapping[str, bytes],
        score: Score,
        deadline: float,
    ) -> ScoreResponse:
        asks = await self._catalogue.asks(wire)
        bounds = await self._catalogue.bounds(asks) if wire.aggregate.normalise == "affine" else {}
        read = await asyncio.to_thread(read_samples, samples, parts, self._limits)
        good = [sample for sample in read if isinstance(sample, RewardSample)]
        scores: dict[str, list[RewardScore]] = {ask.name: [] for ask in asks}
        if good:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise deadline_passed()
            try:
                async with asyncio.timeout(left_s + GRACE_S):
                    scores = await score(good, asks, left_s)
            except TimeoutError:
                raise deadline_passed() from None
            refuse_if_nothing_answered(scores, time.monotonic() >= deadline, self._limits.retry_after_s)
        ids = [sample.id for sample in samples]
        results = results_of(
            list(zip(ids, read, strict=True)), scores, asks, wire.aggregate, bounds, wire.return_details
        )
        common: dict[str, Any] = {
            "request_id": wire.request_id or uuid.uuid4().hex,
            "service": self._service,
            "results": tuple(results),
            "counts": counts_of(results),
        }
        if isinstance(wire, ScoreGroupRequest):
            return ScoreGroupResponse(**common, ranking=ranking_of(results))
        return ScoreResponse(**common)


async def _unless_gone(request: Request, work: Awaitable[AnswerT]) -> AnswerT:
    """The work's result. When the client hangs up, or this is cancelled, so is the work. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return await working
    finally:
        working.cancel()
        leaving.cancel()
        # A cancelled backend frees its replicas before this request counts as over.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    """Returns when the client hangs up; its body has been read, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
