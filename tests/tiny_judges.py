"""Judges small enough to build in a second: random checkpoints with a tokenizer and a chat template, real in form.

Their answers mean nothing; what servers and engines do with them is what they would do with a trained one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_LABELS = ("yes", "Yes", "YES", "no", "No", "NO", "1", "2", "3", "4", "5")
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
]
_THINKING = ["<think>", "</think>"]
_WIDTH = 64
_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}{% else %}PICTURE{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined %}<think>
{% if not enable_thinking %}

</think>

{% endif %}{% endif %}{% endif %}"""


def write_text_judge(folder: Path, seed: int = 0) -> Path:
    """A Qwen3 that reads text and may think."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _tokenizer("")
    config = Qwen3Config(**_language(len(tokenizer)), max_position_embeddings=8192)
    return _save(folder, seed, lambda: Qwen3ForCausalLM(config), tokenizer)


def write_llava_judge(folder: Path, seed: int = 0) -> Path:
    """A LLaVA that sees pictures of 32 pixels a side; it needs no torchvision."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen3Config,
    )

    tokenizer = _tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=Qwen3Config(**_language(len(tokenizer)), max_position_embeddings=8192),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    side = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return _save(folder, seed, lambda: LlavaForConditionalGeneration(config), processor)


def write_qwen_vl_judge(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL, which vLLM serves. Reading it with transformers needs torchvision, so its files are written out."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
    token: Callable[[str], Any] = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **_language(len(tokenizer)),
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": _WIDTH,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": _WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    _save(folder, seed, lambda: Qwen2_5_VLForConditionalGeneration(config), tokenizer)
    sizes = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 112,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen2_5_VLProcessor",
    }
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / name).write_text(json.dumps({**sizes, **kind}), encoding="utf-8")
    return folder


def _language(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": _WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # vLLM's attention on CPU has no smaller one
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }


def _save(folder: Path, seed: int, build: Callable[[], Any], reader: Any) -> Path:
    tokenizer = getattr(reader, "tokenizer", reader)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        # A default initialisation answers every question alike; wide weights let the question decide. One direction is
        # the same for all tokens and no layer writes it, which gives each token a bias in the answer: special tokens
        # are never said, and a quoted text ends soon.
        for name, parameter in model.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if parameter.dim() > 1:
                parameter.normal_(std=0.05 if writes else 0.3)
            if writes:
                parameter[0] = 0.0
        model.get_input_embeddings().weight.normal_(std=2.0)[:, 0] = 4.0
        bias_V = torch.zeros(len(tokenizer))
        bias_V[tokenizer.convert_tokens_to_ids([*_SPECIAL, *_THINKING])] = -15.0
        bias_V[tokenizer.convert_tokens_to_ids('"')] = 4.0
        model.get_output_embeddings().weight[:, 0] = bias_V
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def _tokenizer(picture: str) -> Any:
    """Byte-level BPE whose labels, with and without a space before them, are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [text for label in _LABELS for text in (label, f" {label}")]
    bpe.train_from_iterator(words * 10, trainer)
    bpe.add_tokens(_THINKING)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.chat_template = _TEMPLATE.replace("PICTURE", picture)
    return tokenizer
