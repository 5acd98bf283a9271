"""The R3 reward: a generative judge that marks by a rubric (Robust Rubric-Agnostic Reward Models, arXiv 2505.13388).

point: (s - 1) / 4 of a mark s from 1 to 5; binary: 0 or 1; pair: 1, 0, or 0.5 where the two orders disagree. Groups are
compared in pair mode (win rate over all pairs), and only marked together in the others. Deviations from the published
inference code: thinking is never read, marks off the scale and answers that cannot be read are errors, pairs are
judged in both orders, and candidates are sanitised.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from raylign.errors import ConfigError, PromptError
from raylign.types import JsonValue, Prompt, RewardFailure, RewardSample, RewardScore
from rewards import base
from rewards.base import Canary, Modality, Params
from rewards.judging.canaries import image_canaries, text_canaries
from rewards.judging.engine import JudgeEngine
from rewards.judging.engines import make_engine
from rewards.judging.guard import hollow
from rewards.judging.marks import MAX_SHOWN
from rewards.judging.r3_judge import Candidate, Draw, R3Config, R3Judge
from rewards.judging.rubrics import Rubric, library_rubric, load_rubric, principle_rubric
from rewards.judging.tournament import Match, Standing, group_problem, points, round_robin, standings, with_statistics

RULE_VERSION = "1"
"""Counts changes to prompts, parsing and what makes values of verdicts."""


class R3Params(Params):
    """What a request may set. At most one of `rubric`, `inline` and `principle`."""

    rubric: str | None = Field(default=None, max_length=64)
    """Name of a rubric of the library."""
    inline: Rubric | None = None
    """A rubric of the request's own."""
    principle: str | None = Field(default=None, min_length=1, max_length=4000)
    """A sentence that says what to prefer, in place of a rubric."""
    task: str | None = Field(default=None, min_length=1, max_length=8000)
    """Replaces the rubric's task."""
    num_samples: int | None = Field(default=None, ge=1)
    """Answers to average."""

    @model_validator(mode="after")
    def _one_rubric(self) -> R3Params:
        given = [name for name in ("rubric", "inline", "principle") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rubric, inline and principle, got {' and '.join(given)}")
        return self


class R3Reward:
    """Asks a judge about each candidate, several times if so configured."""

    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    uses_seed = True
    metadata_keys: Mapping[str, str] = {}
    params_model = R3Params

    def __init__(self, config: R3Config, engine: JudgeEngine | None = None, rubric: Rubric | None = None) -> None:
        """`engine` and `rubric` replace the configured ones. Raises ConfigError."""
        self._config = config
        self._engine = engine or make_engine(config.engine)
        self._rubric = rubric or load_rubric(config.rubric)
        self._judge = R3Judge(config, self._rubric, self._engine)
        self.name = config.name
        self.modality: Modality = config.modality
        self.deterministic = config.repeatable
        settings = hashlib.sha256(f"{config.settings()}\n{self._rubric.model_dump_json()}".encode()).hexdigest()[:8]
        what = f"{config.layout}/{config.mode}/{self._rubric.name}-{self._rubric.version}"
        self.version = f"{RULE_VERSION}/{what}/{settings}"

    @property
    def fingerprint(self) -> str:
        return self._engine.fingerprint

    def load(self) -> None:
        self._engine.load()

    def probe(self) -> RewardSample | None:
        """A judge's answer takes seconds of somebody's accelerator."""
        return None

    def canaries(self) -> Sequence[Canary]:
        """None for pairs of pictures, which are scored in groups only."""
        if self.modality == "text":
            return text_canaries(self._config.canary_tolerance)
        if self._config.mode == "pair":
            return []
        return image_canaries(self._config.canary_tolerance, words=self._rubric.about_content)

    def check(self, prompt: Prompt) -> None:
        if not prompt.text.strip():
            raise PromptError(f"prompt {prompt.id!r} is empty; a judge needs to know what was asked for")

    def with_params(self, params: Params) -> R3Reward:
        """Raises ConfigError for an unknown rubric, one without the mode, or more samples than allowed."""
        if not isinstance(params, R3Params):
            raise TypeError(f"{type(params).__name__} are no parameters of an r3 reward")
        num_samples = params.num_samples or self._config.num_samples
        if num_samples > self._config.max_samples:
            raise ConfigError(f"num_samples is {num_samples}, at most {self._config.max_samples} are allowed here")
        rubric = self._rubric
        if params.rubric is not None:
            rubric = library_rubric(params.rubric)
        elif params.inline is not None:
            rubric = params.inline
        elif params.principle is not None:
            rubric = principle_rubric(params.principle)
        task = params.task or ("" if rubric is not self._rubric else self._config.task)
        config = self._config.model_copy(update={"num_samples": num_samples, "task": task})
        return R3Reward(config, self._engine, rubric)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        score_one = self._score_against_reference if self._config.mode == "pair" else self._score_one
        return list(await asyncio.gather(*(score_one(sample) for sample in samples)))

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """Win rates in pair mode, else the scores of each; details say how well the group is told apart."""
        if self._config.mode != "pair":
            return with_statistics(await self.score(samples))
        problem = group_problem(samples, self._config.max_group)
        if problem is not None:
            return [base.failure(self, "invalid_input", problem) for _ in samples]
        return with_statistics(await self._tournament(samples))

    async def _score_one(self, sample: RewardSample) -> RewardScore:
        candidate = self._candidate(sample)
        if isinstance(candidate, RewardFailure):
            return self._failed(candidate)
        why_hollow = self._hollow(candidate)
        if why_hollow is not None:
            return base.success(self, 0.0, details={"prefiltered": why_hollow})
        started = time.perf_counter()
        keys = [f"{sample.seed}/{k}" for k in range(self._config.num_samples)]
        answers = await asyncio.gather(*(self._judge.draw(sample.prompt.text, [candidate], key) for key in keys))
        draws = [answer for answer in answers if isinstance(answer, Draw)]
        failures = [answer for answer in answers if isinstance(answer, RewardFailure)]
        if not draws:
            return self._failed(failures[0])
        values = [_value(draw, self._config.mode) for draw in draws]
        details = {**self._details(draws), "num_failed_draws": len(failures)}
        return base.success(self, sum(values) / len(values), time.perf_counter() - started, details)

    async def _score_against_reference(self, sample: RewardSample) -> RewardScore:
        candidate = self._candidate(sample)
        if isinstance(candidate, RewardFailure):
            return self._failed(candidate)
        if self.modality == "image" or not sample.reference:
            message = (
                "pair mode compares with the sample's reference text, or the candidates of a group with each other"
            )
            return base.failure(self, "invalid_input", message)
        why_hollow = self._hollow(candidate)
        if why_hollow is not None:
            return base.success(self, 0.0, details={"prefiltered": why_hollow})
        started = time.perf_counter()
        match = await self._match(
            sample.prompt.text, candidate, Candidate(sample.reference, candidate.images_HWC), str(sample.seed)
        )
        if isinstance(match, RewardFailure):
            return self._failed(match)
        details = {**match.details, "num_position_conflicts": match.num_position_conflicts}
        return base.success(self, match.points, time.perf_counter() - started, details)

    async def _tournament(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """Everybody against everybody; a hollow text loses to all others unasked, and a bad sample does not play."""
        started = time.perf_counter()
        found = [self._candidate(sample) for sample in samples]
        players = {i: candidate for i, candidate in enumerate(found) if isinstance(candidate, Candidate)}
        why_hollow = {i: self._hollow(candidate) for i, candidate in players.items()}
        places = list(players)

        async def play(a: int, b: int) -> Match | RewardFailure:
            i, j = places[a], places[b]
            if why_hollow[i] or why_hollow[j]:
                return Match(float(not why_hollow[i]), 0, 0, {})
            key = f"{samples[i].seed}/{samples[j].seed}"
            return await self._match(samples[i].prompt.text, players[i], players[j], key)

        matches = await round_robin(len(places), play)
        by_place = dict(zip(places, standings(len(places), matches), strict=True))
        seconds = (time.perf_counter() - started) / max(1, len(samples))
        return [
            self._failed(candidate)
            if isinstance(candidate, RewardFailure)
            else self._ranked(why_hollow[i], by_place[i], seconds)
            for i, candidate in enumerate(found)
        ]

    def _ranked(self, why_hollow: str | None, standing: Standing, seconds: float) -> RewardScore:
        if why_hollow is not None:
            return base.success(self, 0.0, details={"prefiltered": why_hollow})
        only_walkovers = not any(match.num_draws for match in standing.judged)
        if standing.failure is not None and only_walkovers:
            return self._failed(standing.failure)  # to have beaten texts that say nothing is no verdict
        if standing.win_rate is None:
            nobody = RewardFailure("invalid_input", "the group has no other candidate to compare this one with")
            return self._failed(nobody)
        return base.success(self, standing.win_rate, seconds, {**self._named(), **standing.record()})

    async def _match(self, prompt_text: str, first: Candidate, second: Candidate, key: str) -> Match | RewardFailure:
        """Both orders, `num_samples` times; a draw counts only when both of its orders have a verdict."""
        orders = [([first, second], "ab"), ([second, first], "ba")]
        answers = await asyncio.gather(
            *(
                self._judge.draw(prompt_text, pair, f"{key}/{k}/{order}")
                for k in range(self._config.num_samples)
                for pair, order in orders
            )
        )
        outcomes: list[tuple[Draw, Draw]] = []
        failures = [answer for answer in answers if isinstance(answer, RewardFailure)]
        for forward, backward in zip(answers[::2], answers[1::2], strict=True):
            if isinstance(forward, Draw) and isinstance(backward, Draw):
                outcomes.append((forward, backward))
        if not outcomes:
            return failures[0]
        won = [points(bool(forward.verdict.score), not backward.verdict.score) for forward, backward in outcomes]
        return Match(
            points=sum(won) / len(won),
            num_draws=len(won),
            num_position_conflicts=won.count(0.5),
            details={**self._details([outcomes[0][0]]), "draws": won, "num_failed_draws": len(failures)},
        )

    def _candidate(self, sample: RewardSample) -> Candidate | RewardFailure:
        """What the sample has for the judge, or `invalid_input`."""
        if not sample.prompt.text.strip():
            return RewardFailure("invalid_input", "the prompt is empty; a judge needs to know what was asked for")
        longest = max(len(text or "") for text in (sample.prompt.text, sample.text, sample.reference))
        if longest > self._judge.max_chars:
            message = f"a text of {longest} characters is longer than the judge reads, {self._judge.max_chars} at most"
            return RewardFailure("invalid_input", message)
        images = () if sample.image_HWC is None else (sample.image_HWC, *sample.more_images_HWC)
        if self.modality == "image" or images:
            problem = base.image_problem(sample)
            if problem is not None:
                return RewardFailure("invalid_input", problem)
        if self.modality == "text" and sample.text is None:
            return RewardFailure("invalid_input", "the sample has no text to judge")
        return Candidate(sample.text or "", images)

    def _hollow(self, candidate: Candidate) -> str | None:
        return hollow(candidate.text) if self._config.prefilter and self.modality == "text" else None

    def _failed(self, why: RewardFailure) -> RewardScore:
        return RewardScore(self.name, None, why, version=self.version, fingerprint=self.fingerprint)

    def _named(self) -> dict[str, JsonValue]:
        return {"rubric": self._rubric.name, "rubric_version": self._rubric.version}

    def _details(self, draws: Sequence[Draw]) -> dict[str, JsonValue]:
        """The verdicts, and the reasons given for the first."""
        first = draws[0].verdict
        details: dict[str, JsonValue] = {
            **self._named(),
            "draws": [draw.verdict.score for draw in draws],
            "explanation": first.explanation[:MAX_SHOWN],
            "thinking": first.thinking[:MAX_SHOWN],
        }
        masses = [draw.soft.label_mass for draw in draws if draw.soft is not None]
        if masses:
            details["soft_draws"] = [draw.soft.mean for draw in draws if draw.soft is not None]
            details["label_mass"] = min(masses)
            details["low_confidence"] = min(masses) < self._config.low_confidence_below
            details["source"] = "logprobs"
        return details


def _value(draw: Draw, mode: str) -> float:
    """(s - 1) / 4 of a mark or of a soft mark; 0 or 1 of a truth value."""
    if mode == "binary":
        return float(draw.verdict.score)
    mark = draw.soft.mean if draw.soft is not None else draw.verdict.score
    return min(1.0, max(0.0, (mark - 1) / 4))
