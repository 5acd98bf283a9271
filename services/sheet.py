"""A canvas for charts: lines, dots and words at coordinates in pixels shown. PIL only.

It is drawn at twice its size and reduced, so that lines are smooth; pictures.py has the colours and the font.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from services.pictures import PAPER, Colour, typeface

_FINE = 2
"""Pixels drawn per pixel shown, each way."""
GREY: Colour = (138, 146, 160)
"""Of what was there before training."""


@dataclass(slots=True)
class Sheet:
    """An empty sheet of paper to begin with."""

    image: Image.Image
    draw: ImageDraw.ImageDraw

    @classmethod
    def blank(cls, width: int, height: int) -> Self:
        image = Image.new("RGB", (width * _FINE, height * _FINE), PAPER)
        return cls(image, ImageDraw.Draw(image))

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * _FINE, y * _FINE) for x, y in points]
        self.draw.line(scaled, colour, round(width * _FINE), joint="curve")

    def polygon(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill)

    def dot(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self.draw.circle((x * _FINE, y * _FINE), radius * _FINE, fill, PAPER, 2 * _FINE)

    def text(self, x: float, y: float, text: str, colour: Colour, size: int, anchor: str = "lm") -> None:
        self.draw.text((x * _FINE, y * _FINE), text, colour, typeface(size * _FINE), anchor=anchor)

    def reduced(self) -> np.ndarray:
        """The picture in pixels shown, RGB uint8."""
        width, height = self.image.size
        return np.asarray(self.image.resize((width // _FINE, height // _FINE), Image.Resampling.LANCZOS))


def rgb(colour: str) -> Colour:
    """A named or `#rrggbb` colour as numbers."""
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return red, green, blue
