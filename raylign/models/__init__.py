"""Model families. To add one: a file with its config and loader, one with its exporter, and a row in each table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from raylign.models.base import DenoisingPolicy, Role
from raylign.models.sd3 import Sd3Config, load_sd3
from raylign.models.sd3_export import export_sd3
from raylign.precision import Precision

# One family so far, so no union yet: a second row turns this into a discriminated union on `type`.
ModelConfig = Sd3Config
MODEL_FAMILIES = {
    Sd3Config: load_sd3,
}
EXPORTERS = {
    Sd3Config: export_sd3,
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
    return MODEL_FAMILIES[type(config)](config, role, device, precision, fold, seed)


def export_policy(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], directory: Path, adapter_only: bool
) -> None:
    """Write trained tensors as files that the family's own library loads; see the family's exporter."""
    EXPORTERS[type(config)](config, tensors, directory, adapter_only)


__all__ = ["EXPORTERS", "MODEL_FAMILIES", "DenoisingPolicy", "ModelConfig", "export_policy", "load_policy"]
