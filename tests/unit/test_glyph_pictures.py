"""The pictures and prompts that the embedded model is pre-trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import raylign
from raylign.pretrain import glyph_pictures as pictures
from raylign.pretrain import glyph_prompts as prompts
from raylign.pretrain.words import WORDS

GLYPHS = Path(raylign.__file__).parent / "assets" / "glyphs"


def draw(seed: int, num: int, mix: pictures.PictureMix, excluded: frozenset[str] = frozenset()):
    rng = np.random.default_rng(seed)
    return [pictures.draw_example(rng, mix, excluded) for _ in range(num)]


def test_the_same_seed_draws_the_same_pictures() -> None:
    mix = pictures.PictureMix(flawed_share=0.6, wrong_colour_share=0.1, jitter=2)
    first, again, other = draw(3, 40, mix), draw(3, 40, mix), draw(4, 40, mix)
    assert [e.prompt for e in first] == [e.prompt for e in again]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(first, again, strict=True))
    assert [e.prompt for e in first] != [e.prompt for e in other]


def test_pictures_have_the_stated_size_and_type() -> None:
    for example in draw(0, 50, pictures.PictureMix(flawed_share=0.6, jitter=3)):
        assert example.picture.shape == (pictures.HEIGHT, pictures.WIDTH, 3)
        assert example.picture.dtype == np.uint8


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_flawed_share_is_kept(share: float) -> None:
    examples = draw(1, 2000, pictures.PictureMix(flawed_share=share))
    kinds = Counter(e.flaw for e in examples)
    assert sum(kinds[flaw] for flaw in pictures.FLAW_SHARES) / 2000 == pytest.approx(share, abs=0.04)
    for flaw, of_flawed in pictures.FLAW_SHARES.items():
        assert kinds[flaw] / 2000 == pytest.approx(share * of_flawed, abs=0.03)


def test_wrong_colours_are_mixed_in_apart_from_what_a_reader_notices() -> None:
    examples = draw(2, 2000, pictures.PictureMix(flawed_share=0.5, wrong_colour_share=0.2))
    wrong = [e for e in examples if e.flaw == "wrong_colour"]
    assert len(wrong) / 2000 == pytest.approx(0.5 * 0.2, abs=0.03)
    for example in wrong[:50]:
        asked = next(colour for colour in pictures.COLOURS if colour in example.prompt.split())
        corner = example.picture[0, 0].astype(float)
        assert np.abs(corner - pictures.COLOURS[asked]).max() > 25


def test_a_prompt_quotes_its_target() -> None:
    for example in draw(5, 200, pictures.PictureMix(flawed_share=0.6)):
        assert pictures.quoted_target(example.prompt) == example.target
        assert pictures.MIN_LENGTH <= len(example.target) <= pictures.MAX_LENGTH
    with pytest.raises(ValueError, match="quoted"):
        pictures.quoted_target("a red sign")


def test_a_clean_picture_shows_the_target_in_the_asked_colour() -> None:
    picture = pictures.render_clean("HAT", "red")
    assert tuple(picture[0, 0]) == pictures.COLOURS["red"]
    assert (picture == pictures.INKS[0]).all(axis=2).mean() > 0.1
    assert not np.array_equal(picture, pictures.render_clean("CAT", "red"))


def test_each_character_keeps_to_its_cell() -> None:
    left = (pictures.WIDTH - 3 * pictures.CELL) // 2
    one, other = pictures.render_clean("AMB", "blue"), pictures.render_clean("AMC", "blue")
    differs = np.flatnonzero((one != other).any(axis=(0, 2)))
    assert differs.min() >= left + 2 * pictures.CELL
    assert differs.max() < left + 3 * pictures.CELL


def test_unreadable_flaws_remove_the_ink() -> None:
    """The clean picture has two plain colours; faint and blurred ones have lost the contrast between them."""
    spread: dict[str, list[float]] = {}
    for example in draw(6, 600, pictures.PictureMix(flawed_share=0.7)):
        spread.setdefault(example.flaw, []).append(float(example.picture.astype(float).std(axis=(0, 1)).max()))
    assert np.mean(spread["faint"]) < 2 < 20 < np.mean(spread["clean"])
    assert np.mean(spread["blurred"]) < 0.6 * np.mean(spread["clean"])


def test_misspelling_keeps_kind_and_length_and_changes_something() -> None:
    rng = np.random.default_rng(0)
    for target in ("KITE", "407", "OAK"):
        for _ in range(50):
            wrong = pictures.misspell(rng, target)
            assert len(wrong) == len(target)
            assert wrong != target
            assert wrong.isdigit() == target.isdigit()


def test_excluded_targets_are_never_asked_for() -> None:
    excluded = frozenset(WORDS[::2])
    asked = {e.target for e in draw(7, 1000, pictures.PictureMix(word_share=1.0), excluded)}
    assert asked
    assert not asked & excluded


def test_held_out_targets_are_in_neither_list_nor_pretraining() -> None:
    train, held_out = prompts.split_targets()
    assert len(held_out) == 64
    assert len(set(train)) == len(train) >= 400
    assert not set(train) & set(held_out)
    asked = {e.target for e in draw(8, 1000, pictures.PictureMix(word_share=0.7), prompts.held_out_targets())}
    assert not asked & set(held_out)


def test_every_target_can_be_drawn_and_is_no_template_word() -> None:
    for target in (*prompts.split_targets()[0], *prompts.split_targets()[1]):
        assert pictures.MIN_LENGTH <= len(target) <= pictures.MAX_LENGTH
        assert set(target) <= set(pictures.LETTERS + pictures.DIGITS)
        assert target.lower() not in pictures.TEMPLATE_WORDS


def test_shipped_prompt_files_are_what_the_code_makes(tmp_path: Path) -> None:
    prompts.write_prompt_files(tmp_path)
    for name in ("prompts_train.txt", "prompts_heldout.txt"):
        assert (GLYPHS / name).read_text() == (tmp_path / name).read_text()
