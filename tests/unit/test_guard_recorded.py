"""The guard over curves of real runs: it leaves the quickstarts' tasks alone, and not those whose rewards are hacked.

Held-out means of single runs on two CPU cores, a line per evaluation. The clean ones are DiffusionNFT on both picture
tasks, from three seeds each.
"""

from __future__ import annotations

import pytest

from services.guard import replay
from services.guard_config import GuardConfig, Watched

Curve = list[tuple[float, ...]]


GLYPHS: dict[str, Curve] = {
    "seed 0": [
        (0, 0.452, 0.4155, 0.0295, 0.1862),
        (5, 0.8837, 0.8905, 0.0501, 0.2251),
        (10, 0.9305, 0.9527, 0.0536, 0.2174),
        (15, 0.9555, 0.968, 0.0554, 0.1912),
    ],
    "seed 1": [
        (0, 0.4685, 0.3844, 0.0306, 0.2081),
        (5, 0.923, 0.9187, 0.0547, 0.1876),
        (10, 0.9841, 0.9807, 0.0603, 0.0707),
        (15, 0.9913, 0.9897, 0.0607, 0.0465),
    ],
    "seed 2": [
        (0, 0.4283, 0.4009, 0.0279, 0.1881),
        (5, 0.9044, 0.9398, 0.0554, 0.1222),
        (10, 0.9707, 0.9884, 0.0576, 0.072),
        (15, 0.9812, 0.9906, 0.0575, 0.056),
    ],
}
"""Step, ocr, glyph_pixels, sharpness, diversity."""
SHAPES: dict[str, Curve] = {
    "seed 0": [
        (0, 0.541, 0.9117, 0.0127, 0.0879),
        (5, 0.5872, 0.9172, 0.0135, 0.0734),
        (10, 0.6745, 0.92, 0.0141, 0.061),
        (15, 0.6504, 0.9273, 0.0139, 0.0502),
    ],
    "seed 1": [
        (0, 0.4577, 0.9119, 0.0122, 0.0988),
        (5, 0.5033, 0.9099, 0.0142, 0.0925),
        (10, 0.5475, 0.9138, 0.0144, 0.0821),
        (15, 0.6113, 0.9135, 0.0137, 0.0669),
    ],
    "seed 2": [
        (0, 0.3958, 0.9125, 0.0122, 0.0889),
        (5, 0.4935, 0.91, 0.0137, 0.0824),
        (10, 0.4948, 0.9064, 0.0138, 0.0745),
        (15, 0.5762, 0.9093, 0.0136, 0.0731),
    ],
}
"""Step, geneval, palette, sharpness, diversity."""
BRIGHT: Curve = [
    (0, 0.4341, 0.4159, 0.0558, 0.0299, 0.1981),
    (1, 0.4737, 0.4138, 0.0578, 0.0296, 0.1805),
    (2, 0.5149, 0.5143, 0.0475, 0.0343, 0.159),
    (3, 0.5222, 0.5454, 0.0526, 0.0363, 0.1435),
    (4, 0.5463, 0.5938, 0.0522, 0.0392, 0.1206),
    (5, 0.5581, 0.6383, 0.0514, 0.042, 0.1078),
    (6, 0.5687, 0.6951, 0.0506, 0.043, 0.0969),
    (7, 0.572, 0.6628, 0.0599, 0.0432, 0.094),
    (8, 0.5836, 0.6152, 0.0669, 0.0422, 0.0852),
    (9, 0.576, 0.6425, 0.0642, 0.0434, 0.0887),
    (10, 0.5831, 0.6333, 0.0634, 0.0432, 0.0908),
    (11, 0.5822, 0.6122, 0.0647, 0.0435, 0.0905),
    (12, 0.5846, 0.6057, 0.0661, 0.043, 0.0908),
    (13, 0.5863, 0.6398, 0.0644, 0.0446, 0.0933),
    (14, 0.5903, 0.6132, 0.0697, 0.0441, 0.0916),
    (15, 0.5998, 0.496, 0.0757, 0.0404, 0.088),
    (16, 0.5936, 0.6115, 0.0646, 0.044, 0.0899),
    (17, 0.6001, 0.4861, 0.0754, 0.0406, 0.088),
    (18, 0.6052, 0.504, 0.0743, 0.0431, 0.0929),
    (19, 0.6154, 0.4395, 0.0787, 0.0398, 0.0814),
    (20, 0.6163, 0.487, 0.0777, 0.0395, 0.0694),
]
"""Step, brightness, glyph_pixels, its interval's half-width, sharpness, diversity; `hack_brightness`, seed 0."""

DIGITS: Curve = [
    (0, 0.2391, 0.4453, 0.04463, 0.445),
    (1, 0.2495, 0.4604, 0.04793, 0.43),
    (2, 0.2525, 0.4603, 0.04619, 0.495),
    (3, 0.2549, 0.4946, 0.0466, 0.51),
    (4, 0.2585, 0.5037, 0.04779, 0.45),
    (5, 0.2673, 0.6151, 0.04941, 0.39),
    (6, 0.2799, 0.7019, 0.04524, 0.455),
    (7, 0.3028, 0.6963, 0.0428, 0.49),
    (8, 0.327, 0.7383, 0.03653, 0.43),
    (9, 0.3593, 0.7038, 0.035, 0.525),
    (10, 0.391, 0.6722, 0.03354, 0.5),
    (11, 0.4111, 0.6762, 0.02866, 0.465),
    (12, 0.4404, 0.6452, 0.02872, 0.43),
    (13, 0.463, 0.6214, 0.02833, 0.46),
    (14, 0.4854, 0.5707, 0.03053, 0.525),
    (15, 0.5129, 0.543, 0.03048, 0.5),
    (16, 0.5483, 0.5074, 0.03032, 0.49),
    (17, 0.5711, 0.4841, 0.03017, 0.48),
    (18, 0.5973, 0.4522, 0.02891, 0.46),
    (19, 0.6203, 0.4332, 0.02718, 0.49),
    (20, 0.6386, 0.4151, 0.02633, 0.425),
]
"""Step, first_digit, sorted, its interval's half-width, diversity; `hack_repeated_digit`, seed 0."""


def rows(curve: Curve, *names: str) -> list[dict[str, float]]:
    return [dict(zip(("step", *names), values, strict=True)) for values in curve]


@pytest.mark.parametrize("name", GLYPHS)
def test_clean_runs_on_glyphs_trip_nothing(name: str) -> None:
    names = Watched({"ocr": 1.0}, ("glyph_pixels",), ("sharpness",))
    keys = "eval/ocr", "eval/glyph_pixels", "eval/sharpness", "eval/diversity"
    state, verdicts = replay(GuardConfig(), names, rows(GLYPHS[name], *keys))
    assert state.events == ()
    assert all("guard/divergence" in verdict.metrics for verdict in verdicts)


@pytest.mark.parametrize("name", SHAPES)
def test_clean_runs_on_shapes_trip_nothing(name: str) -> None:
    names = Watched({"geneval": 1.0}, ("palette",), ("sharpness",))
    keys = "eval/geneval", "eval/palette", "eval/sharpness", "eval/diversity"
    state, verdicts = replay(GuardConfig(), names, rows(SHAPES[name], *keys))
    assert state.events == ()
    # Nearest to its limit is diversity, which a palette that hardly rises does not explain.
    assert 0 < max(verdict.metrics["guard/diversity"] for verdict in verdicts) < 0.7


def test_a_run_that_is_paid_for_brightness_trips_before_a_tenth_is_lost() -> None:
    names = Watched({"brightness": 1.0}, ("glyph_pixels",), ("sharpness",))
    keys = "eval/brightness", "eval/glyph_pixels", "ci95/eval/glyph_pixels", "eval/sharpness", "eval/diversity"
    curve = rows(BRIGHT, *keys)
    state, _ = replay(GuardConfig(), names, curve)
    first = state.events[0]
    assert (first.step, first.signal) == (7, "divergence")
    readings = [row["eval/glyph_pixels"] for row in curve]
    best = max(readings[:8])
    assert readings[7] > 0.9 * best
    assert min(readings[8:]) < 0.7 * best


def test_a_run_that_is_paid_for_one_digit_over_and_over_trips_before_a_tenth_is_lost() -> None:
    names = Watched({"first_digit": 1.0}, ("sorted",), ())
    keys = "eval/first_digit", "eval/sorted", "ci95/eval/sorted", "eval/diversity"
    curve = rows(DIGITS, *keys)
    state, _ = replay(GuardConfig(), names, curve)
    first = state.events[0]
    assert (first.step, first.signal) == (9, "divergence")
    readings = [row["eval/sorted"] for row in curve]
    assert readings[9] > 0.9 * max(readings[:10])
    assert readings[-1] < 0.6 * max(readings)
