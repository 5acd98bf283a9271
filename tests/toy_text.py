"""A text policy of a few thousand numbers: the whole TokenPolicy protocol, caches and budget head included.

Two bidirectional layers of one attention head over letters. Everything is computed in the plainest way, so that what
a sampler or a loss does with it can be checked by hand or by recomputing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from raylign.errors import PromptError
from raylign.models.tokens import (
    BUDGET_HEAD,
    CacheKind,
    KvCache,
    TokenPolicy,
    TokenPrediction,
    TokenPrompts,
    Vocabulary,
)
from raylign.samplers import TokenSamplerConfig, make_token_sampler
from raylign.types import Needs, Prompt, RolloutGroup, TokenTrajectory, WeightVersion
from raylign.weights import WeightSnapshot, make_snapshot, verify_snapshot
from rollout.engine import ChunkRequest, EvalPoint, RolloutEngine, TokenSetup
from rollout.prompts import GroupTask

PAD_ID, EOS_ID, MASK_ID, FIRST_LETTER_ID = 0, 1, 2, 3
NUM_LAYERS = 2


class ToyCache:
    """Keys and values of every layer and position; a later call computes and overwrites those of `fresh` alone."""

    def __init__(self, kind: CacheKind, span: slice) -> None:
        self.kind = kind
        self.span = span
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, rows_B: torch.Tensor) -> None:
        self.kept = [(keys[rows_B], values[rows_B]) for keys, values in self.kept]

    def fresh(self, canvas_length: int) -> slice:
        """Canvas positions that a call computes once the cache is filled."""
        return self.span if self.kind == "dual" else slice(self.span.start, canvas_length)


class ToyTextPolicy:
    """A TokenPolicy over `letters`; one token per character, prompts of at most `max_prompt` of them."""

    device = torch.device("cpu")

    def __init__(
        self,
        canvas_length: int = 8,
        letters: str = "abcdef",
        *,
        seed: int = 0,
        hidden_size: int = 16,
        max_prompt: int = 8,
        budget_head: bool = False,
        sharpness: float = 2.0,
    ) -> None:
        self.canvas_length = canvas_length
        self.hidden_size = hidden_size
        self.letters = letters
        self.max_prompt = max_prompt
        self.vocabulary = Vocabulary(FIRST_LETTER_ID + len(letters), MASK_ID, EOS_ID, PAD_ID)
        self.num_encoded = 0
        self.num_calls = 0
        draw = torch.Generator().manual_seed(seed)

        def matrix(*shape: int, scale: float = 1.0) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=draw) * scale)

        width = hidden_size
        self._parameters = {
            "tokens": matrix(self.vocabulary.size, width),
            "positions": matrix(max_prompt + canvas_length, width),
            "logits": matrix(width, self.vocabulary.size, scale=sharpness * width**-0.5),
        }
        for layer in range(NUM_LAYERS):
            for name in ("query", "key", "value", "mix"):
                self._parameters[f"{name}.{layer}"] = matrix(width, width, scale=width**-0.5)
        if budget_head:
            self._parameters[f"{BUDGET_HEAD}weight"] = torch.nn.Parameter(torch.zeros(width))
            self._parameters[f"{BUDGET_HEAD}bias"] = torch.nn.Parameter(torch.zeros(1))

    def encode(self, text: str) -> TokenPrompts:
        self.num_encoded += 1
        if len(text) > self.max_prompt:
            raise PromptError(f"prompt {text!r} has {len(text)} tokens, at most {self.max_prompt} fit; shorten it")
        ids_PL = torch.tensor([[FIRST_LETTER_ID + self.letters.index(letter) for letter in text]], dtype=torch.int64)
        return TokenPrompts(ids_PL, torch.ones_like(ids_PL, dtype=torch.bool))

    def predict(
        self,
        canvas_BL: torch.Tensor,
        prompts: TokenPrompts,
        span: slice | None = None,
        cache: KvCache | None = None,
    ) -> TokenPrediction:
        assert cache is None or isinstance(cache, ToyCache)
        self.num_calls += 1
        start = prompts.ids_PL.shape[1]
        length = canvas_BL.shape[1]
        span = span or slice(0, length)
        reuse = cache is not None and bool(cache.kept)
        fresh = cache.fresh(length) if cache is not None and reuse else slice(-start, length)
        place = slice(start + fresh.start, start + fresh.stop)

        ids_BL = torch.cat([prompts.ids_PL, canvas_BL], dim=1)
        real_BL = pad(prompts.real_PL, (0, length), value=True)
        position_BL = (real_BL.cumsum(dim=1) - 1).clamp_min(0)
        hidden = self._parameters["tokens"][ids_BL[:, place]] + self._parameters["positions"][position_BL[:, place]]
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in range(NUM_LAYERS):
            query, key, value, mix = (self._parameters[f"{name}.{layer}"] for name in ("query", "key", "value", "mix"))
            keys, values = hidden @ key, hidden @ value
            if cache is not None and reuse:
                keys = _overwrite(cache.kept[layer][0], place, keys)
                values = _overwrite(cache.kept[layer][1], place, values)
            kept.append((keys, values))
            scores = (hidden @ query) @ keys.transpose(1, 2) / self.hidden_size**0.5
            shares = torch.softmax(scores.masked_fill(~real_BL[:, None], -torch.inf), dim=-1)
            hidden = hidden + torch.tanh((shares @ values) @ mix)
        if cache is not None and not reuse:
            cache.kept = kept
        asked = hidden[:, span.start - fresh.start : span.stop - fresh.start]
        logits = asked @ self._parameters["logits"]
        logits = logits.index_fill(2, torch.tensor([self.vocabulary.mask_id]), -torch.inf)
        return TokenPrediction(logits, None if reuse else _prompt_mean(hidden[:, :start], prompts.real_PL))

    def start_cache(self, kind: CacheKind, span: slice) -> ToyCache | None:
        return None if kind == "none" else ToyCache(kind, span)

    def log_budget(self, prompt_features_BD: torch.Tensor) -> torch.Tensor:
        if f"{BUDGET_HEAD}weight" not in self._parameters:
            return torch.zeros(len(prompt_features_BD))
        return (
            prompt_features_BD.detach() @ self._parameters[f"{BUDGET_HEAD}weight"]
            + self._parameters[f"{BUDGET_HEAD}bias"]
        )

    def decode(self, tokens_BL: torch.Tensor) -> list[str]:
        return ["".join(self._letters_of(row)) for row in tokens_BL.tolist()]

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._parameters

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to recompute."""

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return make_snapshot(tensors or dict(self._parameters), version, "full")

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        tensors = verify_snapshot(snapshot, {name: tuple(p.shape) for name, p in self._parameters.items()})
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def _letters_of(self, row: list[int]) -> list[str]:
        row = row[: row.index(EOS_ID)] if EOS_ID in row else row
        return [self.letters[token - FIRST_LETTER_ID] for token in row if token >= FIRST_LETTER_ID]


def _overwrite(kept_BLD: torch.Tensor, place: slice, fresh_BLD: torch.Tensor) -> torch.Tensor:
    return torch.cat([kept_BLD[:, : place.start], fresh_BLD, kept_BLD[:, place.stop :]], dim=1)


def _prompt_mean(hidden_BLD: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """Mean over the real prompt tokens, without gradient; zero for a prompt without any."""
    weight_BL1 = real_BL[..., None].float()
    return ((hidden_BLD * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1).clamp_min(1)).detach()


def draw_texts(
    policy: TokenPolicy,
    config: TokenSamplerConfig,
    texts: Sequence[str] = ("abc",),
    indices: Sequence[int] = (0, 1, 2, 3),
    *,
    gamma: float | None = None,
    run_seed: int = 0,
) -> list[RolloutGroup]:
    """One group per text, drawn by the real engine in one chunk."""
    setup = TokenSetup(make_token_sampler(config, policy.canvas_length), Needs.FINAL)
    engine = RolloutEngine(policy, {"rollout": setup}, run_seed)
    engine.pull(policy.export_weights(0))
    tasks = tuple(GroupTask(Prompt(text, text), 0, place) for place, text in enumerate(texts))
    return engine.generate(ChunkRequest(tasks, tuple(indices), point=EvalPoint(gamma=gamma)))


def written(group: RolloutGroup) -> TokenTrajectory:
    """A text group's trajectory."""
    assert isinstance(group.trajectory, TokenTrajectory)
    return group.trajectory
