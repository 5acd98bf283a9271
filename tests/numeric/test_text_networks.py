"""LLaDA and Dream against their published formulas, written a second time here in plain torch under published names.

Nothing is shared with the product: rotations are complex products, attention is a softmax of explicit sums, and a row
is computed alone, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raylign.models import load_policy
from raylign.models.bidirectional import BidirectionalNetwork
from raylign.models.dream import DREAM, DreamConfig
from raylign.models.llada import LLADA, LladaConfig
from raylign.models.text_checkpoint import TextFormat, check_names
from raylign.models.text_policy import TextModelConfig, TextPolicy
from raylign.models.tokens import CacheKind, TokenPolicy, finite_logits, join_prompts
from tests.tiny_text_models import (
    CANVAS_LENGTH,
    DREAM_7B,
    LLADA_8B,
    TINY_DREAM,
    TINY_LLADA,
    dream_shapes,
    llada_shapes,
    random_tensors,
    text_config,
)

Tensors = dict[str, torch.Tensor]
TEXTS = ("abcdefg", "hij")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Each pair (i, i + d/2) of a head, (heads, L, d), turned by the angle position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, kv_heads: int, theta: float
) -> torch.Tensor:
    """Full attention of (L, heads * d) queries on (L, kv_heads * d) keys; query head h reads key head h // ratio."""
    length = q.shape[0]
    queries = rotated(q.view(length, heads, -1).transpose(0, 1), theta)
    keys = rotated(k.view(length, kv_heads, -1).transpose(0, 1), theta)
    values = v.view(length, kv_heads, -1).transpose(0, 1)
    mixed: list[torch.Tensor] = []
    for head in range(heads):
        kept = head // (heads // kv_heads)
        shares = torch.softmax(queries[head] @ keys[kept].T / queries.shape[-1] ** 0.5, dim=-1)
        mixed.append(shares @ values[kept])
    return torch.cat(mixed, dim=-1)


def llada_reference(w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one unpadded row, (L, V): position k's say what token k is."""
    c = TINY_LLADA
    x = w["model.transformer.wte.weight"][ids]
    for number in range(c["n_layers"]):
        b = {
            name.partition(f"blocks.{number}.")[2]: tensor for name, tensor in w.items() if f"blocks.{number}." in name
        }
        h = rms_norm(x, b["attn_norm.weight"], c["rms_norm_eps"])
        q, k, v = (h @ b[f"{name}_proj.weight"].T for name in "qkv")
        x = x + attention(q, k, v, c["n_heads"], c["n_kv_heads"], c["rope_theta"]) @ b["attn_out.weight"].T
        h = rms_norm(x, b["ff_norm.weight"], c["rms_norm_eps"])
        gate = h @ b["ff_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ b["up_proj.weight"].T)) @ b["ff_out.weight"].T
    return rms_norm(x, w["model.transformer.ln_f.weight"], c["rms_norm_eps"]) @ w["model.transformer.ff_out.weight"].T


def dream_reference(w: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one unpadded row, (L, V), after the shift: row k says what token k is; row 0 is the first raw row."""
    c = TINY_DREAM
    x = w["model.embed_tokens.weight"][ids]
    for number in range(c["num_hidden_layers"]):
        b = {
            name.partition(f"layers.{number}.")[2]: tensor for name, tensor in w.items() if f"layers.{number}." in name
        }
        h = rms_norm(x, b["input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (h @ b[f"self_attn.{n}_proj.weight"].T + b[f"self_attn.{n}_proj.bias"] for n in "qkv")
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        x = x + attention(q, k, v, heads, kv_heads, c["rope_theta"]) @ b["self_attn.o_proj.weight"].T
        h = rms_norm(x, b["post_attention_layernorm.weight"], c["rms_norm_eps"])
        gate = h @ b["mlp.gate_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (h @ b["mlp.up_proj.weight"].T)) @ b["mlp.down_proj.weight"].T
    raw = rms_norm(x, w["model.norm.weight"], c["rms_norm_eps"]) @ w["lm_head.weight"].T
    return torch.cat([raw[:1], raw[:-1]])


REFERENCES: dict[type[TextModelConfig], tuple[Callable[[Tensors, torch.Tensor], torch.Tensor], Tensors]] = {
    LladaConfig: (llada_reference, random_tensors(llada_shapes(TINY_LLADA))),
    DreamConfig: (dream_reference, random_tensors(dream_shapes(TINY_DREAM))),
}
ROWS = pytest.mark.parametrize("family", REFERENCES)


def expected(policy: TokenPolicy, family: type[TextModelConfig], canvas: torch.Tensor) -> torch.Tensor:
    """The reference's logits of each canvas, the mask's own set to 0, each prompt without padding."""
    reference, tensors = REFERENCES[family]
    rows = [
        reference(tensors, torch.cat([policy.encode(t).ids_PL[0], row])) for t, row in zip(TEXTS, canvas, strict=True)
    ]
    wanted = torch.stack([row[-CANVAS_LENGTH:] for row in rows])
    wanted[..., policy.vocabulary.mask_id] = 0.0
    return wanted


def half_filled(policy: TokenPolicy) -> torch.Tensor:
    canvas = torch.randint(0, 10, (2, CANVAS_LENGTH), generator=torch.Generator().manual_seed(1))
    canvas[:, ::2] = policy.vocabulary.mask_id
    return canvas


@ROWS
def test_a_padded_batch_computes_the_published_formula(family: type[TextModelConfig]) -> None:
    policy = load_policy(text_config(family), "rollout")
    canvas = half_filled(policy)
    with torch.no_grad():
        found = finite_logits(policy.predict(canvas, join_prompts([policy.encode(text) for text in TEXTS])))
    torch.testing.assert_close(found, expected(policy, family, canvas), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.5


@ROWS
@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("span", [slice(0, 3), slice(3, 5), slice(5, 8)], ids=str)
def test_a_cached_block_computes_the_published_formula(
    family: type[TextModelConfig], kind: CacheKind, span: slice
) -> None:
    policy = load_policy(text_config(family), "rollout")
    canvas = half_filled(policy)
    prompts = join_prompts([policy.encode(text) for text in TEXTS])
    with torch.no_grad():
        cache = policy.start_cache(kind, span)
        policy.predict(canvas, prompts, span, cache)
        found = finite_logits(policy.predict(canvas, prompts, span, cache))
    torch.testing.assert_close(found, expected(policy, family, canvas)[:, span], rtol=1e-4, atol=1e-4)


@ROWS
def test_prompt_features_are_the_mean_of_the_last_hidden_states(family: type[TextModelConfig]) -> None:
    # The output layer is linear, so its logits of the mean feature are the mean of the raw logits.
    policy = load_policy(text_config(family), "rollout")
    assert isinstance(policy, TextPolicy)
    network: Any = policy.network
    reference, tensors = REFERENCES[family]
    canvas = half_filled(policy)[:1]
    prompts = policy.encode(TEXTS[0])
    with torch.no_grad():
        features = policy.predict(canvas, prompts).prompt_features_BD
        assert features is not None
        found = network.lm_head(features)[0]
    raw = reference(tensors, torch.cat([prompts.ids_PL[0], canvas[0]]))
    first = 1 if family is DreamConfig else 0  # Dream's are read one place further on
    wanted = raw[first : first + prompts.ids_PL.shape[1]].mean(dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _full_size(build: Callable[..., BidirectionalNetwork], described: dict[str, Any]) -> BidirectionalNetwork:
    with torch.device("meta"):
        return build(described, LladaConfig(path="full size"))


@pytest.mark.parametrize(
    ("text_format", "described", "published", "num_tensors", "num_bytes"),
    [
        # num_bytes: in bf16; LLaDA-8B's is the `total_size` of its published index.
        # num_tensors: 3 + 32 * 9 and 3 + 28 * 12.
        (LLADA, LLADA_8B, llada_shapes(LLADA_8B), 291, 16_031_162_368),
        (DREAM, DREAM_7B, dream_shapes(DREAM_7B), 339, 15_231_233_024),
    ],
    ids=["LLaDA-8B", "Dream-7B"],
)
def test_the_name_map_is_that_of_the_full_size_checkpoint(
    text_format: TextFormat,
    described: dict[str, Any],
    published: dict[str, tuple[int, ...]],
    num_tensors: int,
    num_bytes: int,
) -> None:
    network = _full_size(text_format.build, described)
    ours = {text_format.names.published(own): tuple(t.shape) for own, t in network.named_parameters()}
    assert ours == published
    assert len(ours) == len(list(network.parameters())) == num_tensors, "two tensors may not have one published name"
    assert 2 * sum(p.numel() for p in network.parameters()) == num_bytes
    assert all(p.is_meta for p in network.parameters())


def test_the_name_maps_have_nothing_to_spare() -> None:
    for text_format, described in ((LLADA, TINY_LLADA), (DREAM, TINY_DREAM)):
        own = [name for name, _ in _full_size(text_format.build, described).named_parameters()]
        assert set(text_format.names.outer) == {name for name in own if not name.startswith("layers.")}
        assert set(text_format.names.layer) == {name.split(".", 2)[2] for name in own if name.startswith("layers.")}


def test_a_key_list_that_differs_by_one_name_is_named(tmp_path: Any) -> None:
    wanted = llada_shapes(LLADA_8B)
    check_names(tmp_path, wanted, wanted)
    missing = [name for name in wanted if name != "model.transformer.blocks.31.ff_out.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\): model\.transformer\.blocks\.31\.ff_out\.weight$"):
        check_names(tmp_path, missing, wanted)
    with pytest.raises(ValueError, match=r"has foreign 1 tensor\(s\): model\.transformer\.blocks\.0\.q_proj\.bias$"):
        check_names(tmp_path, [*wanted, "model.transformer.blocks.0.q_proj.bias"], wanted)
