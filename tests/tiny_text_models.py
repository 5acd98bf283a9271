"""Random text checkpoints small enough for tests, one per family, in the published layout and under published names.

The names and shapes are written down here a second time, from the published index files, so that a name map that
drifts is noticed; the same lists at full size stand for LLaDA-8B and Dream-7B.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from raylign.models.adapters import LoraSettings
from raylign.models.dream import DreamConfig
from raylign.models.llada import LladaConfig
from raylign.models.text_policy import TextModelConfig
from raylign.models.tiny_text import TinyTextConfig, make_tiny_text, make_tokenizer, save_tiny_text, settings_for

LETTERS = "abcdefghij"
CANVAS_LENGTH, MAX_PROMPT_LENGTH = 8, 12
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"

LLADA_8B: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM_7B: dict[str, Any] = {
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
TINY_LLADA = {
    **LLADA_8B,
    "d_model": 32,
    "mlp_hidden_size": 48,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "max_sequence_length": 32,
    "embedding_size": 24,
    "vocab_size": 24,
    "eos_token_id": 11,
    "pad_token_id": 11,
    "mask_token_id": 12,
}
TINY_DREAM = {
    **DREAM_7B,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "vocab_size": 24,
    "eos_token_id": 10,
    "pad_token_id": 10,
    "mask_token_id": 12,
}


def llada_shapes(described: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaDA checkpoint, as its model.safetensors.index.json lists them."""
    width, inner, rows = described["d_model"], described["mlp_hidden_size"], described["embedding_size"]
    kept = width // described["n_heads"] * described["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.transformer.wte.weight": (rows, width),
        "model.transformer.ln_f.weight": (width,),
        "model.transformer.ff_out.weight": (rows, width),
    }
    for number in range(described["n_layers"]):
        block = f"model.transformer.blocks.{number}."
        shapes |= {f"{block}{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"{block}{name}.weight": (width, width) for name in ("q_proj", "attn_out")}
        shapes |= {f"{block}{name}.weight": (kept, width) for name in ("k_proj", "v_proj")}
        shapes |= {f"{block}{name}.weight": (inner, width) for name in ("ff_proj", "up_proj")}
        shapes[f"{block}ff_out.weight"] = (width, inner)
    return shapes


def dream_shapes(described: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Dream checkpoint: Qwen2's."""
    width, inner, rows = described["hidden_size"], described["intermediate_size"], described["vocab_size"]
    kept = width // described["num_attention_heads"] * described["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    for number in range(described["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, size in (("q_proj", width), ("k_proj", kept), ("v_proj", kept)):
            shapes[f"{layer}self_attn.{name}.weight"] = (size, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (size,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{layer}mlp.{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that make every tensor matter: matrices of variance 1 / fan-in, norms about one, some bias."""
    draws = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draws)
        tensors[name] = noise / shape[1] ** 0.5 if len(shape) == 2 else 0.2 * noise + float(name.endswith("weight"))
    return tensors


@functools.cache
def tiny_text_folder() -> Path:
    """A random tiny_text directory with features for 2 x 2 boxes of 4 x 4 grids."""
    folder = _new_folder()
    tokenizer = make_tokenizer((), LETTERS)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "grid": 4}
    settings = settings_for(tokenizer, max_prompt_length=MAX_PROMPT_LENGTH, max_canvas_length=CANVAS_LENGTH, **sizes)
    save_tiny_text(folder, settings, make_tiny_text(settings, 0), tokenizer)
    return folder


@functools.cache
def llada_folder() -> Path:
    """A random LLaDA of two layers, in two shards with an index. As published, the tokenizer names no mask token."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = _new_folder()
    tensors = random_tensors(llada_shapes(TINY_LLADA))
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(TINY_LLADA))
    library: Any = pre_tokenizers
    vocab = {token: index for index, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.pre_tokenizer = library.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|mdm_mask|>"],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(str(folder))
    return folder


@functools.cache
def dream_folder() -> Path:
    """A random Dream of two layers in one file; its tokenizer files ask for code that is not there."""
    from safetensors.torch import save_file

    folder = _new_folder()
    save_file(random_tensors(dream_shapes(TINY_DREAM)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_DREAM))
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(LETTERS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"10": "<|endoftext|>", "11": "<|beginoftext|>", "12": "<|mask|>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    described = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {index: {"content": token, **flags} for index, token in special.items()},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def text_config(
    family: type[TextModelConfig], tuning: Literal["lora", "full"] = "lora", **changes: object
) -> TextModelConfig:
    """A configuration of a family over its random checkpoint."""
    values: dict[str, Any] = {
        "path": str(FOLDERS[family]()),
        "canvas_length": CANVAS_LENGTH,
        "max_prompt_length": MAX_PROMPT_LENGTH,
        "tuning": tuning,
        "lora": LoraSettings(rank=2, alpha=4.0),
        "chat_template": family is not TinyTextConfig,
        **changes,
    }
    return family(**values)


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="raylign-tiny-text-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


FOLDERS: dict[type[TextModelConfig], Callable[[], Path]] = {
    TinyTextConfig: tiny_text_folder,
    LladaConfig: llada_folder,
    DreamConfig: dream_folder,
}
