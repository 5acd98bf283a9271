"""Pictures of shapes with the prompts that ask for them: clean ones, and flawed ones like a web crawl has.

Shapes stand in the cells of a two by two grid, a single one in the middle, all a little off: so few ways to lay out a
picture that a tiny model can learn them and draw them in a few steps. As for glyphs, each flaw is a coin flip that does
not depend on the prompt, hence a habit that reinforcement learning can drop everywhere at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from raylign.pretrain.shape_pictures import BACKGROUND, COLOURS, Group, Relation, Scene, Shape, render, varied
from raylign.pretrain.shape_prompts import NAMES, TAGS, ShapeTask, Tag, draw_task

SIDE = 32
"""Pixels, height and width."""
CELL = SIDE / 2
NUM_CELLS = 4
"""Cells in reading order: 0 and 1 above, 2 and 3 below."""
LONE_SIZES, LONE_JITTER = (17.0, 20.0), 1.0
CELL_SIZES, CELL_JITTER = (12.0, 13.0), 0.5
"""Pixels. Two shapes in neighbouring cells stay two pixels apart, and one from the edge."""

USUAL_COLOURS = ("red", "yellow", "blue")
"""Of tidy pictures, where no colour is asked for."""
PAIRS: dict[Relation, tuple[tuple[int, int], ...]] = {
    "left of": ((1, 0), (3, 2)),
    "right of": ((0, 1), (2, 3)),
    "above": ((2, 0), (3, 1)),
    "below": ((0, 2), (1, 3)),
}
"""Cells of (the target, the shape that stands in the relation to it); the first pair is the tidy one."""

TAG_SHARES: dict[Tag, float] = {
    "single_object": 0.06,
    "two_object": 0.14,
    "counting": 0.20,
    "colors": 0.12,
    "position": 0.24,
    "color_attr": 0.24,
}
"""How often pre-training sees each kind of prompt: the harder, the more often."""

Flaw = Literal["clean", "reshaped", "recoloured", "miscounted", "mirrored", "blurred", "faint"]
FLAW_SHARES: dict[Flaw, float] = {
    "reshaped": 0.25,
    "recoloured": 0.2,
    "miscounted": 0.2,
    "mirrored": 0.1,
    "blurred": 0.15,
    "faint": 0.1,
}
"""Flaws with their shares: other shapes, other colours, one shape too many or too few, everything on the opposite side
of the picture, and two ways to be unreadable. A flaw need not spoil the prompt: who asks for a circle does not mind
its colour."""


@dataclass(frozen=True)
class ShapeExample:
    """A prompt with a picture of it, and what is wrong with the picture."""

    task: ShapeTask
    picture: npt.NDArray[np.uint8]
    """SIDE x SIDE x 3."""
    flaw: Flaw


def draw_example(rng: np.random.Generator, flawed_share: float, tidy: bool = True) -> ShapeExample:
    """One random prompt that is not held out, with its picture, flawed with probability `flawed_share`."""
    task = draw_task(rng, TAGS, [TAG_SHARES[tag] for tag in TAGS])
    flaw: Flaw = "clean"
    if rng.random() < flawed_share:
        flaw = list(FLAW_SHARES)[rng.choice(len(FLAW_SHARES), p=list(FLAW_SHARES.values()))]
    return ShapeExample(task, draw_picture(rng, task.groups, flaw, tidy), flaw)


def draw_picture(
    rng: np.random.Generator, groups: Sequence[Group], flaw: Flaw = "clean", tidy: bool = True
) -> npt.NDArray[np.uint8]:
    """A random picture of these groups (SIDE x SIDE x 3) with this flaw."""
    scene = arrange(rng, miscount(rng, groups) if flaw == "miscounted" else groups, tidy)
    match flaw:
        case "reshaped":
            scene = replace(scene, shapes=tuple(replace(s, name=_other(rng, NAMES, s.name)) for s in scene.shapes))
        case "recoloured":
            colours = [_other(rng, list(COLOURS), shape.colour) for shape in scene.shapes]
            scene = replace(scene, paints=tuple(varied(rng, COLOURS[colour]) for colour in colours))
        case "mirrored":
            scene = replace(scene, shapes=tuple(replace(s, x=SIDE - s.x, y=SIDE - s.y) for s in scene.shapes))
        case "faint":
            ground, weight = np.asarray(scene.background, np.float32), rng.uniform(0.0, 0.15)
            paints = [ground + weight * (np.asarray(paint, np.float32) - ground) for paint in scene.paints]
            scene = replace(scene, paints=tuple((int(r), int(g), int(b)) for r, g, b in paints))
        case "clean" | "miscounted" | "blurred":
            pass
    picture = render(scene)
    return blurred(picture, rng.uniform(4.0, 6.0)) if flaw == "blurred" else picture


def arrange(rng: np.random.Generator, groups: Sequence[Group], tidy: bool = True) -> Scene:
    """A random scene of at most four shapes that shows exactly these groups, each group in one colour.

    A tidy one fills the cells in reading order, and all shapes whose colour is not asked for share a usual colour; else
    any cells will do that keep the relation, and any colours.
    """
    colours = _colours(rng, groups, tidy)
    places = [index for index, group in enumerate(groups) for _ in range(group.count)]
    if len(places) > NUM_CELLS:
        raise ValueError(f"{len(places)} shapes do not fit into {NUM_CELLS} cells; ask for fewer")
    alone = len(places) == 1
    low, high = LONE_SIZES if alone else CELL_SIZES
    jitter = LONE_JITTER if alone else CELL_JITTER
    shapes: list[Shape] = []
    for place, (x, y) in zip(places, _centres(rng, groups, len(places), tidy), strict=True):
        dx, dy = rng.uniform(-jitter, jitter, size=2)
        shapes.append(Shape(groups[place].name, colours[place], x + dx, y + dy, rng.uniform(low, high)))
    paints = tuple(varied(rng, COLOURS[shape.colour]) for shape in shapes)
    return Scene(SIDE, SIDE, tuple(shapes), paints, varied(rng, BACKGROUND))


def miscount(rng: np.random.Generator, groups: Sequence[Group]) -> list[Group]:
    """The groups with one shape too many, or as often one too few where there are two or more."""
    counts, total = [group.count for group in groups], sum(group.count for group in groups)
    fewer = total == NUM_CELLS or (total > 1 and rng.random() < 0.5)
    counts[rng.integers(len(counts))] += -1 if fewer else 1
    # Who stands alone, or in a crowd, stands in no relation.
    return [replace(group, count=count, relation=None) for group, count in zip(groups, counts, strict=True) if count]


def blurred(picture: npt.NDArray[np.uint8], sigma: float) -> npt.NDArray[np.uint8]:
    """Gaussian blur, `sigma` in pixels."""
    import cv2

    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.uint8)


def _colours(rng: np.random.Generator, groups: Sequence[Group], tidy: bool) -> list[str]:
    palette = USUAL_COLOURS if tidy else tuple(COLOURS)
    if tidy:
        usual = palette[rng.integers(len(palette))]
        return [group.colour or usual for group in groups]
    return [group.colour or palette[rng.integers(len(palette))] for group in groups]


def _centres(rng: np.random.Generator, groups: Sequence[Group], num: int, tidy: bool) -> list[tuple[float, float]]:
    if num == 1:
        return [(SIDE / 2, SIDE / 2)]
    relation = groups[-1].relation
    if num == 2 and (relation or not tidy):
        choices = PAIRS[relation] if relation else [pair for pairs in PAIRS.values() for pair in pairs]
        cells = choices[0 if tidy else rng.integers(len(choices))]
    else:
        cells = range(num) if tidy else [int(cell) for cell in rng.permutation(NUM_CELLS)[:num]]
    return [((cell % 2 + 0.5) * CELL, (cell // 2 + 0.5) * CELL) for cell in cells]


def _other(rng: np.random.Generator, choices: Sequence[str], choice: str) -> str:
    others = [other for other in choices if other != choice]
    return others[rng.integers(len(others))]
