"""A transformer in which every position sees every other: transformers' own decoder layers under a padding mask.

LLaDA (2502.09992) is Llama without the causal mask; Dream (2508.15487) is Qwen2 without it. So the layers, rotary
embedding and RMSNorm are transformers' own, bound here to full attention. Names of modules and tensors are those of
`LlamaForCausalLM` without its leading `model.`; a family's file maps them to the names its checkpoints use.

The sequence is `[padding][prompt][canvas]`. Positions are counted from the first real token, and padding is attended
by nobody, so a row computes the same alone and in a padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raylign.errors import ShapeError
from raylign.models.kv_cache import BlockCache
from raylign.shapes import check_shape

BLOCK_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Every linear layer of a block, by the network's own names."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """The sizes of a network, read from a checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float
    rope_theta: float | None
    """Base of the rotary embedding; None for none at all."""
    block: Literal["llama", "qwen2"] = "llama"
    """Whose decoder layer: qwen2's has biases on query, key and value."""
    max_positions: int = 4096
    """Longest sequence the model was made for, prompt and canvas."""


class BidirectionalNetwork(nn.Module):
    """Token ids to hidden states; `lm_head` turns hidden states into logits.

    position_features: optional module from (index of each position from the row's first real token, (B, L), and from
    the canvas's start, (L,), negative in the prompt) to what is added to the embeddings, (B, L, D) or (L, D).
    """

    def __init__(self, shape: NetworkShape, position_features: nn.Module | None = None) -> None:
        super().__init__()
        layer, norm, rotary, config = _building_blocks(shape)
        self.shape = shape
        self.hidden_size = shape.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        blocks = [layer(config, index) for index in range(shape.num_layers)]
        for block in blocks:
            block.self_attn.is_causal = False
        self.layers = nn.ModuleList(blocks)
        self.norm = norm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        with torch.device("cpu"):  # its frequencies are computed, not loaded, so they exist also in a meta network
            self.rotary = rotary(config) if shape.rope_theta is not None else None
        self.position_features = position_features
        self.recompute = False
        self.eval()

    def forward(
        self,
        ids_BL: torch.Tensor,
        real_BL: torch.Tensor,
        num_prompt: int,
        cache: BlockCache | None = None,
    ) -> torch.Tensor:
        """Hidden states after the last norm, (B, computed, D), of the positions that were computed.

        ids_BL int64 and real_BL bool cover the whole sequence, whose first `num_prompt` positions are the padded
        prompt. Without a cache every position is computed, with one those that `cache.fresh` names.
        """
        check_shape(real_BL, "real_BL", B=ids_BL.shape[0], L=ids_BL.shape[1])
        length = ids_BL.shape[1]
        fresh = cache.fresh(num_prompt, length - num_prompt) if cache is not None else slice(0, length)
        position_BL = (real_BL.cumsum(dim=1) - 1).clamp_min(0)[:, fresh]
        hidden_BLD = self.embed_tokens(ids_BL[:, fresh])
        if self.position_features is not None:
            offset_L = torch.arange(fresh.start - num_prompt, fresh.stop - num_prompt, device=ids_BL.device)
            hidden_BLD = hidden_BLD + self.position_features(position_BL, offset_L)
        # Without padding there is nothing to mask, and attention may take its fastest kernel.
        mask = None if bool(real_BL.all()) else real_BL[:, None, None, :]
        rotation = self._rotation(hidden_BLD, position_BL)
        for block in self.layers:
            if self.recompute and cache is None and torch.is_grad_enabled():
                hidden_BLD = checkpoint(_call_block, block, hidden_BLD, mask, rotation, None, use_reentrant=False)
            else:
                hidden_BLD = _call_block(block, hidden_BLD, mask, rotation, cache)
        return self.norm(hidden_BLD)

    def read(
        self,
        ids_BL: torch.Tensor,
        real_BL: torch.Tensor,
        num_prompt: int,
        span: slice,
        shift: int = 0,
        cache: BlockCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the canvas positions in `span`, (B, span, V), and what `forward` gives.

        shift: how far to the left of a position its logits are. Raises ShapeError for positions that were not computed.
        """
        hidden_BLD = self(ids_BL, real_BL, num_prompt, cache)
        start = num_prompt + span.start - shift - (cache.place.start if cache is not None else 0)
        stop = start + span.stop - span.start
        if start < 0 or stop > hidden_BLD.shape[1]:
            raise ShapeError(f"canvas positions {span.start} to {span.stop} are not all computed in this call")
        return self.lm_head(hidden_BLD[:, start:stop]), hidden_BLD

    def _rotation(self, hidden_BLD: torch.Tensor, position_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each position's angles, (B or 1, L or 1, head width), in the dtype of the hidden states."""
        if self.rotary is not None:
            return self.rotary(hidden_BLD, position_BL)
        still = hidden_BLD.new_zeros(1, 1, self.shape.hidden_size // self.shape.num_heads)
        return still + 1, still


def _call_block(
    block: nn.Module,
    hidden_BLD: torch.Tensor,
    mask: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor],
    cache: BlockCache | None,
) -> torch.Tensor:
    return block(hidden_BLD, attention_mask=mask, position_embeddings=rotation, past_key_values=cache)


def _building_blocks(shape: NetworkShape) -> tuple[Any, Any, Any, Any]:
    """transformers' decoder layer, norm and rotary classes for a shape, and the configuration they are built from."""
    from transformers import LlamaConfig, Qwen2Config
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

    config_class, *parts = {
        "llama": (LlamaConfig, LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
        "qwen2": (Qwen2Config, Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding),
    }[shape.block]
    config = cast("Any", config_class)(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.rms_norm_eps,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta or 1.0},
        attn_implementation="sdpa",
    )
    return parts[0], parts[1], parts[2], config
