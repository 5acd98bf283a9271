"""The OCR reward: does the picture show the text that the prompt quotes?

The target is `prompt.metadata["target"]` if there is one, else the text in the first pair of double quotes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Modality, RewardConfig
from rewards.reading.engine import EngineName, OcrEngine, make_engine
from rewards.reading.similarity import (
    clean_similarity,
    exact,
    flow_grpo_similarity,
    normalise_clean,
    normalise_flow_grpo,
    quoted_target,
)

logger = logging.getLogger(__name__)

RULE_VERSION = "1"
"""Counts changes to the rule that turns texts into values."""


class OcrConfig(RewardConfig):
    """Edit similarity of the recognised text to the quoted one."""

    type: Literal["ocr"] = "ocr"
    mode: Literal["clean", "flow_grpo"] = "clean"
    """clean: surplus text costs, typographic quotes count. flow_grpo: as published, for comparison."""
    engine: EngineName = "rapidocr_rec"
    """rapidocr_rec: one line that fills the picture, fast. rapidocr: text is looked for first. paddleocr: as most
    published runs, needs its own packages. tesseract: a program for scanned pages, for smoke tests."""
    num_threads: int = Field(default=1, ge=1)
    """Threads per picture."""
    language: str | None = Field(default=None, pattern=r"^[A-Za-z_]+(\+[A-Za-z_]+)*$")
    """What paddleocr (en when not given) and tesseract (eng) look for, in their own spelling."""
    tesseract_path: str = "tesseract"
    """The program, for that engine."""
    page_mode: int = Field(default=7, ge=0, le=13)
    """tesseract's --psm: 7 takes the picture for one line, 11 looks for text anywhere."""
    timeout_s: float = Field(default=20.0, gt=0)
    """After this tesseract is killed and the sample fails."""

    @model_validator(mode="after")
    def _language_is_used(self) -> OcrConfig:
        if self.language is not None and self.engine.startswith("rapidocr"):
            raise ValueError(
                f"rewards.language {self.language!r} has no effect on engine {self.engine!r}; leave it out, or use "
                "engine 'paddleocr' or 'tesseract'"
            )
        return self


class OcrReward:
    """Reads each picture and compares; an empty reading is worth 0, a failed one is an error."""

    modality: Modality = "image"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {"target": "the text the picture should show; the quoted text when not given"}

    def __init__(self, config: OcrConfig, engine: OcrEngine | None = None) -> None:
        """`engine` replaces the configured one. Raises ConfigError when the engine is not installed."""
        self.name = config.name
        self._mode = config.mode
        self._engine = engine or make_engine(
            config.engine,
            config.num_threads,
            language=config.language,
            tesseract_path=config.tesseract_path,
            page_mode=config.page_mode,
            timeout_s=config.timeout_s,
        )
        self.version = f"{RULE_VERSION}/{config.mode}/{config.engine}-{self._engine.version}"
        if config.engine == "tesseract":
            self.version += f"/psm{config.page_mode}"

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    def load(self) -> None:
        self._engine.load()

    def probe(self) -> RewardSample:
        import numpy as np

        return RewardSample("probe", Prompt("probe", 'the text "A"'), np.full((32, 64, 3), 255, np.uint8))

    def check(self, prompt: Prompt) -> None:
        self._target(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        # A thread keeps the event loop, and with it the health checks of a replica, going meanwhile.
        return await asyncio.to_thread(lambda: [self._score_one(sample) for sample in samples])

    def _score_one(self, sample: RewardSample) -> RewardScore:
        problem = base.image_problem(sample)
        if problem is not None or sample.image_HWC is None:
            return base.failure(self, "invalid_input", problem or "the sample has no image")
        try:
            target = self._target(sample.prompt)
        except PromptError as error:
            return base.failure(self, "invalid_input", str(error))
        started = time.perf_counter()
        try:
            recognised = self._engine.read(sample.image_HWC)
        except TimeoutError:
            logger.warning("reward %r ran out of time on sample %r", self.name, sample.id)
            return base.failure(self, "timeout", "text recognition took too long for this picture", retryable=True)
        except Exception:  # ONNX Runtime and OpenCV raise what they like; the sample has no value then
            logger.exception("reward %r could not read sample %r", self.name, sample.id)
            return base.failure(self, "model_error", "text recognition failed; see the scorer's log for this sample")
        similarity = clean_similarity if self._mode == "clean" else flow_grpo_similarity
        details = {"recognised": recognised, "exact": exact(target, recognised)}
        return base.success(self, similarity(target, recognised), time.perf_counter() - started, details)

    def _target(self, prompt: Prompt) -> str:
        """What the picture should say. Raises PromptError."""
        target = prompt.metadata.get("target")
        if target is None:
            target = quoted_target(prompt.text, curly=self._mode == "clean")
            if target is None:
                raise PromptError(
                    f"prompt {prompt.id!r} ({prompt.text[:60]!r}) has no quoted target; put the text to draw in "
                    'double quotes, as in: a sign that says "HELLO", or set metadata.target'
                )
        if not isinstance(target, str):
            raise PromptError(f"prompt {prompt.id!r} has metadata.target {target!r}; it must be a text")
        normalise = normalise_clean if self._mode == "clean" else normalise_flow_grpo
        if not normalise(target):
            raise PromptError(
                f"prompt {prompt.id!r} has the target {target!r}; it needs a letter or a digit to compare"
            )
        return target
