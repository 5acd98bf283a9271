"""Sample grids and before/after sheets: pixels stay pixels, captions fit, wrong shapes are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.pictures import (
    BAD,
    GOOD,
    SHEET_WIDTH,
    BeforeAfterRow,
    Caption,
    _wrap,
    before_after,
    fit,
    grid,
    save_png,
    typeface,
)


def _noise(height: int = 32, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _has_colour(sheet: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((sheet == np.array(colour, np.uint8)).all(axis=-1).any())


def test_a_tile_is_the_picture_in_whole_pixels() -> None:
    image = _noise()
    sheet = grid([image], scale=4)
    enlarged = image.repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(sheet[12 : 12 + 128, 12 : 12 + 256], enlarged)


@pytest.mark.parametrize(("height", "factor"), [(16, 8), (32, 4), (64, 2), (128, 1), (512, 1)])
def test_small_pictures_are_enlarged_to_a_readable_size(height: int, factor: int) -> None:
    sheet = grid([_noise(height, height)])
    assert sheet.shape == (height * factor + 24, height * factor + 24, 3)
    assert sheet.dtype == np.uint8


@pytest.mark.parametrize(("columns", "expected"), [(1, (4, 1)), (2, (2, 2)), (3, (2, 3)), (4, (1, 4)), (9, (1, 4))])
def test_columns(columns: int, expected: tuple[int, int]) -> None:
    sheet = grid([_noise(32, 32, seed) for seed in range(4)], columns=columns, scale=1)
    rows, across = expected
    assert sheet.shape[:2] == (rows * 44 + 12, across * 44 + 12)


def test_a_sheet_is_about_as_wide_as_tall_by_itself() -> None:
    height, width, _ = grid([_noise(32, 96, seed) for seed in range(24)]).shape
    assert 0.5 < width / height < 2


def test_pictures_of_several_sizes_share_a_sheet() -> None:
    assert grid([_noise(32, 32), _noise(16, 64)], ["a", "b"], columns=2, scale=1).shape[1] == 2 * (64 + 12) + 12


def test_captions_are_coloured_by_outcome() -> None:
    good = grid([_noise()], [Caption("KITE 1.00", True)])
    bad = grid([_noise()], [Caption("KITT 0.75", False)])
    plain = grid([_noise()], ["KITE"])
    assert _has_colour(good, GOOD)
    assert not _has_colour(good, BAD)
    assert _has_colour(bad, BAD)
    assert not _has_colour(plain, GOOD)
    assert not _has_colour(plain, BAD)
    assert good.shape[0] > grid([_noise()]).shape[0]


def test_wrong_input_is_refused_with_what_came() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        grid([])
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        grid([_noise()], ["a", "b"])
    with pytest.raises(ValueError, match=r"float64 \(4, 4, 3\)"):
        grid([np.zeros((4, 4, 3))])
    with pytest.raises(ValueError, match=r"uint8 \(3, 4, 4\)"):
        grid([np.zeros((3, 4, 4), np.uint8)])
    with pytest.raises(ValueError, match="at least one row"):
        before_after([])
    with pytest.raises(ValueError, match="rows without images"):
        before_after([BeforeAfterRow("a", [], [])])


def _row(samples: int = 2, prompt: str = 'the word "KITE"') -> BeforeAfterRow:
    pictures = [_noise(seed=seed) for seed in range(samples)]
    return BeforeAfterRow(
        prompt, pictures, pictures[::-1], [Caption("KI 0.5", False)] * samples, [Caption("KITE 1.0", True)] * samples
    )


def test_a_before_after_sheet_holds_both_halves() -> None:
    sheet = before_after([_row(2)], scale=1, means=[("ocr", 0.39, 0.86)])
    first = _noise(seed=0)
    corners = np.argwhere((sheet == first[0, 0]).all(axis=-1))
    found = [(y, x) for y, x in corners if np.array_equal(sheet[y : y + 32, x : x + 64], first)]
    assert len(found) == 2, "once before, once after"
    assert found[0][0] == found[1][0], "on the same row"
    assert _has_colour(sheet, GOOD)
    assert _has_colour(sheet, BAD)


def test_a_headline_says_better_or_worse_by_colour() -> None:
    row = BeforeAfterRow("a", [_noise()], [_noise()])
    better = before_after([row], means=[("ocr", 0.1, 0.9)])
    worse = before_after([row], means=[("ocr", 0.9, 0.1)])
    unknown = before_after([row], means=[("ocr", None, 0.1), ("clip", 0.2, None)])
    assert (_has_colour(better, GOOD), _has_colour(better, BAD)) == (True, False)
    assert (_has_colour(worse, GOOD), _has_colour(worse, BAD)) == (False, True)
    assert (_has_colour(unknown, GOOD), _has_colour(unknown, BAD)) == (False, False)


def test_held_out_metrics_have_a_line_below_the_rewards() -> None:
    row = BeforeAfterRow("a", [_noise()], [_noise()])
    plain, both = (
        before_after([row], means=[("ocr", 0.1, 0.9)], metrics=metrics) for metrics in ((), [("px", 0.9, 0.1)])
    )
    line = both.shape[0] - plain.shape[0]
    assert line > 20
    assert np.array_equal(plain[:100], both[:100]), "title and first line stay where they are"
    assert (_has_colour(plain, BAD), _has_colour(both, BAD)) == (False, True)
    neither = before_after([row], metrics=[("sharpness", 0.1, 0.9)])
    assert (_has_colour(neither, GOOD), _has_colour(neither, BAD)) == (False, False)


def test_a_long_headline_is_written_smaller() -> None:
    row = BeforeAfterRow("a", [_noise()], [_noise()])
    means = [(f"reward_{index}", 0.1, 0.9) for index in range(3)]
    sheet = before_after([row], means=means)
    columns = np.argwhere((sheet == GOOD).all(axis=-1))[:, 1]
    starts = 1 + np.count_nonzero(np.diff(np.unique(columns)) > 40)
    assert starts == 3, "every value is on the sheet"


def test_a_wide_sheet_is_drawn_smaller_but_never_below_one_to_one() -> None:
    assert before_after([_row(2)]).shape[1] <= SHEET_WIDTH
    assert before_after([_row(4)]).shape[1] <= SHEET_WIDTH
    many = BeforeAfterRow("a", [_noise(32, 512)] * 4, [_noise(32, 512)] * 4)
    assert before_after([many]).shape[1] > 8 * 512


def test_rows_may_have_uneven_samples_and_long_prompts() -> None:
    rows = [
        _row(1, "word " * 80),
        BeforeAfterRow("", [], [_noise(), _noise()]),
        BeforeAfterRow("unbroken" * 40, [_noise()], []),
    ]
    assert before_after(rows).ndim == 3


def test_text_is_cut_to_its_width() -> None:
    font = typeface(15)
    cut = fit("a caption that is far too long for its tile", font, 100)
    assert font.getlength(cut) <= 100
    assert cut.endswith("…")
    assert fit("short\nand\tplain", font, 500) == "short and plain"
    assert _wrap("one two three four five six", font, 60, max_lines=2)[1].endswith("…")
    assert _wrap("", font, 60, max_lines=2) == []


def test_a_saved_png_reads_back_exactly(tmp_path: Path) -> None:
    image = _noise()
    path = save_png(tmp_path / "samples" / "step_00001.png", image)
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), image)


def test_pictures_need_neither_matplotlib_nor_torch() -> None:
    code = (
        "import sys, numpy as np; from services.pictures import grid\n"
        "grid([np.zeros((8, 8, 3), np.uint8)], ['a'])\n"
        "print(sorted({'torch', 'matplotlib', 'ray'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, check=True
    )
    assert done.stdout.strip() == "[]"
