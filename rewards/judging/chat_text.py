"""What judges' engines share about texts: labels and their spellings, thinking apart from content."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.judging.engine import TokenAlternatives

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def canonical(text: str) -> str:
    """What all spellings of a label have in common: no space around it, no case."""
    return text.strip().casefold()


def spellings(label: str) -> tuple[str, ...]:
    """The spellings whose tokens count for a label: as given, lower, upper and title case, each after a space too."""
    cased = dict.fromkeys((label, label.lower(), label.upper(), label.title()))
    return (*cased, *(f" {text}" for text in cased))


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless there are labels, none is blank, and they differ in more than case and space."""
    distinct = {canonical(label) for label in labels}
    if not labels or "" in distinct or len(distinct) != len(labels):
        raise ValueError(f"labels must be texts that differ in more than case and space, got {labels!r}")


def sum_labels(logprob_by_token: Mapping[str, float], labels: Sequence[str]) -> dict[str, float]:
    """The log of each label's summed probability over its spellings; a label that no token spells is left out."""
    found: dict[str, list[float]] = {}
    for token, logprob in logprob_by_token.items():
        found.setdefault(canonical(token), []).append(logprob)
    return {label: log_sum(found[canonical(label)]) for label in labels if canonical(label) in found}


def log_sum(logprobs: Iterable[float]) -> float:
    """log of the sum of probabilities, at most 0 whatever the rounding."""
    values = list(logprobs)
    highest = max(values)
    return min(0.0, highest + math.log(sum(math.exp(value - highest) for value in values)))


def shown_name(model: str) -> str:
    """A model's name as it may be shown to anybody: of a folder, its last part."""
    return model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".")) else model


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, content) of an answer that a server did not take apart itself.

    Some chat templates open the thinking in the prompt, so the opening tag may be missing; without the closing tag
    an opened thinking was cut off and there is no content.
    """
    thinking, closed, content = text.partition(THINK_CLOSE)
    if closed:
        return thinking.strip().removeprefix(THINK_OPEN).strip(), content.strip()
    if text.lstrip().startswith(THINK_OPEN):
        return text.strip().removeprefix(THINK_OPEN).strip(), ""
    return "", text


def content_tokens(tokens: Sequence[TokenAlternatives], content: str) -> tuple[TokenAlternatives, ...]:
    """The tokens that spell the content: servers also list those of the thinking before and of the stop after.

    All of them when the content cannot be found in their texts, as with characters that are cut into bytes.
    """
    if not content:
        return ()
    start = "".join(token.token for token in tokens).rfind(content)
    if start < 0:
        return tuple(tokens)
    end = start + len(content)
    kept: list[TokenAlternatives] = []
    place = 0
    for token in tokens:
        if place < end and place + len(token.token) > start:
            kept.append(token)
        place += len(token.token)
    return tuple(kept)
