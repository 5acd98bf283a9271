"""The model files behind a run's rewards: which there are, where they lie, what they weigh. Nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards import AnyRewardConfig
from rewards.geneval import GenevalConfig
from rewards.judging.decision_engine import DecisionEngineConfig
from rewards.vision.checkpoints import weight_files
from rewards.vision.learned import LearnedConfig

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HUB_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[\w.+-]+\.\w+)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A checkpoint that a reward reads. key: of the configuration. found: where it lies; None if it is not here."""

    key: str
    path: str
    found: Path | None


@dataclass(frozen=True, slots=True)
class RewardWeights:
    """What a reward loads. num_bytes: of its weights in memory, None if a file is not here."""

    files: tuple[ModelFile, ...]
    num_bytes: int | None
    on_gpu: bool

    @property
    def needs_files(self) -> bool:
        """Whether there is a model to load."""
        return bool(self.files)


def reward_weights(rewards: Sequence[AnyRewardConfig]) -> dict[str, RewardWeights]:
    """By the name of each reward."""
    return {reward.name: _weights(f"rewards.{place}", reward) for place, reward in enumerate(rewards)}


def _weights(where: str, reward: AnyRewardConfig) -> RewardWeights:
    named = _named(where, reward)
    files = tuple(ModelFile(key, path, _find(path)) for key, path in named.items())
    device = str(getattr(reward, "device", getattr(getattr(reward, "engine", None), "device", "cpu")))
    if isinstance(reward, GenevalConfig):
        device = str(getattr(reward.detector, "device", getattr(reward.colour, "device", "cpu")))
    if any(file.found is None for file in files):
        return RewardWeights(files, None, device.startswith("cuda"))
    total = sum(_bytes_of(file.found) for file in files if file.found is not None)
    stored, wanted = 4, _DTYPE_BYTES.get(str(getattr(reward, "dtype", "float32")), 4)
    return RewardWeights(files, total * wanted // stored, device.startswith("cuda"))


def _named(where: str, reward: AnyRewardConfig) -> dict[str, str]:
    """Every key of a reward that names model files."""
    found: dict[str, str] = {}
    if isinstance(reward, LearnedConfig):
        for name in type(reward).model_fields:
            value: Any = getattr(reward, name)
            if (name == "path" or name.endswith("_path")) and isinstance(value, str) and value:
                found[f"{where}.{name}"] = value
    if isinstance(reward, GenevalConfig):
        for name, part in {"detector": reward.detector, "colour": reward.colour}.items():
            path = getattr(part, "path", None)
            if isinstance(path, str):
                found[f"{where}.{name}.path"] = path
    engine = getattr(reward, "engine", None)
    if isinstance(engine, DecisionEngineConfig):
        found[f"{where}.engine.model"] = engine.model
    return found


def _find(path: str) -> Path | None:
    """A file or folder on this machine, or in the model hub's cache."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    from huggingface_hub import try_to_load_from_cache

    repository, name = path, "config.json"
    if file := _HUB_FILE.fullmatch(path):
        repository, name = file["repository"], file["file"]
    elif not _HUB_NAME.fullmatch(path):
        return None
    cached = try_to_load_from_cache(repository, name)
    if not isinstance(cached, str):
        return None
    return Path(cached) if name != "config.json" else Path(cached).parent


def _bytes_of(path: Path) -> int:
    files = weight_files(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))


def missing_files(weights: Mapping[str, RewardWeights]) -> dict[str, list[ModelFile]]:
    """By reward, what it would have to fetch."""
    missing = {name: [file for file in one.files if file.found is None] for name, one in weights.items()}
    return {name: files for name, files in missing.items() if files}
