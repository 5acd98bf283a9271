"""The fenced blocks of the repository's Markdown, as tests read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "raylign").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]*)"')
NEEDS = "needs "
"""A block whose title begins so says what it needs that a test has not: a GPU, a cluster, published weights."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    section: str
    kind: str
    """The language after the fence."""
    title: str
    text: str

    @property
    def needs(self) -> str:
        """What a test lacks to run it; "" if it is run."""
        return self.title.removeprefix(NEEDS) if self.title.startswith(NEEDS) else ""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Every fenced block of a page."""
    text, page = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found: list[Block] = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", before, flags=re.DOTALL | re.MULTILINE), re.M)
        info = fence[2].strip()
        title = _TITLE.search(info)
        indent = len(fence[1])
        body = "\n".join(line[indent:] for line in fence[3].split("\n"))
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                headings[-1] if headings else "",
                info.split(" ")[0],
                title[1] if title else "",
                body,
            )
        )
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
