"""Versioned data that ships with the package: one TOML file per entry, named after the entry it holds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from raylign.config import Config, load_config
from raylign.errors import ConfigError


class Entry(Config):
    """What every entry says of itself."""

    name: str = Field(default="inline", pattern=r"^[a-z0-9_]{1,64}$")
    """Its file's name."""
    version: int = Field(default=1, ge=1)
    """Counts changes that may change a score."""
    source: str = ""
    """Who wrote it, or where it comes from."""


EntryT = TypeVar("EntryT", bound=Entry)


def read_folder(folder: str, cls: type[EntryT]) -> Mapping[str, EntryT]:
    """Every entry of a folder of this package, by name."""
    paths = [Path(str(file)) for file in resources.files("rewards.judging").joinpath(folder).iterdir()]
    entries = [read_entry(path, cls) for path in sorted(paths) if path.suffix == ".toml"]
    return {entry.name: entry for entry in entries}


def read_entry(path: Path, cls: type[EntryT]) -> EntryT:
    """One file. Raises ConfigError."""
    entry = load_config(cls, path)
    if entry.name != path.stem:
        raise ConfigError(f"{path} holds {entry.name!r}; name the file after what it holds")
    return entry


def find(name: str, entries: Mapping[str, EntryT], kind: str) -> EntryT:
    """The entry of that name. Raises ConfigError with the nearest one."""
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(entries)}"
        raise ConfigError(f"no {kind} {name!r}; {hint}")
    return entries[name]
