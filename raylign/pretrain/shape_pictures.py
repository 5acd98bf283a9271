"""Pictures of coloured shapes on plain grey: a world small enough to draw, and to read back without a model.

A scene is data; `render` turns it into pixels, antialiased. Shapes stand upright and apart, so what a picture shows
can be read exactly. Everything random is drawn from a generator that the caller passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 38, 38),
    "orange": (240, 135, 25),
    "yellow": (245, 220, 45),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (125, 45, 165),
    "pink": (250, 150, 195),
    "brown": (118, 70, 34),
    "black": (16, 16, 16),
    "white": (248, 248, 248),
}
BACKGROUND = (128, 128, 128)
"""A grey, which is none of the colours, and far from all of them."""
JITTER = 8
"""Colours and background vary by up to this much in each channel."""
MIN_SIZE = 8
"""Pixels; below it a heart is a blot."""
MARGIN, GAP = 1.0, 2.0
"""Pixels between a shape and the edge, and between two shapes."""
SUPERSAMPLING = 8
_MAX_TRIES, _MAX_DARTS = 300, 60

Relation = Literal["left of", "right of", "above", "below"]
_DIRECTIONS: dict[Relation, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: the centre of its box, and the longer side of that box, in pixels."""

    name: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        half_width, half_height = np.abs(outlines()[self.name]).max(axis=0) * self.size
        return self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. `paints` are the real colours of the shapes, near those of their names."""

    height: int
    width: int
    shapes: tuple[Shape, ...]
    paints: tuple[tuple[int, int, int], ...]
    background: tuple[int, int, int] = BACKGROUND


@dataclass(frozen=True, slots=True)
class Group:
    """So many equal shapes; any colour when none is given; all in a relation to those of an earlier group, or none."""

    name: str
    count: int = 1
    colour: str | None = None
    relation: Relation | None = None
    target: int = 0


@cache
def outlines() -> dict[str, npt.NDArray[np.float32]]:
    """Every shape as a polygon around the centre of its box, whose longer side is 1; y points down."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    spikes = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.42, 1.0)
    heart = (
        16 * np.sin(turn) ** 3,
        -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn),
    )
    arm = 1 / 6
    raw: dict[str, Sequence[npt.ArrayLike]] = {
        "circle": (np.cos(turn), np.sin(turn)),
        "square": ([-1, 1, 1, -1], [-1, -1, 1, 1]),
        "triangle": ([0, 1, -1], [-math.sqrt(3), 0, 0]),
        "diamond": ([0, 1, 0, -1], [-1, 0, 1, 0]),
        "star": (radius * np.cos(spikes), radius * np.sin(spikes)),
        "cross": (
            [-arm, arm, arm, 0.5, 0.5, arm, arm, -arm, -arm, -0.5, -0.5, -arm],
            [-0.5, -0.5, -arm, -arm, arm, arm, 0.5, 0.5, arm, arm, -arm, -arm],
        ),
        "heart": heart,
    }
    return {
        name: _normalised(np.stack([np.asarray(axis, np.float64) for axis in axes], 1)) for name, axes in raw.items()
    }


def coverage(name: str, x: float, y: float, size: float, height: int, width: int) -> npt.NDArray[np.float32]:
    """How much of each pixel a shape covers, (height, width) from 0 to 1."""
    import cv2

    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    # Sub-pixel corners in 1/16; OpenCV counts from the middle of the first pixel.
    points = (outlines()[name] * size + (x, y)) * SUPERSAMPLING - 0.5
    cv2.fillPoly(fine, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return fine.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3), dtype=np.float32)


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture of a scene, (height, width, 3)."""
    picture = np.empty((scene.height, scene.width, 3), np.float32)
    picture[:] = scene.background
    for shape, paint in zip(scene.shapes, scene.paints, strict=True):
        alpha = coverage(shape.name, shape.x, shape.y, shape.size, scene.height, scene.width)[..., None]
        picture += alpha * (np.asarray(paint, np.float32) - picture)
    return picture.round().astype(np.uint8)


def compose(rng: np.random.Generator, groups: Sequence[Group], height: int, width: int) -> Scene:
    """A random scene that shows exactly these groups, relations and all.

    Raises ValueError when so many shapes do not fit a picture of this size.
    """
    side, count = min(height, width), sum(group.count for group in groups)
    largest = max(MIN_SIZE, 0.66 / math.ceil(math.sqrt(count)) * side)
    smallest = max(MIN_SIZE, 0.75 * largest)
    places = [index for index, group in enumerate(groups) for _ in range(group.count)]
    palette = list(COLOURS)
    colours = [groups[place].colour or palette[rng.integers(len(palette))] for place in places]
    for _ in range(_MAX_TRIES):
        shapes: list[Shape] = []
        for place, colour in zip(places, colours, strict=True):
            group = groups[place]
            shape = Shape(group.name, colour, 0, 0, rng.uniform(smallest, largest))
            targets = [other for other, index in zip(shapes, places, strict=False) if index == group.target]
            found = _place(rng, shape, shapes, group.relation, targets, height, width)
            if found is None:
                break
            shapes.append(found)
        if len(shapes) == count:
            paints = tuple(varied(rng, COLOURS[colour]) for colour in colours)
            return Scene(height, width, tuple(shapes), paints, varied(rng, BACKGROUND))
    raise ValueError(
        f"{count} shapes as asked do not fit into {width}x{height} pixels; ask for fewer or a larger picture"
    )


def varied(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A real colour near the colour of a name: each channel up to `JITTER` away."""
    red, green, blue = (int(np.clip(v, 0, 255)) for v in np.asarray(colour) + rng.integers(-JITTER, JITTER + 1, 3))
    return red, green, blue


def _normalised(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    low, high = points.min(axis=0), points.max(axis=0)
    return ((points - (low + high) / 2) / (high - low).max()).astype(np.float32)


def _place(
    rng: np.random.Generator,
    shape: Shape,
    others: Sequence[Shape],
    relation: Relation | None,
    targets: Sequence[Shape],
    height: int,
    width: int,
) -> Shape | None:
    """The shape at a random place, apart from all others and in the relation to its targets, if one is found."""
    room = MARGIN + shape.size / 2
    for _ in range(_MAX_DARTS):
        moved = replace(shape, x=rng.uniform(room, width - room), y=rng.uniform(room, height - room))
        if all(_apart(moved, other) for other in others) and all(
            relation is None or _related(moved, relation, target) for target in targets
        ):
            return moved
    return None


def _apart(one: Shape, other: Shape) -> bool:
    """Whether there is a gap between the squares around two shapes."""
    reach = (one.size + other.size) / 2 + GAP
    return abs(one.x - other.x) >= reach or abs(one.y - other.y) >= reach


def _related(one: Shape, relation: Relation, other: Shape) -> bool:
    """Whether a relation holds beyond doubt: boxes apart that way, and less than half as far off sideways."""
    right, down = _DIRECTIONS[relation]
    dx, dy = one.x - other.x, one.y - other.y
    along, across = (dx * right, dy) if right else (dy * down, dx)
    return along >= (one.size + other.size) / 2 + GAP and abs(across) <= 0.45 * along
