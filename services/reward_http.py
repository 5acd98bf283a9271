"""The reward service's HTTP face: validation, authentication, decoding. Ray is behind the `RewardBackend`.

request ─▶ token ─▶ size cap ─▶ schema ─▶ pictures decoded one by one ─▶ backend ─▶ one result per sample
           401       413        400 / 422    bad ones become results           200, whatever failed
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

import raylign
from raylign.types import Prompt, RewardBreakdown, RewardFailure, RewardSample
from rewards.base import RewardConfig
from rewards.images import decode_image
from rewards.wire import (
    REQUEST_PART,
    ErrorBody,
    PartImage,
    Readiness,
    RewardInfo,
    RewardList,
    SampleResult,
    ScoreRequest,
    ScoreResponse,
    ScoreSample,
    ServiceInfo,
    WireError,
    result_of,
)
from services.reward_config import ServiceConfig

logger = logging.getLogger(__name__)


class RewardBackend(Protocol):
    """What scores for the HTTP face."""

    async def score(
        self, samples: Sequence[RewardSample], only: Collection[str] | None = None
    ) -> list[RewardBreakdown]:
        """One breakdown per sample, in order."""
        ...

    async def describe(self) -> list[RewardInfo]:
        """The served rewards."""
        ...

    async def ready(self) -> Mapping[str, bool]:
        """Which rewards answer."""
        ...


class ApiError(Exception):
    """A request refused as a whole; becomes an ErrorBody."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(error=WireError(code=code, message=message, retryable=status in (429, 503)))
        self.headers = dict(headers or {})


def token_digest(token: str) -> str:
    """What the service keeps of its token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_api(
    backend: RewardBackend, rewards: Sequence[RewardConfig], limits: ServiceConfig, digest: str | None
) -> FastAPI:
    """The application. `digest` is the `token_digest` that clients must match; None lets everyone in."""
    app = FastAPI(title="Raylign rewards", version=raylign.__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unexpected)

    async def authenticated(request: Request) -> None:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Digests have one length, so the comparison takes the same time for every wrong token.
        matches = digest is None or hmac.compare_digest(token_digest(given.strip()), digest)
        if digest is not None and not (scheme.lower() == "bearer" and matches):
            message = "send the service's token as 'Authorization: Bearer ...'"
            raise ApiError(401, "unauthorized", message, {"WWW-Authenticate": "Bearer"})

    known = {config.name: config for config in rewards}

    @app.post(
        "/v1/score",
        dependencies=[Depends(authenticated)],
        response_model=ScoreResponse,
        openapi_extra=_score_body(),
        responses={code: {"model": ErrorBody} for code in (400, 401, 413, 415, 422, 500, 503)},
    )
    async def score(request: Request) -> Response:
        wire, parts = await _read(request, limits)
        if len(wire.samples) > limits.max_samples:
            raise ApiError(422, "invalid_request", f"at most {limits.max_samples} samples, got {len(wire.samples)}")
        only = _choose(wire, known)
        results = await _score(wire, _image_bytes(wire.samples, parts), backend, [known[n] for n in only], limits)
        counts: dict[str, int] = {}
        for result in results:
            counts[result.status] = counts.get(result.status, 0) + 1
        return _json(
            ScoreResponse(
                request_id=wire.request_id or uuid.uuid4().hex,
                service=ServiceInfo(version=raylign.__version__),
                results=tuple(results),
                counts=counts,
            )
        )

    @app.get("/v1/rewards", dependencies=[Depends(authenticated)], response_model=RewardList)
    async def list_rewards() -> Response:
        return _json(RewardList(rewards=tuple(await backend.describe())))

    @app.get("/v1/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/readyz", response_model=Readiness)
    async def readyz() -> Response:
        ready = dict(await backend.ready())
        return _json(Readiness(ready=all(ready.values()), rewards=ready), 200 if all(ready.values()) else 503)

    return app


async def _read(request: Request, limits: ServiceConfig) -> tuple[ScoreRequest, dict[str, bytes]]:
    """The request's JSON and its other parts. Raises ApiError 400, 413, 415 or 422."""
    capped = _capped(request, limits.max_body_bytes)
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _parse(await capped.body()), {}
    if kind != "multipart/form-data":
        raise ApiError(415, "unsupported_media_type", f"send application/json or multipart/form-data, got {kind!r}")
    head: str | bytes | None = None
    parts: dict[str, bytes] = {}
    async with capped.form(max_files=limits.max_samples + 1, max_fields=1, max_part_size=limits.max_body_bytes) as form:
        for name, value in form.multi_items():
            content = await value.read() if isinstance(value, UploadFile) else value
            if name in parts or (name == REQUEST_PART and head is not None):
                raise ApiError(400, "malformed", f"part {name!r} occurs more than once")
            if name == REQUEST_PART:
                head = content
            else:
                parts[name] = content.encode() if isinstance(content, str) else content
    if head is None:
        raise ApiError(400, "malformed", f"the multipart body has no part {REQUEST_PART!r} with the JSON")
    return _parse(head), parts


def _capped(request: Request, max_bytes: int) -> Request:
    """The same request, refusing with 413 as soon as its body is known to be too long."""
    refusal = ApiError(413, "too_large", f"the body may have {max_bytes} bytes; send fewer samples per request")
    declared = request.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise refusal
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise refusal
        return message

    return Request(request.scope, receive)


def _parse(body: str | bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if problems[0]["type"] == "json_invalid":
            raise ApiError(400, "malformed", "the body is not valid JSON") from None
        shown = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'request'}: {p['msg']}" for p in problems[:10])
        raise ApiError(422, "invalid_request", shown) from None


def _choose(wire: ScoreRequest, known: Mapping[str, RewardConfig]) -> list[str]:
    """Names of the rewards to score with, in the order they are configured."""
    asked = set(known) if wire.rewards is None else {choice.name for choice in wire.rewards}
    if not asked <= set(known):
        unknown = ", ".join(sorted(asked - set(known)))
        raise ApiError(422, "invalid_request", f"no reward named {unknown}; served: {', '.join(known)}")
    return [name for name in known if name in asked]


def _image_bytes(samples: Sequence[ScoreSample], parts: Mapping[str, bytes]) -> list[bytes | None]:
    """Each sample's picture file. A part that is missing or unused, or text that is not base64, is a 400."""
    used: set[str] = set()
    files: list[bytes | None] = []
    for sample in samples:
        image = sample.image
        if image is None:
            files.append(None)
        elif isinstance(image, PartImage):
            if image.part not in parts:
                raise ApiError(
                    400, "malformed", f"sample {sample.id!r} names the part {image.part!r}, which is not sent"
                )
            used.add(image.part)
            files.append(parts[image.part])
        else:
            try:
                files.append(base64.b64decode(image.data, validate=True))
            except (binascii.Error, ValueError):
                raise ApiError(400, "malformed", f"the image of sample {sample.id!r} is not valid base64") from None
    unused = sorted(set(parts) - used)
    if unused:
        raise ApiError(400, "malformed", f"no sample names the part(s) {', '.join(unused)}")
    return files


async def _score(
    wire: ScoreRequest,
    files: Sequence[bytes | None],
    backend: RewardBackend,
    configs: Sequence[RewardConfig],
    limits: ServiceConfig,
) -> list[SampleResult]:
    """One result per sample; those whose picture cannot be read never reach the backend."""
    pictures = await asyncio.to_thread(_decode_all, wire.samples, files, limits.max_image_pixels)
    good: list[RewardSample] = []
    breakdowns: dict[str, RewardBreakdown] = {}
    for sample, picture in zip(wire.samples, pictures, strict=True):
        if isinstance(picture, RewardFailure):
            breakdowns[sample.id] = RewardBreakdown(None, (), picture)
        else:
            prompt = Prompt(sample.id, sample.prompt, sample.metadata)
            good.append(RewardSample(sample.id, prompt, picture, sample.text, sample.seed))
    answers = await backend.score(good, [config.name for config in configs]) if good else []
    breakdowns.update({sample.id: answer for sample, answer in zip(good, answers, strict=True)})
    return [result_of(sample.id, breakdowns[sample.id], configs, wire.return_details) for sample in wire.samples]


def _decode_all(
    samples: Sequence[ScoreSample], files: Sequence[bytes | None], max_pixels: int
) -> list[np.ndarray | RewardFailure | None]:
    def decode(sample: ScoreSample, data: bytes | None) -> np.ndarray | RewardFailure | None:
        if sample.image is None or data is None:
            return None
        return decode_image(data, sample.image.mime, max_pixels, sample.image.sha256)

    return [decode(sample, data) for sample, data in zip(samples, files, strict=True)]


def _json(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Pydantic writes the JSON itself: a stray NaN in details becomes null and not an opaque 500."""
    return Response(body.model_dump_json(), status, dict(headers or {}), media_type="application/json")


async def _answer_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return _json(error.body, error.status, error.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Refusals by the framework itself: no such route, wrong method, broken multipart."""
    if not isinstance(error, HTTPException):
        raise error
    code = "malformed" if error.status_code == 400 else "http_error"
    body = ErrorBody(error=WireError(code=code, message=str(error.detail)))
    return _json(body, error.status_code, error.headers)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    """A bug or an unreachable replica: the client learns where to look, not what the exception says."""
    log_id = uuid.uuid4().hex[:12]
    logger.error("%s %s failed (log id %s)", request.method, request.url.path, log_id, exc_info=error)
    return _json(ErrorBody(error=WireError(code="internal", message="the service failed"), log_id=log_id), 500)


def _score_body() -> dict[str, Any]:
    """The two forms of the request for the OpenAPI document; the framework cannot see them, bodies are read by hand."""
    # With an id of its own the schema is a document of its own, in which its references to $defs resolve.
    schema = {"$id": "score-request", **ScoreRequest.model_json_schema()}
    parts = {"type": "object", "properties": {REQUEST_PART: schema}, "additionalProperties": {"format": "binary"}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": parts}}
    return {"requestBody": {"required": True, "content": content}}
