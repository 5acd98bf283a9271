"""What sharding asks of every model family: units that the network really calls, and the same numbers through them.

One process is a whole group here: the hooks run, and gather what is there anyway. Ranks that have parts are in
`tests/numeric/test_parallel_learner.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn

from learner.parallel import RankGroup
from raylign.models import MODEL_FAMILIES, load_policy
from raylign.models.sharding import sharding_units
from tests.tiny_image_families import TINY_FAMILIES
from tests.tiny_text_models import FOLDERS, text_config

FAMILIES: dict[type, Callable[[], Any]] = {
    **{config: family.config for config, family in TINY_FAMILIES.items()},
    **{config: (lambda config=config: text_config(config)) for config in FOLDERS},
}
ROWS = pytest.mark.parametrize("family", MODEL_FAMILIES, ids=lambda family: family.__name__)


@pytest.fixture
def alone() -> Iterator[RankGroup]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield RankGroup(0, 1)
    distributed.destroy_process_group()


def load(family: type) -> tuple[Any, Any]:
    """A learner's policy, and what a rollout policy tells it of two prompts."""
    config = FAMILIES[family]()
    if MODEL_FAMILIES[family].modality == "text":
        policy: Any = load_policy(config, "learner", seed=3)
        return policy, policy.encode("abc").repeat(2)
    encoder: Any = load_policy(config, "rollout", seed=3)
    return load_policy(config, "learner", seed=3), encoder.encode("glow 7", False).repeat(2)


def answer(policy: Any, told: Any) -> torch.Tensor:
    if not hasattr(policy, "latent_shape"):
        canvas = torch.full((2, policy.canvas_length), policy.vocabulary.mask_id)
        return policy.predict(canvas, told).logits_BLV[..., : policy.vocabulary.mask_id]
    state = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    return policy.predict(state, torch.tensor([0.3, 0.8]), told)


def gradients(policy: Any, told: Any) -> list[torch.Tensor]:
    (answer(policy, told) ** 2).mean().backward()
    found = [p.grad for p in policy.trainable_parameters().values()]
    return [one.to_local() if hasattr(one, "to_local") else one for one in found]


@ROWS
def test_the_units_are_blocks_and_none_lies_in_another(family: type) -> None:
    policy, _ = load(family)
    units = sharding_units(policy.network)
    inside = [id(module) for unit in units for module in unit.modules()]
    assert len(units) >= 2
    assert len(inside) == len(set(inside))
    assert all(isinstance(unit, nn.Module) and type(unit) is not nn.ModuleList for unit in units)


@ROWS
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_sharded_network_answers_and_learns_the_same(family: type, recompute: bool, alone: RankGroup) -> None:
    whole, told = load(family)
    sharded, _ = load(family)
    for policy in (whole, sharded) if recompute else ():
        policy.enable_gradient_checkpointing()
    sharded.shard(alone.mesh(torch.device("cpu")))
    assert all(hasattr(p, "to_local") for p in sharded.trainable_parameters().values())
    with torch.no_grad():
        assert torch.equal(answer(sharded, told), answer(whole, told))
    for found, expected in zip(gradients(sharded, told), gradients(whole, told), strict=True):
        # The hooks are nodes of the graph, so that gradients of skip connections are added in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    units = [unit for unit in sharding_units(sharded.network) if next(unit.parameters(), None) is not None]
    for unit in units:
        assert all(hasattr(p, "to_local") for p in unit.parameters()), "gathered weights are let go after a backward"
