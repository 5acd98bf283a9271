"""The credit that people are shown is the credit that was trained with, for every row of the ALGORITHMS table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from learner.algorithms import IMAGE_ALGORITHMS, TEXT_ALGORITHMS, Algorithm, LossSetting, make_algorithm
from learner.algorithms.awm import AwmConfig
from learner.algorithms.crd import CrdConfig
from learner.algorithms.dance_grpo import DanceGrpoConfig
from learner.algorithms.ddpo import DdpoConfig
from learner.algorithms.wd1 import Wd1Config
from raylign.types import RolloutGroup
from services.recorded_credit import credit_of
from tests.picture_samplers import sampler_for
from tests.text_groups import draw_text_groups, text_algorithm
from tests.tiny_models import ToyPolicy, breakdown, by_sibling, draw_groups
from tests.toy_text import ToyTextPolicy

_OPTIONS: dict[type, dict[str, Any]] = {
    CrdConfig: {"num_train_times": 4, "kl_guidance": 1.0},
    AwmConfig: {"num_train_times": 3},
}
_PICTURES: list[tuple[type, dict[str, Any]]] = [
    *((config_cls, _OPTIONS.get(config_cls, {})) for config_cls in IMAGE_ALGORITHMS),
    (DanceGrpoConfig, {"train_best_worst": 2}),
    (DdpoConfig, {"min_count": 4}),
]
_TEXTS: list[tuple[type, dict[str, Any]]] = [
    *((config_cls, {}) for config_cls in TEXT_ALGORITHMS),
    (Wd1Config, {"softmax_over": "step"}),
    (Wd1Config, {"variant": "psr"}),
]


def _scored(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Unlike rewards, one group whose are all alike, and one failed sample."""

    def total(group: int, sibling: int) -> float | None:
        if (group, sibling) == (1, 2):
            return None
        return 0.5 if group == 2 else by_sibling(group, sibling) + 0.1 * group * sibling

    return [
        group.with_rewards([breakdown(total(place, sibling)) for sibling in range(group.group_size)])
        for place, group in enumerate(groups)
    ]


def _trained_with(algorithm: Algorithm[Any], groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
    return [
        [value if ok else None for value, ok in zip(one.adv_G.tolist(), one.valid_G.tolist(), strict=True)]
        for one in algorithm.credit(groups)
    ]


@pytest.mark.parametrize(("config_cls", "options"), _PICTURES, ids=lambda value: str(getattr(value, "__name__", value)))
def test_of_pictures(config_cls: type, options: dict[str, Any]) -> None:
    config = config_cls(**options)
    algorithm = make_algorithm(config, LossSetting(sampler_for(config)))
    groups = _scored(draw_groups(ToyPolicy(), sampler_for(config), algorithm.needs))
    assert credit_of(config, groups) == _trained_with(algorithm, groups)
    assert credit_of(config, groups)[1][2] is None


@pytest.mark.parametrize(("config_cls", "options"), _TEXTS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_of_texts(config_cls: type, options: dict[str, Any]) -> None:
    config, policy = config_cls(**options), ToyTextPolicy()
    groups = _scored(draw_text_groups(policy))
    assert credit_of(config, groups) == _trained_with(text_algorithm(config, policy), groups)
