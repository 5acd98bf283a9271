"""A masked diffusion language model as a `TokenPolicy`: a network, a tokenizer, weights to train.

One class serves all text families, actor and learner alike: what the learner scores is what the actor sampled from.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.nn.functional import pad

from raylign.config import Config
from raylign.errors import ModelError, PromptError
from raylign.models.adapters import LoraSettings
from raylign.models.bidirectional import BidirectionalNetwork
from raylign.models.kv_cache import BlockCache
from raylign.models.remote_code import NATIVE, RemoteNetwork
from raylign.models.sharding import shard_network
from raylign.models.tokens import BUDGET_HEAD, CacheKind, KvCache, TokenPrediction, TokenPrompts, Vocabulary
from raylign.models.tuned import TunedWeights, Tuning
from raylign.shapes import check_shape
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TextModelConfig(Config):
    """What every text family's configuration has."""

    path: str
    """Model directory in the Hugging Face layout: config.json, safetensors, tokenizer files."""
    canvas_length: int = Field(default=256, ge=1)
    """Response positions, all of which are filled; d1 and its successors train with 256."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longest prompt in tokens, template included; a longer one is refused."""
    tuning: Tuning = "lora"
    """Train a LoRA adapter or every weight of the network."""
    lora: LoraSettings = LoraSettings()
    """The adapter, when tuning is "lora"; its targets are linear layers by the names the checkpoint gives them."""
    chat_template: bool = True
    """Wrap prompts in the tokenizer's chat template; false for base models, which read the text as it is."""
    budget_head: bool = False
    """Add the head that chooses each prompt's entropy budget; see the entropy-bounded sampler."""
    trust_remote_code: bool = False
    """Run the modelling code that lies in the checkpoint instead of the native network; it may do anything."""

    @model_validator(mode="after")
    def _refuse_a_saved_adapter(self) -> TextModelConfig:
        if self.lora.start is not None:
            raise ValueError("lora.start is for image models; merge the adapter into the checkpoint instead")
        return self


def prompt_ids(tokenizer: Any, config: TextModelConfig, text: str) -> list[int]:
    """A prompt's tokens, in the chat template if one is wanted. Raises PromptError for too many, or none at all."""
    if config.chat_template:
        turn = [{"role": "user", "content": text}]
        templated = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(templated, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    if len(ids) > config.max_prompt_length:
        raise PromptError(
            f"prompt {shown!r} has {len(ids)} tokens, model.max_prompt_length is {config.max_prompt_length}; "
            "shorten the prompt or raise the limit"
        )
    if not ids:
        raise PromptError(f"prompt {shown!r} has no tokens; give some text")
    return ids


class TextPolicy:
    """A TokenPolicy over a native network, or over one of the checkpoint's own code.

    shift: 1 for a model whose raw output at position k - 1 says what token k is, else 0.
    targets: the adapted modules by the network's own names.
    """

    def __init__(
        self,
        config: TextModelConfig,
        network: BidirectionalNetwork | RemoteNetwork,
        tokenizer: Any,
        vocabulary: Vocabulary,
        targets: tuple[str, ...],
        *,
        shift: int = 0,
        fold: bool = False,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.network = network
        self.device = next(network.parameters()).device
        self.vocabulary = vocabulary
        self.canvas_length = config.canvas_length
        self.hidden_size = network.hidden_size
        self._tokenizer = tokenizer
        self._shift = shift
        self._head = _zero_head(self.hidden_size, self.device) if config.budget_head else None
        lora = config.lora.model_copy(update={"targets": targets})
        head = {f"{BUDGET_HEAD}{name}": p for name, p in self._head.named_parameters()} if self._head else {}
        self._weights = TunedWeights(network, config.tuning, lora, targets, fold=fold, seed=seed, head=head)

    def with_network(self, network: Any) -> TextPolicy:
        """The same policy, weights and all, computing with another network that answers to the same calls."""
        other = copy.copy(self)
        other.network = network
        return other

    def encode(self, text: str) -> TokenPrompts:
        """See TokenPolicy. Raises PromptError for a prompt that is too long, or of no tokens at all."""
        ids = prompt_ids(self._tokenizer, self.config, text)
        ids_PL = torch.tensor([ids], dtype=torch.int64, device=self.device)
        return TokenPrompts(ids_PL, torch.ones_like(ids_PL, dtype=torch.bool))

    def predict(
        self,
        canvas_BL: torch.Tensor,
        prompts: TokenPrompts,
        span: slice | None = None,
        cache: KvCache | None = None,
    ) -> TokenPrediction:
        """See TokenPolicy. Raises ShapeError for a span of which a filled cache computes only a part."""
        check_shape(canvas_BL, "canvas_BL", B=prompts.ids_PL.shape[0], L=self.canvas_length)
        if cache is not None and not isinstance(cache, BlockCache):
            raise TypeError(f"a {type(cache).__name__} is no cache of this policy; take one from start_cache")
        num_prompt = prompts.ids_PL.shape[1]
        span = span or slice(0, self.canvas_length)
        reuses = cache is not None and cache.is_filled
        ids_BL = torch.cat([prompts.ids_PL, canvas_BL], dim=1)
        real_BL = pad(prompts.real_PL, (0, self.canvas_length), value=True)
        logits_BLV, hidden_BLD = self.network.read(ids_BL, real_BL, num_prompt, span, self._shift, cache)
        logits_BLV = logits_BLV.float()
        logits_BLV[..., self.vocabulary.mask_id] = -torch.inf
        features = None if reuses else _prompt_mean(hidden_BLD[:, :num_prompt], prompts.real_PL)
        return TokenPrediction(logits_BLV, features)

    def start_cache(self, kind: CacheKind, span: slice) -> BlockCache | None:
        if kind == "none":
            return None
        if isinstance(self.network, RemoteNetwork):
            raise ModelError(
                f"a checkpoint's own code keeps no {kind!r} cache; set sampler.cache = 'none', or {NATIVE}"
            )
        return BlockCache(kind, span, self._shift)

    def log_budget(self, prompt_features_BD: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return torch.zeros(len(prompt_features_BD), device=prompt_features_BD.device)
        with torch.autocast(prompt_features_BD.device.type, enabled=False):
            return self._head(prompt_features_BD.detach().float())[:, 0]

    def decode(self, tokens_BL: torch.Tensor) -> list[str]:
        return [self._tokenizer.decode(self._answer(row), skip_special_tokens=True) for row in tokens_BL.tolist()]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return self._weights.parameters()

    def enable_gradient_checkpointing(self) -> None:
        if isinstance(self.network, RemoteNetwork):
            raise ModelError(
                "how to recompute activations in a checkpoint's own code is not known; set "
                f"learner.gradient_checkpointing = false, or {NATIVE}"
            )
        self.network.recompute = True

    def shard(self, mesh: DeviceMesh) -> None:
        """See Shardable. Raises ModelError for a checkpoint's own code. The budget head stays whole: it is small."""
        if isinstance(self.network, RemoteNetwork):
            raise ModelError(
                "a checkpoint's own code cannot be sharded: how often it is asked depends on the batch; set "
                f"learner.sharding = 'none', or {NATIVE}"
            )
        shard_network(self.network, mesh)
        self.device = torch.device(mesh.device_type)
        if self._head is not None:
            self._head.to(self.device)

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return self._weights.export(version, tensors)

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self._weights.load(snapshot)

    def _answer(self, row: list[int]) -> list[int]:
        return row[: row.index(self.vocabulary.eos_id)] if self.vocabulary.eos_id in row else row


def _zero_head(width: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _prompt_mean(hidden_PLD: torch.Tensor, real_PL: torch.Tensor) -> torch.Tensor:
    """Mean over the real prompt tokens, (P, D) fp32, without gradient."""
    weight_PLD = real_PL[..., None].float()
    return (hidden_PLD.detach().float() * weight_PLD).sum(dim=1) / weight_PLD.sum(dim=1)
