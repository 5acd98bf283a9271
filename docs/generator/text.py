"""Pieces of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

NOTE = (
    "<!-- Written by `python -m docs.generator`, and compared with it in the tests. Edit what it reads instead. -->\n\n"
)


def code(text: str) -> str:
    """Text in a fixed width, also with backticks in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def paragraph(docstring: str) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def cell(text: str) -> str:
    """Text that is safe between the bars of a table, and shows `<name>` as it is."""
    escaped = text.replace("|", "\\|").replace("\n", " ")
    pieces = re.split(r"(`[^`]*`)", escaped)
    return "".join(piece if piece.startswith("`") else piece.replace("<", "&lt;") for piece in pieces)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
