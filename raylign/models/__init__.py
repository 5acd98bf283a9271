"""Model families. To add one: a file with its config, loader and check, one with its exporter, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylign.models.base import DenoisingPolicy, Role
from raylign.models.sd3 import Sd3Config, check_sd3, load_sd3
from raylign.models.sd3_export import export_sd3
from raylign.precision import Precision


@dataclass(frozen=True, slots=True)
class Family:
    """What one model family brings."""

    load: Callable[[Any, Role, str, Precision, bool, int], DenoisingPolicy]
    check: Callable[[Any], None]
    export: Callable[[Any, Mapping[str, torch.Tensor], Path, bool], None]


# One family so far, so no union yet: a second row turns this into a discriminated union on `type`.
ModelConfig = Sd3Config
MODEL_FAMILIES = {
    Sd3Config: Family(load_sd3, check_sd3, export_sd3),
}


def load_policy(
    config: ModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> DenoisingPolicy:
    """Load the model a configuration names; see the family's loader for the arguments and errors."""
    return MODEL_FAMILIES[type(config)].load(config, role, device, precision, fold, seed)


def check_model(config: ModelConfig) -> None:
    """Raise ModelError or ConfigError for a model directory that cannot be loaded; reads small files only."""
    MODEL_FAMILIES[type(config)].check(config)


def export_policy(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], directory: Path, adapter_only: bool
) -> None:
    """Write trained tensors as files that the family's own library loads; see the family's exporter."""
    MODEL_FAMILIES[type(config)].export(config, tensors, directory, adapter_only)


__all__ = ["MODEL_FAMILIES", "DenoisingPolicy", "Family", "ModelConfig", "check_model", "export_policy", "load_policy"]
