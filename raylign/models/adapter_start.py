"""A saved LoRA that training goes on from: diffusers' and PEFT's files, checked by their headers and then read.

The policy at step 0, and so the reference that a KL term holds on to, is the base model with that adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylign.assets import resolve
from raylign.errors import ModelError
from raylign.models.adapters import LoraSettings
from raylign.models.pipeline_folder import read_json

ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""As diffusers and as PEFT name them."""
_UNSUPPORTED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A file's header. names: our parameter's name to the file's; shapes by our names; told: its LoRA settings."""

    file: Path
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    told: dict[str, Any]


def open_start(start: str, network: str) -> SavedAdapter:
    """The header of a LoRA file, or of the one in a folder. network: the component's name, diffusers' prefix.

    Raises ModelError for a file that is missing, unreadable or in another layout.
    """
    from safetensors import SafetensorError, safe_open

    file = _find(resolve(start))
    names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118  # safe_open is no mapping
                own = _own_name(name, network)
                if own is None:
                    raise ModelError(
                        f"lora.start: {name} of {file} is no LoRA matrix of the {network} in diffusers' or PEFT's "
                        "layout; save it again with save_lora_weights of the model's pipeline, that part alone"
                    )
                names[own], shapes[own] = name, tuple(saved.get_slice(name).get_shape())
            metadata = saved.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"lora.start: {file} cannot be read: {error}") from error
    return SavedAdapter(file, names, shapes, _settings(file, metadata, network))


def check_start(saved: SavedAdapter, settings: LoraSettings, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless the file holds just the adapter that `settings` make, whose `shapes` are given."""
    for name in sorted(set(shapes) ^ set(saved.shapes)):
        fault = "lacks" if name in shapes else "has the foreign tensor"
        raise ModelError(
            f"lora.start: {saved.file} {fault} {saved.names.get(name, name)}; take an adapter of this model, with "
            "lora.targets as it was trained"
        )
    for name, wanted in shapes.items():
        found = saved.shapes[name]
        if found == wanted:
            continue
        rank = found[0] if ".lora_A." in name else found[-1]
        if rank != settings.rank:
            raise ModelError(
                f"lora.start: {saved.names[name]} of {saved.file} has rank {rank}, lora.rank is {settings.rank}; set "
                f"lora.rank = {rank}"
            )
        raise ModelError(
            f"lora.start: {saved.names[name]} of {saved.file} is {found}, this model's must be {wanted}; take an "
            "adapter of this model"
        )
    for key in _UNSUPPORTED:
        if saved.told.get(key):
            raise ModelError(f"lora.start: {saved.file} was made with {key}, which is not supported; take a plain LoRA")
    # diffusers takes a file that tells no alpha to mean alpha = rank.
    alpha = float(saved.told.get("lora_alpha", settings.rank))
    if alpha != settings.alpha:
        raise ModelError(
            f"lora.start: {saved.file} has alpha {alpha:g}, lora.alpha is {settings.alpha:g}; "
            f"set lora.alpha = {alpha:g}"
        )


def read_start(saved: SavedAdapter) -> dict[str, torch.Tensor]:
    """The matrices by our names, fp32 on the CPU."""
    from safetensors import safe_open

    with safe_open(saved.file, framework="pt") as tensors:
        return {own: tensors.get_tensor(name).float() for own, name in saved.names.items()}


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ADAPTER_FILES:
        if (path / name).is_file():
            return path / name
    raise ModelError(f"lora.start: {path} is no adapter and holds none ({' or '.join(ADAPTER_FILES)})")


def _own_name(name: str, network: str) -> str | None:
    """`unet.m.lora_A.weight` and `base_model.model.m.lora_A.weight` are `m.lora_A.default.weight`; None for others."""
    found = re.fullmatch(rf"(?:{network}|base_model\.model)\.(.+\.lora_[AB])(?:\.default)?\.weight", name)
    return f"{found[1]}.default.weight" if found else None


def _settings(file: Path, metadata: Mapping[str, str], network: str) -> dict[str, Any]:
    """What the file says of its rank and scale: in its metadata (diffusers) or in adapter_config.json (PEFT)."""
    beside = file.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        told = json.loads(metadata["lora_adapter_metadata"])
        return {key.removeprefix(f"{network}."): value for key, value in told.items()}
    return read_json(beside) if beside.is_file() else {}
