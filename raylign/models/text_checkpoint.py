"""Checkpoints of text models: their files checked, loaded into a network by an explicit name map, and written back.

A family describes its checkpoints by a `TextFormat`. Nothing here executes code that a checkpoint brings: the network
is Raylign's own, the tokenizer is one of transformers' own classes, weights are safetensors. With
`trust_remote_code` alone the network is the checkpoint's, under the names its files have (see remote_code.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raylign.assets import resolve
from raylign.errors import ModelError
from raylign.models.adapters import LoraSettings, adapter_pair
from raylign.models.base import Role
from raylign.models.bidirectional import BLOCK_LINEARS, BidirectionalNetwork
from raylign.models.remote_code import OWN_PREFIX, RemoteNetwork, build_remote, check_remote, match_linears
from raylign.models.text_policy import TextModelConfig, TextPolicy, prompt_ids
from raylign.models.tokens import BUDGET_HEAD, Vocabulary
from raylign.precision import DTYPES, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_LAYERS = "layers."
# Configuration, tokenizer, template and modelling code. Model cards and prompts describe the untrained model.
_COPIED_SUFFIXES = frozenset({".jinja", ".json", ".model", ".py", ".txt"})


@dataclass(frozen=True, slots=True)
class NameMap:
    """What a family's files call the network's tensors: two complete tables and the prefix of a layer.

    outer: by tensor, "embed_tokens.weight" and the like. layer: by tensor of a layer, "self_attn.q_proj.weight" and
    the like, to the name behind `layer_prefix` and the layer's number.
    """

    outer: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str

    def published(self, own: str) -> str:
        """The published name of one of the network's tensors."""
        if not own.startswith(_LAYERS):
            return self.outer[own]
        _, number, name = own.split(".", 2)
        return f"{self.layer_prefix}{number}.{self.layer[name]}"

    def linears(self) -> dict[str, str]:
        """The published name, within a layer, of every linear layer, by the network's own name."""
        return {own: self.layer[f"{own}.weight"].removesuffix(".weight") for own in BLOCK_LINEARS}

    def own_targets(self, targets: Iterable[str]) -> tuple[str, ...]:
        """LoRA targets, given by published names or endings of them, by the network's own names; all when none are.

        Raises ModelError for one that matches no linear layer of a block.
        """
        linears = self.linears()
        found: list[str] = []
        for target in targets:
            matches = [own for own, name in linears.items() if name == target or name.endswith(f".{target}")]
            if not matches:
                raise ModelError(
                    f"LoRA target {target!r} matches no linear layer; there are {', '.join(linears.values())}"
                )
            found += matches
        return tuple(found) or tuple(linears)


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a family's checkpoints are read.

    model_type: what their config.json says. build: a network of a config.json's sizes, fit for a configuration; it is
    called where tensors have no storage. shift: see TextPolicy.
    """

    model_type: str
    names: NameMap
    build: Callable[[dict[str, Any], TextModelConfig], BidirectionalNetwork]
    tokenizer: Callable[[], type[PreTrainedTokenizerFast]]
    shift: int = 0


def load_text(
    text_format: TextFormat,
    config: TextModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> TextPolicy:
    """Load a policy from a checkpoint directory. Raises ModelError naming what is missing or wrong.

    Both roles hold the same things. fold: keep no adapter layers and fold published adapters into the weights
    (rollout with LoRA only). seed: initial values of the adapter's A matrices.
    """
    checkpoint = open_checkpoint(text_format, config)
    network = checkpoint.network or _build_remote(checkpoint, device, precision)
    native = checkpoint.network is not None
    for file, names in checkpoint.shards.items():
        tensors = _read(file, names, device, DTYPES[precision])
        # A native network has no storage yet; foreign code may hold its parameters in two places, so it is filled.
        own = {checkpoint.own[name]: tensor for name, tensor in tensors.items()}
        network.load_state_dict(own, strict=False, assign=native)
    network.to(device)  # what is computed and not loaded: rotary frequencies
    targets = config.lora.targets
    return TextPolicy(
        config,
        network,
        checkpoint.tokenizer,
        checkpoint.vocabulary,
        network.own_targets(targets) if isinstance(network, RemoteNetwork) else text_format.names.own_targets(targets),
        shift=text_format.shift,
        fold=fold and role == "rollout",
        seed=seed,
    )


def check_text(text_format: TextFormat, config: TextModelConfig, texts: Sequence[str] = ()) -> None:
    """Raise ModelError for a checkpoint that cannot be loaded, PromptError for a prompt that it cannot be given.

    No tensor's values are read.
    """
    checkpoint = open_checkpoint(text_format, config)
    for text in texts:
        prompt_ids(checkpoint.tokenizer, config, text)
    if checkpoint.network is None:
        match_linears([name.removesuffix(".weight") for name in checkpoint.own], config.lora.targets)
    else:
        text_format.names.own_targets(config.lora.targets)


def export_text(
    text_format: TextFormat,
    config: TextModelConfig,
    tensors: Mapping[str, torch.Tensor],
    directory: Path,
    adapter_only: bool,
) -> None:
    """Write trained tensors (named as `trainable_parameters` names them) as the family's own library reads them.

    `directory` becomes a copy of the checkpoint with the same shards and dtypes and the trained values; its model card
    is left out. A LoRA run's adapter also lies in `directory/adapter` in PEFT's layout, for the family's own modelling
    code. With `adapter_only` the adapter is written to `directory` itself and nothing else is. The budget head is
    Raylign's and is left out.
    """
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(text_format, config)
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(BUDGET_HEAD)}
    directory.mkdir(parents=True, exist_ok=True)
    if config.tuning == "lora":
        _save_adapter(checkpoint, config, trained, directory if adapter_only else directory / "adapter")
        if adapter_only:
            return
    for file, names in checkpoint.shards.items():
        shard = _read(file, names)
        for name, tensor in shard.items():
            own = checkpoint.own[name]
            value = _trained_value(own, tensor, trained, config.lora)
            shard[name] = value.detach().to("cpu", tensor.dtype).contiguous()
        save_file(shard, directory / file.name, metadata={"format": "pt"})
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and (file.suffix in _COPIED_SUFFIXES or file.name.startswith("LICENSE")):
            shutil.copyfile(file, directory / file.name)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked directory. `network` has no values yet, and is None where the checkpoint's own code is to make it;
    `shards` lists the published names in each file, and `own` says what the network calls them."""

    folder: Path
    network: BidirectionalNetwork | None
    tokenizer: Any
    vocabulary: Vocabulary
    shards: dict[Path, list[str]]
    own: dict[str, str]


def open_checkpoint(text_format: TextFormat, config: TextModelConfig) -> Checkpoint:
    """Check a directory's files against each other and against the name map. Raises ModelError for the first fault."""
    folder = resolve(config.path)
    if not folder.is_dir():
        raise ModelError(f"model.path {str(folder)!r} is no directory; give a checkpoint in the Hugging Face layout")
    described = read_json(folder / "config.json")
    found = described.get("model_type")
    if found != text_format.model_type:
        raise ModelError(
            f"{folder} is a {found!r}, not a {text_format.model_type!r}; choose the [model] type that fits"
        )
    try:
        if config.trust_remote_code:
            network, (num_rows, max_positions) = None, check_remote(folder, described)
        else:
            with torch.device("meta"):
                network = text_format.build(described, config)
            num_rows, max_positions = network.shape.vocab_size, network.shape.max_positions
    except KeyError as error:
        raise ModelError(f"{folder}/config.json has no {error.args[0]!r}") from None
    if config.max_prompt_length + config.canvas_length > max_positions:
        raise ModelError(
            f"model.max_prompt_length {config.max_prompt_length} and model.canvas_length {config.canvas_length} exceed "
            f"the {max_positions} positions that {folder} was made for"
        )
    tokenizer = _load_tokenizer(folder, text_format, config)
    vocabulary = read_vocabulary(folder, described, tokenizer, num_rows)
    shards = _list_shards(folder)
    if network is None:
        own = {name: f"{OWN_PREFIX}{name}" for names in shards.values() for name in names}
    else:
        own = {text_format.names.published(name): name for name, _ in network.named_parameters()}
        _check_tensors(folder, shards, own, network)
    return Checkpoint(folder, network, tokenizer, vocabulary, shards, own)


def read_vocabulary(folder: Path, described: Mapping[str, Any], tokenizer: Any, num_rows: int) -> Vocabulary:
    """The token ids that mean something, from config.json or else the tokenizer's own files.

    Raises ModelError for a tokenizer without a mask or end token, with more tokens than the embedding has rows, or
    one that disagrees with config.json about the mask.
    """
    if len(tokenizer) > num_rows:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {num_rows} rows; whose is it?"
        )
    ids: dict[str, int] = {}
    for kind in ("mask", "eos", "pad"):
        stated, tokenizers_own = described.get(f"{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
        token_id = stated if stated is not None else tokenizers_own
        if token_id is None and kind == "pad":
            token_id = ids["eos"]  # padding is seen by nobody, so any token will do
        if not isinstance(token_id, int):
            raise ModelError(
                f"{folder}: neither config.json ({kind}_token_id: {stated!r}) nor the tokenizer names one {kind} token"
            )
        if token_id >= num_rows or tokenizer.convert_ids_to_tokens(token_id) is None:
            raise ModelError(f"{folder}: the tokenizer has no token of the {kind} id {token_id}")
        if kind == "mask" and tokenizers_own not in (None, token_id):
            raise ModelError(f"{folder}: mask id {token_id} in config.json, {tokenizers_own} in the tokenizer's files")
        ids[kind] = token_id
    return Vocabulary(num_rows, mask_id=ids["mask"], eos_id=ids["eos"], pad_id=ids["pad"])


def refuse_options(path: str, described: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ModelError for an option of a config.json that is there and not what the native network computes."""
    for key, value in options.items():
        if described.get(key, value) != value:
            raise ModelError(f"{path}/config.json has {key} = {described[key]!r}; this family is built with {value!r}")


def check_names(folder: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise ModelError naming the tensors that are missing or foreign."""
    found, wanted = set(found), set(wanted)
    for kind, names in (("lacks", wanted - found), ("has foreign", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ModelError(f"{folder} {kind} {len(names)} tensor(s): {shown}{' …' if len(names) > 3 else ''}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises ModelError for a missing or broken one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; is the download complete?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None


def _load_tokenizer(folder: Path, text_format: TextFormat, config: TextModelConfig) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice names the class that would need remote code
    try:
        tokenizer = text_format.tokenizer().from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that loads: {error}") from error
    if config.chat_template and tokenizer.chat_template is None:
        raise ModelError(f"{folder}: the tokenizer has no chat template; set model.chat_template = false")
    return tokenizer


def _list_shards(folder: Path) -> dict[Path, list[str]]:
    """Which tensors lie in which file."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX_FILE
    if index.is_file():
        shards: dict[Path, list[str]] = {}
        for name, file in read_json(index)["weight_map"].items():
            shards.setdefault(folder / file, []).append(name)
        for file in shards:
            if not file.is_file():
                raise ModelError(f"{folder} lacks {file.name}, which {INDEX_FILE} names; is the download complete?")
        return shards
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise ModelError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; is the download complete?")
    try:
        with safe_open(single, framework="pt") as tensors:
            return {single: list(tensors.keys())}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{single} cannot be read: {error}") from error


def _build_remote(checkpoint: Checkpoint, device: str, precision: Precision) -> RemoteNetwork:
    """The checkpoint's own network with values of its own, after a look at whether it is the files' network."""
    network = build_remote(checkpoint.folder, device, DTYPES[precision])
    own = {name.removeprefix(OWN_PREFIX): name for name in network.state_dict()}
    _check_tensors(checkpoint.folder, checkpoint.shards, own, network)
    return network


def _check_tensors(
    folder: Path, shards: Mapping[Path, list[str]], own: Mapping[str, str], network: torch.nn.Module
) -> None:
    """Raise ModelError for tensors that are missing, foreign or of another shape. own: by published name."""
    check_names(folder, [name for names in shards.values() for name in names], own)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for file, names in shards.items():
        _check_shapes(file, {name: shapes[own[name]] for name in names})


def _check_shapes(file: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(f"{file}: {name} is {found[name]}, by config.json it must be {shape}")


def _read(
    file: Path, names: list[str], device: str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=device) as tensors:
        return {name: tensors.get_tensor(name).to(dtype) for name in names}


def _trained_value(
    own: str, base: torch.Tensor, trained: Mapping[str, torch.Tensor], lora: LoraSettings
) -> torch.Tensor:
    """The value a tensor is published with: trained, W + scale * B A in fp32, or the base's own."""
    down_name, up_name = adapter_pair(own.removesuffix(".weight"))
    if own in trained:
        return trained[own]
    if down_name not in trained:
        return base
    return base.float() + lora.scale * (trained[up_name].cpu().float() @ trained[down_name].cpu().float())


def _save_adapter(
    checkpoint: Checkpoint, config: TextModelConfig, trained: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """PEFT's layout over the family's own module names; targets as a pattern that leaves the output layer out."""
    import re

    import peft
    from safetensors.torch import save_file

    published = {own.removesuffix(".weight"): name.removesuffix(".weight") for name, own in checkpoint.own.items()}
    modules = {name: published[name.partition(".lora_")[0]] for name in trained}
    choice = "|".join(sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in modules.values()}))
    peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, so a float is fine
        target_modules=rf"(.*\.)?({choice})",
        base_model_name_or_path=config.path,
    ).save_pretrained(str(directory))
    layers: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        part = name.partition(".lora_")[2].replace(".default.", ".")
        layers[f"base_model.model.{modules[name]}.lora_{part}"] = tensor.detach().cpu().contiguous()
    save_file(layers, directory / "adapter_model.safetensors", metadata={"format": "pt"})
