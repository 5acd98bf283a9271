"""A low-precision copy of a network that lives beside it, shares all it can with it, and follows its weights.

The shadow is a second tree of modules over the same parameters and buffers, in which some linear layers hold their
weight packed. The network itself is left alone: names, tensors, hooks and outputs are what they were.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raylign.errors import NumericsError
from raylign.precision import Format
from raylign.precision.linear import QuantizedLinear
from raylign.precision.packed import Packed
from raylign.precision.quantizer import Quantizer


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What following the weights took: seconds, and bytes of packed weights."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Copied:
    """A layer of the network (an nn.Linear, or PEFT's LoRA layer around one) and what stands for it in the shadow."""

    name: str
    source: nn.Module
    layer: QuantizedLinear


class Shadow:
    """See the module. `network` is the copy; call it as the original is called."""

    def __init__(self, network: nn.Module, quantizer: Quantizer, layers: Sequence[str]) -> None:
        """layers: names of `linear_sizes(network)` to quantise. Raises NumericsError as `refresh` does."""
        shared = [*network.parameters(), *network.buffers()]
        self.network: Any = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
        self._quantizer = quantizer
        self._num_linears = len(linear_sizes(network))
        self._copied: list[_Copied] = []
        for name in layers:
            source = network.get_submodule(name)
            with naming_layer(name):
                layer = QuantizedLinear(quantizer, effective_weight(source), _linear(source).bias)
            self.network.set_submodule(name, layer)
            self._copied.append(_Copied(name, source, layer))

    def refresh(self, received: Mapping[str, Packed] | None = None) -> Refreshed:
        """Quantise the network's weights as they are now, an attached adapter added, into the memory of the old ones.

        received: layers whose weight was packed elsewhere, to take as it is. What was quantised before leaves no trace.
        Raises NumericsError naming a layer that is not finite.
        """
        started_s = time.perf_counter()
        for copied in self._copied:
            packed = (received or {}).get(copied.name)
            if packed is not None:
                copied.layer.load_packed(packed)
                continue
            with naming_layer(copied.name):
                copied.layer.repack(effective_weight(copied.source))
        _synchronise(self._copied[0].layer)
        return Refreshed(time.perf_counter() - started_s, self.packed_bytes)

    @contextmanager
    def prepared(self) -> Generator[None]:
        """Ready for many calls: emulation unpacks each weight once, and drops it at the end."""
        try:
            for copied in self._copied:
                copied.layer.prepare(_linear(copied.source).weight.dtype)
            yield
        finally:
            for copied in self._copied:
                copied.layer.release()

    @property
    def format(self) -> Format:
        """The number format of the packed weights."""
        return self._quantizer.format

    @property
    def layers(self) -> dict[str, QuantizedLinear]:
        """The layers that hold their weight packed, by name."""
        return {copied.name: copied.layer for copied in self._copied}

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights."""
        return sum(copied.layer.packed.num_bytes for copied in self._copied)

    def describe(self) -> str:
        """The format, whether the device's units compute it or it is emulated, and how much of the network it is."""
        how = "native" if self._quantizer.is_native else "emulated, so not faster"
        count = f"{len(self._copied)} of {self._num_linears} linear layers"
        return f"{self._quantizer.format}, {how} ({self._quantizer.backend}), {count}"


def linear_sizes(network: nn.Module) -> dict[str, tuple[int, int]]:
    """(in features, out features) of every linear layer by name; one inside PEFT's layer goes by that layer's name.

    Subclasses of nn.Linear are left out: what they compute is their own, or their owner reads their weight.
    """
    layers: dict[str, tuple[int, int]] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if name.startswith(wrapped):
            continue
        inner = getattr(module, "base_layer", module)
        if inner is not module:
            wrapped = (*wrapped, f"{name}.")
        if type(inner) is nn.Linear:
            layers[name] = (inner.in_features, inner.out_features)
    return layers


@torch.no_grad()
def effective_weight(layer: nn.Module) -> torch.Tensor:
    """W of a linear layer, (O, I); with PEFT's adapters attached W + sum of scale B A, in fp32."""
    weight_OI = _linear(layer).weight.detach()
    if layer is _linear(layer):
        return weight_OI
    adapted: Any = layer
    weight_OI = weight_OI.float()
    for adapter, down in adapted.lora_A.items():
        up = adapted.lora_B[adapter]
        weight_OI = weight_OI + adapted.scaling[adapter] * (up.weight.float() @ down.weight.float())
    return weight_OI


def _linear(layer: nn.Module) -> nn.Linear:
    inner = getattr(layer, "base_layer", layer)
    assert isinstance(inner, nn.Linear)
    return inner


@contextmanager
def naming_layer(name: str) -> Generator[None]:
    """Say which layer a number is from."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"layer {name}: {error}") from error


def _synchronise(layer: QuantizedLinear) -> None:
    """Wait for the device, so that seconds are those of the work and not of asking for it."""
    device = next(iter(layer.packed.tensors.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
