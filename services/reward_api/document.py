"""The OpenAPI document: what the framework cannot see, because bodies are read by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from rewards.wire import REQUEST_PART, ErrorBody

_REF = "#/components/schemas/{model}"
_MEANING = {
    400: "The body cannot be read: no JSON, too deep, or multipart parts that are missing, unused or repeated.",
    401: "The bearer token is missing or wrong.",
    408: "The body took too long to arrive.",
    409: "The request id was used for a different request.",
    413: "The body, or all pictures together, are too large.",
    415: "Neither application/json nor multipart/form-data, or compressed.",
    422: "The schema is broken, or a reward, version or parameter is asked for that there is not.",
    429: "Every reward's queue is full, or this address asks too often. Retry-After says when to come back.",
    500: "A bug. The log entry `log_id` tells more.",
    503: "The service is full, or a reward cannot be reached. Retry-After says when to come back.",
    504: "The deadline passed before any reward answered.",
}
SCORE_STATUSES = (400, 401, 408, 409, 413, 415, 422, 429, 500, 503, 504)
READ_STATUSES = (401, 429, 500, 503)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route."""
    return {status: {"model": ErrorBody, "description": _MEANING[status]} for status in statuses}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads this model, as JSON or as multipart."""
    reference = {"$ref": _REF.format(model=model.__name__)}
    multipart = {
        "type": "object",
        "properties": {REQUEST_PART: reference},
        "required": [REQUEST_PART],
        "additionalProperties": {
            "type": "string",
            "format": "binary",
            "description": "A picture, in a part of the name that its sample gives.",
        },
    }
    content = {
        "application/json": {"schema": reference},
        "multipart/form-data": {
            "schema": multipart,
            "encoding": {REQUEST_PART: {"contentType": "application/json"}},
        },
    }
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI, models: tuple[type[BaseModel], ...], description: str, with_token: bool) -> None:
    """Have the application publish the schemas of these request models, and the token if it asks for one."""
    written: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not written:
            written.update(
                get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
            )
            components = written["components"]
            for model in models:
                schema = model.model_json_schema(ref_template=_REF)
                components["schemas"].update(schema.pop("$defs", {}))
                components["schemas"][model.__name__] = schema
            if with_token:
                components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                written["security"] = [{"token": []}]
                for path in ("/v1/healthz", "/v1/readyz"):
                    written["paths"][path]["get"]["security"] = []
        return written

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
