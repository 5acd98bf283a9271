"""What a run's guard watches by default, and what it refuses when the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError
from services.config import RunConfig
from services.guard_config import ACTIONS, SIGNALS, GuardActions, watched

OCR = {"type": "ocr"}
BRIGHT = {"type": "brightness", "weight": 0.5}
READER = {"type": "glyph_pixels", "only_eval": True}
SHARPNESS = {"type": "sharpness", "only_eval": True}


def run(**tables: Any) -> RunConfig:
    return parse_config(RunConfig, {"rewards": [OCR, READER, SHARPNESS], **tables}, "test")


def guarded(signal: str, *actions: str, **table: Any) -> dict[str, Any]:
    return {**table, "actions": {signal: list(actions)}}


def test_it_is_on_and_warns_when_nothing_is_said() -> None:
    config = parse_config(RunConfig, {}, "test")
    assert config.guard.enabled
    assert {getattr(config.guard.actions, signal) for signal in SIGNALS} == {("warn",)}
    assert set(GuardActions.model_fields) == set(SIGNALS)


def test_statistics_are_told_from_metrics_by_their_type() -> None:
    config = run(rewards=[OCR, BRIGHT, READER, {**SHARPNESS, "name": "edges"}])
    names = watched(config.guard, config.rewards)
    assert (dict(names.trained), names.held_out, names.statistics) == (
        {"ocr": 1.0, "brightness": 0.5},
        ("glyph_pixels",),
        ("edges",),
    )
    chosen = run(guard={"held_out": ["sharpness"], "statistics": []})
    assert watched(chosen.guard, chosen.rewards).held_out == ("sharpness",)
    detail = run(guard={"held_out": ["glyph_pixels/colour_right"]})
    assert watched(detail.guard, detail.rewards).held_out == ("glyph_pixels/colour_right",)


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"guard": {"held_out": ["glyph_pixel"]}}, "did you mean 'glyph_pixels'"),
        ({"guard": {"statistics": ["ocr"]}}, "no [[rewards]] with only_eval"),
        (
            {"algorithm": {"type": "nft", "kl_weight": 0.0}, "guard": guarded("divergence", "raise_kl")},
            "has no KL here",
        ),
        ({"algorithm": {"type": "nft", "kl_weight": 0.0}, "guard": {"max_kl": 0.1}}, "set algorithm.kl_weight above 0"),
        ({"guard": guarded("kl", "stop")}, "set guard.max_kl"),
        ({"guard": guarded("divergence", "drop_reward")}, "one reward to train on, 'ocr'"),
        ({"rewards": [OCR, BRIGHT], "guard": {"drop": "brightnes"}}, "did you mean 'brightness'"),
        ({"rewards": [OCR, BRIGHT], "guard": guarded("artefacts", "roll_back")}, "no held-out metric says"),
        ({"prompts": {"heldout": None}, "guard": guarded("divergence", "roll_back")}, "held-out prompts"),
        (
            {
                "rewards": [OCR, BRIGHT, READER],
                "rollout": {"explore": {"pool_size": 24}},
                "guard": guarded("divergence", "drop_reward"),
            },
            "remove one of the two",
        ),
        ({"guard": guarded("divergence", "lower_rl")}, "lower_lr"),
        ({"guard": {"lr_factor": 1.0}}, "less than 1"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(tables: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"problem\(s\)") as raised:
        run(**tables)
    assert told in str(raised.value)


def test_what_can_be_done_is_not_refused() -> None:
    every = {signal: list(ACTIONS) for signal in SIGNALS}
    config = run(
        rewards=[OCR, BRIGHT, READER],
        algorithm={"type": "nft", "kl_weight": 1e-3},
        guard={"actions": every, "max_kl": 0.1, "drop": "brightness"},
    )
    assert config.guard.takes("roll_back") == list(SIGNALS)
    off = {"enabled": False, **guarded("divergence", "raise_kl")}
    assert not run(algorithm={"type": "nft", "kl_weight": 0.0}, guard=off).guard.enabled
