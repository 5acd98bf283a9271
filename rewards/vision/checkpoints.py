"""Where a learned scorer's files are, and what they hash to. No model library is needed to ask.

A checkpoint is a file, a directory in the layout of transformers, or the name of such a directory on the model hub
(then its files come from the local cache, or are downloaded unless HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylign.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[\w.+-]+)")
_SMALL_FILES = ["*.json", "*.txt"]
_CHUNK_BYTES = 1 << 24


def find_directory(path: str, remedy: str, weights: bool = True) -> Path:
    """The directory of a checkpoint; a name on the hub is fetched, its weights only if asked for.

    Raises ModelError with the path and the remedy.
    """
    directory = Path(path).expanduser()
    if not directory.exists() and _HUB_NAME.fullmatch(path):
        directory = _fetch(path, remedy, weights)
    if not directory.is_dir():
        raise ModelError(f"there is no model directory {path!r}; {remedy}")
    if weights and not weight_files(directory):
        raise ModelError(
            f"{str(directory)!r} has neither model.safetensors nor pytorch_model.bin; save the model there "
            "with transformers' save_pretrained, or give the directory that has them"
        )
    return directory


def find_file(path: str, remedy: str) -> Path:
    """The file of a checkpoint; owner/repository/file is fetched from the hub if there is no such file here.

    Raises ModelError with the path and the remedy.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if not (found := _HUB_FILE.fullmatch(path)):
        raise ModelError(f"there is no model file {path!r}; {remedy}")
    from huggingface_hub import hf_hub_download

    return Path(_asked_of_hub(functools.partial(hf_hub_download, found["repository"], found["file"]), path, remedy))


def weight_files(directory: Path) -> list[Path]:
    """The weights in a directory of transformers' layout, safetensors before the older format; empty without any."""
    return sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))


def described_by(directory: Path) -> list[Path]:
    """The weights and every small file that says how to use them: architecture, tokens, preprocessing."""
    return [*weight_files(directory), *small_files(directory)]


def small_files(directory: Path) -> list[Path]:
    """Every file that says how to use the weights."""
    return sorted(file for pattern in _SMALL_FILES for file in directory.glob(pattern))


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in the order given."""
    whole = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                content.update(chunk)
        whole.update(f"{file.name}|{content.hexdigest()}\n".encode())
    return whole.hexdigest()


def check_device(device: str) -> None:
    """Raise ModelError if PyTorch cannot use a device here."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f'device {device!r} is not here: PyTorch sees {torch.cuda.device_count()} CUDA devices; set device = "cpu"'
        )


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, safetensors or PyTorch's; of the latter tensors only, code is never run.

    Raises ModelError for a file that holds anything else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        content: Any = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # PyTorch and safetensors raise a dozen kinds for a file they cannot read
        raise ModelError(f"{str(file)!r} is no file of tensors ({type(error).__name__}); download it again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ModelError(f"{str(file)!r} holds no named tensors; give the file of weights alone")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def check_fit(file: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless `state` has exactly the names and shapes of `wanted`."""
    check_complete(file, wanted.keys() - state.keys(), state.keys() - wanted.keys())
    wrong = [
        f"{name} {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
        for name, tensor in sorted(state.items())
        if tensor.shape != wanted[name].shape
    ]
    if wrong:
        raise ModelError(f"{str(file)!r} is of another architecture: {_some(wrong)}")


def check_complete(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError, naming them, if a checkpoint lacks tensors or has some that nothing uses."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ModelError(
            f"{str(path)!r} is no checkpoint of this architecture: {len(missing)} tensors missing"
            f"{_some(missing, ': ')}; {len(unexpected)} unknown{_some(unexpected, ': ')}"
        )


def join_hashes(*hashes: str) -> str:
    """One sha256 for several, in order."""
    return hashlib.sha256("|".join(hashes).encode()).hexdigest()


def library_versions(*names: str) -> str:
    """What a version string says of the libraries that a score passes through, as in torch-2.13.0/pillow-13.0.0."""
    return "/".join(f"{name}-{metadata.version(name)}" for name in names)


def _fetch(name: str, remedy: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    # safetensors if there are any: a repository often holds the same weights in every format there is.
    for patterns in [["model*.safetensors"], ["pytorch_model*.bin"]] if weights else [[]]:
        wanted = [*_SMALL_FILES, *patterns]
        directory = Path(
            _asked_of_hub(lambda files=wanted: snapshot_download(name, allow_patterns=files), name, remedy)
        )
        if not weights or weight_files(directory):
            return directory
    raise ModelError(f"{name!r} on the model hub has neither model.safetensors nor pytorch_model.bin; {remedy}")


def _asked_of_hub(ask: Callable[[], str], what: str, remedy: str) -> str:
    try:
        return ask()
    except Exception as error:  # the hub's client raises its own errors, httpx2's, OSError and ValueError
        raise ModelError(
            f"{what!r} is not here, and the model hub did not give it ({type(error).__name__}); {remedy}"
        ) from error


def _some(names: list[str], before: str = "") -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return before + ", ".join(names[:8]) + more if names else ""
