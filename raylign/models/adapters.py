"""LoRA through PEFT: attaching it to a network, and folding a published one into plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from raylign.config import Config
from raylign.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"


class LoraSettings(Config):
    """Low-rank adapters (2106.09685): delta W = alpha / rank * B A on each target's weight."""

    rank: int = Field(default=32, ge=1)
    """Rank r of the update."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale numerator; the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Module name endings; the model family's own list when empty."""
    start: str | None = None
    """Saved LoRA of the same rank, alpha and targets to go on from, a file or its folder; image models only. The
    reference policy is then the base with it."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapter_pair(module_name: str) -> tuple[str, str]:
    """The names of the tensors A and B that adapt a module."""
    return module_name + _DOWN, module_name + _UP


def attach_lora(network: nn.Module, settings: LoraSettings, targets: tuple[str, ...], seed: int) -> None:
    """Freeze `network` and add a trainable PEFT adapter named "default", seeded, in fp32.

    Raises ModelError if a target name matches no module: a misspelt target would silently train less.
    """
    import peft

    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(
                f"LoRA target {target!r} matches no module of {type(network).__name__}; see `lora.targets`"
            )
    network.requires_grad_(False)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, so a float is fine
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fold_lora(
    network: nn.Module, tensors: Mapping[str, torch.Tensor], scale: float, pristine: dict[str, torch.Tensor]
) -> None:
    """Set every adapted weight of a plain network to W + scale * B A, computed in fp32.

    `pristine` keeps the untouched W of each adapted module between calls, so that folding again and again
    does not drift.
    """
    for name, down in tensors.items():
        if not name.endswith(_DOWN):
            continue
        module_name = name.removesuffix(_DOWN)
        weight = _weight(network.get_submodule(module_name))
        base = pristine.setdefault(module_name, weight.detach().clone())
        up = tensors[module_name + _UP]
        delta = scale * (up.to(weight.device).float() @ down.to(weight.device).float())
        weight.data.copy_(base.float() + delta)


def lora_shapes(network: nn.Module, settings: LoraSettings, targets: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes an adapter of these settings has on a plain network: what a foldable snapshot must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            out_features, in_features = _weight(module).shape
            shapes[name + _DOWN] = (settings.rank, int(in_features))
            shapes[name + _UP] = (int(out_features), settings.rank)
    return shapes


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise ModelError(f"LoRA target {type(module).__name__} has no weight matrix; target linear layers only")
    return weight
