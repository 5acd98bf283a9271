"""Which number format computes what, decided in one table.

Rollout weights are cast to the rollout precision. The learner keeps fp32 master weights and computes under
autocast. Latents, transitions, log-probs and losses are fp32 everywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
Format = Literal["fp8", "nvfp4", "mxfp4"]
"""Of quantised linear layers; rollouts and drafts only."""
RolloutPrecision = Literal["fp32", "bf16", "fp8", "nvfp4", "mxfp4"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base_precision(precision: RolloutPrecision) -> Precision:
    """The format of everything that is not a quantised layer."""
    return precision if precision == "fp32" else "bf16"


def autocast(precision: Precision, device: torch.device, cache: bool = True) -> AbstractContextManager[object]:
    """The learner's compute context: nothing for fp32, torch autocast otherwise. cache: keep casts of weights in it."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=cache)
