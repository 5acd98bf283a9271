"""CLIPScore: how well the picture matches its prompt in CLIP's common space (Hessel et al. 2021, arXiv 2104.08718).

`raw` is the cosine of the two vectors, which peers use as it is (logits_per_image / 100 of OpenAI's models).
`clipscore_2.5` is the paper's 2.5 max(cos, 0), without the paper's "A photo depicts" before the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality
from rewards.vision import learned
from rewards.vision.clip_model import ClipModel
from rewards.vision.learned import LearnedConfig, Rating

RULE_VERSION = "1"


class ClipScoreConfig(LearnedConfig):
    """Cosine of the prompt and the picture."""

    type: Literal["clip_score"] = "clip_score"
    path: str = "openai/clip-vit-large-patch14"
    """CLIP checkpoint: a directory in the layout of transformers, or a name on the model hub."""
    scale: Literal["raw", "clipscore_2.5"] = "raw"
    """raw: the cosine. clipscore_2.5: 2.5 max(cosine, 0)."""


class ClipScoreReward:
    """Higher means a closer match; prompts beyond the model's 77 tokens are cut, and `details.truncated` says so."""

    modality: Modality = "image"
    higher_is_better = True
    deterministic = True
    uses_seed = False
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: ClipScoreConfig) -> None:
        self.name = config.name
        self.version = config.version(f"{RULE_VERSION}/{config.scale}")
        self.range: tuple[float, float] | None = (-1.0, 1.0) if config.scale == "raw" else (0.0, 2.5)
        self._scale = config.scale
        self._clip = ClipModel(config.path, config.device, config.dtype, batch_size=config.batch_size)

    @property
    def fingerprint(self) -> str:
        return self._clip.fingerprint

    def load(self) -> None:
        self._clip.load()

    def probe(self) -> RewardSample:
        return learned.probe()

    def check(self, prompt: Prompt) -> None:
        learned.check_prompt(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await learned.rate(self, samples, learned.prompt_problem, self._rate)

    def _rate(self, samples: Sequence[RewardSample]) -> list[Rating]:
        return [
            (cosine if self._scale == "raw" else 2.5 * max(cosine, 0.0), {"cosine": cosine, **details})
            for cosine, details in learned.cosines(self._clip, samples, learned.pictures(samples))
        ]
