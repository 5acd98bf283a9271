"""A second reader of the embedded glyphs task: what does the picture say, by the font and not by an OCR engine?

The reader is in `rewards/reading/glyphs.py`; text and target are compared as the OCR reward's `clean` mode does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.pixels import score_pixels
from rewards.reading.similarity import clean_similarity, exact, normalise_clean, quoted_target

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"


class GlyphPixelsConfig(RewardConfig):
    """Edit similarity of the text that the pixels show to the quoted one; pictures of the glyphs task only."""

    is_light: ClassVar[bool] = True
    type: Literal["glyph_pixels"] = "glyph_pixels"


class GlyphPixelsReward:
    """Reads each picture and compares; a picture without anything legible is worth 0."""

    modality: Modality = "image"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    version = RULE_VERSION
    metadata_keys: Mapping[str, str] = {"target": "the text the picture should show; the quoted text when not given"}

    def __init__(self, config: GlyphPixelsConfig) -> None:
        self.name = config.name

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        from raylign.pretrain.glyph_pictures import render_clean

        return RewardSample("probe", Prompt("probe", 'the word "ABC"'), render_clean("ABC", "red"))

    def check(self, prompt: Prompt) -> None:
        _target(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_pixels(self, samples, _measure)


def _measure(image_HWC: np.ndarray, prompt: Prompt) -> tuple[float, Mapping[str, JsonValue]]:
    from rewards.reading.glyphs import nearest_colour, read_glyphs

    target = _target(prompt)
    reading = read_glyphs(image_HWC)
    details: dict[str, JsonValue] = {"recognised": reading.text, "exact": exact(target, reading.text)}
    colour = asked_colour(prompt.text)
    if colour is not None:
        details["colour_right"] = nearest_colour(reading.paper) == colour
    return clean_similarity(target, reading.text), details


def asked_colour(text: str) -> str | None:
    """The first colour of the task that a prompt names outside its quotes; None if it names none."""
    from raylign.pretrain.glyph_pictures import COLOURS

    unquoted = re.sub(r'"[^"]*"', " ", text).lower()
    return next((word for word in re.findall(r"[a-z]+", unquoted) if word in COLOURS), None)


def _target(prompt: Prompt) -> str:
    """What the picture should say. Raises PromptError."""
    target = prompt.metadata.get("target", quoted_target(prompt.text, curly=True))
    if not isinstance(target, str) or not normalise_clean(target):
        raise PromptError(
            f"prompt {prompt.id!r} ({prompt.text[:60]!r}) has the target {target!r}; put a text with a letter or a "
            "digit in double quotes, or set metadata.target"
        )
    return target
