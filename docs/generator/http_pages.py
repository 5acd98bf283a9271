"""The reference page of the HTTP interfaces, read from the applications' own OpenAPI documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.generator.text import cell, code, paragraph, table
from raylign.types import RewardSample, RewardScore
from rewards import JpegConfig
from rewards.base import RewardAsk
from rewards.wire import RewardInfo
from services.reward_config import ServiceConfig
from services.reward_http import build_api
from services.run_api import build_run_api
from services.run_drivers import Drivers

Json = Mapping[str, Any]
_INTRODUCTION = """Two applications speak HTTP. Both refuse unknown keys, both publish their document at
`/openapi.json`, and both ask for `Authorization: Bearer TOKEN` everywhere but on loopback
([security](../security.md)). What requests mean, with examples: [reward
service](../reward_service.md), [control of live runs](../scaling.md#over-http)."""


class Unasked:
    """A reward backend for an application that is only described."""

    async def score(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        raise NotImplementedError

    async def score_group(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        raise NotImplementedError

    async def describe(self) -> list[RewardInfo]:
        raise NotImplementedError

    async def ready(self) -> Mapping[str, str]:
        raise NotImplementedError


def named(schema: Json) -> str | None:
    """The name of the schema that a reference leads to."""
    return str(schema["$ref"]).rpartition("/")[2] if "$ref" in schema else None


def type_text(schema: Json) -> str:
    """A JSON schema in words, with links to those that have names."""
    name = named(schema)
    if name is not None:
        return f"[{name}](#{name.lower()})"
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(type_text(one) for one in choices)
    if "enum" in schema or "const" in schema:
        return ", ".join(code(f'"{one}"') for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {type_text(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_text(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def schema_section(name: str, schema: Json) -> list[str]:
    """One named schema: its keys."""
    lines = ["", f"#### {name}", "", paragraph(str(schema.get("description", "")))]
    needed = set(schema.get("required", ()))
    rows = [
        (
            code(key),
            type_text(value),
            "**needed**" if key in needed else code(f"{value['default']}") if value.get("default") is not None else "–",
            paragraph(str(value.get("description", ""))),
        )
        for key, value in schema.get("properties", {}).items()
    ]
    if rows:
        lines += ["", *table(("key", "is", "default", ""), [tuple(map(cell, row)) for row in rows])]
    else:
        lines += ["", type_text({key: value for key, value in schema.items() if key != "description"})]
    return lines


def _answers(operation: Json, document: Json) -> Iterator[tuple[str, str, str]]:
    for status, answer in operation["responses"].items():
        content = answer.get("content", {})
        body = next((type_text(one.get("schema", {})) for one in content.values()), "")
        yield status, body, paragraph(str(answer.get("description", "")))


def operation_section(method: str, path: str, operation: Json, document: Json) -> list[str]:
    """One request: what it takes and what it answers."""
    lines = ["", f"### {method.upper()} {path}", "", paragraph(str(operation.get("description", "")))]
    asked = [
        (code(one["name"]), f"{type_text(one['schema'])}, in the {one['in']}", paragraph(one.get("description", "")))
        for one in operation.get("parameters", ())
    ]
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        asked.append(("body", f"{kind}: {type_text(body['schema'])}", ""))
    if asked:
        lines += ["", *table(("takes", "", ""), [tuple(map(cell, row)) for row in asked])]
    rows = [tuple(map(cell, row)) for row in _answers(operation, document)]
    return [*lines, "", *table(("answers", "body", ""), rows)]


def application(title: str, command: str, document: Json) -> list[str]:
    """One application: its requests, then its schemas."""
    lines = ["", f"## {title}", "", command]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += operation_section(method, path, operation, document)
    for name, schema in document["components"]["schemas"].items():
        lines += schema_section(name, schema)
    return lines


def http_page() -> str:
    """The whole page."""
    rewards = build_api(Unasked(), [JpegConfig()], ServiceConfig(), digest="0" * 64).openapi()
    runs = build_run_api(Path(), token=None, drivers=Drivers(Path(), None)).openapi()
    lines = ["# HTTP interfaces", "", _INTRODUCTION]
    lines += application("Reward service", "`raylign serve-rewards`, by default at 127.0.0.1:8000.", rewards)
    lines += application("Runs", "`raylign serve-runs`, by default at 127.0.0.1:8270.", runs)
    return "\n".join(line.rstrip() for line in lines) + "\n"
