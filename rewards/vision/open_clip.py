"""The names of CLIP's tensors in open_clip's files, put into transformers' names. Pure renaming and splitting.

open_clip (and OpenAI) keep the three attention projections of a block in one tensor, and the projections into the
common space transposed. Layout: mlfoundations/open_clip, src/open_clip/transformer.py and model.py; the same in the
copy inside tgxs002/HPSv2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_CAUSAL_MASK = "attn_mask"
"""A constant that some versions saved."""


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of transformers' CLIPModel; a name that open_clip does not use stays."""
    return {new: tensor for name, old in state.items() if name != _CAUSAL_MASK for new, tensor in _renamed(name, old)}


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(name)
    if name in _WHOLE:
        yield _WHOLE[name], tensor
    elif name in _TRANSPOSED:
        yield _TRANSPOSED[name], tensor.T.contiguous()
    elif module in _NORMS:
        yield f"{_NORMS[module]}.{kind}", tensor
    elif block:
        tower = "vision_model" if block.group(1) else "text_model"
        layer = f"{tower}.encoder.layers.{block.group(2)}"
        yield from _renamed_in_block(layer, block.group(3), tensor)
    else:
        yield name, tensor


def _renamed_in_block(layer: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}.self_attn.{letter}_proj.{kind}", part.clone()
    elif module in _IN_BLOCK:
        yield f"{layer}.{_IN_BLOCK[module]}.{kind}", tensor
    else:
        yield f"{layer}.{name}", tensor
