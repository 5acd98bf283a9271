"""A vision-language model that judges pictures against their captions.

yes_no: P(yes) / (P(yes) + P(no)) of the next token, or P(yes) over the whole vocabulary (VQAScore, arXiv 2404.01291;
here the spellings of a label are summed). aspects: (m - 1) / 4 of the mean m of marks from 1 to 5 for alignment,
coherence and style (UnifiedReward 2.0's scale). pairwise: win rate in a group, each pair in both orders (Pref-GRPO,
arXiv 2508.20751, asks in one). Unlike in published services the caption is in every question, and what cannot be read
is an error where they give 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from raylign.config import parse_config
from raylign.errors import ConfigError, PromptError
from raylign.types import JsonValue, Prompt, RewardFailure, RewardSample, RewardScore
from rewards import base
from rewards.base import Canary, Modality, Params, RewardConfig
from rewards.judging.canaries import image_canaries
from rewards.judging.draws import ask_until_usable
from rewards.judging.engine import JudgeEngine, JudgeRequest
from rewards.judging.engines import EngineUnion, OpenAIEngineConfig, make_engine
from rewards.judging.marks import parse_marks
from rewards.judging.probability import Preference, preference
from rewards.judging.template import JudgeTemplate, Kind, library_template, load_template
from rewards.judging.tournament import (
    Match,
    Standing,
    group_problem,
    points_of_preferences,
    round_robin,
    standings,
    with_statistics,
)

if TYPE_CHECKING:
    import numpy as np

RULE_VERSION = "1"
"""Counts changes to questions, parsing and what makes values of answers."""


class VlmJudgeConfig(RewardConfig):
    """What a vision-language model thinks of a picture."""

    type: Literal["vlm_judge"] = "vlm_judge"
    engine: EngineUnion = OpenAIEngineConfig()
    """Where the judge runs; a server without log-probs can be asked for aspects only."""
    mode: Kind = "yes_no"
    """yes_no: one token, cheap and smooth. aspects: marks with reasons. pairwise: compares the pictures of a group."""
    template: str = ""
    """The question: a name in the library, or path of an own file that ends in .toml; the mode's own when empty."""
    normalise: Literal["labels", "vocabulary"] = "labels"
    """yes_no: P(yes) among the two labels, or among all tokens as in VQAScore."""
    low_confidence_below: float = Field(default=0.5, ge=0, le=1)
    """Answers whose two labels have less probability together are flagged."""
    max_retries: int = Field(default=2, ge=0)
    """aspects: how often an unusable answer is asked for again, each time with a new seed."""
    max_tokens: int = Field(default=1024, ge=1)
    """aspects: most tokens of an answer."""
    temperature: float = Field(default=0.0, ge=0)
    """aspects: sampling temperature; at 0 a retry is of use only with servers that do not repeat themselves."""
    thinking: bool | None = None
    """aspects: switch the model's thinking on or off; None leaves it to its chat template."""
    max_group: int = Field(default=16, ge=2)
    """Largest group that is compared; n pictures take n (n - 1) questions."""
    max_caption_chars: int = Field(default=8000, ge=1)
    """Longer prompts are refused."""
    canary_tolerance: float = Field(default=0.25, ge=0, lt=1)
    """How much a canary may score."""
    repeatable: bool = False
    """Whether the engine answers equal questions equally (vLLM: VLLM_BATCH_INVARIANT=1); an in-process engine does.
    Only then are scores remembered."""

    def settings(self) -> str:
        """Everything that may change a score, beside the template: part of the reward's version."""
        left_out = {"name", "weight", "required", "engine", "template", "max_group", "canary_tolerance", "repeatable"}
        return f"{self.engine.version}/{self.model_dump_json(exclude=left_out)}"


class VlmJudgeParams(Params):
    """What a request may set."""

    template: str | None = Field(default=None, max_length=64)
    """Name of a template of the library, of the configured mode."""
    question: str | None = Field(default=None, min_length=1, max_length=4000)
    """Replaces the template's user message; has to hold {caption}."""


class VlmJudgeReward:
    """Shows each picture, with its caption, to the judge."""

    modality: Modality = "image"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    metadata_keys: Mapping[str, str] = {}
    params_model = VlmJudgeParams

    def __init__(
        self, config: VlmJudgeConfig, engine: JudgeEngine | None = None, template: JudgeTemplate | None = None
    ) -> None:
        """`engine` and `template` replace the configured ones. Raises ConfigError."""
        self._config = config
        self._engine = engine or make_engine(config.engine)
        self._template = template or load_template(config.template or config.mode)
        if self._template.kind != config.mode:
            raise ConfigError(
                f"template {self._template.name!r} is for mode {self._template.kind!r}, not {config.mode!r}"
            )
        self.name = config.name
        self.uses_seed = config.mode == "aspects"
        self.deterministic = config.repeatable or config.engine.type == "decision"
        settings = f"{config.settings()}\n{self._template.model_dump_json()}"
        what = f"{config.mode}/{self._template.name}-{self._template.version}"
        self.version = f"{RULE_VERSION}/{what}/{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    def load(self) -> None:
        self._engine.load()

    def probe(self) -> RewardSample | None:
        """A grey picture for an in-process judge; an external one's health is not this replica's."""
        if self._config.engine.type != "decision" or self._config.mode == "pairwise":
            return None
        import numpy as np

        return RewardSample("probe", Prompt("probe", "a grey square"), np.full((32, 32, 3), 128, np.uint8))

    def canaries(self) -> Sequence[Canary]:
        """None in pairwise mode, which scores groups only."""
        return [] if self._config.mode == "pairwise" else image_canaries(self._config.canary_tolerance)

    def check(self, prompt: Prompt) -> None:
        problem = self._caption_problem(prompt)
        if problem is not None:
            raise PromptError(f"prompt {prompt.id!r}: {problem}")

    def with_params(self, params: Params) -> VlmJudgeReward:
        """Raises ConfigError for an unknown template, one of another mode, or a question without {caption}."""
        if not isinstance(params, VlmJudgeParams):
            raise TypeError(f"{type(params).__name__} are no parameters of a vlm_judge reward")
        template = self._template if params.template is None else library_template(params.template)
        if params.question is not None:
            fields = {**template.model_dump(), "name": "inline", "version": 1, "user": params.question}
            template = parse_config(JudgeTemplate, fields, "params.question")
        return VlmJudgeReward(self._config, self._engine, template)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return list(await asyncio.gather(*(self._score_one(sample) for sample in samples)))

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """Win rates in pairwise mode, else the scores of each; details say how well the group is told apart."""
        if self._config.mode != "pairwise":
            return with_statistics(await self.score(samples))
        problem = group_problem(samples, self._config.max_group)
        if problem is not None:
            return [base.failure(self, "invalid_input", problem) for _ in samples]
        return with_statistics(await self._tournament(samples))

    async def _score_one(self, sample: RewardSample) -> RewardScore:
        image_HWC = self._picture(sample)
        if isinstance(image_HWC, RewardFailure):
            return self._failed(image_HWC)
        if self._config.mode == "pairwise":
            message = "pairwise mode compares the pictures of a group; send them to /v1/score_group"
            return base.failure(self, "invalid_input", message)
        started = time.perf_counter()
        answer = await (self._yes if self._config.mode == "yes_no" else self._marks)(sample, image_HWC)
        if isinstance(answer, RewardFailure):
            return self._failed(answer)
        value, details = answer
        return base.success(self, value, time.perf_counter() - started, {**self._named(), **details})

    async def _yes(
        self, sample: RewardSample, image_HWC: np.ndarray
    ) -> tuple[float, Mapping[str, JsonValue]] | RewardFailure:
        answer = await self._prefers_first(sample.prompt.text, (image_HWC,))
        if isinstance(answer, RewardFailure):
            return answer
        found, details = answer
        return found.value if self._config.normalise == "labels" else found.first, details

    async def _prefers_first(
        self, caption: str, images_HWC: tuple[np.ndarray, ...]
    ) -> tuple[Preference, Mapping[str, JsonValue]] | RewardFailure:
        """How much the judge prefers the first of the template's labels as its next word."""
        template = self._template
        request = JudgeRequest(template.messages(caption, images_HWC), max_tokens=1, top_logprobs=20, thinking=False)
        said = await self._engine.label_logprobs(request, (template.first, template.second))
        if isinstance(said, RewardFailure):
            return said
        found = preference(said.logprob_by_label, template.first, template.second)
        if found is None:
            message = f"neither {template.first!r} nor {template.second!r} is among the judge's likeliest words"
            return RewardFailure("unparseable", message)
        details: dict[str, JsonValue] = {
            **said.details,
            "p_first": found.first,
            "label_mass": found.label_mass,
            "low_confidence": found.label_mass < self._config.low_confidence_below,
            "source": said.source,
        }
        return found, details

    async def _marks(
        self, sample: RewardSample, image_HWC: np.ndarray
    ) -> tuple[float, Mapping[str, JsonValue]] | RewardFailure:
        config, template = self._config, self._template
        request = JudgeRequest(
            messages=template.messages(sample.prompt.text, (image_HWC,)),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            json_schema=template.answer_schema(),
            thinking=config.thinking,
        )
        read = partial(parse_marks, aspects=template.aspects)
        return await ask_until_usable(self._engine, request, str(sample.seed), read, config.max_retries)

    async def _tournament(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """Everybody against everybody; a sample without a usable picture does not play."""
        started = time.perf_counter()
        found = [self._picture(sample) for sample in samples]
        pictures = {i: image_HWC for i, image_HWC in enumerate(found) if not isinstance(image_HWC, RewardFailure)}
        places = list(pictures)
        caption = samples[0].prompt.text if samples else ""

        async def play(a: int, b: int) -> Match | RewardFailure:
            return await self._match(caption, pictures[places[a]], pictures[places[b]])

        matches = await round_robin(len(places), play)
        by_place = dict(zip(places, standings(len(places), matches), strict=True))
        seconds = (time.perf_counter() - started) / max(1, len(samples))
        return [
            self._failed(picture) if isinstance(picture, RewardFailure) else self._ranked(by_place[i], seconds)
            for i, picture in enumerate(found)
        ]

    async def _match(self, caption: str, first_HWC: np.ndarray, second_HWC: np.ndarray) -> Match | RewardFailure:
        forward, backward = await asyncio.gather(
            self._prefers_first(caption, (first_HWC, second_HWC)), self._prefers_first(caption, (second_HWC, first_HWC))
        )
        if isinstance(forward, RewardFailure):
            return forward
        if isinstance(backward, RewardFailure):
            return backward
        points = points_of_preferences(forward[0].value, backward[0].value)
        mass = min(forward[0].label_mass, backward[0].label_mass)
        return Match(points, 1, int(points == 0.5), {"source": forward[1]["source"]}, mass)

    def _ranked(self, standing: Standing, seconds: float) -> RewardScore:
        if standing.win_rate is None:
            nobody = RewardFailure("invalid_input", "the group has no other picture to compare this one with")
            return self._failed(standing.failure or nobody)
        mass = min(match.label_mass for match in standing.judged)
        details: dict[str, JsonValue] = {
            **self._named(),
            **standing.record(),
            "label_mass": mass,
            "low_confidence": mass < self._config.low_confidence_below,
            "source": standing.judged[0].details["source"],
        }
        return base.success(self, standing.win_rate, seconds, details)

    def _picture(self, sample: RewardSample) -> np.ndarray | RewardFailure:
        """The picture to judge, or `invalid_input`."""
        problem = self._caption_problem(sample.prompt) or base.image_problem(sample)
        if problem is not None or sample.image_HWC is None:
            return RewardFailure("invalid_input", problem or "the sample has no image")
        return sample.image_HWC

    def _caption_problem(self, prompt: Prompt) -> str | None:
        if not prompt.text.strip():
            return "the prompt is empty; a judge needs to know what was asked for"
        if len(prompt.text) > self._config.max_caption_chars:
            return f"the prompt has {len(prompt.text)} characters; the judge reads {self._config.max_caption_chars}"
        return None

    def _failed(self, why: RewardFailure) -> RewardScore:
        return RewardScore(self.name, None, why, version=self.version, fingerprint=self.fingerprint)

    def _named(self) -> dict[str, JsonValue]:
        return {"template": self._template.name, "template_version": self._template.version}
