"""What the learned picture scorers share: where they run, which samples they refuse, and how answers are built."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards import base
from rewards.base import Reward, RewardConfig
from rewards.vision import checkpoints

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rewards.vision.clip_model import ClipModel

HEAD_WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of the five linear layers that turn a vector into a score, in ImageReward and the aesthetic predictor."""
_HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Their places in the published torch.nn.Sequential; the others are dropout, which does nothing when scoring."""


class LearnedConfig(RewardConfig):
    """What every learned picture scorer's configuration has beside its files."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    """Where the model runs: cpu, cuda or cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model; bfloat16 is faster on a GPU and moves scores by about one per cent."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures per pass. With more than 1 a score may depend on its neighbours in the last digits."""

    def version(self, rule: str) -> str:
        """What equal scores need to have in common beside the files: rule, precision, kind of device, libraries."""
        place = f"{self.dtype}-{self.device.partition(':')[0]}-b{self.batch_size}"
        return f"{rule}/{place}/{checkpoints.library_versions('torch', 'transformers', 'tokenizers', 'pillow')}"


Rating = tuple[float, Mapping[str, JsonValue]]
"""A sample's value, and what there is to say about it."""


def prompt_problem(sample: RewardSample) -> str | None:
    """Why a sample has no usable picture or no prompt to hold it against, or None if it has both."""
    problem = base.image_problem(sample)
    if problem is None and not sample.prompt.text.strip():
        problem = "the prompt is empty; this reward holds the picture against it"
    return problem


def check_prompt(prompt: Prompt) -> None:
    """Raise PromptError for a prompt without text."""
    if not prompt.text.strip():
        raise PromptError(f"prompt {prompt.id!r} is empty; give it the text that pictures are held against")


def probe() -> RewardSample:
    """A grey square for a plain prompt: every scorer has a value for it."""
    import numpy as np

    return RewardSample("probe", Prompt("probe", "a grey square"), np.full((32, 32, 3), 128, np.uint8))


def pictures(samples: Sequence[RewardSample]) -> list[np.ndarray]:
    """The pictures of samples that have one."""
    return [sample.image_HWC for sample in samples if sample.image_HWC is not None]


async def rate(
    reward: Reward,
    samples: Sequence[RewardSample],
    problem: Callable[[RewardSample], str | None],
    rate_good: Callable[[Sequence[RewardSample]], Sequence[Rating]],
) -> list[RewardScore]:
    """Scores in order: `invalid_input` where there is a problem, else what `rate_good` says of the others together.

    It runs in a thread, which keeps the event loop, and with it the health checks of a replica, going.
    """

    def answer() -> list[RewardScore]:
        problems = [problem(sample) for sample in samples]
        good = [sample for sample, found in zip(samples, problems, strict=True) if found is None]
        started = time.perf_counter()
        ratings = iter(rate_good(good) if good else [])
        seconds = (time.perf_counter() - started) / max(1, len(good))
        return [
            base.failure(reward, "invalid_input", found) if found else _score(reward, next(ratings), seconds)
            for found in problems
        ]

    return await asyncio.to_thread(answer)


def _score(reward: Reward, rating: Rating, seconds: float) -> RewardScore:
    value, details = rating
    if not math.isfinite(value):
        return base.failure(reward, "model_error", f"the model's score is {value}, which is no number to train on")
    return base.success(reward, value, seconds, details)


def cosines(clip: ClipModel, samples: Sequence[RewardSample], images_HWC: Sequence[np.ndarray]) -> list[Rating]:
    """cos(text, image) of each sample, in [-1, 1], with whether the prompt was longer than the model reads."""
    import numpy as np

    texts = [sample.prompt.text for sample in samples]
    # In double precision and row by row: a matrix product would compute every pair and round by its own shape.
    text_ND, image_ND = (rows.astype(np.float64) for rows in (clip.embed_texts(texts), clip.embed_images(images_HWC)))
    return [
        (float(np.clip(np.dot(text_D, image_D), -1.0, 1.0)), {"truncated": clip.is_truncated(text)})
        for text, text_D, image_D in zip(texts, text_ND, image_ND, strict=True)
    ]


class LinearHead:
    """Five linear layers without activations between them, as published; `state` holds exactly its ten tensors."""

    def __init__(self, file: Path, state: Mapping[str, Tensor], width: int) -> None:
        """`width` is the length of the vectors it takes. Raises ModelError if `state` is anything else."""
        import torch

        inputs = (width, *HEAD_WIDTHS)
        with torch.device("meta"):
            wanted = {
                f"layers.{layer}.{kind}": torch.empty((outwards, inwards) if kind == "weight" else (outwards,))
                for layer, inwards, outwards in zip(_HEAD_LAYERS, inputs, HEAD_WIDTHS, strict=False)
                for kind in ("weight", "bias")
            }
        checkpoints.check_fit(file, state, wanted)
        self._layers = [
            (state[f"layers.{layer}.weight"].float().numpy(), state[f"layers.{layer}.bias"].float().numpy())
            for layer in _HEAD_LAYERS
        ]

    def __call__(self, vector_D: np.ndarray) -> float:
        """The score of one vector."""
        for weight, bias in self._layers:
            vector_D = weight @ vector_D + bias
        return float(vector_D[0])
