"""A tiny, ordinary Stable Diffusion 3 pipeline built from nothing (no download).

Every part is the stock diffusers / transformers class, only small, so that a saved directory loads with
`StableDiffusion3Pipeline.from_pretrained` and anything written for SD3 runs on it.

What the sizes are chosen for:

- Pictures are `height x width` pixels; the VAE shrinks them 4 times and the transformer reads patches of 2
  latents, so one image token covers 8 x 8 pixels.
- The CLIPs have one layer. SD3 takes `hidden_states[-2]` as the prompt, which with one layer is the token plus
  position embedding: enough to spell a word, nearly free, and trained together with the transformer.
- The T5 says nothing: its last norm is zero, so it returns `max_sequence_length` zero vectors, which is also what
  diffusers puts there when SD3 runs without a T5. (With no T5 in the directory `from_pretrained` would ask for
  `text_encoder_3=None`.) The vectors cost time, 256 of them unless told otherwise, so callers pass a small
  `max_sequence_length`; the pre-training makes the model indifferent to their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # diffusers takes seconds to import: only those who build a pipeline pay
    from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VAE_FACTOR = 4
"""Pixels per latent along each side, fixed by the three levels of `build_vae`."""


class TinySD3Config(BaseModel):
    """Sizes of the pipeline; the defaults are those of the embedded `glyphs` model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = 24
    width: int = 80
    latent_channels: int = 8
    vae_channels: int = 24
    fine_decoder_blocks: int = 0
    """Residual blocks of the VAE's decoder at full size; with none, the last two convolutions are linear."""
    patch_size: int = 2
    num_layers: int = 5
    num_heads: int = 4
    head_dim: int = 32
    text_dim: int = 64
    """Width of the first text encoder."""
    text_dim_2: int = 8
    """Width of the second text encoder, which SD3 asks for; it carries next to nothing here."""
    shift: float = 1.0
    """Timestep shift of the scheduler: sigma becomes s*sigma / (1 + (s-1)*sigma)."""
    max_prompt_tokens: int = 16
    """Tokens of a prompt, start and end marks included; longer prompts are cut."""


def build_tokenizer(words: Sequence[str], characters: str, max_prompt_tokens: int) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token and anything else is spelt in `characters`.

    CLIP lower-cases and marks the end of a word with `</w>`, so a character has two tokens: inside and final.
    Whole words are added tokens, not merges: a merge that glues `at` for `that` would also glue the end of `CAT`.
    """
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    vocab = {BOS: 0, EOS: 1}
    for character in sorted(set(characters.lower())):
        for token in (character, character + "</w>"):
            vocab.setdefault(token, len(vocab))
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], unk_token=EOS, pad_token=EOS, model_max_length=max_prompt_tokens)
    whole_words = [AddedToken(word, single_word=True, normalized=True) for word in words]
    tokenizer.add_tokens(cast("Any", whole_words))  # transformers declares its own AddedToken, which is this one
    return tokenizer


def build_text_encoder(
    vocab_size: int, width: int, projection_dim: int, max_prompt_tokens: int
) -> CLIPTextModelWithProjection:
    """One-layer CLIP; prompt states B,L,width are its embeddings, the pooled vector B,projection_dim its output."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection_dim,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=max_prompt_tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModelWithProjection(config)
    embeddings = encoder.text_model.embeddings
    # CLIP's own 0.02 is meant for long training; the transformer reads these vectors raw, so start at unit scale
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.7)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.7)
    return encoder


def build_silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 whose output is exactly zero, B,L,width, and a tokenizer for which every prompt is the end mark alone.

    The one token keeps diffusers from warning that the prompt was cut, however small `max_sequence_length` is.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    config = T5Config(vocab_size=2, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    return encoder, tokenizer


def build_vae(config: TinySD3Config) -> AutoencoderTiny:
    """Pictures B,3,H,W in [-1, 1] to latents B,C,H/4,W/4 and back, convolutions only."""
    from diffusers import AutoencoderTiny

    channels = (config.vae_channels,) * 3
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(0, 1, 1),  # nothing but one convolution at full size: that is where the time goes
        num_decoder_blocks=(1, 1, config.fine_decoder_blocks),
        latent_channels=config.latent_channels,
    )


def build_transformer(config: TinySD3Config) -> SD3Transformer2DModel:
    """The velocity model, starting as the zero function (adaLN gates and output are zero)."""
    from diffusers import SD3Transformer2DModel

    latents_wide = max(config.height, config.width) // VAE_FACTOR
    text_dim = config.text_dim + config.text_dim_2
    transformer = SD3Transformer2DModel(
        sample_size=latents_wide,
        patch_size=config.patch_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.num_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=text_dim,
        caption_projection_dim=config.num_heads * config.head_dim,
        pooled_projection_dim=text_dim,
        pos_embed_max_size=latents_wide // config.patch_size,
        qk_norm="rms_norm",
    )
    gates = [m for name, m in transformer.named_modules() if name.endswith(("norm1.linear", "norm1_context.linear"))]
    for linear in (*gates, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def build_tiny_sd3(
    words: Sequence[str], characters: str, seed: int, config: TinySD3Config | None = None
) -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights, the same for the same `seed`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    config = config or TinySD3Config()
    limit = config.max_prompt_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        silent_t5, silent_tokenizer = build_silent_t5(config.text_dim + config.text_dim_2)
        # two tokenizer objects: diffusers saves each under its own folder
        tokenizer, tokenizer_2 = (build_tokenizer(words, characters, limit) for _ in range(2))
        return StableDiffusion3Pipeline(
            transformer=build_transformer(config),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=config.shift),
            vae=cast("Any", build_vae(config)),  # diffusers names AutoencoderKL and takes any VAE
            text_encoder=build_text_encoder(len(tokenizer), config.text_dim, config.text_dim, limit),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(len(tokenizer), config.text_dim_2, config.text_dim_2, limit),
            tokenizer_2=tokenizer_2,
            text_encoder_3=silent_t5,
            tokenizer_3=silent_tokenizer,
        )
