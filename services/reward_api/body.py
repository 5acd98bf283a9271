"""From the bytes on the wire to a request: size, patience, media type, multipart, JSON, schema."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from fastapi import Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from rewards.wire import MAX_IMAGES, REQUEST_PART, RequestHead
from services.reward_api.refusals import ApiError, ClientGone, invalid, malformed
from services.reward_config import ServiceConfig

THREAD_BYTES = 2**18
"""More than this is read in a thread, so that others go on meanwhile; a hop costs 0.1 ms."""
_MAX_MESSAGE = 2000
P = ParamSpec("P")
ResultT = TypeVar("ResultT")
RequestT = TypeVar("RequestT", bound=RequestHead)


@dataclass(frozen=True, slots=True)
class Body:
    """A request's JSON and the files beside it, by the name of their part."""

    head: bytes
    parts: Mapping[str, bytes]

    async def digest(self, path: str) -> bytes:
        """Equal for requests that ask the same of the same path, whatever the multipart boundary."""
        num_bytes = len(self.head) + sum(map(len, self.parts.values()))
        return await _run(num_bytes, self._digest, path)

    def _digest(self, path: str) -> bytes:
        sha256 = hashlib.sha256(path.encode())
        for name, data in (("", self.head), *sorted(self.parts.items())):
            sha256.update(f"{len(name.encode())}:{name}{len(data)}:".encode())
            sha256.update(data)
        return sha256.digest()


async def read_body(request: Request, limits: ServiceConfig) -> Body:
    """The whole body in memory. Raises ApiError 400, 408, 413 or 415, and ClientGone."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_media_type", "send the body without a Content-Encoding")
    content_type = request.headers.get("Content-Type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(415, "unsupported_media_type", f"send application/json or multipart/form-data, got {kind!r}")
    data = await _receive(request, limits)
    if kind == "application/json":
        return Body(data, {})
    max_parts = limits.max_samples * MAX_IMAGES + 1
    parts = await _run(len(data), split_multipart, data, content_type, max_parts)
    if REQUEST_PART not in parts:
        raise malformed(f"the multipart body has no part {REQUEST_PART!r} with the JSON")
    return Body(parts.pop(REQUEST_PART), parts)


async def parse(model: type[RequestT], body: Body) -> RequestT:
    """The request. Raises ApiError 400 for what is no JSON, 422 for what breaks the schema."""
    return await _run(len(body.head), _parse, model, body.head)


async def _run(num_bytes: int, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
    """The work on so many bytes: here, or in a thread when it would keep others waiting."""
    if num_bytes > THREAD_BYTES:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


def _parse(model: type[RequestT], head: bytes) -> RequestT:
    try:
        return model.model_validate_json(head)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        if problems[0]["type"] == "json_invalid":
            # Also what nests deeper than the parser's 200 levels, or has a number of thousands of digits.
            raise malformed("the body is not valid JSON, or nests too deeply") from None
        shown = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'request'}: {p['msg']}" for p in problems[:10])
        raise invalid(shown[:_MAX_MESSAGE]) from None


async def _receive(request: Request, limits: ServiceConfig) -> bytes:
    too_large = ApiError(
        413, "too_large", f"the body may have {limits.max_body_bytes} bytes; send fewer samples per request"
    )
    declared = request.headers.get("Content-Length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    data = b""
    more = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                if len(data) + len(more) + len(chunk) > limits.max_body_bytes:
                    raise too_large
                # Most bodies come in one piece, which is then not copied.
                if data or more:
                    more += chunk
                else:
                    data = chunk
                if not message.get("more_body", False):
                    return data + more if more else data
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_timeout_s:g} s"
        raise ApiError(408, "body_timeout", message, {"Connection": "close"}) from None


def split_multipart(data: bytes, content_type: str, max_parts: int) -> dict[str, bytes]:
    """The parts of a multipart/form-data body by name. Raises ApiError 400 unless it is whole and names are unique."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise malformed("the Content-Type names no multipart boundary")
    parts = _Parts(max_parts)
    try:
        # A boundary of over 256 bytes is refused here, too.
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]  # its own TypedDict
        parser.write(data)
    except FormParserError:
        raise malformed("the body is not valid multipart/form-data") from None
    if not parts.ended:
        raise malformed("the multipart body ends before its closing boundary")
    return parts.found


class _Parts:
    """Collects what the parser finds."""

    def __init__(self, max_parts: int) -> None:
        self.found: dict[str, bytes] = {}
        self.ended = False
        self._max_parts = max_parts
        self._header: list[bytes] = []
        self._value: list[bytes] = []
        self._disposition = b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.append(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.append(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._pieces.append(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) >= self._max_parts:
            raise malformed(f"the multipart body has more than {self._max_parts} parts")
        self._disposition = b""
        self._pieces = []

    def _end_header(self) -> None:
        if b"".join(self._header).lower() == b"content-disposition":
            self._disposition = b"".join(self._value)
        self._header, self._value = [], []

    def _end_part(self) -> None:
        raw = parse_options_header(self._disposition)[1].get(b"name", b"")
        name = raw.decode("utf-8", "replace")
        if not name:
            raise malformed("a part of the multipart body has no name")
        if name in self.found:
            raise malformed(f"part {name!r} occurs more than once")
        self.found[name] = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _end(self) -> None:
        self.ended = True
