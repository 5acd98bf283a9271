"""What a run reads besides its configuration: prompts and the model's folder, checked, and identified by hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raylign.assets import PREFIX, resolve
from raylign.models import check_model
from raylign.types import Prompt
from rewards import make_mix
from rollout.prompts import GroupTask, load_prompts, refuse_overlap
from services.config import RunConfig
from services.tracking import check_tracking


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Prompts to train on, and held-out prompts as evaluation tasks."""

    prompts: list[Prompt]
    heldout: list[GroupTask]
    sha256s: Mapping[str, str]
    """By the key that names it: identity of what was read, for exact resumption."""


def read_inputs(config: RunConfig) -> RunInputs:
    """Check trackers and the model directory, read the prompts, and let every required reward check each, before
    anything starts."""
    check_tracking(config.tracking)
    prompts, heldout = checked_prompts(config)
    tasks = [GroupTask(prompt, -1, place) for place, prompt in enumerate(heldout)]
    return RunInputs(prompts, tasks, _sha256s(config))


def checked_prompts(config: RunConfig, model_is_here: bool = True) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and to hold out. A model that is elsewhere is not looked at.

    Raises ConfigError, PromptError or ModelError.
    """
    prompts = load_prompts(resolve(config.prompts.train), config.prompts.fields)
    heldout: list[Prompt] = []
    if config.prompts.heldout is not None:
        heldout = load_prompts(resolve(config.prompts.heldout), config.prompts.fields)
        refuse_overlap(prompts, heldout)
        heldout = heldout[: config.eval.num_prompts]
    if model_is_here:
        check_model(config.model, [prompt.text for prompt in (*prompts, *heldout)])
    rewards = make_mix(config.rewards)
    for prompt in (*prompts, *heldout):
        rewards.check(prompt)
    return prompts, heldout


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The user's paths mean the same in workers and on resumption, whatever their working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or path.startswith(PREFIX) else str(Path(path).expanduser().resolve())

    prompts = {"train": absolute(config.prompts.train), "heldout": absolute(config.prompts.heldout)}
    lora = config.model.lora.model_copy(update={"start": absolute(config.model.lora.start)})
    model = {"path": absolute(config.model.path), "lora": lora}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "prompts": config.prompts.model_copy(update=prompts),
        }
    )


def _sha256s(config: RunConfig) -> dict[str, str]:
    """Identity of the prompt files (contents) and of the model directory (names and sizes: contents are many GB)."""
    files = {"prompts.train": config.prompts.train, "prompts.heldout": config.prompts.heldout}
    hashes = {key: _contents_sha256(resolve(name)) for key, name in files.items() if name is not None}
    model, digest = resolve(config.model.path), hashlib.sha256()
    for path in _files(model):
        digest.update(f"{path.relative_to(model)} {path.stat().st_size}\n".encode())
    return {**hashes, "model.path": digest.hexdigest()}


def _contents_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The files of a folder in a fixed order, or the file itself."""
    return [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
