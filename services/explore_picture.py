"""One prompt's drafts by reward, the chosen framed, above the same keys drawn again: a sheet to judge drafts by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from raylign.types import RolloutGroup
from services.pictures import (
    BAD,
    FAINT,
    GOOD,
    INK,
    PAPER,
    SHEET_WIDTH,
    TILE_HEIGHT,
    Caption,
    Colour,
    fit,
    grid,
    typeface,
)

_MARGIN = 16
_TITLE, _HEADING = 24, 17
"""Pixels of height."""


def explored_sheet(group: RolloutGroup) -> np.ndarray:
    """An RGB uint8 sheet of a group that carries its drafts' pictures.

    Drafts stand best first, failed ones last; framed green are the better half of the chosen, red the others. Siblings
    that were drawn again stand below in the order of their drafts, each with its draft's reward and its own.
    Raises ValueError for a group without such pictures.
    """
    seen = group.exploration
    if seen is None or seen.images_NHWC is None:
        raise ValueError(f"group {group.prompt.id!r} carries no drafts to show")
    draft_of = dict(zip(seen.indices, seen.totals, strict=True))
    order = sorted(range(len(seen.indices)), key=lambda place: _worst_last(seen.totals[place], place))
    siblings = {rollout.key.sample_index: place for place, rollout in enumerate(group.rollouts)}
    chosen = [seen.indices[place] for place in order if seen.indices[place] in siblings]
    colours = {index: GOOD if rank < len(chosen) // 2 else BAD for rank, index in enumerate(chosen)}
    pool = _tiles(
        [seen.images_NHWC[place] for place in order],
        [Caption(_number(seen.totals[place])) for place in order],
        [colours.get(seen.indices[place]) for place in order],
    )
    words = f"{len(order)} drafts and their rewards, best first; framed are the {len(chosen)} chosen"
    parts = [(words, pool)]
    if seen.redrawn and group.images_GHWC is not None:
        again = _tiles(
            [group.images_GHWC[siblings[index]] for index in chosen],
            [_both(draft_of[index], group.rollouts[siblings[index]].total) for index in chosen],
            [colours[index] for index in chosen],
        )
        parts.append(("The chosen drawn again: reward of the draft / reward", again))
    return _stacked(group.prompt.text, parts)


def _worst_last(total: float | None, place: int) -> tuple[bool, float, int]:
    return (total is None, -(total or 0.0), place)


def _tiles(images: Sequence[np.ndarray], captions: Sequence[Caption], frames: Sequence[Colour | None]) -> np.ndarray:
    """A grid as wide as a sheet, of pictures that are made smaller where they are large."""
    small = [_shrunk(image) for image in images]
    height, width = small[0].shape[:2]
    scale = max(1, round(TILE_HEIGHT / 2 / height))
    columns = max(1, (SHEET_WIDTH - 2 * _MARGIN) // (width * scale + 12))
    return grid(small, captions, columns=columns, scale=scale, frames=frames)


def _shrunk(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    if height <= TILE_HEIGHT:
        return image_HWC
    size = (max(1, round(width * TILE_HEIGHT / height)), TILE_HEIGHT)
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BOX))


def _both(draft: float | None, final: float | None) -> Caption:
    better = None if draft is None or final is None or draft == final else final > draft
    return Caption(f"{_number(draft)} / {_number(final)}", better)


def _number(total: float | None) -> str:
    return "no reward" if total is None else f"{total:.2f}"


def _stacked(title: str, parts: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """A title, and each picture below its heading."""
    width = max(480, *(picture.shape[1] for _, picture in parts)) + 2 * _MARGIN
    heading = _HEADING + 20
    height = 2 * _MARGIN + _TITLE + sum(heading + picture.shape[0] for _, picture in parts)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _MARGIN, _MARGIN), fit(title, typeface(_TITLE), width - 4 * _MARGIN), INK, typeface(_TITLE))
    y = _MARGIN + _TITLE
    for words, picture in parts:
        font = typeface(_HEADING)
        draw.text((2 * _MARGIN, y + 16), fit(words, font, width - 4 * _MARGIN), FAINT, font)
        sheet.paste(Image.fromarray(picture), (_MARGIN, y + heading))
        y += heading + picture.shape[0]
    return np.asarray(sheet)
