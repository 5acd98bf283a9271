"""What MkDocs does beside turning pages into HTML: links out of `docs/` work, and no page is forgotten.

Pages link to files of the repository, `../configs/quickstart_image.toml`. GitHub shows those; a site holds `docs/`
only. So each such file is copied into the site under `source/`, and the link leads there. A page that mkdocs.yml does
not name yet is listed under "Further pages".
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
COPIES = "source"
UNLISTED = "Further pages"


def named(nav: Any) -> Iterator[str]:
    """The pages that a navigation tree names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for below in nav.values():
            yield from named(below)
    else:
        for below in nav or ():
            yield from named(below)


def outside(page: str, link: str, root: Path) -> str | None:
    """The path in the repository that a page's link leads to, if that is no file of `docs/`."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if target.startswith(("docs/", "..")) or not (root / target).exists():
        return None  # MkDocs itself knows, or complains
    return target


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages without a place in the navigation at its end."""
    docs, listed = Path(config.docs_dir), set(named(config.nav))
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    left = [page for page in pages if page not in listed]
    if left and config.nav is not None:
        config.nav.append({UNLISTED: left})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to."""
    docs = Path(config.docs_dir)
    linked = {
        target
        for page in docs.rglob("*.md")
        for link in _LINK.findall(page.read_text(encoding="utf-8"))
        if (target := outside(page.relative_to(docs).as_posix(), link, docs.parent))
    }
    for target in sorted(linked):
        path = docs.parent / target
        if path.is_file():
            # As plain text: a browser then shows it, whatever the file's ending.
            files.append(File.generated(config, f"{COPIES}/{target}.txt", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of `docs/` to the copies; a folder's or a Markdown page's stays text, as nothing can show it."""
    root, source = Path(config.docs_dir).parent, str(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        target = outside(source, found[1], root)
        if target is None:
            return found[0]
        if not (root / target).is_file():
            return posixpath.relpath("index.md", posixpath.dirname(source) or ".")
        return posixpath.relpath(f"{COPIES}/{target}.txt", posixpath.dirname(source) or ".")

    return _LINK.sub(lead, markdown)
