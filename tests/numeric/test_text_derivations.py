"""Whole losses of text algorithms derived a second time: row by row, in plain loops, from the papers' formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.algorithms.coupled_grpo import CoupledGrpoConfig
from learner.algorithms.d1 import D1Config
from learner.algorithms.espo import EspoConfig
from learner.algorithms.spg import SpgConfig, block_canvases
from learner.algorithms.unigrpo import UniGrpoConfig
from learner.algorithms.wd1 import Wd1Config
from learner.noising import NoisedCanvas
from raylign.keys import generator
from raylign.models.tokens import TokenPrompts, response_mask
from raylign.types import RolloutGroup, SampleKey
from tests.text_groups import draw_text_groups, policies_for, text_algorithm, token_batches
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy

LENGTH = 8
PLACES = [(place, place // 4, place % 4) for place in range(12)]
"""Row of the batch, group, sibling."""


def row_logprobs(
    policy: ToyTextPolicy, group: RolloutGroup, row: int, masked: list[bool], hidden: list[bool] | None = None
) -> torch.Tensor:
    """Log-prob of every token of one response with some positions masked, computed for it alone: (L,)."""
    tokens = group.tokens.tokens_GL[row]
    prompt = group.conditioning.ids_PL[0]
    if hidden is not None:
        prompt = torch.tensor([MASK_ID if hide else int(one) for one, hide in zip(prompt, hidden, strict=True)])
    canvas = torch.tensor([MASK_ID if hide else int(one) for one, hide in zip(tokens, masked, strict=True)])
    logits = policy.predict(canvas[None], TokenPrompts(prompt[None], torch.ones(1, len(prompt), dtype=torch.bool)))
    return torch.stack([torch.log_softmax(logits.logits_BLV[0, k], dim=0)[int(one)] for k, one in enumerate(tokens)])


def num_counted(group: RolloutGroup, row: int) -> int:
    tokens = group.tokens.tokens_GL[row].tolist()
    return tokens.index(EOS_ID) + 1 if EOS_ID in tokens else len(tokens)


def uniform(*key: Any) -> float:
    return float(torch.rand((), generator=generator(*key), dtype=torch.float64))


def shared_uniform(key: SampleKey, purpose: str) -> float:
    return uniform(key.run_seed, key.prompt_id, key.visit, purpose, 0)


def clipped(ratio: float, adv: float, clip: float) -> float:
    return -min(ratio * adv, min(max(ratio, 1 - clip), 1 + clip) * adv)


def d1_scores(policy: ToyTextPolicy, group: RolloutGroup, row: int) -> torch.Tensor:
    key = group.rollouts[row].key
    length = group.conditioning.ids_PL.shape[1]
    hidden = [bool(u < 0.15) for u in torch.rand(length, generator=generator(*key, "prompt_mask", 0, 0))]
    return row_logprobs(policy, group, row, [True] * LENGTH, hidden)


def coupled_scores(policy: ToyTextPolicy, group: RolloutGroup, row: int) -> torch.Tensor:
    key = group.rollouts[row].key
    rate = 0.2 + 0.6 * shared_uniform(key, "coupled_rate")
    part = [bool(u < rate) for u in torch.rand(LENGTH, generator=generator(*key, "coupled_mask", 0, 0))]
    rest = [not one for one in part]
    full, first, second = (row_logprobs(policy, group, row, masked) for masked in ([True] * LENGTH, part, rest))
    scores = [full[k] + (first[k] / rate if part[k] else second[k] / (1 - rate)) for k in range(LENGTH)]
    return torch.stack(scores) / 2


SECOND = {D1Config: d1_scores, CoupledGrpoConfig: coupled_scores}


class Moved:
    """Three groups with the losses of a policy that has moved away from the one that drew them."""

    def __init__(self, config: Any) -> None:
        self.policy, self.before = ToyTextPolicy(), ToyTextPolicy()
        self.groups = draw_text_groups(self.before)
        algorithm = text_algorithm(config, self.policy)
        policies = policies_for(algorithm, self.policy)
        with torch.no_grad():
            self.policy.trainable_parameters()["logits"].mul_(2.5)
        self.credit = [one.adv_G.tolist() for one in algorithm.credit(self.groups)]
        (self.batch,) = token_batches(algorithm, self.groups, 12, on_policy=False)
        self.loss = algorithm.loss(policies, self.batch).loss_N.tolist()


@pytest.mark.parametrize("config_cls", SECOND)
def test_losses_per_token(config_cls: type[D1Config | CoupledGrpoConfig]) -> None:
    config = config_cls()
    moved = Moved(config)
    ratios: list[float] = []
    for place, index, row in PLACES:
        group, adv, expected = moved.groups[index], moved.credit[index][row], 0.0
        with torch.no_grad():
            now, then = (SECOND[config_cls](one, group, row).tolist() for one in (moved.policy, moved.before))
        for k in range(num_counted(group, row)):
            gap = then[k] - now[k]
            ratios.append(math.exp(-gap))
            expected += clipped(ratios[-1], adv, 0.5) + config.kl_weight * (math.exp(gap) - gap - 1)
        assert moved.loss[place] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert min(ratios) < 0.5 < 1.5 < max(ratios)


@pytest.mark.parametrize("config_cls", SECOND)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(config_cls: type[D1Config | CoupledGrpoConfig]) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    algorithm = text_algorithm(config_cls(), policy)
    (batch,) = token_batches(algorithm, groups, 12)
    surrogate = algorithm.loss(policies_for(algorithm, policy), replace(batch, on_policy=False)).loss_N.sum()
    plain = torch.zeros(())
    for group, credit in zip(groups, algorithm.credit(groups), strict=True):
        for row in range(4):
            plain = plain - credit.adv_G[row] * SECOND[config_cls](policy, group, row)[: num_counted(group, row)].sum()
    parameters = list(policy.trainable_parameters().values())
    pairs = zip(torch.autograd.grad(surrogate, parameters), torch.autograd.grad(plain, parameters), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert other.abs().max() > 1e-2


@pytest.mark.parametrize("config_cls", [D1Config, CoupledGrpoConfig, SpgConfig])
def test_means_over_tokens_count_those_up_to_the_end(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy)
    counts = [[num_counted(group, row) for row in range(4)] for group in groups]
    assert [text_algorithm(config_cls(), policy).shares(group).tolist() for group in groups] == counts
    assert len({count for some in counts for count in some}) > 1


@pytest.mark.parametrize("config_cls", [UniGrpoConfig, Wd1Config, EspoConfig])
def test_means_over_samples_count_each_once(config_cls: type[Any]) -> None:
    policy = ToyTextPolicy()
    for group in draw_text_groups(policy):
        assert text_algorithm(config_cls(), policy).shares(group).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("config_cls", "expected"),
    [
        # Rewards 1, 2, 6, 7 of mean 4: less the mean, less that of the other three, or over the deviation sqrt(6.5).
        (D1Config, (-3.0, -2.0, 2.0, 3.0)),
        (SpgConfig, (-3.0, -2.0, 2.0, 3.0)),
        (CoupledGrpoConfig, (-4.0, -8 / 3, 8 / 3, 4.0)),
        (EspoConfig, (-4.0, -8 / 3, 8 / 3, 4.0)),
        (UniGrpoConfig, (-1.176651, -0.784434, 0.784434, 1.176651)),
    ],
)
def test_default_advantages(config_cls: type[Any], expected: tuple[float, ...]) -> None:
    policy = ToyTextPolicy()
    groups = draw_text_groups(policy, num_groups=1, reward=lambda group, sibling: (1.0, 2.0, 6.0, 7.0)[sibling])
    (credit,) = text_algorithm(config_cls(), policy).credit(groups)
    assert credit.adv_G.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_unigrpo(level: str) -> None:
    moved = Moved(UniGrpoConfig.model_validate({"ratio": level}))
    for place, index, row in PLACES:
        group, adv = moved.groups[index], moved.credit[index][row]
        key, count = group.rollouts[row].key, num_counted(group, row)
        size = max(1, round(uniform(*key, "unigrpo_level") * count))
        order = torch.rand(LENGTH, generator=generator(*key, "unigrpo_mask", 0, 0), dtype=torch.float64)[:count]
        chosen = order.argsort()[:size].tolist()
        masked = [k in chosen or k >= count for k in range(LENGTH)]
        with torch.no_grad():
            now, then = (row_logprobs(one, group, row, masked).tolist() for one in (moved.policy, moved.before))
        gaps = [then[k] - now[k] for k in chosen]
        if level == "token":
            surrogate = sum(clipped(math.exp(-gap), adv, 0.2) for gap in gaps) / size
        else:
            surrogate = clipped(math.exp(-sum(gaps) / size), adv, 0.2)
        distance = sum(math.exp(gap) - gap - 1 for gap in gaps) / size
        assert moved.loss[place] == pytest.approx(surrogate + 0.04 * distance, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_wd1(normalised: bool) -> None:
    moved = Moved(Wd1Config(normalise_length=normalised, kl_weight=0.1))
    for place, index, row in PLACES:
        group, count = moved.groups[index], num_counted(moved.groups[index], row)
        with torch.no_grad():
            now, then = (d1_scores(one, group, row).tolist()[:count] for one in (moved.policy, moved.before))
        distance = sum(math.exp(b - a) - (b - a) - 1 for a, b in zip(now, then, strict=True))
        expected = (-moved.credit[index][row] * sum(now) + 0.1 * distance) / (count if normalised else 1)
        assert moved.loss[place] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_espo() -> None:
    moved = Moved(EspoConfig(kl_weight=0.1))
    golden = (math.sqrt(5) - 1) / 2

    def elbo(policy: ToyTextPolicy, group: RolloutGroup, row: int) -> float:
        key, total = group.rollouts[row].key, 0.0
        draw = generator(*key, "espo_mask", 0, 0)
        for pair in range(2):
            size = int((shared_uniform(key, "espo_size") + (2 * row + pair) * golden) % 1 * (LENGTH + 1))
            inside = torch.rand(LENGTH, generator=draw, dtype=torch.float64).argsort()[:size].tolist()
            for chosen in (inside, [k for k in range(LENGTH) if k not in inside]):
                with torch.no_grad():
                    scores = row_logprobs(policy, group, row, [k in chosen for k in range(LENGTH)]).tolist()
                total += sum((LENGTH + 1) / len(chosen) * scores[k] for k in chosen)
        return total / 4

    for place, index, row in PLACES:
        now, then = (elbo(policy, moved.groups[index], row) for policy in (moved.policy, moved.before))
        expected = clipped(math.exp((now - then) / LENGTH), moved.credit[index][row], 0.2)
        expected += 0.1 * (then - now) ** 2 / 2 / LENGTH
        assert moved.loss[place] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("negative", ["mix", "upper", "lower", "zero"])
def test_spg(negative: str) -> None:
    moved = Moved(SpgConfig.model_validate({"negative": negative, "block_length": 4, "kl_weight": 0.1}))
    counted_NL = response_mask(moved.batch.tokens.tokens_GL, EOS_ID)
    canvases = block_canvases(moved.batch, counted_NL, 2, 4, 0.15)
    for place, index, row in PLACES:
        group, adv, count = moved.groups[index], moved.credit[index][row], num_counted(moved.groups[index], row)
        seen = [canvas.selected_NL[place].nonzero()[:, 0].tolist() for canvas in canvases]
        with torch.no_grad():
            now, then = (
                [canvas_scores(policy, group, row, place, canvas) for canvas in canvases]
                for policy in (moved.policy, moved.before)
            )
        lower = sum(sum(now[t][k] for k in some) / len(some) for t, some in enumerate(seen)) / 2
        powers: dict[int, float] = {}
        for t, some in enumerate(seen):
            for k in some:
                powers[k] = powers.get(k, 0.0) + math.exp(now[t][k]) ** 1.5 / (len(some) / count) / 2
        upper = sum(map(math.log, powers.values())) / len(powers) / 1.5
        below = {"mix": (upper + lower) / 2, "upper": upper, "lower": lower, "zero": 0.0}[negative]
        distance = 0.0
        for t, some in enumerate(seen):
            gaps = [then[t][k] - now[t][k] for k in some]
            distance += sum(math.exp(gap) - gap - 1 for gap in gaps) / len(gaps) / 2
        expected = count * (-adv * (lower if adv >= 0 else below) + 0.1 * distance)
        assert moved.loss[place] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def canvas_scores(
    policy: ToyTextPolicy, group: RolloutGroup, row: int, place: int, canvas: NoisedCanvas
) -> list[float]:
    """Log-probs of one row's tokens on a canvas of the batch, (L,)."""
    assert canvas.hidden_NP is not None
    hidden = canvas.hidden_NP[place, -group.conditioning.ids_PL.shape[1] :].tolist()
    return row_logprobs(policy, group, row, (~canvas.visible_NL[place]).tolist(), hidden).tolist()
