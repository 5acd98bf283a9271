"""Client of a reward service somewhere else. Whatever goes wrong comes back as an error per sample, never a number."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Literal, cast

import httpx
from pydantic import JsonValue, ValidationError

from raylign.types import RewardBreakdown, RewardFailure, RewardSample
from rewards.images import encode_png
from rewards.retry import RetryPolicy, post_with_retries
from rewards.wire import (
    REQUEST_PART,
    InlineImage,
    PartImage,
    RewardChoice,
    RewardList,
    ScoreRequest,
    ScoreResponse,
    ScoreSample,
    breakdown_of,
)


class RewardClient:
    """Scores samples by `POST /v1/score`; usable as `async with RewardClient(url) as client`.

    Only what may pass is retried: 408, 429, 5xx and broken connections, with full jitter and the server's
    Retry-After, under one request id.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        form: Literal["multipart", "json"] = "multipart",
        *,
        timeout_s: float = 150.0,
        max_attempts: int = 4,
        max_samples: int = 64,
        max_in_flight: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`timeout_s` should exceed the server's; `max_samples` go into one request, `max_in_flight` run at a time."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s))
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self._form = form
        self._max_samples = max_samples
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
        """What the service offers. Raises httpx.HTTPError or ValidationError: this is asked once, by a person."""
        response = await self._http.get("/v1/rewards")
        response.raise_for_status()
        return RewardList.model_validate_json(response.content)

    async def score(self, samples: Sequence[RewardSample], only: Sequence[str] | None = None) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; `only` names the rewards to ask for. Ids must be unique."""
        chunks = [samples[i : i + self._max_samples] for i in range(0, len(samples), self._max_samples)]
        answers = await asyncio.gather(*(self._score_chunk(chunk, only) for chunk in chunks))
        return [breakdown for answer in answers for breakdown in answer]

    async def _score_chunk(self, samples: Sequence[RewardSample], only: Sequence[str] | None) -> list[RewardBreakdown]:
        async with self._in_flight:
            answer = await self._ask(samples, only)
        if isinstance(answer, ScoreResponse):
            if [result.id for result in answer.results] == [sample.id for sample in samples]:
                return [breakdown_of(result) for result in answer.results]
            answer = RewardFailure("model_error", "the service answered with other samples than it was asked about")
        return [RewardBreakdown(None, (), answer)] * len(samples)

    async def _ask(self, samples: Sequence[RewardSample], only: Sequence[str] | None) -> ScoreResponse | RewardFailure:
        """Post until there is an answer that trying again would not change."""
        request, files = await asyncio.to_thread(_encode, samples, only, self._form)
        body = request.model_dump_json()
        answer = await post_with_retries(lambda: self._post(body, files), self._retry, "the reward service")
        return answer if isinstance(answer, RewardFailure) else _parse(answer)

    async def _post(self, body: str, files: Sequence[tuple[str, bytes]]) -> httpx.Response:
        if self._form == "json":
            return await self._http.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
        parts: list[tuple[str, tuple[str, str | bytes, str]]] = [
            (REQUEST_PART, ("request.json", body, "application/json"))
        ]
        parts += [(name, (name, data, "image/png")) for name, data in files]
        return await self._http.post("/v1/score", files=parts)


def _encode(
    samples: Sequence[RewardSample], only: Sequence[str] | None, form: str
) -> tuple[ScoreRequest, list[tuple[str, bytes]]]:
    """The request, and the named pictures that go beside it."""
    files: list[tuple[str, bytes]] = []
    wired: list[ScoreSample] = []
    for index, sample in enumerate(samples):
        image: InlineImage | PartImage | None = None
        if sample.image_HWC is not None:
            data = encode_png(sample.image_HWC)
            if form == "json":
                image = InlineImage(mime="image/png", data=base64.b64encode(data).decode("ascii"))
            else:
                files.append((f"image-{index}", data))
                image = PartImage(mime="image/png", part=f"image-{index}")
        wired.append(
            ScoreSample(
                id=sample.id,
                prompt=sample.prompt.text,
                metadata=cast("dict[str, JsonValue]", dict(sample.prompt.metadata)),
                image=image,
                text=sample.text,
                seed=sample.seed,
            )
        )
    choices = None if only is None else tuple(RewardChoice(name=name) for name in only)
    return ScoreRequest(request_id=uuid.uuid4().hex, rewards=choices, samples=tuple(wired)), files


def _parse(response: httpx.Response) -> ScoreResponse | RewardFailure:
    try:
        return ScoreResponse.model_validate_json(response.content)
    except ValidationError as error:
        problems = error.error_count()
        return RewardFailure("model_error", f"the answer breaks the schema in {problems} place(s); check the versions")
