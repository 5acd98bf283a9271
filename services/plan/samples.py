"""Drawn groups from one process of the probe to the next: safetensors and JSON in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from raylign.models.base import Conditioning
from raylign.models.tokens import TokenPrompts
from raylign.types import (
    LatentTrajectory,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    TokenTrajectory,
)

_TENSORS, _REST = "groups.safetensors", "groups.json"
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (LatentTrajectory, TokenTrajectory, Conditioning, TokenPrompts)
}


def save_groups(groups: Sequence[RolloutGroup], folder: Path) -> None:
    """Write groups as they came from an engine."""
    tensors: dict[str, torch.Tensor] = {}
    rows: list[dict[str, Any]] = []
    for place, group in enumerate(groups):
        parts = {"trajectory": group.trajectory, "conditioning": group.conditioning}
        for name, part in parts.items():
            tensors |= {f"{place}/{name}/{key}": tensor for key, tensor in _tensors(part).items()}
        if group.images_GHWC is not None:
            tensors[f"{place}/images"] = torch.from_numpy(group.images_GHWC)
        rows.append(
            {
                "prompt": {"id": group.prompt.id, "text": group.prompt.text, "metadata": dict(group.prompt.metadata)},
                "visit": group.visit,
                "keys": [list(rollout.key) for rollout in group.rollouts],
                "kinds": {name: type(part).__name__ for name, part in parts.items()},
                "texts": group.texts,
            }
        )
    # Groups of a prompt share what it says, and a file holds every tensor by itself.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, folder / _TENSORS)
    (folder / _REST).write_text(json.dumps(rows), encoding="utf-8")


def load_groups(folder: Path) -> list[RolloutGroup]:
    """The groups of a folder, in order, as of weight version 0; none of their samples has failed."""
    tensors = load_file(folder / _TENSORS)
    groups: list[RolloutGroup] = []
    for place, row in enumerate(json.loads((folder / _REST).read_text(encoding="utf-8"))):
        own = {name.removeprefix(f"{place}/"): value for name, value in tensors.items() if name.startswith(f"{place}/")}
        images = own.pop("images", None)
        keys = [SampleKey(*key) for key in row["keys"]]
        groups.append(
            RolloutGroup(
                prompt=Prompt(**row["prompt"]),
                visit=row["visit"],
                sequence=place,
                rollouts=tuple(Rollout(key, RolloutStatus.OK, 0, 0) for key in keys),
                trajectory=_made(row["kinds"]["trajectory"], _under("trajectory", own)),
                conditioning=_made(row["kinds"]["conditioning"], _under("conditioning", own)),
                images_GHWC=None if images is None else images.numpy(),
                texts=None if row["texts"] is None else tuple(row["texts"]),
            )
        )
    return groups


def group_bytes(group: RolloutGroup) -> int:
    """What a group weighs for the learner: trajectory and conditioning."""
    parts = (*_tensors(group.trajectory).values(), *_tensors(group.conditioning).values())
    return sum(tensor.nbytes for tensor in parts)


def _tensors(part: Any) -> dict[str, torch.Tensor]:
    """The tensors of a dataclass by field, those of a dataclass within it by `field/field`."""
    found: dict[str, torch.Tensor] = {}
    for name in part.__dataclass_fields__:
        value = getattr(part, name)
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif value is not None:
            found |= {f"{name}/{inner}": tensor for inner, tensor in _tensors(value).items()}
    return found


def _made(kind: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    own: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    for name in {name.partition("/")[0] for name in tensors if "/" in name}:
        own[name] = _made(kind, _under(name, tensors))  # a Conditioning's negative is one too
    return _KINDS[kind](**own)


def _under(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
