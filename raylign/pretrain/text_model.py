"""A tiny text model while it is being made: texts to tokens and back, logits, and answers drawn by a sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from raylign.models.bidirectional import BidirectionalNetwork
from raylign.models.tiny_text import TinyTextSettings
from raylign.models.tokens import TokenPrompts
from raylign.samplers.tokens import Candidates, TokenSampler, TokenTransition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TextModel:
    """A network with the tokenizer it speaks; its canvas is as long as its settings allow."""

    settings: TinyTextSettings
    network: BidirectionalNetwork
    tokenizer: PreTrainedTokenizerFast

    def encode_prompts(self, texts: Sequence[str]) -> TokenPrompts:
        """Prompts padded on the left to the longest, P = len(texts)."""
        told = cast("Any", self.tokenizer)(list(texts), padding=True, padding_side="left", return_tensors="pt")
        return TokenPrompts(told["input_ids"], told["attention_mask"].bool())

    def encode_labels(self, labels: Sequence[str]) -> torch.Tensor:
        """Labels filled up with end tokens to the canvas's length, (B, L) int64."""
        length, end = self.settings.max_canvas_length, self.settings.eos_token_id
        rows: list[list[int]] = [cast("Any", self.tokenizer)(label)["input_ids"] for label in labels]
        return torch.tensor([(row + [end] * length)[:length] for row in rows])

    def logits(self, canvas_BL: torch.Tensor, prompts: TokenPrompts) -> torch.Tensor:
        """Logits of the canvas, (B, L, V) fp32, -inf at the mask token."""
        num_prompt = prompts.ids_PL.shape[1]
        ids_BL = torch.cat([prompts.ids_PL, canvas_BL], dim=1)
        real_BL = torch.cat([prompts.real_PL, torch.ones_like(canvas_BL, dtype=torch.bool)], dim=1)
        hidden_BLD = self.network(ids_BL, real_BL, num_prompt)[:, num_prompt:]
        mask = torch.tensor([self.settings.mask_token_id])
        return self.network.lm_head(hidden_BLD).float().index_fill(2, mask, -math.inf)

    @torch.no_grad()
    def answer(
        self, prompts: TokenPrompts, sampler: TokenSampler, draws: torch.Generator, gamma: float | None = None
    ) -> tuple[list[str], torch.Tensor]:
        """One answer per prompt at temperature 1 and how many calls each took, (B,) int64.

        `gamma` is the entropy budget, for a sampler that has one. The canvas is one block.
        """
        mask_id, num_rows = self.settings.mask_token_id, len(prompts.ids_PL)
        canvas_BL = torch.full((num_rows, self.settings.max_canvas_length), mask_id)
        calls_B = torch.zeros(num_rows, dtype=torch.int64)
        gamma_B = None if gamma is None else torch.full((num_rows,), gamma)
        step = 0
        while bool((masked_BL := canvas_BL == mask_id).any()):
            transition = TokenTransition.of(self.logits(canvas_BL, prompts), temperature=1.0, top_p=1.0)
            tokens_BL = transition.sample(torch.rand(canvas_BL.shape, generator=draws))
            eos_id = self.settings.eos_token_id
            chosen_BL = sampler.choose(Candidates(transition, tokens_BL, masked_BL, 0, step, eos_id, gamma_B))
            calls_B += masked_BL.any(dim=1)
            canvas_BL = torch.where(chosen_BL & masked_BL, tokens_BL, canvas_BL)
            step += 1
        return [self._text(row) for row in canvas_BL.tolist()], calls_B

    def _text(self, row: list[int]) -> str:
        end = self.settings.eos_token_id
        row = row[: row.index(end)] if end in row else row
        return cast("str", self.tokenizer.decode(row, skip_special_tokens=True))
