"""The tiny diffusion language model: Llama blocks a few hundred thousand numbers large, in a Hugging Face directory.

It exists so that everything written for LLaDA and Dream runs, learns and is tested on two CPU cores. A directory
holds `config.json` (`TinyTextSettings`), `model.safetensors` and a tokenizer of whole words and single other
characters. Positions of the canvas and of the prompt have learned features, on top
of or instead of the rotary embedding; for n x n grids there are features of row, column and box as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from raylign.config import Config, parse_config
from raylign.errors import ConfigError, ModelError
from raylign.models.bidirectional import BLOCK_LINEARS, BidirectionalNetwork, NetworkShape
from raylign.models.text_checkpoint import NameMap, TextFormat
from raylign.models.text_policy import TextModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK, UNKNOWN = "<pad>", "<eos>", "<mask>", "<unk>"


class TinyTextSettings(Config):
    """Sizes of a tiny model: what its config.json holds."""

    model_type: Literal["tiny_text"] = "tiny_text"
    vocab_size: int = Field(ge=5)
    """Rows of the embedding: all tokens of the tokenizer."""
    hidden_size: int = Field(default=96, ge=8)
    intermediate_size: int = Field(default=256, ge=8)
    num_hidden_layers: int = Field(default=3, ge=1)
    num_attention_heads: int = Field(default=4, ge=1)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float | None = Field(default=10000.0, gt=0)
    """Base of the rotary embedding; null for none."""
    position_features: bool = True
    """Learned features of each position of the prompt and of the canvas, added to the embeddings."""
    grid: int | None = Field(default=None, ge=1)
    """Side n of the n x n grids (n a square) that the first n^2 canvas and the last n^2 prompt tokens may spell."""
    max_prompt_length: int = Field(default=32, ge=1)
    """Prompt positions that have features."""
    max_canvas_length: int = Field(default=16, ge=1)
    """Canvas positions that have features."""
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int

    @model_validator(mode="after")
    def _check_sizes(self) -> TinyTextSettings:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * num_attention_heads, got {self.hidden_size}")
        if self.grid is not None and round(self.grid**0.5) ** 2 != self.grid:
            raise ValueError(f"grid must be a square number, so that it has boxes, got {self.grid}")
        return self


class PositionFeatures(nn.Module):
    """Learned features of where a token is: its index in prompt or canvas, and its row, column and box in a grid."""

    def __init__(self, settings: TinyTextSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.canvas_length = settings.max_canvas_length
        self.prompt_length = settings.max_prompt_length
        self.grid = settings.grid
        self.index = nn.Embedding(self.canvas_length + self.prompt_length, width)
        side = settings.grid or 0
        # The last entry of each means "not in a grid".
        self.row, self.column, self.box = (nn.Embedding(side + 1, width) if side else None for _ in range(3))

    def forward(self, position_BL: torch.Tensor, offset_L: torch.Tensor) -> torch.Tensor:
        """(B, L, D) from the index counted from the first real token and the index counted from the canvas's start."""
        in_canvas_L = offset_L >= 0
        prompt_BL = self.canvas_length + position_BL.clamp_max(self.prompt_length - 1)
        features_BLD = self.index(torch.where(in_canvas_L, offset_L.clamp_min(0), prompt_BL))
        if self.grid is None or self.row is None or self.column is None or self.box is None:
            return features_BLD
        side, box_side = self.grid, round(self.grid**0.5)
        cell_L = torch.where(in_canvas_L, offset_L, offset_L + side**2)
        outside_L = (cell_L < 0) | (cell_L >= side**2)
        row_L, column_L = cell_L // side, cell_L % side
        box_L = row_L // box_side * box_side + column_L // box_side
        for table, place_L in ((self.row, row_L), (self.column, column_L), (self.box, box_L)):
            features_BLD = features_BLD + table(place_L.masked_fill(outside_L, side))
        return features_BLD


def make_tiny_text(settings: TinyTextSettings, seed: int) -> BidirectionalNetwork:
    """A network with random weights on the CPU, the same for the same seed: norms one, matrices of variance
    1 / (3 fan-in), as torch starts its linear layers, and embeddings of deviation .3 (.02 learns to sort slower)."""
    features = PositionFeatures(settings) if settings.position_features else None
    network = BidirectionalNetwork(network_shape(settings), features)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = (3 * module.in_features) ** -0.5 if isinstance(module, nn.Linear) else 0.3
                module.weight.copy_(scale * torch.randn(module.weight.shape, generator=draws))
    return network


def network_shape(settings: TinyTextSettings) -> NetworkShape:
    """The network's sizes: one key-value head per query head."""
    return NetworkShape(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_hidden_layers,
        num_heads=settings.num_attention_heads,
        num_kv_heads=settings.num_attention_heads,
        rms_norm_eps=settings.rms_norm_eps,
        rope_theta=settings.rope_theta,
        max_positions=settings.max_prompt_length + settings.max_canvas_length,
    )


def make_tokenizer(words: Sequence[str], symbols: str) -> PreTrainedTokenizerFast:
    """One token for each of `words` and for each character of `symbols`; white space separates and is left out.

    Decoding puts nothing between tokens: labels are spelt in symbols.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([PAD, EOS, MASK, UNKNOWN, *dict.fromkeys([*words, *symbols])])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    library: Any = pre_tokenizers
    known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = rf"\b(?:{known})\b|\S" if words else r"\S"
    separate = library.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = library.Sequence([library.WhitespaceSplit(), separate])
    backend.decoder = cast("Any", decoders).Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def settings_for(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> TinyTextSettings:
    """The settings of a model that speaks a tokenizer's tokens."""
    return TinyTextSettings(
        vocab_size=len(tokenizer),
        mask_token_id=cast("int", tokenizer.mask_token_id),
        eos_token_id=cast("int", tokenizer.eos_token_id),
        pad_token_id=cast("int", tokenizer.pad_token_id),
        **sizes,
    )


def save_tiny_text(
    folder: Path, settings: TinyTextSettings, network: BidirectionalNetwork, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write a directory that `TinyTextConfig.path` can name. Raises ModelError for a tokenizer that does not fit."""
    from safetensors.torch import save_file

    if len(tokenizer) != settings.vocab_size:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {settings.vocab_size}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings.model_dump(), indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))


class TinyTextConfig(TextModelConfig):
    """A tiny text model directory and how it is trained."""

    type: Literal["tiny_text"] = "tiny_text"
    path: str = "asset:text/tiny"
    """Model directory; `asset:text/tiny` is the one that ships with Raylign."""
    canvas_length: int = Field(default=8, ge=1)
    """Response positions; at most the model's own."""
    max_prompt_length: int = Field(default=32, ge=1)
    """Longest prompt in tokens; at most the model's own."""
    chat_template: bool = False
    """Tiny models read prompts as they are."""


def build_tiny_text(described: dict[str, Any], config: TextModelConfig) -> BidirectionalNetwork:
    """The network that a config.json describes. Raises ModelError for a bad one, or lengths it has no positions for."""
    try:
        settings = parse_config(TinyTextSettings, described, f"{config.path}/config.json")
    except ConfigError as error:
        raise ModelError(str(error)) from None
    for key, most in (("canvas_length", settings.max_canvas_length), ("max_prompt_length", settings.max_prompt_length)):
        if getattr(config, key) > most:
            raise ModelError(f"model.{key} is {getattr(config, key)}, this model has positions for {most}")
    features = PositionFeatures(settings) if settings.position_features else None
    return BidirectionalNetwork(network_shape(settings), features)


def _tokenizer_class() -> type[PreTrainedTokenizerFast]:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


_OUTER = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
_FEATURES = tuple(f"position_features.{name}.weight" for name in ("index", "row", "column", "box"))
_LAYER = (*(f"{name}.weight" for name in BLOCK_LINEARS), "input_layernorm.weight", "post_attention_layernorm.weight")
TINY_TEXT = TextFormat(
    model_type="tiny_text",
    names=NameMap({name: name for name in (*_OUTER, *_FEATURES)}, {name: name for name in _LAYER}, "layers."),
    build=build_tiny_text,
    tokenizer=_tokenizer_class,
)
