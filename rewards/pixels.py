"""What the rewards that need no model share: each measures the pixels of one picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Reward

if TYPE_CHECKING:
    import numpy as np

Measure = Callable[["np.ndarray", Prompt], tuple[float, Mapping[str, JsonValue]]]
"""A picture's value, with details. Raises PromptError for a prompt it cannot measure by, ValueError for a picture that
it cannot measure; the messages may travel to clients."""


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
