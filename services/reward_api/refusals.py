"""How a request is refused as a whole: one exception, one body, and nothing of what went wrong inside."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rewards.wire import ErrorBody, WireError

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
"""Status of an answer that nobody waits for; it is never seen."""
_RETRYABLE = (408, 429, 503, 504)


class ApiError(Exception):
    """A request refused as a whole; becomes an ErrorBody."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, log_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(
            error=WireError(code=code, message=message, retryable=status in _RETRYABLE), log_id=log_id
        )
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client hung up."""


def invalid(message: str) -> ApiError:
    """422: the request is well-formed and asks for what there is not."""
    return ApiError(422, "invalid_request", message)


def malformed(message: str) -> ApiError:
    """400: the request cannot be read."""
    return ApiError(400, "malformed", message)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that tells a client when to come back; whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def new_log_id() -> str:
    """What an answer names and the log explains."""
    return uuid.uuid4().hex[:12]


def json_answer(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A model as an answer; pydantic writes the JSON itself, once."""
    return raw_answer(body.model_dump_json().encode(), status, headers)


def raw_answer(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that is written already, as an answer."""
    return Response(body, status, dict(headers or {}), media_type="application/json")


def add_handlers(app: FastAPI) -> None:
    """Have every refusal and every bug answered with an ErrorBody."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(ClientGone, _answer_client_gone)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unexpected)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return json_answer(error.body, error.status, error.headers)


async def _answer_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Refusals by the framework itself: no such route, wrong method."""
    if not isinstance(error, HTTPException):
        raise error
    body = ErrorBody(error=WireError(code="http_error", message=str(error.detail)))
    return json_answer(body, error.status_code, error.headers)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    """A bug: the client learns where to look, not what the exception says."""
    log_id = new_log_id()
    logger.error("%s %s failed (log id %s)", request.method, request.url.path, log_id, exc_info=error)
    body = ErrorBody(error=WireError(code="internal", message="the service failed"), log_id=log_id)
    return json_answer(body, 500)
