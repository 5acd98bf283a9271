"""The reader of the glyphs task by its font: everything that is drawn is read, nothing that is not."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from PIL import ImageFilter

from raylign.errors import PromptError
from raylign.pretrain.glyph_pictures import (
    COLOURS,
    HEIGHT,
    INKS,
    WIDTH,
    PictureMix,
    draw_example,
    misspell,
    paint,
    random_target,
    render_clean,
    text_mask,
)
from raylign.types import Prompt, RewardSample, RewardScore
from rewards import GlyphPixelsConfig, GlyphPixelsReward
from rewards.glyph_pixels import asked_colour
from rewards.reading.glyphs import ILLEGIBLE, nearest_colour, read_glyphs


def score(prompt: str, image_HWC: np.ndarray, **metadata: str) -> RewardScore:
    reward = GlyphPixelsReward(GlyphPixelsConfig())
    return asyncio.run(reward.score([RewardSample("s", Prompt("p", prompt, metadata), image_HWC)]))[0]


def targets(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [random_target(rng, 0.4, frozenset()) for _ in range(count)]


@pytest.mark.parametrize("ink", range(len(INKS)))
@pytest.mark.parametrize("colour", COLOURS)
def test_clean_pictures_are_read_in_every_colour(colour: str, ink: int) -> None:
    for target in targets(25, ink):
        reading = read_glyphs(render_clean(target, colour, ink))
        assert reading.text == target
        assert nearest_colour(reading.paper) == colour


@pytest.mark.parametrize("shift", [(-2, 2), (2, -2), (1, 0), (-2, -2)])
def test_a_text_may_stand_a_little_off_its_place(shift: tuple[int, int]) -> None:
    for target in targets(10):
        assert read_glyphs(paint(text_mask(target, *shift), COLOURS["red"], INKS[0])).text == target


@pytest.mark.parametrize("text", ["I", "AB", "XYZ", "0123", "OQ0I1", "AA:BB", "#!"])
def test_texts_of_any_length_and_signs_are_read(text: str) -> None:
    assert read_glyphs(render_clean(text, "grey")).text == text


def test_what_is_drawn_counts_not_what_is_asked() -> None:
    rng = np.random.default_rng(2)
    for target in targets(20):
        drawn = misspell(rng, target)
        assert read_glyphs(render_clean(drawn, "green")).text == drawn


def test_moderate_noise_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    for target in targets(20):
        picture = render_clean(target, "purple") + rng.normal(0, 30, (HEIGHT, WIDTH, 3))
        assert read_glyphs(picture.round().clip(0, 255).astype(np.uint8)).text == target


@pytest.mark.parametrize("flaw", ["blurred", "faint", "cropped"])
def test_the_flaws_of_the_base_models_data_are_not_read(flaw: str) -> None:
    rng = np.random.default_rng(4)
    examples = [draw_example(rng, PictureMix(flawed_share=1.0, jitter=2)) for _ in range(150)]
    flawed = [example for example in examples if example.flaw == flaw]
    assert len(flawed) > 15
    assert not [e.target for e in flawed if read_glyphs(e.picture).text == e.target]


def test_blur_and_faintness_have_limits() -> None:
    paper, ink = np.asarray(COLOURS["blue"], float), np.asarray(INKS[0], float)
    for target in targets(10):
        mask = text_mask(target)
        assert read_glyphs(paint(mask.filter(ImageFilter.GaussianBlur(1.0)), paper, ink)).text == target
        assert read_glyphs(paint(mask, paper, paper + 0.4 * (ink - paper))).text == target
        assert read_glyphs(paint(mask, paper, paper + 0.1 * (ink - paper))).text == ""
        assert ILLEGIBLE in read_glyphs(paint(mask.filter(ImageFilter.GaussianBlur(4.0)), paper, ink)).text


def test_bars_and_blots_are_no_text() -> None:
    picture = render_clean("A", "red")
    picture[4:20, 16:64] = INKS[0]
    assert set(read_glyphs(picture).text) <= {ILLEGIBLE}
    assert read_glyphs(np.full((HEIGHT, WIDTH, 3), 128, np.uint8)).text == ""


def test_the_value_is_one_minus_the_share_of_edits() -> None:
    right = score('a red sign that says "KITE"', render_clean("KITE", "red"))
    assert right.value == 1.0
    assert right.details == {"recognised": "KITE", "exact": True, "colour_right": True}
    wrong = score('a red sign that says "KITE"', render_clean("KIXE", "blue"))
    assert wrong.value == pytest.approx(3 / 4)
    assert wrong.details == {"recognised": "KIXE", "exact": False, "colour_right": False}
    assert score('a red sign that says "KITE"', render_clean("", "red")).value == 0.0
    assert score("a red sign", render_clean("KITE", "red"), target="KITES").value == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ('a red sign that says "KITE"', "red"),
        ('the word "RED" on a grey wall', "grey"),
        ('"GREEN BLUE" on an orange sign', "orange"),
        ('a sign that says "RED"', None),
        ('a coloured redwood sign "X"', None),
    ],
)
def test_the_colour_is_what_the_prompt_names_outside_its_quotes(prompt: str, colour: str | None) -> None:
    assert asked_colour(prompt) == colour
    details = score(prompt, render_clean("KITE", "red")).details
    assert details.get("colour_right") == (None if colour is None else colour == "red")


def test_pictures_of_another_size_and_prompts_without_a_target_are_refused() -> None:
    other = score('the word "A"', np.zeros((48, 160, 3), np.uint8)).error
    assert other is not None
    assert (other.code, "80x24 pixels, got 160x48" in other.message) == ("invalid_input", True)
    for prompt in ("a red sign", 'a sign "?!"'):
        with pytest.raises(PromptError, match=r"'p'.* has the target"):
            GlyphPixelsReward(GlyphPixelsConfig()).check(Prompt("p", prompt))
