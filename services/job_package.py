"""What a submitted run takes to the cluster: one archive with the program, its configuration and its prompts.

    raylign/ learner/ rollout/ rewards/ services/     the import packages, as this process imports them
    job/NAME.toml                                      the configuration with every override in it
    job/inputs/HASH/                                   prompt files of this machine, in a folder per content

Nothing else of the working directory travels: no environment, no runs, no hidden file, no link. The same content gives
the same bytes, so Ray stores an archive that it has already under its hash and does not take it twice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from raylign.assets import PREFIX, resolve
from raylign.errors import ConfigError
from services.config import RunConfig
from services.run_dir import config_toml

PACKAGES = ("raylign", "learner", "rollout", "rewards", "services")
MAX_BYTES = 100 * 1024**2
"""What Ray's job server takes in one request."""

_FOLDER, _INPUTS = "job", "inputs"
# A fixed time and mode: an archive of the same files is the same archive.
_EPOCH, _MODE = (1980, 1, 1, 0, 0, 0), 0o644 << 16
_MODEL_KEYS = ("path", "model")


@dataclass(frozen=True, slots=True)
class JobPackage:
    """The archive, and what a reader should know of it."""

    path: Path
    size_bytes: int
    uploaded: tuple[Path, ...]
    """Prompt files and folders that travel with it."""
    left: tuple[Path, ...]
    """Models and other files that it names: the cluster must have them under the same paths."""
    entrypoint: str
    """Shell command that runs it."""


def pack(
    config: RunConfig, name: str, run_dir: str, folder: Path, upload: bool = True, max_bytes: int = MAX_BYTES
) -> JobPackage:
    """Write the archive of a run into `folder`. `run_dir` is on the cluster; `upload` = False leaves prompts here.

    Raises ConfigError for an archive beyond what Ray takes, naming its largest parts.
    """
    text, inputs, left = _travelling_config(config, run_dir, upload)
    members = dict(_program_files())
    for place, source in inputs.items():
        members |= {f"{_FOLDER}/{_INPUTS}/{place}{inner}": file for inner, file in _files(source)}
    archive = folder / "raylign_job.zip"
    with zipfile.ZipFile(archive, "w") as target:  # stored: nearly all of it is weights, which do not shrink
        _write(target, f"{_FOLDER}/{name}.toml", text.encode())
        for member in sorted(members):
            _write(target, member, members[member].read_bytes())
        sizes = {info.filename: info.file_size for info in target.infolist()}
    size_bytes = archive.stat().st_size
    if size_bytes >= max_bytes:
        raise ConfigError(_too_large(size_bytes, max_bytes, sizes))
    entrypoint = _entrypoint(name, run_dir, bool(inputs))
    return JobPackage(archive, size_bytes, tuple(inputs.values()), tuple(left), entrypoint)


def _entrypoint(name: str, run_dir: str, has_inputs: bool) -> str:
    """Prompts go into the run directory, where resuming finds them when the job's own folder is gone."""
    run = shell_path(run_dir)
    train = f"exec python -m services.cli train {_FOLDER}/{name}.toml --run-dir {run} --address auto"
    return f"mkdir -p {run} && cp -R {_FOLDER}/{_INPUTS} {run}/ && {train}" if has_inputs else train


def shell_path(path: str) -> str:
    """A path as a word of a shell command; `~` is the home directory of whoever runs it."""
    if path == "~" or path.startswith("~/"):
        return f'"$HOME"{shlex.quote(path[1:]) if path != "~" else ""}'
    return shlex.quote(path)


def megabytes(size_bytes: float) -> str:
    """ "12.3 MB"."""
    return f"{size_bytes / 1e6:.1f} MB"


def _travelling_config(config: RunConfig, run_dir: str, upload: bool) -> tuple[str, dict[str, Path], list[Path]]:
    """The configuration as the cluster reads it, what is uploaded under which name, and what is not."""
    data = tomllib.loads(config_toml(config))
    inputs: dict[str, Path] = {}
    left: list[Path] = []
    for key in ("train", "heldout"):
        given = data["prompts"].get(key)
        if given is None or given.startswith(PREFIX):
            continue
        source = resolve(given).resolve()
        if upload:
            # The name stays as it is: prompts' ids have it, and with them every random draw.
            place = f"{_identity(source)}/{source.name}"
            inputs[place] = source
            data["prompts"][key] = f"{run_dir.rstrip('/')}/{_INPUTS}/{place}"
        else:
            left.append(source)
            data["prompts"][key] = str(source)
    for part in (data["model"], *data["rewards"]):
        left += _leave(part)
    return tomli_w.dumps(data), inputs, left


def _leave(part: dict[str, Any]) -> Iterator[Path]:
    """Make paths of this machine absolute, and yield them. A name that is no file here is the cluster's to find."""
    for key, value in part.items():
        is_path = (key in _MODEL_KEYS or key.endswith("_path")) and isinstance(value, str) and value
        if is_path and not value.startswith(PREFIX) and (path := resolve(value)).exists():
            part[key] = str(path.resolve())
            yield path.resolve()


def _identity(source: Path) -> str:
    """The beginning of a hash of a file or of a folder's files with their names."""
    digest = hashlib.sha256()
    for inner, file in _files(source):
        digest.update(f"{inner}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _files(source: Path) -> list[tuple[str, Path]]:
    """A file as itself, or a folder's files with the rest of their path after it."""
    if source.is_file():
        return [("", source)]
    return [(f"/{file.relative_to(source).as_posix()}", file) for file in sorted(source.rglob("*")) if file.is_file()]


def _program_files() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        root = Path(spec.submodule_search_locations[0])
        for file in root.rglob("*"):
            inner = file.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inner.parts)
            if file.is_file() and not file.is_symlink() and not hidden:
                yield f"{package}/{inner.as_posix()}", file


def _write(target: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = _MODE
    target.writestr(info, content)


def _too_large(size_bytes: int, max_bytes: int, sizes: dict[str, int]) -> str:
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    named = ", ".join(f"{name} ({megabytes(sizes[name])})" for name in largest)
    return (
        f"the run's files make {megabytes(size_bytes)} and Ray takes less than {megabytes(max_bytes)}; the largest are "
        f"{named}. Put prompts on a file system that the cluster shares, under the same path, and give --no-upload"
    )
