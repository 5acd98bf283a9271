"""Pictures a person looks at: grids of samples, and before/after sheets. PIL and numpy only.

Training pictures can be tiny (32×96 pixels), so tiles are enlarged by whole factors with hard pixel edges:
what is shown is what the reward saw. The font is the scalable one that PIL carries, so no system font is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from services.headlines import direction

Colour = tuple[int, int, int]
Mean = tuple[str, float | None, float | None]
"""The name of a held-out mean, and its values before and after training."""

INK: Colour = (28, 32, 40)
FAINT: Colour = (118, 126, 140)
PAPER: Colour = (255, 255, 255)
FRAME: Colour = (222, 226, 233)
GOOD: Colour = (22, 130, 70)
BAD: Colour = (196, 48, 43)

TILE_HEIGHT = 128
"""About how tall a tile is drawn, before whole-factor rounding."""
SHEET_WIDTH = 1600
"""A before/after sheet is drawn smaller rather than wider than this, so that it reads well in a page."""
_HEADLINE, _SMALLEST_HEADLINE = 22, 14
"""Pixels of height."""
_COLOURS = {"better": GOOD, "worse": BAD, "": INK}
_ARROW = "→"
_ARROW_WIDTH = 22
_GAP = 12
_MARGIN = 28


@dataclass(frozen=True, slots=True)
class Caption:
    """A line under a picture. `good` colours it green or red; None leaves it grey."""

    text: str
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class BeforeAfterRow:
    """One held-out prompt and samples of it, drawn with the same keys before and after training."""

    prompt: str
    before: Sequence[np.ndarray]
    after: Sequence[np.ndarray]
    before_captions: Sequence[Caption] = ()
    after_captions: Sequence[Caption] = ()


def grid(
    images: Sequence[np.ndarray],
    captions: Sequence[Caption | str] = (),
    columns: int | None = None,
    scale: int | None = None,
    frames: Sequence[Colour | None] = (),
) -> np.ndarray:
    """A sheet of RGB uint8 pictures with a caption under each, as one RGB uint8 array.

    `columns` defaults to a sheet about as wide as tall, `scale` to the whole factor that makes tiles readable.
    `frames` are the colours of thick frames, None for a picture without one.
    """
    if not images:
        raise ValueError("grid needs at least one image, got none")
    if captions and len(captions) != len(images):
        raise ValueError(f"grid got {len(images)} images and {len(captions)} captions; give one each, or none")
    tiles = [_tile(image, _scale_for(images) if scale is None else scale) for image in images]
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    if columns is None:
        columns = max(1, round(math.sqrt(len(tiles) * height / width)))
    columns = min(columns, len(tiles))
    font = typeface(15)
    caption_height = _line_height(font) + 8 if captions else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + _GAP) + _GAP, rows * (height + caption_height + _GAP) + _GAP),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        x = _GAP + index % columns * (width + _GAP)
        y = _GAP + index // columns * (height + caption_height + _GAP)
        _paste(sheet, draw, tile, x, y)
        if frames and frames[index] is not None:
            # Apart from the picture, which may have the frame's colour.
            draw.rectangle((x - 5, y - 5, x + tile.width + 4, y + tile.height + 4), outline=frames[index], width=3)
        if captions:
            _caption(draw, captions[index], x, y + height + 4, width, font)
    return np.asarray(sheet)


def before_after(
    rows: Sequence[BeforeAfterRow],
    title: str = "Before and after training",
    means: Sequence[Mean] = (),
    scale: int | None = None,
    metrics: Sequence[Mean] = (),
) -> np.ndarray:
    """A sheet with one row per held-out prompt: its text, then samples before | after, drawn with the same keys.

    `means` are printed as the headline: "held-out ocr 0.39 → 0.86"; `metrics`, which no reward asked for, below it.
    """
    if not rows:
        raise ValueError("before_after needs at least one row, got none")
    everything = [image for row in rows for image in (*row.before, *row.after)]
    if not everything:
        raise ValueError("before_after got rows without images")
    factor = _scale_for(everything) if scale is None else scale
    layout = _Layout.of(rows, everything, factor)
    while scale is None and factor > 1 and layout.width > SHEET_WIDTH:
        factor -= 1
        layout = _Layout.of(rows, everything, factor)
    headlines = [
        pieces for pieces in (_headline(means), _headline(metrics, "held-out metrics, not trained on: ")) if pieces
    ]
    line_height = _line_height(typeface(_HEADLINE)) + 12
    top = _MARGIN + 44 + line_height * len(headlines)
    height = top + 40 + len(rows) * layout.row_height + _MARGIN - _GAP
    sheet = Image.new("RGB", (max(layout.width, 520), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), fit(title, typeface(28), sheet.width - 2 * _MARGIN), INK, typeface(28))
    for place, pieces in enumerate(headlines):
        _draw_headline(draw, pieces, _MARGIN, _MARGIN + 48 + line_height * place, sheet.width - 2 * _MARGIN)
    for x, name in ((layout.before_x, "BEFORE"), (layout.after_x, "AFTER")):
        draw.text((x, top + 12), name, FAINT, typeface(14))
    middle = layout.after_x - _MARGIN
    draw.line([(middle, top + 10), (middle, height - _MARGIN)], FRAME, 2)
    for index, row in enumerate(rows):
        _draw_row(sheet, draw, row, layout, top + 40 + index * layout.row_height, factor)
    return np.asarray(sheet)


def save_png(path: Path, image_HWC: np.ndarray) -> Path:
    """Write an RGB uint8 array as PNG and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HWC).save(path, format="PNG", optimize=True)
    return path


@dataclass(frozen=True, slots=True)
class _Layout:
    """Pixel positions of a before/after sheet."""

    prompt_width: int
    tile_width: int
    tile_height: int
    before_x: int
    after_x: int
    width: int
    row_height: int

    @classmethod
    def of(cls, rows: Sequence[BeforeAfterRow], images: Sequence[np.ndarray], factor: int) -> _Layout:
        tile_width = max(image.shape[1] for image in images) * factor
        tile_height = max(image.shape[0] for image in images) * factor
        has_captions = any(row.before_captions or row.after_captions for row in rows)
        widest = max(typeface(18).getlength(row.prompt) for row in rows)
        prompt_width = int(min(max(widest, 120), 260))
        step = tile_width + _GAP
        before_x = _MARGIN + prompt_width + _MARGIN
        after_x = before_x + max(1, *(len(row.before) for row in rows)) * step - _GAP + 2 * _MARGIN
        width = after_x + max(1, *(len(row.after) for row in rows)) * step - _GAP + _MARGIN
        row_height = tile_height + (_line_height(typeface(15)) + 8 if has_captions else 0) + _GAP + 6
        return cls(prompt_width, tile_width, tile_height, before_x, after_x, width, row_height)


def _draw_row(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, row: BeforeAfterRow, layout: _Layout, y: int, factor: int
) -> None:
    lines = _wrap(row.prompt, typeface(18), layout.prompt_width, max_lines=4)
    text_y = y + max(0, (layout.tile_height - len(lines) * 24) // 2)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, text_y + number * 24), line, INK, typeface(18))
    halves = ((layout.before_x, row.before, row.before_captions), (layout.after_x, row.after, row.after_captions))
    for left, images, captions in halves:
        for index, image in enumerate(images):
            x = left + index * (layout.tile_width + _GAP)
            _paste(sheet, draw, _tile(image, factor), x, y)
            if index < len(captions):
                _caption(draw, captions[index], x, y + layout.tile_height + 4, layout.tile_width, typeface(15))


def _headline(means: Sequence[Mean], words: str = "held-out ") -> list[tuple[str, Colour]]:
    """The headline as coloured pieces, e.g. "held-out ocr 0.39 → 0.86"; none without means."""
    pieces: list[tuple[str, Colour]] = []
    for name, before, after in means:
        pieces.append(("   ·   " if pieces else words, FAINT))
        pieces.append((f"{name}  ", FAINT))
        pieces.append((f"{_number(before)} ", INK))
        pieces.append((_ARROW, FAINT))
        pieces.append((_number(after), _COLOURS[direction(name, before, after)]))
    return pieces


def _draw_headline(
    draw: ImageDraw.ImageDraw, pieces: Sequence[tuple[str, Colour]], x: float, y: float, width: float
) -> None:
    """On one line, in letters that are small enough for it."""

    def length(font: ImageFont.FreeTypeFont) -> float:
        return sum(_ARROW_WIDTH + 6 if text == _ARROW else font.getlength(text) for text, _ in pieces)

    sizes = range(_HEADLINE, _SMALLEST_HEADLINE, -1)
    font = typeface(next((size for size in sizes if length(typeface(size)) <= width), _SMALLEST_HEADLINE))
    for text, colour in pieces:
        if text == _ARROW:
            _arrow(draw, x, y + _line_height(font) * 0.56, colour)
            x += _ARROW_WIDTH + 6
        else:
            draw.text((x, y), text, colour, font)
            x += font.getlength(text)


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, colour: Colour) -> None:
    """An arrow to the right, drawn because the font that comes with PIL has none."""
    tip = x + _ARROW_WIDTH
    draw.line([(x, y), (tip - 2, y)], colour, 2)
    draw.polygon([(tip, y), (tip - 8, y - 5), (tip - 8, y + 5)], colour)


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Image.Image, x: int, y: int) -> None:
    sheet.paste(tile, (x, y))
    draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline=FRAME)


def _caption(
    draw: ImageDraw.ImageDraw,
    caption: Caption | str,
    x: int,
    y: int,
    width: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    if isinstance(caption, str):
        caption = Caption(caption)
    colour = FAINT if caption.good is None else GOOD if caption.good else BAD
    text = fit(caption.text, font, width)
    draw.text((x + (width - font.getlength(text)) / 2, y), text, colour, font)


def _tile(image: np.ndarray, factor: int) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 (height, width, 3), got {image.dtype} {image.shape}")
    picture = Image.fromarray(image)
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _scale_for(images: Sequence[np.ndarray]) -> int:
    """The whole factor that makes the tallest picture about TILE_HEIGHT, at least 1."""
    return max(1, round(TILE_HEIGHT / max(image.shape[0] for image in images)))


def fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with an ellipsis to at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Words on lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        last = len(lines) == max_lines - 1
        lines.append(fit(" ".join(words if last else words[:count]), font, width))
        words = [] if last else words[count:]
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


@lru_cache(maxsize=16)
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """The font of every picture, in pixels of height."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; install the `pillow` wheel of constraints.txt")
    return font
