"""What a checkpoint holds: names and shapes from the headers of its safetensors files, no value is read.

Where the weights are not here, the network is what its config.json describes, on tensors without storage, and the size
of every other component is unknown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylign.assets import resolve
from raylign.config import Config
from raylign.errors import ModelError
from raylign.models import MODEL_FAMILIES
from raylign.models.adapters import adapter_pair
from raylign.models.dream import DREAM, DreamConfig
from raylign.models.flux import FLUX, FluxConfig
from raylign.models.image_policy import Architecture
from raylign.models.llada import LLADA, LladaConfig
from raylign.models.pipeline_folder import component_config, empty_network
from raylign.models.sana import SANA, SanaConfig
from raylign.models.sd3 import SD3, Sd3Config
from raylign.models.sdxl import SDXL, SdxlConfig
from raylign.models.stable_diffusion import STABLE_DIFFUSION, StableDiffusionConfig
from raylign.models.text_checkpoint import TextFormat
from raylign.models.tiny_text import TINY_TEXT, TinyTextConfig
from raylign.models.tokens import BUDGET_HEAD

Shapes = Mapping[str, tuple[int, ...]]
ARCHITECTURES: dict[type[Config], Architecture] = {
    Sd3Config: SD3,
    StableDiffusionConfig: STABLE_DIFFUSION,
    SdxlConfig: SDXL,
    FluxConfig: FLUX,
    SanaConfig: SANA,
}
FORMATS: dict[type[Config], TextFormat] = {LladaConfig: LLADA, DreamConfig: DREAM, TinyTextConfig: TINY_TEXT}

_INDEX = ".safetensors.index.json"
_WHOLE = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_MOST_HEADER_BYTES = 100 * 2**20
# Written with the weights, and computed, not trained.
_BUFFERS = ("pos_embed.pos_embed",)


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline beside its network. num_values is None where its weights are not here."""

    name: str
    num_values: int | None
    always_fp32: bool


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """network: the trained component's tensors, by its own names. adapted: the (out, in) of every adapted layer;
    empty without an adapter. trained: what is trained, and published. described: the network's own config.json."""

    network: Shapes
    others: tuple[Component, ...]
    adapted: Mapping[str, tuple[int, int]]
    trained: Shapes
    linears: Mapping[str, tuple[int, int]]
    described: Mapping[str, Any]
    from_files: bool

    @property
    def num_network(self) -> int:
        """Numbers in the network."""
        return count(self.network)

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        return count(self.trained)

    @property
    def num_adapted(self) -> int:
        """Numbers in the layers that an adapter is added to."""
        return sum(rows * columns for rows, columns in self.adapted.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Components whose weights are not here."""
        return tuple(one.name for one in self.others if one.num_values is None)


def count(shapes: Shapes) -> int:
    """Numbers in all tensors together."""
    return sum(math.prod(shape) for shape in shapes.values())


def model_sizes(model: Any) -> ModelSizes:
    """The sizes of a configured model. Raises ModelError for a folder that does not say them."""
    folder = resolve(model.path)
    if not folder.is_dir():
        raise ModelError(
            f"model.path {str(folder)!r} is no directory; a plan reads its config.json and the headers of its weights"
        )
    of_kind: dict[str, Callable[[Any, Path], ModelSizes]] = {"image": _image_sizes, "text": _text_sizes}
    return of_kind[MODEL_FAMILIES[type(model)].modality](model, folder)


def _image_sizes(model: Any, folder: Path) -> ModelSizes:
    architecture = ARCHITECTURES[type(model)]
    form = architecture.form
    index = _json(folder / "model_index.json")
    network, from_files = weight_shapes(folder / form.network), True
    if network is None:
        network, from_files = _parameters(empty_network(folder, form)), False
    names = [name for name, told in index.items() if isinstance(told, list) and told[-1] is not None]
    others = [
        Component(name, None if found is None else count(found), name in architecture.fp32_components)
        for name in names
        if name not in (form.network, *form.left_out)
        if (folder / name / "config.json").is_file()  # tokenizers and schedulers have no weights
        for found in [weight_shapes(folder / name)]
    ]
    targets = tuple(model.lora.targets) or architecture.lora_targets
    adapted = _matrices(network, targets) if model.tuning == "lora" else {}
    whole = {name: shape for name, shape in network.items() if name not in _BUFFERS}
    trained = _adapter(adapted, model.lora.rank) if model.tuning == "lora" else whole
    described = component_config(folder, form.network)
    return ModelSizes(network, tuple(others), adapted, trained, _matrices(network), described, from_files)


def _text_sizes(model: Any, folder: Path) -> ModelSizes:
    text_format, described = FORMATS[type(model)], _json(folder / "config.json")
    published = weight_shapes(folder)
    if published is None:
        if model.trust_remote_code:
            raise ModelError(
                f"{folder} has no safetensors, and only its own code knows its sizes; download the weights"
            )
        with torch.device("meta"):
            network: Shapes = _parameters(text_format.build(dict(described), model))
    else:
        network = published if model.trust_remote_code else _own_names(text_format, published)
    embedding = next((shape for name, shape in network.items() if re.search(r"embed_tokens|wte", name)), None)
    linears = {
        name: shape
        for name, shape in _matrices(network).items()
        if not re.search(r"embed_tokens|wte|position_feat", name)
    }
    targets = () if model.trust_remote_code else text_format.names.own_targets(model.lora.targets)
    wanted = targets or tuple(model.lora.targets)
    numbered = {name: shape for name, shape in linears.items() if re.search(r"\.\d+\.", name)}
    chosen = {name: shape for name, shape in numbered.items() if not wanted or _is_one_of(name, wanted)}
    adapted = chosen if model.tuning == "lora" else {}
    trained = dict(_adapter(adapted, model.lora.rank) if model.tuning == "lora" else network)
    if model.budget_head and embedding is not None:
        trained |= {f"{BUDGET_HEAD}weight": (1, embedding[1]), f"{BUDGET_HEAD}bias": (1,)}
    return ModelSizes(network, (), adapted, trained, linears, described, published is not None)


def weight_shapes(folder: Path) -> Shapes | None:
    """Every tensor of a component's safetensors files; None where there are none. Raises ModelError for a bad file."""
    files = _weight_files(folder)
    if not files:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= read_header(path)
    return shapes


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in one safetensors file. Raises ModelError for a file that is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MOST_HEADER_BYTES:
                raise ValueError(f"its header would have {length} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no safetensors file ({error}); is the download complete?") from None


def _weight_files(folder: Path) -> list[Path]:
    """The files that are loaded: those of an index, or the one file; copies in other precisions have other names."""
    indices = sorted(path for path in folder.glob(f"*{_INDEX}") if path.name.count(".") == _INDEX.count("."))
    if indices:
        listed = sorted(set(_json(indices[0]).get("weight_map", {}).values()))
        files = [folder / name for name in listed]
        return files if files and all(path.is_file() for path in files) else []
    return [folder / name for name in _WHOLE if (folder / name).is_file()][:1]


def _own_names(text_format: TextFormat, published: Shapes) -> Shapes:
    """Published tensors by the native network's own names. Raises ModelError for one that it does not have."""
    names = text_format.names
    outer = {theirs: own for own, theirs in names.outer.items()}
    inner = {theirs: own for own, theirs in names.layer.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in published.items():
        if name in outer:
            found[outer[name]] = shape
            continue
        number, _, rest = name.removeprefix(names.layer_prefix).partition(".")
        if not name.startswith(names.layer_prefix) or rest not in inner:
            raise ModelError(
                f"the checkpoint has a tensor {name!r}, which this family has not; choose its [model] type"
            )
        found[f"layers.{number}.{inner[rest]}"] = shape
    return found


def _matrices(network: Shapes, targets: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """The layers with a weight matrix, by name; only those that `targets` names or ends, if given."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in network.items():
        layer = name.removesuffix(".weight")
        if layer != name and len(shape) == 2 and (not targets or _is_one_of(layer, targets)):
            found[layer] = (shape[0], shape[1])
    return found


def _is_one_of(layer: str, targets: tuple[str, ...]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _adapter(adapted: Mapping[str, tuple[int, int]], rank: int) -> Shapes:
    """The tensors A and B of every adapted layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in adapted.items():
        down, up = adapter_pair(name)
        shapes |= {down: (rank, columns), up: (rows, rank)}
    return shapes


def _parameters(network: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); a plan needs it") from None
