"""Dream-7B Base and Instruct (2508.15487): Qwen2 without the causal mask, whose raw logits are shifted by one.

Dream was initialised from an autoregressive model, so its raw output at position k - 1 says what token k is. Its
tokenizer is Qwen2's with two more special tokens; the checkpoint brings code for it, which is not needed here.
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
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
    layer={
        "self_attn.q_proj.weight": "self_attn.q_proj.weight",
        "self_attn.q_proj.bias": "self_attn.q_proj.bias",
        "self_attn.k_proj.weight": "self_attn.k_proj.weight",
        "self_attn.k_proj.bias": "self_attn.k_proj.bias",
        "self_attn.v_proj.weight": "self_attn.v_proj.weight",
        "self_attn.v_proj.bias": "self_attn.v_proj.bias",
        "self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "mlp.up_proj.weight": "mlp.up_proj.weight",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    },
    layer_prefix="model.layers.",
)
# What the native network computes; a checkpoint that says otherwise is another model.
_OPTIONS = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
}


class DreamConfig(TextModelConfig):
    """A Dream checkpoint directory and how it is trained."""

    type: Literal["dream"] = "dream"


def build_dream(described: dict[str, Any], config: TextModelConfig) -> BidirectionalNetwork:
    """The network that a config.json describes. Raises ModelError for options of other models, KeyError for gaps."""
    refuse_options(config.path, described, _OPTIONS)
    return BidirectionalNetwork(
        NetworkShape(
            vocab_size=described["vocab_size"],
            hidden_size=described["hidden_size"],
            intermediate_size=described["intermediate_size"],
            num_layers=described["num_hidden_layers"],
            num_heads=described["num_attention_heads"],
            num_kv_heads=described["num_key_value_heads"],
            rms_norm_eps=described["rms_norm_eps"],
            rope_theta=described["rope_theta"],
            block="qwen2",
            max_positions=described["max_position_embeddings"],
        )
    )


def _tokenizer_class() -> type[PreTrainedTokenizerFast]:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer


DREAM = TextFormat("Dream", NAMES, build_dream, _tokenizer_class, shift=1)
