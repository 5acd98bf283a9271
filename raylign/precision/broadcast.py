"""Weights that the learner quantises once for all its actors, and that travel packed: snapshots of kind "packed".

    learner   quantised layers ─ round to the actors' dtype ─ pack ─▶ codes, scales ┐
              all other weights, as they are ────────────────────────────────────────┴─▶ snapshot
    actor     verify ─▶ codes and scales into the low-precision copy, the rest into the parameters

Packing gives the same bytes on every backend and device, and the learner packs what an actor would hold, so that an
actor draws bit for bit what it draws when it quantises the whole weights itself. Its own high-precision copies of the
packed weights are left as they are: nothing that is drawn in the rollout slot reads them.

A packed tensor's name is that of the weight, the format and the part: `block.ff.weight:nvfp4.codes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from raylign.errors import ConfigError, WeightError
from raylign.precision import Format
from raylign.precision.packed import Packed, WeightTile, pack_weight
from raylign.precision.shadow import Shadow, naming_layer
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot


@dataclass(frozen=True, slots=True)
class Packing:
    """What of a network's weights is packed, and how. dtype: of the weights that actors hold, and would quantise."""

    layers: tuple[str, ...]
    format: Format
    weight_tile: WeightTile
    dtype: torch.dtype


def make_packing(
    network: nn.Module, layers: Sequence[str], format_name: Format, weight_tile: WeightTile, dtype: torch.dtype
) -> Packing:
    """A packing of linear layers of `network`.

    Raises ConfigError for one whose weight another module reads too: packed, it would not reach that one.
    """
    readers = Counter(id(weight) for _, weight in network.named_parameters(remove_duplicate=False))
    for layer in layers:
        if readers[id(network.get_submodule(layer).weight)] > 1:
            raise ConfigError(
                f"learner.publish = 'packed': layer {layer} shares its weight with another module, which needs it in "
                "high precision; add the layer to rollout.quantizer.keep_high, or set learner.publish = 'whole'"
            )
    return Packing(tuple(layers), format_name, weight_tile, dtype)


@torch.no_grad()
def make_packed_snapshot(
    packing: Packing, tensors: Mapping[str, torch.Tensor], version: WeightVersion
) -> WeightSnapshot:
    """A snapshot of all trained `tensors`, those of the packing's layers packed, on the device where they lie.

    Raises NumericsError naming a layer that is not finite.
    """
    sent = dict(tensors)
    for layer in packing.layers:
        weight = _weight_name(layer)
        with naming_layer(layer):
            packed = pack_weight(packing.format, sent.pop(weight).to(packing.dtype), packing.weight_tile)
        sent |= {_part_name(weight, packing.format, part): tensor for part, tensor in packed.tensors.items()}
    return make_snapshot(sent, version, "packed")


def load_high(snapshot: WeightSnapshot, parameters: Mapping[str, nn.Parameter], shadow: Shadow) -> dict[str, Packed]:
    """Verify a packed snapshot and swap in what is not packed; returns what is, by layer, for `shadow.refresh`.

    The packed tensors lie in the snapshot's own memory. Raises WeightError and changes nothing when something is torn,
    or packed in another format than the shadow's, or of other layers.
    """
    _check_format(snapshot, shadow.format)
    quantised = {_weight_name(name) for name in shadow.layers}
    high = {name: parameter for name, parameter in parameters.items() if name not in quantised}
    parts = {
        _part_name(_weight_name(name), shadow.format, part): shape
        for name, layer in shadow.layers.items()
        for part, shape in layer.part_shapes.items()
    }
    tensors = view_snapshot(snapshot, {name: tuple(parameter.shape) for name, parameter in high.items()} | parts)
    with torch.no_grad():
        for name, parameter in high.items():
            parameter.copy_(tensors[name])
    packed: dict[str, Packed] = {}
    for name, layer in shadow.layers.items():
        weight = _weight_name(name)
        own = {part: tensors[_part_name(weight, shadow.format, part)] for part in layer.part_shapes}
        packed[name] = Packed(shadow.format, (layer.out_features, layer.in_features), own)
    return packed


def _check_format(snapshot: WeightSnapshot, wanted: Format) -> None:
    names = [entry.name.partition(":")[2] for entry in snapshot.entries]
    for found in sorted({name.partition(".")[0] for name in names if name}):
        if found != wanted:
            raise WeightError(
                f"snapshot {snapshot.version} has weights packed in {found}, and this actor computes in {wanted}; "
                "learner and actors must read the same rollout.precision"
            )


def _weight_name(layer: str) -> str:
    return f"{layer}.weight"


def _part_name(weight: str, format_name: Format, part: str) -> str:
    return f"{weight}:{format_name}.{part}"
