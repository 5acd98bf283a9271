"""Rubrics as versioned data: what a judge is to look at, and what each verdict means.

A rubric is one TOML file in `rewards/judging/rubric_files/`. A change that may change a score raises its `version`,
which is part of the reward's version; what it had been stays in the history of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pydantic import Field, model_validator

from raylign.config import Config
from raylign.errors import ConfigError
from rewards.judging.library import Entry, find, read_entry, read_folder
from rewards.judging.r3_prompts import PAIR_LABELS, Layout, Mode


class PointCriteria(Config):
    """What each mark means."""

    score_1: str = Field(min_length=1)
    """The worst."""
    score_2: str = Field(min_length=1)
    """Between."""
    score_3: str = Field(min_length=1)
    """The middle."""
    score_4: str = Field(min_length=1)
    """Between."""
    score_5: str = Field(min_length=1)
    """The best."""


class PairCriteria(Config):
    """When each of two responses is to be chosen."""

    first: str = Field(min_length=1)
    """When the first wins; {first} and {second} stand for the names that the layout gives the responses."""
    second: str = Field(min_length=1)
    """When the second wins."""


class BinaryCriteria(Config):
    """What the two verdicts mean."""

    true: str = Field(min_length=1)
    """When the answer is true."""
    false: str = Field(min_length=1)
    """When it is false."""


class Rubric(Entry):
    """One rubric, for the modes that it has criteria for."""

    task: str = Field(min_length=1)
    """What the judge is told the response was meant to do, and what to judge."""
    about_content: bool = True
    """Whether it asks what is shown or said; only then do pictures of mere words deserve the lowest score."""
    point: PointCriteria | None = None
    """For marks from 1 to 5."""
    pair: PairCriteria | None = None
    """For a choice between two."""
    binary: BinaryCriteria | None = None
    """For true or false."""

    @model_validator(mode="after")
    def _some_mode(self) -> Rubric:
        if not self.modes:
            raise ValueError("a rubric needs criteria: a table `point`, `pair` or `binary`")
        return self

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What it has criteria for."""
        having: Mapping[Mode, Config | None] = {"point": self.point, "pair": self.pair, "binary": self.binary}
        return tuple(mode for mode, criteria in having.items() if criteria is not None)

    def options(self, mode: Mode, layout: Layout) -> dict[str, str]:
        """The meaning of each label in a mode. Raises ConfigError when the rubric has no such mode."""
        if mode == "point" and self.point is not None:
            texts: dict[str, str] = self.point.model_dump()
            return {name.removeprefix("score_"): text for name, text in texts.items()}
        if mode == "binary" and self.binary is not None:
            return self.binary.model_dump()
        if mode == "pair" and self.pair is not None:
            first, second = PAIR_LABELS[layout]
            texts = self.pair.model_dump()
            named = [text.replace("{first}", first).replace("{second}", second) for text in texts.values()]
            return {first: named[0], second: named[1]}
        raise ConfigError(f"rubric {self.name!r} has no {mode} criteria, only {', '.join(self.modes)}")


def principle_rubric(principle: str) -> Rubric:
    """A rubric out of one sentence that says what to prefer (as in RewardAnything, arXiv 2506.03637)."""
    return Rubric(
        name="principle",
        task=f"Judge the response by this principle and by nothing else: {principle}",
        source="a principle given with the request",
        point=PointCriteria(
            score_1="The response goes against the principle.",
            score_2="The response mostly fails the principle.",
            score_3="The response follows the principle in part.",
            score_4="The response follows the principle with small lapses.",
            score_5="The response follows the principle fully.",
        ),
        pair=PairCriteria(
            first="{first} follows the principle better than {second}.",
            second="{second} follows the principle better than {first}.",
        ),
        binary=BinaryCriteria(
            true="The response follows the principle.", false="The response does not follow the principle."
        ),
    )


@cache
def library() -> Mapping[str, Rubric]:
    """The rubrics that come with the package, by name."""
    return read_folder("rubric_files", Rubric)


def library_rubric(name: str) -> Rubric:
    """A rubric of the library by name. Raises ConfigError with the nearest name."""
    return find(name, library(), "rubric")


def load_rubric(name_or_path: str) -> Rubric:
    """A rubric of the library, or an operator's own from a path that ends in .toml. Raises ConfigError."""
    is_path = name_or_path.endswith(".toml")
    return read_entry(Path(name_or_path), Rubric) if is_path else library_rubric(name_or_path)
