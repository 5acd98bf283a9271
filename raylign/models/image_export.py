"""Writes a trained image policy as what diffusers loads by itself: a pipeline and a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from raylign.assets import resolve
from raylign.models.adapters import fold_lora
from raylign.models.image_policy import Architecture, ImageModelConfig
from raylign.models.pipeline_folder import check_pipeline_folder, load_pipeline

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def export_image(
    architecture: Architecture,
    config: ImageModelConfig,
    tensors: Mapping[str, torch.Tensor],
    directory: Path,
    adapter_only: bool,
) -> None:
    """Write trained tensors (named as `trainable_parameters` names them) to `directory`.

    Whole pipeline: the family's pipeline class loads `directory` as the trained model. With a LoRA run the adapter
    also lies in `directory/adapter` for `load_lora_weights` on the base; with `adapter_only` it is written to
    `directory` itself and nothing else is.
    """
    folder = resolve(config.path)
    check_pipeline_folder(folder, architecture.form)
    directory.mkdir(parents=True, exist_ok=True)
    if config.tuning == "lora":
        _save_adapter(architecture, config, tensors, directory if adapter_only else directory / "adapter")
        if adapter_only:
            return
    pipeline = load_pipeline(folder, architecture.form)
    network = getattr(pipeline, architecture.form.network)
    with torch.no_grad():
        if config.tuning == "lora":
            fold_lora(network, tensors, config.lora.scale, {})
        else:
            for name, parameter in network.named_parameters():
                parameter.copy_(tensors[name])
    pipeline.save_pretrained(str(directory))


def _save_adapter(
    architecture: Architecture, config: ImageModelConfig, tensors: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """A LoRA file in diffusers' layout. Its metadata carry rank and alpha, so that the scale survives."""
    import diffusers

    form = architecture.form
    layers: dict[str, torch.nn.Module | torch.Tensor] = {
        name.replace(".default.weight", ".weight"): tensor for name, tensor in tensors.items()
    }
    metadata = {
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "target_modules": list(config.lora.targets or architecture.lora_targets),
    }
    getattr(diffusers, form.pipeline).save_lora_weights(
        str(directory),
        **{f"{form.network}_lora_layers": layers, f"{form.network}_lora_adapter_metadata": metadata},
    )
