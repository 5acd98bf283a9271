"""The JSON object that ends a judge's answer. Nothing is guessed: an answer is found in one place or not at all."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, cast

MAX_TRIES = 32
"""Opening braces looked at, from the last backwards; bounds the work on hostile text."""


def final_object(content: str, key: str) -> dict[str, Any] | None:
    """The content as a JSON object, or else the last object in it that holds `key`; None if there is none.

    An object inside other text counts only when no brace is left open before it and none follows, so neither
    a quotation inside a broken explanation nor a draft before the answer is taken for the answer. A code fence
    is other text. Repeated keys, NaN and infinities are no JSON here.
    """
    whole = _object(content)
    if whole is not None:
        return whole if key in whole else None
    end = content.rfind("}") + 1
    start = end
    for _ in range(MAX_TRIES):
        start = content.rfind("{", 0, start)
        if start < 0:
            return None
        found = _object(content[start:end])
        if found is not None and key in found:
            head = content[:start]
            return found if head.count("{") == head.count("}") and "{" not in content[end:] else None
    return None


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
