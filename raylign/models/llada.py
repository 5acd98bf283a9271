"""LLaDA-8B Base, Instruct and 1.5 (2502.09992, 2505.19223): Llama without the causal mask, under OLMo's names.

Pre-norm blocks of RMSNorm, rotary attention without biases and SwiGLU: ff_out(silu(ff_proj x) * up_proj x), so
`ff_proj` is Llama's gate and a block's `ff_out` its down projection; the output layer is called `ff_out` as well, one
level up. Position k's logits say what token k is. The published code ignores the attention mask; here padding is
masked. In bf16 that code rotates queries and keys in fp32 and this one in bf16, as transformers' Llama does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from raylign.models.bidirectional import BidirectionalNetwork, NetworkShape
from raylign.models.text_checkpoint import NameMap, TextFormat, refuse_options
from raylign.models.text_policy import TextModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = NameMap(
    outer={
        "embed_tokens.weight": "model.transformer.wte.weight",
        "norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight",
    },
    layer={
        "self_attn.q_proj.weight": "q_proj.weight",
        "self_attn.k_proj.weight": "k_proj.weight",
        "self_attn.v_proj.weight": "v_proj.weight",
        "self_attn.o_proj.weight": "attn_out.weight",
        "mlp.gate_proj.weight": "ff_proj.weight",
        "mlp.up_proj.weight": "up_proj.weight",
        "mlp.down_proj.weight": "ff_out.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ff_norm.weight",
    },
    layer_prefix="model.transformer.blocks.",
)
# What the native network computes; a checkpoint that says otherwise is another model.
_OPTIONS = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "weight_tying": False,
}


class LladaConfig(TextModelConfig):
    """A LLaDA checkpoint directory and how it is trained."""

    type: Literal["llada"] = "llada"


def build_llada(described: dict[str, Any], config: TextModelConfig) -> BidirectionalNetwork:
    """The network that a config.json describes. Raises ModelError for options of other models, KeyError for gaps."""
    refuse_options(config.path, described, _OPTIONS)
    return BidirectionalNetwork(
        NetworkShape(
            vocab_size=described.get("embedding_size") or described["vocab_size"],
            hidden_size=described["d_model"],
            intermediate_size=described["mlp_hidden_size"],
            num_layers=described["n_layers"],
            num_heads=described["n_heads"],
            num_kv_heads=described.get("n_kv_heads") or described["n_heads"],
            rms_norm_eps=described["rms_norm_eps"],
            rope_theta=described["rope_theta"],
            max_positions=described["max_sequence_length"],
        )
    )


def _tokenizer_class() -> type[PreTrainedTokenizerFast]:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


LLADA = TextFormat("llada", NAMES, build_llada, _tokenizer_class)
