"""Where the answer stands in a completion: the last `<answer>` block, the last `\\boxed{}`, the last code fence.

All of them take time linear in the text, whatever the text is; the regular expressions that peers use do not.
"""

from __future__ import annotations

import re
from typing import Literal

AnswerIn = Literal["tag", "text"]
"""Where the answer stands: in the last `<answer>` block, or the whole text is the answer."""
OPEN, CLOSE = "<answer>", "</answer>"
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
"""A box's opening, a line break, an escaped brace, a brace."""
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+([A-Za-z0-9_+-]*+)[ \t]*+$", re.MULTILINE)
"""Possessive: giving spaces back finds no other match, but takes quadratic time to find none."""


def find_answer(text: str, where: AnswerIn) -> str | None:
    """The answer, stripped; None without a closed block, or for an empty text."""
    return last_answer(text) if where == "tag" else text.strip() or None


def last_answer(text: str) -> str | None:
    """The last match of `<answer>(.*?)</answer>` (d1's rule), stripped; None without a closed block.

    A block that is opened twice begins at the first opening, as the pattern has it.
    """
    found = None
    start = text.find(OPEN)
    while start >= 0:
        end = text.find(CLOSE, start + len(OPEN))
        if end < 0:
            break
        found = text[start + len(OPEN) : end].strip()
        start = text.find(OPEN, end + len(CLOSE))
    return found


def after_last_tag(text: str) -> str:
    """What follows the last `<answer>` up to a `</answer>`, stripped (d1's rule for GSM8K); all of it without tags."""
    return text.rpartition(OPEN)[2].partition(CLOSE)[0].strip()


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` or `\\fbox{...}` with matching braces, stripped; None without one.

    A box inside another is part of its content; one that is never closed hides none of those after it.
    """
    found = None
    starts: list[int | None] = []
    for piece in _BRACES.finditer(text):
        match piece.group()[-1], len(piece.group()):
            case "{", 1:
                starts.append(None)
            case "}", 1:
                start = starts.pop() if starts else None
                found = found if start is None else (start, piece.start())
            case "{", length if length > 2:
                starts.append(piece.end())
            case _:
                pass  # An escaped brace is a character.
    return None if found is None else text[slice(*found)].strip()


def last_code(text: str) -> str | None:
    """The last closed fence marked as Python, else the last closed unmarked one; None without either."""
    marked = plain = None
    language, start = None, 0
    for fence in _FENCE.finditer(text):
        if language is None:
            language, start = fence.group(1).lower(), fence.end() + 1
        elif not fence.group(1):
            code, language_was, language = text[start : fence.start()], language, None
            if language_was in ("python", "py", "python3"):
                marked = code
            elif not language_was:
                plain = code
    return marked if marked is not None else plain
