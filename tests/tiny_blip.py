"""ImageReward's network once more, written from its description, with random weights: what its file must mean.

Names and shapes of the parameters are those of THUDM/ImageReward; the vision tower has 2 heads of 64, the text
encoder reads single letters.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from tests.tiny_clip import LETTERS, head_state, scratch_folder

SIDE, PATCH, WIDTH, LAYERS = 32, 16, 128, 2
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": 60,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "encoder_width": 768,  # as published: the code puts the vision tower's width in its place
}
Shapes = dict[str, tuple[int, ...]]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def imagereward_state() -> dict[str, Tensor]:
    """ImageReward.pt with random weights."""
    shapes = _vision_shapes() | _text_shapes()
    draw = torch.Generator().manual_seed(5)
    state = {
        name: torch.randn(*shape, generator=draw) * 0.2 + (1.0 if "orm" in name and name.endswith("weight") else 0.0)
        for name, shape in shapes.items()
    }
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(TEXT["max_position_embeddings"])[None]
    return state | head_state(TEXT["hidden_size"], "mlp.")


def _layer(name: str, inwards: int, outwards: int) -> Shapes:
    return {f"{name}.weight": (outwards, inwards), f"{name}.bias": (outwards,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _vision_shapes() -> Shapes:
    root = "blip.visual_encoder"
    shapes: Shapes = {
        f"{root}.cls_token": (1, 1, WIDTH),
        f"{root}.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        f"{root}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{root}.patch_embed.proj.bias": (WIDTH,),
        "blip.vision_proj.weight": (256, WIDTH),
        "blip.text_proj.weight": (256, TEXT["hidden_size"]),
    }
    shapes |= _norm(f"{root}.norm", WIDTH)
    for i in range(LAYERS):
        block = f"{root}.blocks.{i}"
        shapes |= _norm(f"{block}.norm1", WIDTH) | _norm(f"{block}.norm2", WIDTH)
        shapes |= _layer(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | _layer(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= _layer(f"{block}.mlp.fc1", WIDTH, 96) | _layer(f"{block}.mlp.fc2", 96, WIDTH)
    return shapes


def _text_shapes() -> Shapes:
    root, width, inner = "blip.text_encoder", TEXT["hidden_size"], TEXT["intermediate_size"]
    shapes: Shapes = {
        f"{root}.embeddings.word_embeddings.weight": (TEXT["vocab_size"], width),
        f"{root}.embeddings.position_embeddings.weight": (TEXT["max_position_embeddings"], width),
    }
    shapes |= _norm(f"{root}.embeddings.LayerNorm", width)
    for i in range(LAYERS):
        layer = f"{root}.encoder.layer.{i}"
        for kind, seen in (("attention", width), ("crossattention", WIDTH)):
            shapes |= _layer(f"{layer}.{kind}.self.query", width, width)
            shapes |= _layer(f"{layer}.{kind}.self.key", seen, width)
            shapes |= _layer(f"{layer}.{kind}.self.value", seen, width)
            shapes |= _layer(f"{layer}.{kind}.output.dense", width, width)
            shapes |= _norm(f"{layer}.{kind}.output.LayerNorm", width)
        shapes |= _layer(f"{layer}.intermediate.dense", width, inner) | _layer(f"{layer}.output.dense", inner, width)
        shapes |= _norm(f"{layer}.output.LayerNorm", width)
    return shapes


class Reference:
    """The forward pass over such a state dict, in double precision."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()}

    def rate(self, tokens_L: list[int], pixels_1CHW: Tensor) -> float:
        """The head's answer to a tokenised prompt, padded as published to 35, and a normalised picture."""
        x = self._read(tokens_L, self._look(pixels_1CHW.double()))[0, 0]
        for layer in (0, 2, 4, 6, 7):
            x = self._linear(f"mlp.layers.{layer}", x)
        return float(x)

    def _look(self, pixels: Tensor) -> Tensor:
        root = "blip.visual_encoder"
        weight, bias = (self.state[f"{root}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = nn.functional.conv2d(pixels, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([self.state[f"{root}.cls_token"], patches], dim=1) + self.state[f"{root}.pos_embed"]
        for i in range(LAYERS):
            block = f"{root}.blocks.{i}"
            q, k, v = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + self._linear(f"{block}.attn.proj", _attend(q, k, v, heads=WIDTH // 64))
            inner = gelu(self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", x, 1e-6)))
            x = x + self._linear(f"{block}.mlp.fc2", inner)
        return self._norm(f"{root}.norm", x, 1e-6)

    def _read(self, tokens: list[int], picture: Tensor) -> Tensor:
        root, length = "blip.text_encoder", 35
        padded = torch.tensor([tokens + [0] * (length - len(tokens))])
        seen = torch.tensor([0.0] * len(tokens) + [-1e9] * (length - len(tokens)))
        x = self.state[f"{root}.embeddings.word_embeddings.weight"][padded]
        x = x + self.state[f"{root}.embeddings.position_embeddings.weight"][:length]
        x = self._norm(f"{root}.embeddings.LayerNorm", x, 1e-12)
        for i in range(LAYERS):
            layer = f"{root}.encoder.layer.{i}"
            for kind, source, mask in (("attention", None, seen), ("crossattention", picture, None)):
                looked_at = x if source is None else source
                q = self._linear(f"{layer}.{kind}.self.query", x)
                k, v = (self._linear(f"{layer}.{kind}.self.{part}", looked_at) for part in ("key", "value"))
                y = self._linear(f"{layer}.{kind}.output.dense", _attend(q, k, v, TEXT["num_attention_heads"], mask))
                x = self._norm(f"{layer}.{kind}.output.LayerNorm", x + y, 1e-12)
            inner = gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(f"{layer}.output.LayerNorm", x + self._linear(f"{layer}.output.dense", inner), 1e-12)
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (weights if mask is None else weights + mask).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@functools.cache
def blip_tokenizer_folder() -> str:
    """BERT's tokenizer over single letters, as it is saved."""
    from transformers import BertTokenizer

    folder = scratch_folder() / "bert"
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=True).save_pretrained(folder)
    return str(folder)


@functools.cache
def imagereward_files() -> tuple[str, str]:
    """ImageReward.pt and med_config.json."""
    weights, settings = scratch_folder() / "ImageReward.pt", scratch_folder() / "med_config.json"
    torch.save(imagereward_state(), weights)
    settings.write_text(json.dumps(TEXT), encoding="utf-8")
    return str(weights), str(settings)
