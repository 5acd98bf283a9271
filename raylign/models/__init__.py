"""Model families. To add one: a file with its config, loader and check, one with its exporter, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import torch
from pydantic import Field

from raylign.config import Config
from raylign.models.base import DenoisingPolicy, Role
from raylign.models.dream import DREAM, DreamConfig
from raylign.models.flux import FLUX, FluxConfig
from raylign.models.image_export import export_image
from raylign.models.image_policy import Architecture, ImageModelConfig, check_image, load_image
from raylign.models.llada import LLADA, LladaConfig
from raylign.models.sana import SANA, SanaConfig
from raylign.models.sd3 import SD3, Sd3Config
from raylign.models.sdxl import SDXL, SdxlConfig
from raylign.models.stable_diffusion import STABLE_DIFFUSION, StableDiffusionConfig
from raylign.models.text_checkpoint import TextFormat, check_text, export_text, load_text
from raylign.models.text_policy import TextModelConfig
from raylign.models.tiny_text import TINY_TEXT, TinyTextConfig
from raylign.models.tokens import TokenPolicy
from raylign.precision import Precision


@dataclass(frozen=True, slots=True)
class Family:
    """What one model family brings. Its policies are DenoisingPolicy for images, TokenPolicy for text."""

    modality: Literal["image", "text"]
    load: Callable[[Any, Role, str, Precision, bool, int], Any]
    check: Callable[[Any, Sequence[str]], None]
    export: Callable[[Any, Mapping[str, torch.Tensor], Path, bool], None]


def _text_family(text_format: TextFormat) -> Family:
    return Family(
        "text", partial(load_text, text_format), partial(check_text, text_format), partial(export_text, text_format)
    )


def _image_family(architecture: Architecture) -> Family:
    return Family(
        "image",
        partial(load_image, architecture),
        partial(check_image, architecture),
        partial(export_image, architecture),
    )


ModelConfig = Annotated[
    Sd3Config
    | StableDiffusionConfig
    | SdxlConfig
    | FluxConfig
    | SanaConfig
    | LladaConfig
    | DreamConfig
    | TinyTextConfig,
    Field(discriminator="type"),
]
MODEL_FAMILIES: dict[type[Config], Family] = {
    Sd3Config: _image_family(SD3),
    StableDiffusionConfig: _image_family(STABLE_DIFFUSION),
    SdxlConfig: _image_family(SDXL),
    FluxConfig: _image_family(FLUX),
    SanaConfig: _image_family(SANA),
    LladaConfig: _text_family(LLADA),
    DreamConfig: _text_family(DREAM),
    TinyTextConfig: _text_family(TINY_TEXT),
}


@overload
def load_policy(
    config: ImageModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> DenoisingPolicy: ...


@overload
def load_policy(
    config: TextModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> TokenPolicy: ...


def load_policy(
    config: ImageModelConfig | TextModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> DenoisingPolicy | TokenPolicy:
    """Load the model a configuration names; see the family's loader for the arguments and errors."""
    return MODEL_FAMILIES[type(config)].load(config, role, device, precision, fold, seed)


def check_model(config: ModelConfig, texts: Sequence[str] = ()) -> None:
    """Raise ModelError or ConfigError for a model directory that cannot be loaded; reads small files only.

    Raises PromptError for the first of `texts` that the model cannot be given as a prompt.
    """
    MODEL_FAMILIES[type(config)].check(config, texts)


def export_policy(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], directory: Path, adapter_only: bool
) -> None:
    """Write trained tensors as files that the family's own library loads; see the family's exporter."""
    MODEL_FAMILIES[type(config)].export(config, tensors, directory, adapter_only)


__all__ = ["MODEL_FAMILIES", "DenoisingPolicy", "Family", "ModelConfig", "check_model", "export_policy", "load_policy"]
