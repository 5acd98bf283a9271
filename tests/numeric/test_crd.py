"""CRD's gradient over micro-batches, ranks and failures is that of all siblings at once; its centring cancels Z."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from learner.advantages import r_from_advantage
from learner.algorithms.base import LossSetting, SurveyedItems
from learner.algorithms.crd import Crd, CrdConfig
from learner.forward_losses import crd_loss
from learner.learner import Learner, LearnerConfig
from learner.parallel import RankGroup
from raylign.keys import generator
from raylign.models.base import Conditioning
from raylign.types import RolloutGroup
from tests.tiny_models import RUN_SEED, ToyPolicy, by_sibling, draw_groups, euler

GROUPS, SIBLINGS, LEVELS = 3, 4, 3
FAILED = {(1, 2), (2, 0), (2, 1)}
UNIFORM = CrdConfig(num_train_times=LEVELS)


class DoubleToy(ToyPolicy):
    """The toy in float64, so that what is left of a difference is its cause, not rounding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.network.double()

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        told = Conditioning(conditioning.prompt_embeds_PLD, conditioning.need_pooled().double())
        return super().predict(state_BCHW.double(), sigma_B.double(), told)


def reward(group: int, sibling: int) -> float | None:
    return None if (group, sibling) in FAILED else by_sibling(group, sibling)


def drawn(config: CrdConfig) -> list[RolloutGroup]:
    return draw_groups(ToyPolicy(), euler(), config.needs, num_groups=GROUPS, reward=reward)


def moved_learner(config: CrdConfig, micro_batch_size: int, ranks: RankGroup | None = None) -> Learner:
    """A learner whose policy has left its old, sampling and reference ones, which all differ."""
    learner = Learner(LearnerConfig(), config, DoubleToy(), euler(), 1.0, micro_batch_size, RUN_SEED, ranks)
    for seed, tensors in enumerate(learner.policies.relatives.values(), start=3):
        other = DoubleToy(seed).trainable_parameters()
        for name, tensor in tensors.items():
            tensor.mul_(0.9).add_(other[name].detach(), alpha=0.1)
    return learner


def gradient(config: CrdConfig, micro_batch_size: int) -> torch.Tensor:
    learner = moved_learner(config, micro_batch_size)
    learner.begin_step(drawn(config), 1)
    learner.forward_backward(0)
    return flat([p.grad for p in learner.policy.trainable_parameters().values()])


def flat(tensors: list[Any]) -> torch.Tensor:
    return torch.cat([tensor.flatten().clone() for tensor in tensors])


def one_shot(config: CrdConfig, detached: bool = True) -> torch.Tensor:
    """The same gradient from one batch of all items, by plain loops over the formulas."""
    learner, groups = moved_learner(config, 1), drawn(config)
    policy = learner.policy
    algorithm = learner.algorithm
    assert isinstance(algorithm, Crd)
    rows = [(g, s, k) for g in range(GROUPS) for s in range(SIBLINGS) for k in range(LEVELS) if (g, s) not in FAILED]
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    advantages = algorithm.credit(groups)
    level = [int(items[g][s, k]) for g, s, k in rows]
    sigma = algorithm.levels.sigmas[level]
    x0 = torch.stack([groups[g].latents.final_GCHW[s] for g, s, _ in rows])
    noise = torch.stack(
        [
            torch.randn(x0.shape[1:], generator=generator(*groups[g].rollouts[s].key, "train_noise", at))
            for (g, s, _), at in zip(rows, level, strict=True)
        ]
    )
    state = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
    pooled = torch.cat([groups[g].conditioning.need_pooled() for g, _, _ in rows])

    def velocity(of: str | None, told: torch.Tensor) -> torch.Tensor:
        network = policy
        if of is not None:
            network = copy.deepcopy(policy)
            for name, parameter in network.trainable_parameters().items():
                parameter.data.copy_(learner.policies.relatives[of][name])  # type: ignore[index]
        return network.predict(state, sigma, Conditioning(told[:, None], told)).float().double()

    def error(answer: torch.Tensor) -> torch.Tensor:
        gap = (answer.float() - (noise - x0)).double()
        size = gap.abs().mean(dim=(1, 2, 3)).detach() if config.adaptive else 1.0
        return (gap**2).mean(dim=(1, 2, 3)) / size

    mine = velocity(None, pooled)
    implicit = error(velocity("old", pooled)).detach() - error(mine)
    target = torch.stack([advantages[g].adv_G[s].double() / 10 + 0.5 for g, s, _ in rows])
    total = torch.zeros((), dtype=torch.float64)
    for i, (g, _, k) in enumerate(rows):
        mates = [j for j, (h, _, m) in enumerate(rows) if m == k and (h == g or config.center_scope == "batch")]
        for sign in (1, -1):
            temperature = config.weight_temp
            scores = sign * target[mates] / temperature if temperature > 0 else torch.zeros(len(mates)).double()
            p = torch.softmax(scores, dim=0)
            centre = (p * implicit[mates]).sum()
            logit = config.beta * (implicit[i] - (centre.detach() if detached else centre))
            wanted = target[i] - (p * target[mates]).sum()
            if config.loss == "mse":
                one = (logit - wanted) ** 2
            else:
                one = torch.nn.functional.softplus(logit) - torch.sigmoid(wanted) * logit
            total = total + config.adv_clip / config.beta * one / 2
    total = total / len(rows)
    if config.kl_weight > 0:
        negative = torch.cat([groups[g].conditioning.need_negative().need_pooled() for g, _, _ in rows])
        raw = torch.tensor([by_sibling(g, s) for g, s, _ in rows]).clamp(0, 1)
        share = target if config.kl_reward_source == "advantage01" else raw
        total = total + anchor_term(config, mine, velocity("reference", negative), velocity("reference", pooled), share)
    return flat(list(torch.autograd.grad(total, list(policy.trainable_parameters().values()))))


def anchor_term(
    config: CrdConfig,
    mine: torch.Tensor,
    unguided: torch.Tensor,
    guided: torch.Tensor,
    share: torch.Tensor,
) -> torch.Tensor:
    anchor = unguided.float() + config.kl_guidance * (guided.float() - unguided.float())
    gaps = ((mine.float() - anchor.detach()) ** 2).mean(dim=(1, 2, 3))
    return ((config.kl_floor + share * (config.kl_weight - config.kl_floor)) * gaps).mean()


VARIANTS: dict[str, dict[str, Any]] = {
    "mse": {},
    "plain error": {"adaptive": False},
    "bce": {"loss": "bce", "beta": 2.0},
    "temperature": {"weight_temp": 0.2},
    "bce at a temperature": {"loss": "bce", "weight_temp": 0.2},
    "batch": {"center_scope": "batch"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_gradient_is_that_of_all_siblings_at_once(options: dict[str, Any]) -> None:
    # Without the KL, which is fp32 and would hide what is compared in float64.
    config = UNIFORM.model_copy(update={"kl_weight": 0.0, **options})
    whole = one_shot(config)
    assert whole.abs().max() > 1e-2
    for size in (1, 5, 12):
        torch.testing.assert_close(gradient(config, size), whole, rtol=1e-7, atol=1e-9)


def test_the_squared_losses_gradient_is_also_that_of_an_undetached_mean() -> None:
    config = UNIFORM.model_copy(update={"kl_weight": 0.0})
    torch.testing.assert_close(gradient(config, 3), one_shot(config, detached=False), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("source", ["advantage01", "raw"])
def test_the_anchor_is_the_guided_base_weighed_by_rewards(source: str) -> None:
    config = UNIFORM.model_copy(update={"kl_weight": 2.0, "kl_reward_source": source})
    without = config.model_copy(update={"kl_weight": 0.0})
    whole = one_shot(config)
    assert (whole - one_shot(without)).abs().max() > 1e-2
    torch.testing.assert_close(gradient(config, 5), whole, rtol=1e-4, atol=1e-6)


def surveyed(implicit_PGK: torch.Tensor, adv_PG: torch.Tensor) -> SurveyedItems:
    present = torch.ones_like(implicit_PGK, dtype=torch.bool)
    present[0, 1] = False
    numbers = torch.stack([implicit_PGK, torch.zeros_like(implicit_PGK)], dim=3)
    return SurveyedItems(numbers, present, adv_PG)


def losses(config: CrdConfig, items: SurveyedItems) -> torch.Tensor:
    settled = Crd(config, LossSetting(euler())).settle(items)
    target = r_from_advantage(items.adv_PG, 5.0)[:, :, None].expand_as(items.present_PGK)
    loss = crd_loss(
        items.numbers_PGKF[..., 0].flatten(), target.flatten(), settled[..., 1:].flatten(0, 2), 1.0, config.loss
    )
    return loss.view_as(items.present_PGK)[items.present_PGK]


@pytest.mark.parametrize("options", [{}, {"loss": "bce"}, {"weight_temp": 0.3}])
def test_what_only_depends_on_the_prompt_cancels_within_groups_and_not_over_batches(options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    implicit, adv = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    log_z = torch.tensor([[[5.0]], [[-3.0]]], dtype=torch.float64)
    shift = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)
    for scope, cancels in (("group", True), ("batch", False)):
        config = UNIFORM.model_copy(update={"center_scope": scope, **options})
        plain = losses(config, surveyed(implicit, adv))
        for other in (surveyed(implicit + log_z, adv), surveyed(implicit, adv + shift)):
            difference = float((losses(config, other) - plain).abs().max())
            assert difference < 1e-12 if cancels else difference > 1e-3, (scope, difference)


def test_at_the_old_policy_the_signal_is_zero_and_the_gradient_is_not() -> None:
    config = UNIFORM.model_copy(update={"kl_weight": 0.0})
    learner = Learner(LearnerConfig(), config, ToyPolicy(), euler(), 1.0, 4, RUN_SEED)
    learner.begin_step(drawn(config), 1)
    learner.forward_backward(0)
    metrics = learner.optimise(0).metrics
    assert metrics["implicit/mean"] == metrics["implicit/spread"] == 0
    assert metrics["grad/norm"] > 1e-2


def test_a_group_of_equal_rewards_teaches_nothing_there() -> None:
    config = UNIFORM.model_copy(update={"kl_weight": 0.0})
    learner = Learner(LearnerConfig(), config, ToyPolicy(), euler(), 1.0, 4, RUN_SEED)
    groups = draw_groups(ToyPolicy(), euler(), config.needs, num_groups=2, reward=lambda group, sibling: 0.1 + group)
    learner.begin_step(groups, 1)
    learner.forward_backward(0)
    metrics = learner.optimise(0).metrics
    assert metrics["grad/norm"] == 0
    assert metrics["loss"] == 0
