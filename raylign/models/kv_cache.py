"""Keys and values kept while one block of a canvas is filled (Fast-dLLM, 2505.22618, section 3.2).

The first call of a block computes every position and stores the keys and values of every layer. Later calls compute
some positions only, attend to what is stored, and overwrite the stored keys and values of what they computed:

    prefix   everything from the block on is computed anew; what lies before it is kept
    dual     the block alone is computed anew; what lies before and behind it is kept

What is kept is stale as soon as the block changes, so a cache trades a little exactness for time; the first call of
each block is exact. A model whose logits are shifted reads position k at k - 1, so there one position more, to the
left of the block, is computed anew.
"""

from __future__ import annotations

import torch

from raylign.models.tokens import CacheKind


class BlockCache:
    """A `KvCache`, and the `past_key_values` that transformers' attention layers call.

    span: the block, in positions of the canvas. shift: 1 for a model with shifted logits, else 0.
    """

    def __init__(self, kind: CacheKind, span: slice, shift: int = 0) -> None:
        self.kind = kind
        self.span = span
        self.shift = shift
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.place = slice(0, 0)
        """The positions of [prompt][canvas] that the last call computed."""

    @property
    def is_filled(self) -> bool:
        return bool(self._kept)

    def fresh(self, num_prompt: int, length: int) -> slice:
        """Which of the `num_prompt + length` positions of [prompt][canvas] the next call computes."""
        if self.is_filled:
            stop = self.span.stop if self.kind == "dual" else length
            self.place = slice(num_prompt + self.span.start - self.shift, num_prompt + stop)
        else:
            self.place = slice(0, num_prompt + length)
        return self.place

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's computed keys and values, (B, heads, computed, width); return those of all positions."""
        if layer_idx == len(self._kept):
            self._kept.append((keys, values))
        kept_keys, kept_values = self._kept[layer_idx]
        if keys is not kept_keys:
            kept_keys[:, :, self.place] = keys
            kept_values[:, :, self.place] = values
        return kept_keys, kept_values

    def keep(self, rows_B: torch.Tensor) -> None:
        """Go on with these rows of the batch only (int64 indices)."""
        self._kept = [(keys[rows_B], values[rows_B]) for keys, values in self._kept]
