"""How low-precision copies of a network are made: the keys of `[rollout.quantizer]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylign.config import Config

BackendName = Literal["reference", "torch", "torchao", "transformer_engine"]


class QuantizerConfig(Config):
    """How linear layers are quantised, wherever a rollout or draft precision is fp8, nvfp4 or mxfp4."""

    backend: Literal["auto"] | BackendName = "auto"
    """What computes them; auto takes the first that runs natively on the device, else the reference, which emulates."""
    require_native: bool = False
    """Refuse to start where the device has no units for the format, instead of emulating it slowly."""
    weight_tile: Literal["1x16", "16x16"] = "1x16"
    """Weights that share one NVFP4 block scale."""
    activations: bool = True
    """Quantise what enters the layers as well, as the hardware's units do; false keeps small weights only."""
    keep_high: tuple[str, ...] | None = None
    """Patterns of module names that stay in high precision, such as "*attn*"; the model family's own when not given."""
    min_features: int | None = Field(default=None, ge=0)
    """Layers no wider than this on either side stay in high precision; the model family's own when not given."""
