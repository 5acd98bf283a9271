"""What a diffusion language model offers the rest of Raylign: prompts as tokens, logits of a canvas, and weights.

The canvas is the response: L positions, all masked at the start, filled in any order and never remasked. The network
always sees `[padding][prompt][canvas]`: prompts are padded on the left, padding is attended by nobody and counts no
position, so a row's answer does not depend on the prompts beside it (up to the rounding of another matrix shape).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

CacheKind = Literal["none", "prefix", "dual"]
"""Which keys and values are kept while a block is filled: none; of what lies before it; of all but the block."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token ids that mean something to a sampler; read from the model's files, never assumed."""

    size: int
    mask_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Prompts as the network is told them; the leading axis is P prompts (or B samples).

    ids_PL: int64, padded on the left. real_PL: bool, False where `ids_PL` is padding.
    """

    ids_PL: torch.Tensor
    real_PL: torch.Tensor

    def repeat(self, count: int) -> TokenPrompts:
        """Each row `count` times in a row."""
        return TokenPrompts(self.ids_PL.repeat_interleave(count, dim=0), self.real_PL.repeat_interleave(count, dim=0))

    def rows(self, index: slice | torch.Tensor) -> TokenPrompts:
        """A selection of rows."""
        return TokenPrompts(self.ids_PL[index], self.real_PL[index])

    def to(self, device: torch.device) -> TokenPrompts:
        return TokenPrompts(self.ids_PL.to(device), self.real_PL.to(device))

    def blanked(self, mask_id: int) -> TokenPrompts:
        """Every prompt token replaced by the mask: what classifier-free guidance calls unconditional."""
        return TokenPrompts(torch.where(self.real_PL, mask_id, self.ids_PL), self.real_PL)


def join_prompts(parts: Sequence[TokenPrompts]) -> TokenPrompts:
    """Rows of several prompts, one after the other, padded on the left to the longest."""
    longest = max(part.ids_PL.shape[1] for part in parts)
    return TokenPrompts(
        torch.cat([torch.nn.functional.pad(part.ids_PL, (longest - part.ids_PL.shape[1], 0)) for part in parts]),
        torch.cat([torch.nn.functional.pad(part.real_PL, (longest - part.real_PL.shape[1], 0)) for part in parts]),
    )


class KvCache(Protocol):
    """Keys and values kept while one block of the canvas is filled. Made by `TokenPolicy.start_cache`."""

    def keep(self, rows_B: torch.Tensor) -> None:
        """Go on with these rows of the batch only (int64 indices)."""
        ...


@dataclass(frozen=True, slots=True)
class TokenPrediction:
    """What one call of the network says.

    logits_BLV: fp32, of the canvas positions asked for; the mask token's own logit is -inf, it is never an answer.
    prompt_features_BD: fp32, mean over the real prompt tokens of the last hidden state, without gradient; None in a
    call that reused the prompt's keys and values.
    """

    logits_BLV: torch.Tensor
    prompt_features_BD: torch.Tensor | None = None


class TokenPolicy(Protocol):
    """A masked diffusion language model as Raylign sees it. One class serves actor and learner."""

    device: torch.device
    vocabulary: Vocabulary
    canvas_length: int
    """L, the response positions."""
    hidden_size: int

    def encode(self, text: str) -> TokenPrompts:
        """One prompt (P = 1) through the model's template. Raises PromptError for one that is longer than allowed."""
        ...

    def predict(
        self,
        canvas_BL: torch.Tensor,
        prompts: TokenPrompts,
        span: slice | None = None,
        cache: KvCache | None = None,
    ) -> TokenPrediction:
        """Logits of the canvas, or of its positions in `span`, where every position sees every other.

        Position k's logits say what token k is, also for models whose raw output is shifted. With a `cache`, the
        first call computes all and fills it; later calls compute only what the cache's kind does not keep.
        """
        ...

    def start_cache(self, kind: CacheKind, span: slice) -> KvCache | None:
        """An empty cache for the block of the canvas at `span`; None for kind "none"."""
        ...

    def log_budget(self, prompt_features_BD: torch.Tensor) -> torch.Tensor:
        """The budget head's offset of log gamma, (B,) fp32, with gradient to the head alone; 0 without a head."""
        ...

    def decode(self, tokens_BL: torch.Tensor) -> list[str]:
        """Text of each row up to its first end token, special tokens left out."""
        ...

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """By name, in a fixed order: an adapter's tensors, or all of the network's; with the budget head's, if any,
        whose names start with `budget_head.`."""
        ...

    def enable_gradient_checkpointing(self) -> None:
        """From now on recompute activations in the backward pass instead of keeping them."""
        ...

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        """Publish the trainable tensors, or another set of the same names and shapes."""
        ...

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Verify, then swap in a snapshot. Raises WeightError and changes nothing when it does not fit."""
        ...


BUDGET_HEAD = "budget_head."
"""Leading part of the names of the budget head's tensors."""


def response_mask(tokens_BL: torch.Tensor, eos_id: int) -> torch.Tensor:
    """True up to and including the first end token of each row, (B, L) bool; all True in a row without one."""
    is_eos = tokens_BL == eos_id
    return (is_eos.cumsum(dim=1) - is_eos.long()) == 0


def probed(canvas_BL: torch.Tensor) -> slice:
    """The canvas positions whose logits a parity check compares; those of all can be hundreds of megabytes."""
    return slice(0, min(16, canvas_BL.shape[1]))


def finite_logits(prediction: TokenPrediction) -> torch.Tensor:
    """Logits with 0 for tokens that are -inf everywhere, as the mask is, (B, L, V): what a parity check compares.

    Any other number that is not finite stays as it is.
    """
    never_V = (prediction.logits_BLV == -torch.inf).flatten(0, 1).all(dim=0)
    return torch.where(never_V, 0.0, prediction.logits_BLV)
