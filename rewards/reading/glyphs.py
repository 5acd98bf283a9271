"""Reads the signs of the embedded glyphs task by drawing them: the text whose picture explains the pixels best.

It shares nothing with the OCR engines: no network, only the font that the task's pictures are drawn in.

    picture ──▶ paper p, ink q ──▶ coverage w = clip((x − p)·(q − p) / |q − p|², 0, 1) per pixel x
    gain of character c in a cell = Σ w² − Σ (w − m_c)² = 2 Σ w m_c − Σ m_c²      with its mask m_c, sums over the cell

What a character explains of its cell's coverage is its gain, and an empty cell gains 0. Of all layouts (texts of odd
and of even length, moved by up to `MAX_SHIFT` pixels) the one with the greatest sum of best gains is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from raylign.pretrain.glyph_pictures import CELL, CHARACTERS, COLOURS, HEIGHT, MAX_LENGTH, WIDTH, text_mask

Floats = npt.NDArray[np.float32]

MAX_SHIFT = 2
"""Pixels that a text may stand off its place, each way."""
MIN_CONTRAST = 40.0
"""Distance of ink and paper in RGB space, of 441; below it there is nothing to read."""
MAX_MISFIT = 0.35
"""Σ (w − m)² / Σ m² at which a character still counts as drawn."""
ILLEGIBLE = "?"
"""Stands for a cell with something in it that is no character."""
_INK_SHARE = 0.03
"""Of the pixels, those farthest from the paper show the ink."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture says and on which paper (RGB)."""

    text: str
    paper: tuple[float, float, float]


def read_glyphs(image_HWC: np.ndarray) -> Reading:
    """Read one picture of the glyphs task, RGB uint8 (HEIGHT, WIDTH, 3). Raises ValueError for another size."""
    if image_HWC.shape != (HEIGHT, WIDTH, 3):
        height, width = image_HWC.shape[:2]
        raise ValueError(f"this reader knows pictures of {WIDTH}x{HEIGHT} pixels, got {width}x{height}")
    pixels_HWC = image_HWC.astype(np.float32)
    paper_C = _paper(pixels_HWC)
    red, green, blue = (float(v) for v in paper_C)
    coverage_HW = _coverage(pixels_HWC, paper_C)
    text = "" if coverage_HW is None else _best_text(coverage_HW)
    return Reading(text, (red, green, blue))


def nearest_colour(paper: tuple[float, float, float]) -> str:
    """The name of the task's colour that is nearest in RGB space."""
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(paper, COLOURS[name], strict=True)))


def _paper(pixels_HWC: Floats) -> Floats:
    """The median of the two outermost rows on either side, which a text leaves free."""
    return np.median(np.concatenate([pixels_HWC[:2], pixels_HWC[-2:]]).reshape(-1, 3), axis=0)


def _coverage(pixels_HWC: Floats, paper_C: Floats) -> Floats | None:
    """How much ink each pixel has, (H, W) in [0, 1]; None where no ink stands out from the paper."""
    away_NC = (pixels_HWC - paper_C).reshape(-1, 3)
    distance_N = np.linalg.norm(away_NC, axis=1)
    farthest = np.argsort(distance_N, kind="stable")[-round(_INK_SHARE * len(distance_N)) :]
    ink_C = np.median(away_NC[farthest], axis=0)
    contrast = float(np.linalg.norm(ink_C))
    if contrast < MIN_CONTRAST:
        return None
    coverage_N: Floats = np.clip(away_NC @ ink_C / contrast**2, 0.0, 1.0, dtype=np.float32)
    return coverage_N.reshape(pixels_HWC.shape[:2])


@cache
def _masks() -> Floats:
    """Ink coverage of every character in its cell, (CHARACTERS, HEIGHT * CELL)."""
    left = (WIDTH - CELL) // 2
    cells = [np.asarray(text_mask(character), np.float32)[:, left : left + CELL] for character in CHARACTERS]
    return np.stack([cell.reshape(-1) / 255.0 for cell in cells])


def _best_text(coverage_HW: Floats) -> str:
    """The text of the layout that explains most."""
    padded_HW = np.pad(coverage_HW, MAX_SHIFT)
    best, text = -1.0, ""
    for num_cells in (MAX_LENGTH, MAX_LENGTH - 1):
        for dy in range(2 * MAX_SHIFT + 1):
            for dx in range(2 * MAX_SHIFT + 1):
                left = dx + (WIDTH - CELL * num_cells) // 2
                cells = [
                    padded_HW[dy : dy + HEIGHT, x : x + CELL].reshape(-1)
                    for x in range(left, left + CELL * num_cells, CELL)
                ]
                gain, drawn = _read_cells(np.stack(cells))
                if gain > best:
                    best, text = gain, drawn
    return text


def _read_cells(cells_ND: Floats) -> tuple[float, str]:
    """The sum of the best gains, and the characters that make it: none for an empty cell, "?" for a misfit."""
    masks = _masks()
    energies = (masks**2).sum(axis=1)
    gains = 2 * cells_ND @ masks.T - energies
    text, total = "", 0.0
    for cell_D, gains_of_cell in zip(cells_ND, gains, strict=True):
        place = int(gains_of_cell.argmax())
        gain = float(gains_of_cell[place])
        if gain > 0:
            misfit = (float((cell_D**2).sum()) - gain) / energies[place]
            text += CHARACTERS[place] if misfit <= MAX_MISFIT else ILLEGIBLE
            total += gain
    return total, text
