"""What autograd keeps of one micro-batch, counted on the meta device: the network's own code runs without storage.

Every tensor that the backward pass will want is handed to a hook, which counts its bytes once; parameters do not count.
So the number follows what is frozen, an attached adapter, the precision and the attention kernel's own needs, for a
12 B network on any machine, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from raylign.assets import resolve
from raylign.models.adapters import attach_lora
from raylign.models.base import Conditioning
from raylign.models.flux import FluxConfig
from raylign.models.pipeline_folder import component_config, empty_network
from raylign.models.sana import SanaConfig
from raylign.models.sd3 import Sd3Config
from raylign.models.sdxl import SdxlConfig
from raylign.precision import DTYPES, Precision
from services.plan.sizes import ARCHITECTURES, FORMATS, ModelSizes

CLIP_TOKENS = 77
_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes kept for the backward pass of one forward of `rows` samples, and what the forward works with beside.

    whole: all of it. recomputed: with gradient checkpointing, the blocks' inputs and one block's own. working: the most
    that one block needs, as a forward without gradient holds about that much. told: what one prompt says, in numbers.
    """

    rows: int
    whole: int
    recomputed: int
    working: int
    told: int


def kept_activations(model: Any, sizes: ModelSizes, precision: Precision, rows: int, guided: bool) -> Kept:
    """Count one forward of `rows` samples, doubled where they are guided. Raises what the network's code raises."""
    if type(model) in ARCHITECTURES:
        network, ask, told = _image(model, sizes, 2 * rows if guided else rows)
    else:
        network, ask, told = _text(model, sizes, 2 * rows if guided else rows)
    network.eval()
    if model.tuning == "lora":
        targets = tuple(name for name in sizes.adapted)
        attach_lora(network, model.lora, targets, 0)
    network.to(DTYPES[precision])
    blocks = _Blocks(network)
    with blocks.watched(), _FusedAttention():
        ask()
    return Kept(rows, blocks.total, blocks.recomputed, max(blocks.by_block, default=blocks.total), told)


class _Blocks:
    """Counts saved tensors, in all and by outermost block (an entry of a module list)."""

    def __init__(self, network: nn.Module) -> None:
        parameters = [*network.parameters(), *network.buffers()]
        self._counted = {_storage_id(tensor) for tensor in parameters}
        self._held: list[torch.Tensor] = []
        self._network = network
        self._inside = -1
        self.total = self._outside = self._inputs = 0
        self.by_block: list[int] = []

    @property
    def recomputed(self) -> int:
        """What is left with every block recomputed in the backward pass, one at a time."""
        return self._outside + self._inputs + max(self.by_block, default=0)

    @contextmanager
    def watched(self) -> Generator[None]:
        """Count what is saved inside."""
        handles = [hook for block in _outermost_blocks(self._network) for hook in self._hooks(block)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._held.clear()

    def _hooks(self, block: nn.Module) -> list[Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside = len(self.by_block)
            self.by_block.append(0)
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one.requires_grad]
            self._inputs += sum(one.nbytes for one in given)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self._inside = -1

        return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (known := _storage_id(tensor)) not in self._counted:
            self._counted.add(known)
            self._held.append(tensor)  # so that no later storage gets its place
            self.total += storage.nbytes()
            if self._inside < 0:
                self._outside += storage.nbytes()
            else:
                self.by_block[self._inside] += storage.nbytes()
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what every fused kernel keeps; the meta device's own would keep its weights, L x L."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Query, key, value, output, and one number per query to normalise its weights anew; never computed."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("activations are counted, nothing is trained on them")


def _storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory; meant for shared memory, it tells storages without any apart too."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def _outermost_blocks(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            found += list(child)
        else:
            found += _outermost_blocks(child)
    return found


def _image(model: Any, sizes: ModelSizes, rows: int) -> tuple[nn.Module, Callable[[], Any], int]:
    architecture, folder = ARCHITECTURES[type(model)], resolve(model.path)
    network: Any = empty_network(folder, architecture.form)
    geometry = architecture.geometry(model, dict(sizes.described), component_config(folder, "vae"))
    # A family's own call of its network; what it asks of noise levels changes no size.
    plain = SimpleNamespace(
        network_state=lambda state, sigma: state,
        timestep_of=lambda sigma: sigma,
        velocity=lambda answer, *_: answer,
    )
    policy: Any = SimpleNamespace(network=network, config=model, latent_shape=geometry.latent_shape, schedule=plain)
    told = conditioning(model, sizes, 1)
    state = torch.empty(rows, *geometry.latent_shape, device=_META)
    sigma = torch.empty(rows, device=_META)
    numbers = sum(one.numel() for one in (told.prompt_embeds_PLD, told.pooled_PD) if one is not None)
    return network, lambda: architecture.velocity(policy, state, sigma, told.repeat(rows)), numbers


def conditioning(model: Any, sizes: ModelSizes, rows: int) -> Conditioning:
    """What the network is told of `rows` prompts, without storage."""
    network = sizes.described
    width = network.get("joint_attention_dim") or network.get("caption_channels") or network.get("cross_attention_dim")
    length, pooled, masked = CLIP_TOKENS, None, None
    if isinstance(model, Sd3Config):
        length = CLIP_TOKENS + model.max_sequence_length
    elif isinstance(model, FluxConfig | SanaConfig):
        length = model.max_sequence_length
    if isinstance(model, Sd3Config | FluxConfig):
        pooled = torch.empty(rows, network["pooled_projection_dim"], device=_META)
    if isinstance(model, SdxlConfig):
        # The rest of this projection's input is six sizes of a picture.
        width_of_sizes = 6 * network["addition_time_embed_dim"]
        pooled_width = network["projection_class_embeddings_input_dim"] - width_of_sizes
        pooled = torch.empty(rows, pooled_width, device=_META)
    if isinstance(model, SanaConfig):
        masked = torch.empty(rows, length, dtype=torch.int64, device=_META)
    return Conditioning(torch.empty(rows, length, int(width or 1), device=_META), pooled, masked)


def _text(model: Any, sizes: ModelSizes, rows: int) -> tuple[nn.Module, Callable[[], Any], int]:
    """Blocks as the native network calls them, for the longest prompt allowed, and logits of the canvas in fp32."""
    with _META:
        network: Any = FORMATS[type(model)].build(dict(sizes.described), model)
    length = model.max_prompt_length + model.canvas_length
    shape = network.shape
    head_width = shape.hidden_size // shape.num_heads

    def ask() -> None:
        dtype = network.lm_head.weight.dtype
        hidden_BLD = torch.empty(rows, length, shape.hidden_size, dtype=dtype, device=_META)
        hidden_BLD.requires_grad_(model.tuning == "full")
        rotation = tuple(torch.empty(1, length, head_width, dtype=dtype, device=_META) for _ in range(2))
        for block in network.layers:
            hidden_BLD = block(hidden_BLD, attention_mask=None, position_embeddings=rotation, past_key_values=None)
        hidden_BLD = network.norm(hidden_BLD)
        logits_BLV = network.lm_head(hidden_BLD[:, -model.canvas_length :]).float()
        logits_BLV.logsumexp(dim=-1)

    return network, ask, 2 * model.max_prompt_length
