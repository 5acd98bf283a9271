"""Pictures of short words with the prompts that ask for them: clean ones, and flawed ones like a web crawl has.

Everything is drawn from a generator that the caller passes, so the same seed gives the same pictures. Reinforcement
learning selects among what a model already does, so the *kinds* of flaw matter: each is a coin flip per picture that
does not depend on the prompt, hence a habit the model can drop everywhere at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from raylign.pretrain.words import WORDS

HEIGHT, WIDTH = 24, 80
"""Pixels."""
CELL = 16
"""Pixels from one character to the next: two image tokens, so that characters sit on the token grid."""
MIN_LENGTH, MAX_LENGTH = 3, WIDTH // CELL
FONT_SIZE = 26
FONT_FILE = "DejaVuSansMono-Bold.ttf"

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 44, 44),
    "orange": (226, 124, 30),
    "green": (40, 150, 70),
    "blue": (44, 96, 210),
    "purple": (132, 62, 178),
    "grey": (128, 128, 128),
}
"""Colour of the sign, mid-tones on which both inks can be read."""
INKS: tuple[tuple[int, int, int], ...] = ((250, 250, 250), (12, 12, 12))

TEMPLATES: tuple[str, ...] = (
    'a {colour} sign that says "{target}"',
    'a {colour} poster with the {kind} "{target}"',
    'a {colour} label reading "{target}"',
    'one {colour} card showing only "{target}"',
    'a picture of the {kind} "{target}" in {colour}',
    'the {kind} "{target}" on a {colour} wall',
    '"{target}" on a {colour} sign',
)
"""Ways to ask. The target stands at several places of the sentence, so a model has to look for the quotes."""
_FIXED_WORDS = {w for t in TEMPLATES for w in re.findall(r"\b[a-z]+\b", t)} - {"kind", "colour", "target"}
TEMPLATE_WORDS: tuple[str, ...] = (*sorted(_FIXED_WORDS), "an", "word", "number", *COLOURS)
"""Words that get a token of their own; none of them may be a target."""
CHARACTERS = LETTERS + DIGITS + "\"'.,:;!?-&#"
"""Everything a prompt may be spelt in."""

Flaw = Literal["clean", "misspelt", "blurred", "faint", "cropped", "wrong_colour"]
FLAW_SHARES: dict[Flaw, float] = {"misspelt": 0.4, "blurred": 0.2, "faint": 0.2, "cropped": 0.2}
"""Flaws that a reader notices, with their shares. A wrong colour reads well, so it is mixed in apart from them.

They are this harsh because recognisers are good: text of 2 % contrast, or with its upper half cut off, still reads.
"""


@dataclass(frozen=True)
class GlyphExample:
    """A prompt with a picture of it, and what is wrong with the picture."""

    prompt: str
    target: str
    picture: np.ndarray
    """uint8, HEIGHT x WIDTH x 3."""
    flaw: Flaw


@dataclass(frozen=True)
class PictureMix:
    """Which pictures a training stage sees."""

    flawed_share: float = 0.0
    """Fraction of pictures with a flaw that a reader notices."""
    wrong_colour_share: float = 0.0
    """Fraction of the other pictures whose sign has another colour than the prompt asks for."""
    jitter: int = 0
    """The text is moved by up to this many pixels each way."""
    word_share: float = 0.4
    """Fraction of targets from the word list; the rest are random letters or digits."""


def prompt_for(target: str, colour: str, template: int) -> str:
    """The sentence that asks for `target` on a sign of `colour`."""
    kind = "number" if target[0] in DIGITS else "word"
    prompt = TEMPLATES[template].format(colour=colour, target=target, kind=kind)
    return prompt.replace("a orange", "an orange")


def quoted_target(prompt: str) -> str:
    """The text a prompt asks for: what stands between its quotes."""
    found = re.search(r'"([^"]+)"', prompt)
    if found is None:
        raise ValueError(f'prompt has no "quoted" target: {prompt!r}')
    return found.group(1)


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = resources.files("raylign") / "assets" / "fonts" / FONT_FILE
    return ImageFont.truetype(BytesIO(path.read_bytes()), FONT_SIZE)


@cache
def _glyph(character: str) -> Image.Image:
    """Ink coverage of one character, 8 bit, HEIGHT x CELL, baseline at the same height for all."""
    mask = Image.new("L", (CELL, HEIGHT), 0)
    ImageDraw.Draw(mask).text((CELL / 2, HEIGHT - 3), character, font=_font(), fill=255, anchor="ms")
    return mask


def text_mask(target: str, dx: int = 0, dy: int = 0) -> Image.Image:
    """Ink coverage of `target`, centred, moved by (dx, dy) pixels."""
    mask = Image.new("L", (WIDTH, HEIGHT), 0)
    left = (WIDTH - CELL * len(target)) // 2 + dx
    for index, character in enumerate(target):
        mask.paste(_glyph(character), (left + CELL * index, dy))
    return mask


def paint(mask: Image.Image, paper: npt.ArrayLike, ink: npt.ArrayLike) -> np.ndarray:
    """uint8 HEIGHT x WIDTH x 3: `ink` where the mask is full, `paper` where it is empty."""
    weight = np.asarray(mask, dtype=np.float32)[..., None] / 255.0
    picture = weight * np.asarray(ink, np.float32) + (1.0 - weight) * np.asarray(paper, np.float32)
    return picture.round().clip(0, 255).astype(np.uint8)


def render_clean(target: str, colour: str, ink: int = 0) -> np.ndarray:
    """The picture that a prompt deserves: exact colour, centred, sharp."""
    return paint(text_mask(target), COLOURS[colour], INKS[ink])


def random_target(rng: np.random.Generator, word_share: float, excluded: frozenset[str]) -> str:
    """A word, or 3 to 5 random letters or digits; never one of `excluded`, nor a template word."""
    while True:
        if rng.random() < word_share:
            target = WORDS[rng.integers(len(WORDS))]
        else:
            alphabet = LETTERS if rng.random() < 0.6 else DIGITS
            length = rng.integers(MIN_LENGTH, MAX_LENGTH + 1)
            target = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))
        if target not in excluded and target.lower() not in TEMPLATE_WORDS:
            return target


def misspell(rng: np.random.Generator, target: str) -> str:
    """`target` with most characters replaced by others of their kind (letters by letters, digits by digits)."""
    alphabet = DIGITS if target[0] in DIGITS else LETTERS
    wrong = [alphabet[i] for i in rng.integers(len(alphabet), size=len(target))]
    keep = rng.random(len(target)) < 0.25
    spelt = "".join(old if kept else new for old, new, kept in zip(target, wrong, keep, strict=True))
    return spelt if spelt != target else misspell(rng, target)


def draw_example(rng: np.random.Generator, mix: PictureMix, excluded: frozenset[str] = frozenset()) -> GlyphExample:
    """One random prompt with its picture, good or flawed as `mix` says; `excluded` targets do not occur."""
    target = random_target(rng, mix.word_share, excluded)
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    prompt = prompt_for(target, colour, int(rng.integers(len(TEMPLATES))))
    flaw: Flaw = "clean"
    if rng.random() < mix.flawed_share:
        flaw = list(FLAW_SHARES)[rng.choice(len(FLAW_SHARES), p=list(FLAW_SHARES.values()))]
    elif rng.random() < mix.wrong_colour_share:
        flaw = "wrong_colour"
    drawn = target
    while flaw == "misspelt" and (drawn == target or drawn in excluded):
        drawn = misspell(rng, target)
    return GlyphExample(prompt, target, _flawed_picture(rng, drawn, colour, flaw, mix.jitter), flaw)


def _flawed_picture(rng: np.random.Generator, drawn: str, colour: str, flaw: Flaw, jitter: int) -> np.ndarray:
    dx, dy = (int(v) for v in rng.integers(-jitter, jitter + 1, size=2))
    if flaw == "wrong_colour":
        colour = rng.choice([other for other in COLOURS if other != colour])
    if flaw == "cropped":
        # all but a few rows leave the picture, above or below; half a row of letters can still be read
        dy = int(rng.choice([-1, 1]) * rng.integers(18, 21))
    mask = text_mask(drawn, dx, dy)
    paper = np.asarray(COLOURS[colour], np.float32) + rng.uniform(-12, 12, size=3)
    ink = np.asarray(INKS[rng.integers(len(INKS))], np.float32)
    if flaw == "faint":
        ink = paper + (ink - paper) * rng.uniform(0.0, 0.004)
    if flaw == "blurred":
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(6.0, 9.0)))
    return paint(mask, paper, ink)
