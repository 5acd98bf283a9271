"""The GenEval reward: are the objects there that the prompt asks for, so many, in those colours, in that place?

A detector finds objects, a namer says their colours, and a rule turns both into a value (`rewards.scenes.rules`).
Ghosh et al. 2023 (arXiv 2310.11513). With the Mask2Former detector and CLIP colours it is the published protocol;
with the shapes detector and pixel colours, the default, the same protocol on pictures of plain coloured shapes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Modality, Params, RewardConfig
from rewards.scenes import rules
from rewards.scenes.colour import ClipColourConfig, ColourNamer, PixelColourConfig, make_colours
from rewards.scenes.detector import Mask2FormerConfig, Mask2FormerDetector
from rewards.scenes.rules import ColourReader, Detection, Verdict, select, threshold_of
from rewards.scenes.shapes import ShapesConfig, ShapesDetector
from rewards.scenes.task import METADATA_KEYS, Task, parse_task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger(__name__)

RULE_VERSION = "1"
"""Counts changes to the rules that turn detections into values."""

Mode = Literal["clean", "strict", "official", "flow_grpo"]
Rule = Callable[[Task, Mapping[str, Sequence[Detection]], ColourReader], Verdict]
_DIGITS = 4
"""After the point, of scores in the details."""


class GenevalConfig(RewardConfig):
    """What share of the prompt's clauses a picture fulfils."""

    type: Literal["geneval"] = "geneval"
    mode: Mode = "clean"
    """clean: the mean of the clauses, in [0, 1]. strict: 1 if clean is 1. official: the benchmark's own 0 or 1.
    flow_grpo: the published training reward with its quirks, from -14 to 1."""
    detector: ShapesConfig | Mask2FormerConfig = Field(default=ShapesConfig(), discriminator="type")
    """shapes: plain shapes on plain ground, no model. mask2former: the 80 objects of COCO."""
    colour: PixelColourConfig | ClipColourConfig = Field(default=PixelColourConfig(), discriminator="type")
    """pixels: the nearest of the ten colours. clip: as officially."""


class GenevalParams(Params):
    """What a request may set."""

    mode: Mode | None = None
    """Another rule than the configured one, say `official` for an evaluation."""


class Detector(Protocol):
    """Finds objects of a fixed list of classes in a picture."""

    @property
    def names(self) -> Sequence[str]:
        """What it can find."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever equal pictures may be seen differently."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the model files, known after `load`; empty without any."""
        ...

    def load(self) -> None:
        """Build what is slow to build."""
        ...

    def detect(self, image_HWC: npt.NDArray[np.uint8], threshold: float) -> list[Detection]:
        """The objects that score above the threshold, in any order."""
        ...


class GenevalReward:
    """Counts, names colours and compares places; every verdict on a picture is in the details."""

    modality: Modality = "image"
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = METADATA_KEYS
    params_model: type[Params] = GenevalParams

    def __init__(
        self, config: GenevalConfig, detector: Detector | None = None, colours: ColourNamer | None = None
    ) -> None:
        """`detector` and `colours` replace the configured ones."""
        self.name = config.name
        self._config = config
        self._mode: Mode = config.mode
        self._detector = detector or make_detector(config.detector)
        self._colours = colours or make_colours(config.colour)
        self.range: tuple[float, float] | None = (
            (rules.LOWEST_FLOW_GRPO, 1.0) if config.mode == "flow_grpo" else (0.0, 1.0)
        )
        self.version = f"{RULE_VERSION}/{config.mode}/{self._detector.version}/{self._colours.version}"

    @property
    def fingerprint(self) -> str:
        return "+".join(part for part in (self._detector.fingerprint, self._colours.fingerprint) if part)

    def with_params(self, params: Params) -> GenevalReward:
        """The same detector and colours, another rule."""
        if not isinstance(params, GenevalParams) or params.mode in (None, self._mode):
            return self
        config = self._config.model_copy(update={"mode": params.mode})
        return GenevalReward(config, self._detector, self._colours)

    def load(self) -> None:
        self._detector.load()
        self._colours.load()

    def probe(self) -> RewardSample:
        import numpy as np

        task = {"tag": "single_object", "include": [{"class": self._detector.names[0], "count": 1}]}
        return RewardSample("probe", Prompt("probe", "a photo", task), np.full((64, 64, 3), 128, np.uint8))

    def check(self, prompt: Prompt) -> None:
        parse_task(prompt, self._detector.names)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        # A thread keeps the event loop, and with it the health checks of a replica, going meanwhile.
        return await asyncio.to_thread(self._score_all, samples)

    def _score_all(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        self.load()  # both engines, before the first score: a fingerprint must not depend on which was needed first
        return [self._score_one(sample) for sample in samples]

    def _score_one(self, sample: RewardSample) -> RewardScore:
        problem, image_HWC = base.image_problem(sample), sample.image_HWC
        if problem is not None or image_HWC is None:
            return base.failure(self, "invalid_input", problem or "the sample has no image")
        try:
            task = parse_task(sample.prompt, self._detector.names)
        except PromptError as error:
            return base.failure(self, "invalid_input", str(error))
        started = time.perf_counter()
        try:
            value, details = self._judge(task, image_HWC)
        except Exception:  # a detector runs foreign models on any picture; the sample has no value then
            logger.exception("reward %r could not look at sample %r", self.name, sample.id)
            return base.failure(self, "model_error", "object detection failed; see the scorer's log for this sample")
        return base.success(self, value, time.perf_counter() - started, details)

    def _judge(self, task: Task, image_HWC: npt.NDArray[np.uint8]) -> tuple[float, dict[str, JsonValue]]:
        threshold = threshold_of(task.tag)
        found = select(self._detector.detect(image_HWC, threshold), threshold)
        eye = _Eye(self._colours, image_HWC)
        clean = rules.clean(task, found, eye.colours_of)
        official = rules.official(task, found, eye.colours_of)
        chosen = {
            "clean": clean,
            "strict": clean,
            "official": official,
            "flow_grpo": rules.flow_grpo(task, found, eye.colours_of),
        }[self._mode]
        value = float(clean.perfect) if self._mode == "strict" else chosen.value
        details: dict[str, JsonValue] = {
            "tag": task.tag,
            "official": official.perfect,
            "strict": clean.perfect,
            "clauses": [
                {"class": term.name, "aspect": term.aspect, "value": round(term.value, _DIGITS)}
                for term in chosen.terms or clean.terms
            ],
            "reasons": list(chosen.reasons),
            "objects": [eye.describe(one) for objects in found.values() for one in objects],
        }
        return value, details


def make_detector(config: ShapesConfig | Mask2FormerConfig) -> Detector:
    """The detector that a configuration describes."""
    return Mask2FormerDetector(config) if isinstance(config, Mask2FormerConfig) else ShapesDetector()


class _Eye:
    """Colours of one picture's objects, named once, when first asked for."""

    def __init__(self, colours: ColourNamer, image_HWC: npt.NDArray[np.uint8]) -> None:
        self._colours = colours
        self._image_HWC = image_HWC
        self._named: dict[int, str] = {}

    def colours_of(self, detections: Sequence[Detection]) -> list[str]:
        new = [one for one in detections if id(one) not in self._named]
        for one, colour in zip(new, self._colours.name_colours(self._image_HWC, new), strict=True):
            self._named[id(one)] = colour
        return [self._named[id(one)] for one in detections]

    def describe(self, one: Detection) -> dict[str, Any]:
        """Class, score and box; the colour if it mattered."""
        seen: dict[str, Any] = {"class": one.name, "score": round(one.score, _DIGITS), "box": list(one.box)}
        return seen | ({"color": self._named[id(one)]} if id(one) in self._named else {})
