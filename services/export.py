"""`raylign export`: a run's newest checkpoint as files that the model's own library loads by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from learner.checkpoint import latest_checkpoint, load_checkpoint
from learner.state import policy_tensors
from raylign.errors import CheckpointError, ConfigError
from raylign.models import export_policy
from services.config import RunConfig, read_resolved_config
from services.run_dir import RunDir


def export_run(path: Path, directory: Path, adapter_only: bool) -> None:
    """Write the trained model to an empty directory. Raises RaylignError for a run or a directory that won't do."""
    folder = RunDir(path)
    folder.check()
    config = read_resolved_config(folder.config)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty folder; choose another")
    if adapter_only and config.model.tuning != "lora":
        raise ConfigError("--adapter-only needs model.tuning = 'lora'; this run trained every weight")
    export_policy(config.model, trained_tensors(path), directory, adapter_only)
    _say_how_to_load(config, directory, adapter_only)


def trained_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The trained policy's tensors in a run's newest checkpoint, by trainable name."""
    checkpoint = latest_checkpoint(RunDir(path).checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{path} has no checkpoint; let the run write one (`raylign resume {path}`)")
    return policy_tensors(load_checkpoint(checkpoint).state)


def _say_how_to_load(config: RunConfig, directory: Path, adapter_only: bool) -> None:
    console = Console(highlight=False)
    console.print(f"Exported to {directory}")
    if config.modality == "text":
        console.print(f'  in a configuration: model = {{ type = "{config.model.type}", path = "{directory}" }}')
        return
    if not adapter_only:
        console.print(f'  pipe = StableDiffusion3Pipeline.from_pretrained("{directory}")')
    if config.model.tuning == "lora":
        adapter = directory if adapter_only else directory / "adapter"
        console.print(f'  or, on the base model: pipe.load_lora_weights("{adapter}")')
