"""Stable Diffusion 3 and 3.5: any `StableDiffusion3Pipeline` directory of diffusers, tiny or real.

Text encoding, the network and the VAE are diffusers' own modules; this file only binds them to the
`DenoisingPolicy` protocol. diffusers is imported when a policy is loaded, not when a configuration is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from raylign.assets import resolve
from raylign.config import Config
from raylign.errors import ModelError
from raylign.models.adapters import LoraSettings
from raylign.models.base import Conditioning, Role
from raylign.models.tuned import TunedWeights
from raylign.precision import DTYPES, Precision
from raylign.shapes import check_shape
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

PIPELINE = "StableDiffusion3Pipeline"
_COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
# The targets of Flow-GRPO and DiffusionNFT: every attention projection of both streams.
LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class Sd3Config(Config):
    """A Stable Diffusion 3 / 3.5 model directory and how it is trained."""

    type: Literal["sd3"] = "sd3"
    path: str = "asset:glyphs"
    """diffusers pipeline directory; `asset:glyphs` is the tiny model that ships with Raylign."""
    height: int = Field(default=32, ge=8)
    """Picture height in pixels."""
    width: int = Field(default=64, ge=8)
    """Picture width in pixels."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter or every weight of the transformer."""
    lora: LoraSettings = LoraSettings()
    """The adapter, when tuning is "lora"."""
    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """T5 tokens per prompt, where the model has a T5."""


class Sd3Policy:
    """A DenoisingPolicy over diffusers modules. In a learner, text encoders and VAE are absent.

    diffusers' modules and their configurations are typed as Any: their stubs know neither `config.x` nor calls.
    """

    def __init__(
        self,
        config: Sd3Config,
        transformer: Any,
        pipeline: Any | None,
        vae_config: dict[str, Any],
        schedule_shift: float,
        weights: TunedWeights,
    ) -> None:
        self.config = config
        self.transformer = transformer
        self.schedule_shift = schedule_shift
        self.device = next(transformer.parameters()).device
        self._pipeline = pipeline
        self._weights = weights
        factor = _latent_factor(config, vae_config, transformer.config.patch_size)
        self.latent_shape = (transformer.config.in_channels, config.height // factor, config.width // factor)

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        """See DenoisingPolicy. Raises ModelError in a learner, which has no text encoders."""
        pipeline = self._need_pipeline("encode a prompt")
        with torch.no_grad():
            embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
                text,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=with_negative,
                max_sequence_length=self.config.max_sequence_length,
            )
        return Conditioning(embeds, pooled, negative, negative_pooled)

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """See DenoisingPolicy. The network is fed sigma * 1000 as a float, never truncated to an integer."""
        channels, height, width = self.latent_shape
        check_shape(state_BCHW, "state_BCHW", C=channels, H=height, W=width)
        dtype = self.transformer.dtype
        velocity = self.transformer(
            hidden_states=state_BCHW.to(dtype),
            timestep=sigma_B.float() * 1000.0,
            encoder_hidden_states=conditioning.prompt_embeds_PLD.to(dtype),
            pooled_projections=conditioning.pooled_PD.to(dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        """See DenoisingPolicy. Raises ModelError in a learner, which has no VAE."""
        vae = self._need_pipeline("decode a picture").vae
        with torch.no_grad():
            latents = state_BCHW / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            pictures = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        scaled = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round()
        return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._weights.parameters()

    def enable_gradient_checkpointing(self) -> None:
        self.transformer.enable_gradient_checkpointing()

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return self._weights.export(version, tensors)

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self._weights.load(snapshot)

    def _need_pipeline(self, action: str) -> Any:
        if self._pipeline is None:
            raise ModelError(f"a learner's policy cannot {action}: it holds the transformer only; load role='rollout'")
        return self._pipeline


def load_sd3(
    config: Sd3Config, role: Role, device: str = "cpu", precision: Precision = "fp32", fold: bool = False, seed: int = 0
) -> Sd3Policy:
    """Load a policy from a pipeline directory. Raises ModelError naming the missing or wrong component.

    role "rollout": every component, in `precision`; "learner": the transformer alone, fp32 master weights.
    fold: keep no adapter layers and fold published adapters into the weights (rollout with LoRA only).
    seed: initial values of the adapter's A matrices.
    """
    folder = resolve(config.path)
    check_pipeline_folder(folder)
    pipeline = load_pipeline(folder, precision).to(device) if role == "rollout" else None
    transformer: Any = pipeline.transformer if pipeline is not None else _load_transformer(folder).to(device)
    transformer.eval()
    weights = TunedWeights(
        transformer, config.tuning, config.lora, LORA_TARGETS, fold=fold and role == "rollout", seed=seed
    )
    shift = float(_read_json(folder / "scheduler" / "scheduler_config.json").get("shift", 1.0))
    return Sd3Policy(config, transformer, pipeline, _vae_config(folder), shift, weights)


def check_sd3(config: Sd3Config, texts: Sequence[str] = ()) -> None:
    """Raise for a directory without a component, or a size it cannot draw, before anything is started.

    Any of `texts` will do: the encoders cut one that is too long.
    """
    folder = resolve(config.path)
    check_pipeline_folder(folder)
    _latent_factor(config, _vae_config(folder), int(_read_json(folder / "transformer" / "config.json")["patch_size"]))


def _vae_config(folder: Path) -> dict[str, Any]:
    """The VAE's own configuration; the tiny VAE class names its channels differently."""
    config = _read_json(folder / "vae" / "config.json")
    config.setdefault("block_out_channels", config.get("decoder_block_out_channels"))
    return config


def _latent_factor(config: Sd3Config, vae_config: dict[str, Any], patch_size: int) -> int:
    """Pixels per latent along each side. Raises ModelError for a picture size that patches do not fill."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    step = factor * patch_size
    for name, size in (("height", config.height), ("width", config.width)):
        if size % step:
            raise ModelError(f"model.{name} must be a multiple of {step} for this model, got {size}")
    return factor


def load_pipeline(folder: Path, precision: Precision = "fp32") -> StableDiffusion3Pipeline:
    """The whole diffusers pipeline of a checked directory, progress bars off."""
    _quiet()
    from diffusers import StableDiffusion3Pipeline

    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), dtype=DTYPES[precision], local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder} does not load as a {PIPELINE}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_pipeline_folder(folder: Path) -> None:
    """Raise ModelError for the first fault of a folder that lacks something SD3 needs."""
    if not folder.is_dir():
        raise ModelError(f"model.path {str(folder)!r} is no directory; give a diffusers {PIPELINE} directory")
    index = _read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found != PIPELINE:
        raise ModelError(f"{folder} is a {found}, not a {PIPELINE}; choose the [model] type that fits it")
    for name in _COMPONENTS:
        declared = index.get(name)
        if not declared or declared[1] is None:
            raise ModelError(f"{folder}/model_index.json names no {name}, which a {PIPELINE} needs")
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} lacks its component folder {name}/ ({declared[1]}); is the download complete?")
    found = _read_json(folder / "transformer" / "config.json").get("_class_name")
    if found != "SD3Transformer2DModel":
        raise ModelError(f"{folder}/transformer is a {found}, not an SD3Transformer2DModel")


def _load_transformer(folder: Path) -> Any:
    _quiet()
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    try:
        return SD3Transformer2DModel.from_pretrained(
            str(folder), subfolder="transformer", dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}/transformer does not load: {error}") from error


def _quiet() -> None:
    """No loading bars or advice from the libraries: a run has its own screen, and every worker would repeat them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library_logging in (diffusers_logging, transformers_logging):
        library_logging.disable_progress_bar()
        library_logging.set_verbosity_error()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; is it a diffusers {PIPELINE} directory?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
