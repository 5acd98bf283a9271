"""Parts of tiny random pipelines, from stock transformers and diffusers modules, and how pipelines are saved."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {
    token: 2 + place for place, token in enumerate([*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)])
}


@contextmanager
def seeded(seed: int = 0) -> Generator[None]:
    """Modules made inside have the weights of this seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def saved(pipeline: Any, name: str) -> Path:
    """The pipeline's directory, gone when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"raylign-tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipeline.save_pretrained(str(folder))
    return folder


def clip_text(*, projected: bool = True) -> Any:
    """CLIP's text encoder, two blocks 16 wide, with or without the projection to the space it shares with pictures."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    """CLIP's own tokenizer over single letters and digits."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=_VOCABULARY, merges=[], unk_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=16
    )


def t5_tokenizer() -> Any:
    """One token per word; only single letters and digits are known."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + place for place, letter in enumerate(_LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def kl_vae(**changes: Any) -> Any:
    """An AutoencoderKL of factor 2 with 4 channels."""
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL  # diffusers types its tuples as one long
    return build(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        **changes,
    )
