"""The toy text policy keeps the promises of TokenPolicy that other tests build on."""

from __future__ import annotations

import pytest
import torch

from raylign.errors import PromptError
from raylign.models.tokens import CacheKind, TokenPolicy, join_prompts
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy

CANVAS = torch.full((2, 8), MASK_ID)


def test_a_row_does_not_depend_on_padding() -> None:
    policy: TokenPolicy = ToyTextPolicy()
    short, long = policy.encode("ab"), policy.encode("abcdef")
    together = policy.predict(CANVAS, join_prompts([short, long]))
    alone = policy.predict(CANVAS[:1], short)
    torch.testing.assert_close(together.logits_BLV[:1], alone.logits_BLV)
    assert together.prompt_features_BD is not None
    assert alone.prompt_features_BD is not None
    torch.testing.assert_close(together.prompt_features_BD[:1], alone.prompt_features_BD)
    assert not torch.allclose(together.logits_BLV[0], together.logits_BLV[1])
    assert bool((together.logits_BLV[..., MASK_ID] == -torch.inf).all())


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cached_call_computes_the_block_from_kept_neighbours(kind: CacheKind) -> None:
    policy = ToyTextPolicy()
    prompts, span = policy.encode("abc").repeat(2), slice(2, 4)
    cache = policy.start_cache(kind, span)
    first = policy.predict(CANVAS, prompts, span, cache)
    torch.testing.assert_close(first.logits_BLV, policy.predict(CANVAS, prompts).logits_BLV[:, span])
    again = policy.predict(CANVAS, prompts, span, cache)
    torch.testing.assert_close(again.logits_BLV, first.logits_BLV)
    assert again.prompt_features_BD is None
    # What is kept is stale once the block has changed; what is computed is not.
    changed = CANVAS.clone()
    changed[:, 2] = 5
    cached = policy.predict(changed, prompts, span, cache).logits_BLV
    exact = policy.predict(changed, prompts, span).logits_BLV
    gap = (cached - exact).nan_to_num(0.0).abs().max()
    assert gap > 0
    assert not torch.allclose(cached, first.logits_BLV)
    assert cache is not None
    cache.keep(torch.tensor([1]))
    torch.testing.assert_close(
        policy.predict(changed[1:], prompts.rows(slice(1, 2)), span, cache).logits_BLV, cached[1:]
    )


def test_the_budget_head_starts_at_zero_and_has_a_gradient_of_its_own() -> None:
    policy = ToyTextPolicy(budget_head=True)
    features = torch.ones(3, policy.hidden_size, requires_grad=True)
    offset = policy.log_budget(features)
    assert offset.tolist() == [0.0, 0.0, 0.0]
    offset.sum().backward()
    assert features.grad is None
    assert policy.trainable_parameters()["budget_head.bias"].grad is not None
    assert ToyTextPolicy().log_budget(features).tolist() == [0.0, 0.0, 0.0]


def test_text_ends_at_the_first_end_token_and_long_prompts_are_refused() -> None:
    policy = ToyTextPolicy()
    assert policy.decode(torch.tensor([[3, 4, EOS_ID, 5], [5, 5, 4, 3]])) == ["ab", "ccba"]
    with pytest.raises(PromptError, match="at most 8 fit"):
        policy.encode("abcdefabc")


def test_weights_travel() -> None:
    one, two = ToyTextPolicy(seed=0), ToyTextPolicy(seed=1)
    prompts = one.encode("fa").repeat(2)
    two.load_weights(one.export_weights(3))
    assert torch.equal(one.predict(CANVAS, prompts).logits_BLV, two.predict(CANVAS, prompts).logits_BLV)
