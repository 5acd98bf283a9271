"""What ships with Raylign (models, prompts, fonts, configurations), and how a configured path finds it.

A path that starts with `asset:` lies in this folder, wherever Raylign is installed; any other path is the
user's, relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path

from raylign.errors import ConfigError

PREFIX = "asset:"
_HERE = Path(__file__).parent
# `configs/` lies at the root of a checkout and inside the package in an installed wheel.
_CONFIG_FOLDERS = (_HERE.parent / "configs", _HERE.parent.parent / "configs")


def resolve(path: str) -> Path:
    """The file or folder a configured path means. Raises ConfigError when a shipped one does not exist."""
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
    found = _HERE / path.removeprefix(PREFIX)
    if not found.exists():
        shipped = ", ".join(sorted(f"{PREFIX}{p.name}" for p in _HERE.iterdir() if p.is_dir() and p.name[0] != "_"))
        raise ConfigError(f"Raylign ships no {path!r}; shipped: {shipped}")
    return found


def find_config(name: str) -> Path:
    """A configuration by path, or by the name of a shipped one (`quickstart_image`, with or without .toml).

    Presets, which are laid over another configuration, lie in `configs/presets`.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    folders = [folder / inner for folder in _CONFIG_FOLDERS for inner in ("", "presets")]
    for folder in folders:
        shipped = folder / Path(name).name
        for candidate in (shipped, shipped.with_suffix(".toml")):
            if candidate.is_file():
                return candidate
    known = sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.toml")})
    raise ConfigError(f"no configuration at {name!r}, and none of that name is shipped (shipped: {', '.join(known)})")
