"""The trained tensors of a policy: which they are, how they are published, and how a published set is swapped in.

A policy holds one `TunedWeights` and passes the weight verbs of its protocol on to it. An adapter is either attached
(PEFT computes W x + s B A x, as the learner does) or, with `fold`, added into plain weights on load: faster, and
equal only up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from raylign.models.adapters import LoraSettings, attach_lora, fold_lora, lora_shapes
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot

Tuning = Literal["lora", "full"]


class TunedWeights:
    """Trains an adapter or every weight of `network`, and the parameters of `head` in any case.

    targets: names of the adapted modules, when the settings name none. seed: initial values of the adapter's A.
    fold: keep no adapter layers; a published adapter is added into the weights. start: the adapter's first values.
    """

    def __init__(
        self,
        network: nn.Module,
        tuning: Tuning,
        lora: LoraSettings,
        targets: tuple[str, ...],
        *,
        fold: bool,
        seed: int,
        head: Mapping[str, nn.Parameter] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._network = network
        self._tuning: Tuning = tuning
        self._lora = lora
        self._targets = lora.targets or targets
        self._fold = fold and tuning == "lora"
        self._head = dict(head or {})
        self._pristine: dict[str, torch.Tensor] = {}
        if tuning == "full":
            network.requires_grad_(True)
        elif self._fold:
            network.requires_grad_(False)
        else:
            attach_lora(network, lora, self._targets, seed)
        if start is not None:
            self._set(start, lora.scale)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, in a fixed order, the head's last. A folded adapter's are not among them."""
        return {name: p for name, p in self._network.named_parameters() if p.requires_grad} | self._head

    def export(self, version: WeightVersion, tensors: Mapping[str, torch.Tensor] | None = None) -> WeightSnapshot:
        """Publish the trained tensors, or another set of the same names and shapes."""
        kind = "adapter" if self._tuning == "lora" else "full"
        return make_snapshot(dict(self.parameters() if tensors is None else tensors), version, kind, self._lora.scale)

    def load(self, snapshot: WeightSnapshot) -> None:
        """Verify, then swap in. Raises WeightError and changes nothing when it does not fit."""
        parameters = self.parameters()
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        if self._fold:
            shapes |= lora_shapes(self._network, self._lora, self._targets)
        tensors = view_snapshot(snapshot, shapes)
        self._set(tensors, snapshot.lora_scale)

    def _set(self, tensors: Mapping[str, torch.Tensor], scale: float) -> None:
        with torch.no_grad():
            if self._fold:
                fold_lora(self._network, tensors, scale, self._pristine)
            for name, parameter in self.parameters().items():
                parameter.copy_(tensors[name])
