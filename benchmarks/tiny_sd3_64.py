"""A random Stable Diffusion 3 pipeline of the size that CPU comparisons of RL stacks use, as a diffusers directory.

2 transformer layers of width 128, 64x64 pictures (16 latent channels, 8x8), 77 CLIP and up to 512 T5 tokens per
prompt. Stock diffusers / transformers classes, random weights from one seed, no download. What only costs time once
per prompt (the text encoders) or once per picture (the VAE) is as small as it can be.

    python benchmarks/tiny_sd3_64.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast

HEIGHT = WIDTH = 64
NUM_CLIP_TOKENS = 77
LATENT_CHANNELS = 16
PROMPTS = ("a photo of a cat", "a red square", "snow at night", "two old boats")

_CLIP_WIDTH = 32
_T5_WIDTH = 2 * _CLIP_WIDTH
_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": HEIGHT,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def build_model_dir(path: str | Path, seed: int = 0) -> Path:
    """Write the pipeline to `path` (created) unless one is there already. The same bytes for the same seed."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=HEIGHT // 8,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=32,
            joint_attention_dim=_T5_WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=2 * _CLIP_WIDTH,
            pos_embed_max_size=HEIGHT // 16,
            qk_norm="rms_norm",
        )
        vae = AutoencoderKL(**_VAE)
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(_CHARACTERS) + 3, d_model=_T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=vae,
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=t5,
            tokenizer_3=_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _clip() -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=2 * len(_CHARACTERS) + 2,
            hidden_size=_CLIP_WIDTH,
            intermediate_size=2 * _CLIP_WIDTH,
            projection_dim=_CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=NUM_CLIP_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _clip_tokenizer() -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    vocab = {_BOS: 0, _EOS: 1}
    for character in _CHARACTERS:
        for token in (character, character + "</w>"):
            vocab[token] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], unk_token=_EOS, pad_token=_EOS, model_max_length=NUM_CLIP_TOKENS)


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {character: 3 + i for i, character in enumerate(_CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(build_model_dir(sys.argv[1]))
