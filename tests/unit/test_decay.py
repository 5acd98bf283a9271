"""How slowly a policy's relatives follow it, and how a configuration says so."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from learner.algorithms.crd import CrdConfig
from learner.algorithms.nft import NftConfig
from learner.decay import DECAY_PRESETS, DecaySchedule


def test_the_default_rises_to_a_half_and_the_ocr_preset_waits() -> None:
    default, ocr = DecaySchedule(), DECAY_PRESETS[2]
    assert [default.at(s) for s in (0, 1, 100, 500, 9999)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    assert [ocr.at(s) for s in (0, 75, 76, 175, 9999)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])
    assert DecaySchedule(start=3, start_value=0.2, slope=0.1, end=0.9).at(1) == 0.2


@pytest.mark.parametrize(
    ("preset", "early", "late"),
    [(0, 0.0, 0.0), (1, 0.05, 0.5), (2, 0.0, 0.999), (3, 1.0, 1.0), (4, 0.99, 0.99), (5, 0.5, 0.5), (6, 0.375, 0.999)],
)
def test_presets_after_50_and_after_many_steps(preset: int, early: float, late: float) -> None:
    schedule = NftConfig.model_validate({"old_decay": preset}).old_decay
    assert [schedule.at(50), schedule.at(10_000)] == pytest.approx([early, late])


def test_a_schedule_is_a_table_a_preset_or_the_released_codes_words() -> None:
    words = CrdConfig.model_validate({"old_decay": "0-0.25-0.005-0.999", "sampling_decay": "2"})
    assert words == CrdConfig()
    assert CrdConfig.model_validate({"old_decay": {"slope": 0.5}}).old_decay == DecaySchedule(slope=0.5)


@pytest.mark.parametrize(
    ("bad", "said"),
    [(7, "one of"), ("fast", "start-start_value-slope-end"), ("1-2", "start-start_value"), ("0-2-0-1", "less than")],
)
def test_anything_else_is_refused(bad: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        NftConfig.model_validate({"old_decay": bad})
