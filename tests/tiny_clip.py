"""A random CLIP of a few thousand weights in the real file formats, with a tokenizer made on the fly."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

SIDE = 32
CONTEXT = 16
EMBEDDING = 768
"""As long as the vectors of CLIP ViT-L/14, for the aesthetic predictor's sake."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@functools.cache
def scratch_folder() -> Path:
    """A folder for this process's checkpoints, gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="raylign-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def clip_config(activation: str = "quick_gelu") -> Any:
    """The architecture: two blocks in each tower, two heads."""
    from transformers import CLIPConfig

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "hidden_act": activation}
    tower |= {"projection_dim": EMBEDDING}
    return CLIPConfig(
        projection_dim=EMBEDDING,
        text_config=tower
        | {"hidden_size": 24, "vocab_size": 2 + 2 * len(LETTERS), "max_position_embeddings": CONTEXT, "eos_token_id": 1}
        | {"bos_token_id": 0, "pad_token_id": 1},
        vision_config=tower | {"hidden_size": 32, "image_size": SIDE, "patch_size": 8},
    )


def tokenizer() -> Any:
    """CLIP's own tokenizer over single letters."""
    from transformers import CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=CONTEXT)


def image_processor() -> Any:
    """CLIP's preprocessing at the tiny model's size."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def clip_model(activation: str = "quick_gelu", seed: int = 0) -> Any:
    """Random weights, larger than at the start of training, so that texts and pictures really differ."""
    from transformers import CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = CLIPModel(clip_config(activation))
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.data.normal_(0.0, 0.2)
    return model.eval()


@functools.cache
def clip_folder(activation: str = "quick_gelu", seed: int = 0) -> str:
    """A whole checkpoint as `save_pretrained` writes it."""
    folder = scratch_folder() / f"clip_{activation}_{seed}"
    for part in (clip_model(activation, seed), tokenizer(), image_processor()):
        part.save_pretrained(folder)
    return str(folder)


def head_state(width: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random weights of the five linear layers that ImageReward and the aesthetic predictor put on a vector."""
    draw = torch.Generator().manual_seed(7)
    widths = (width, 1024, 128, 64, 16, 1)
    state: dict[str, torch.Tensor] = {}
    for layer, inwards, outwards in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weight = torch.randn(outwards, inwards, generator=draw) / inwards**0.5
        state |= {f"{prefix}layers.{layer}.weight": weight, f"{prefix}layers.{layer}.bias": torch.ones(outwards)}
    return state
