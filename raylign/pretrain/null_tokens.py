"""Training with any number of zero prompt tokens for the price of one.

Without a T5, diffusers appends `max_sequence_length` zero tokens to an SD3 prompt, 256 by default. They are equal,
have no position, and stay equal through every layer, so n of them act exactly like one whose attention logit is
larger by log n. During pre-training one such token is kept and n is drawn anew at each step; the model learns to
give the same picture for every n, so sampling can use the cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class NullTokenAttention:
    """SD3's joint attention, with the last context token counted `num_null_tokens` times."""

    def __init__(self) -> None:
        self.num_null_tokens = 1.0

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens B,N,D and context tokens B,L,D to the same shapes; attention runs over N+L."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        context = encoder_hidden_states
        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        query = torch.cat([query, attn.norm_added_q(heads(attn.add_q_proj(context)))], dim=2)
        key = torch.cat([key, attn.norm_added_k(heads(attn.add_k_proj(context)))], dim=2)
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(context))], dim=2)
        bias = torch.zeros(1, 1, 1, key.shape[2], dtype=key.dtype, device=key.device)
        bias[..., -1] = math.log(self.num_null_tokens)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, context = mixed.split([hidden_states.shape[1], context.shape[1]], dim=1)
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[1](attn.to_out[0](image)), context


@contextmanager
def train_with_null_tokens(
    transformer: SD3Transformer2DModel, max_null_tokens: int
) -> Generator[Callable[[torch.Generator], None]]:
    """Inside, the yielded function draws how many tokens the last context token stands for, log-uniformly."""
    processor = NullTokenAttention()
    before = transformer.attn_processors

    def draw(generator: torch.Generator) -> None:
        processor.num_null_tokens = max_null_tokens ** torch.rand((), generator=generator).item()

    transformer.set_attn_processor(cast("Any", processor))  # diffusers types a closed list of processors
    try:
        yield draw
    finally:
        transformer.set_attn_processor(before)
