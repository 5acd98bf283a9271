"""What the documentation says of the code, compared with the code: generated pages, messages, metrics, links."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.documents import PAGES, ROOT

PRODUCT = ("raylign", "learner", "rollout", "rewards", "services")
_ANY = "\x00"
"""Stands for a value in a message."""
METRICS_PAGE = ROOT / "docs" / "reference" / "metrics.md"
SCREEN = 50
"""Lines."""


def sources() -> Iterator[ast.Module]:
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ast.parse(path.read_text(encoding="utf-8"))


def literal(node: ast.expr) -> str:
    """A string with `_ANY` for what is computed; "" for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else _ANY
            for part in node.values
        )
    return ""


@cache
def strings() -> list[str]:
    """Every string of the product, longest pieces only."""
    return [
        text for tree in sources() for node in ast.walk(tree) if isinstance(node, ast.expr) and (text := literal(node))
    ]


@cache
def told_messages() -> list[str]:
    """The messages that the page of error messages quotes."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def is_in_sources(message: str) -> bool:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    return any(re.search(pattern, text, flags=re.DOTALL) for text in strings())


def test_messages_are_told() -> None:
    assert len(told_messages()) >= 40


@pytest.mark.parametrize("message", told_messages())
def test_a_message_is_still_in_the_sources(message: str) -> None:
    assert is_in_sources(message)


def test_a_message_that_nobody_raises_is_found() -> None:
    assert not is_in_sources("the rollout actors are on strike")


def documented(page: Path = METRICS_PAGE) -> re.Pattern[str]:
    """What matches every name in the first column of the page of metrics; `<…>` is any name."""
    names: set[str] = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            names.update(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
    patterns = ["[^/ ]+".join(map(re.escape, re.split(r"<\w+>", name))) for name in sorted(names)]
    return re.compile("|".join(patterns))


def written_metrics() -> set[str]:
    """Names of metrics that are spelt out in what makes them."""
    places = [*(ROOT / "learner").rglob("*.py")]
    services = (
        "step_metrics",
        "pull_metrics",
        "staleness",
        "controller",
        "autoscaler",
        "observer",
        "guard",
        "guard_run",
    )
    places += [ROOT / "services" / f"{name}.py" for name in services]
    names: set[str] = set()
    for path in places:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.update(re.findall(r"^[a-z_]+/[a-z_]+$", node.value))
    return names


def test_every_metric_that_the_sources_spell_out_is_on_the_page() -> None:
    written = written_metrics()
    assert len(written) > 40
    assert {name for name in written if not documented().fullmatch(name)} == set()


def test_the_page_has_no_metric_that_the_sources_cannot_write() -> None:
    """A name is a string of the sources, or what an f-string such as `failed/{status}` can make."""
    made = {text for text in strings() if re.fullmatch(rf"[a-z_0-9{_ANY}]+/[a-z_0-9{_ANY}]+", text)}
    patterns = [re.escape(text).replace(re.escape(_ANY), "[a-z_0-9]+") for text in made if re.search("[a-z]", text)]
    can = re.compile("|".join(patterns))
    page = METRICS_PAGE.read_text(encoding="utf-8")
    first = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    names = {name for cell in first for name in re.findall(r"`([a-z_]+/[a-z_0-9]+)`", cell)}
    assert len(names) > 60
    assert {name for name in names if not can.fullmatch(name)} == set()


def test_generated_pages_are_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.generator", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}\nrun `python -m docs.generator`, and commit what it writes"
    )


@pytest.mark.slow
def test_the_site_builds_with_every_link_and_anchor(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "search" in index
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', index)
    assert loaded == [], "the site loads nothing from elsewhere"
    start = (tmp_path / "site" / "start_image.html").read_text(encoding="utf-8")
    copy = "source/configs/quickstart_image.toml.txt"
    assert f'href="{copy}"' in start, "a link out of docs/ leads to a copy of the file"
    assert (tmp_path / "site" / copy).read_bytes() == (ROOT / "configs" / "quickstart_image.toml").read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, place in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if place:
            assert place in anchors(path), f"{target}#{place}"


def anchors(page: Path) -> set[str]:
    """The places that a page's headings make, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_fits_three_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 3 * SCREEN
