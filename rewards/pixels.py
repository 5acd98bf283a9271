"""What the rewards that need no model share: each measures the pixels of one picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Modality, Reward, RewardConfig

if TYPE_CHECKING:
    import numpy as np

Measure = Callable[["np.ndarray", Prompt], tuple[float, Mapping[str, JsonValue]]]
"""A picture's value, with details. Raises PromptError for a prompt it cannot measure by, ValueError for a picture that
it cannot measure; the messages may travel to clients."""


class PixelStatistic:
    """A reward in [0, 1] that is one number of each picture's pixels; the prompt plays no part."""

    modality: Modality = "image"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: RewardConfig, version: str, statistic: Callable[[np.ndarray], float]) -> None:
        """statistic: of an RGB uint8 picture (H, W, 3)."""
        self.name = config.name
        self.version = version
        self._statistic = statistic

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        import numpy as np

        return RewardSample("probe", Prompt("probe", ""), np.zeros((8, 8, 3), np.uint8))

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_pixels(self, samples, self._measure)

    def _measure(self, image_HWC: np.ndarray, prompt: Prompt) -> tuple[float, Mapping[str, JsonValue]]:
        return self._statistic(image_HWC), {}


async def score_pixels(reward: Reward, samples: Sequence[RewardSample], measure: Measure) -> list[RewardScore]:
    """One score per sample, in order, measured in a thread so that the event loop goes on meanwhile."""
    return await asyncio.to_thread(lambda: [_score(reward, sample, measure) for sample in samples])


def _score(reward: Reward, sample: RewardSample, measure: Measure) -> RewardScore:
    problem = base.image_problem(sample)
    if problem is not None or sample.image_HWC is None:
        return base.failure(reward, "invalid_input", problem or "the sample has no image")
    started = time.perf_counter()
    try:
        value, details = measure(sample.image_HWC, sample.prompt)
    except (PromptError, ValueError) as error:
        return base.failure(reward, "invalid_input", str(error))
    return base.success(reward, value, time.perf_counter() - started, details)
