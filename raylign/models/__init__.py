"""Model families. To add one: a file with its config and loader, and a row here."""

from __future__ import annotations

from raylign.models.base import DenoisingPolicy, Role
from raylign.models.sd3 import Sd3Config, load_sd3
from raylign.precision import Precision

# One family so far, so no union yet: a second row turns this into a discriminated union on `type`.
ModelConfig = Sd3Config
MODEL_FAMILIES = {
    Sd3Config: load_sd3,
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


__all__ = ["MODEL_FAMILIES", "DenoisingPolicy", "ModelConfig", "load_policy"]
