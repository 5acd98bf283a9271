"""Rewards for the form of a completion, whatever it says.

d1 (after Will Brown's GRPO demo, in diffu-grpo/reward_func.py of dllm-reasoning/d1), one rule or the sum of three:

    strict  0.5 if the text is  <reasoning>⏎ … ⏎</reasoning>⏎<answer>⏎ … ⏎</answer>⏎
    soft    0.5 if it begins with  <reasoning> … </reasoning> <answer> … </answer>
    xml     0.125 for each of four tags (with their line ends) that occurs exactly once,
            less 0.001 per character after the closing answer tag, counted once per answer tag found

tags: the share of `tags` of which each occurs exactly once, opened and closed, in order and not nested.
regex: 1 if `pattern` matches the whole text, else 0.

The d1 patterns are matched by hand in linear time, with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.text.rule import Verdict, score_texts

RULE_VERSION = "1"
_STRICT_OPEN, _STRICT_MIDDLE, _STRICT_CLOSE = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>\n"
_SOFT_MIDDLE = re.compile(r"</reasoning>\s*<answer>")


class FormatTagsConfig(RewardConfig):
    """Whether a completion has the form that was asked for."""

    type: Literal["format_tags"] = "format_tags"
    rule: Literal["tags", "regex", "d1", "d1_strict", "d1_soft", "d1_xml"] = "tags"
    """tags: each tag once and in order. regex: the whole text matches. d1: the sum of the three published rules."""
    tags: tuple[str, ...] = Field(default=("reasoning", "answer"), min_length=1)
    """rule = "tags": the names, in order."""
    pattern: str = ""
    """rule = "regex": a Python regular expression; `.` matches line ends too. Its cost is yours to bound."""

    @model_validator(mode="after")
    def _rule_can_be_applied(self) -> Self:
        bad = [tag for tag in self.tags if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", tag)]
        if bad or len(set(self.tags)) != len(self.tags):
            raise ValueError(f"tags must be different names without angle brackets, got {list(self.tags)}")
        if (self.rule == "regex") != bool(self.pattern):
            raise ValueError(f"rule = 'regex' and `pattern` go together, got rule {self.rule!r}, {self.pattern!r}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        return self


class FormatTagsReward:
    """Judges the text alone; the prompt plays no part."""

    modality: Modality = "text"
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, config: FormatTagsConfig) -> None:
        self.name = config.name
        self._rule = _rule(config)
        detail = {"tags": ",".join(config.tags), "regex": config.pattern}.get(config.rule, "")
        self.version = f"{RULE_VERSION}/{config.rule}" + (f"/{detail}" if detail else "")
        self.range: tuple[float, float] | None = _RANGES[config.rule]

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        return RewardSample("probe", Prompt("probe", ""), text="<answer>1</answer>")

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_texts(self, samples, lambda _, text: self._rule(text))


_RANGES: dict[str, tuple[float, float] | None] = {
    "tags": (0.0, 1.0), "regex": (0.0, 1.0), "d1": None, "d1_strict": (0.0, 0.5), "d1_soft": (0.0, 0.5), "d1_xml": None,
}  # fmt: skip


def _rule(config: FormatTagsConfig) -> Callable[[str], Verdict]:
    """The configured rule. Every one says in its details what it found."""
    compiled = re.compile(config.pattern, re.DOTALL)
    table: dict[str, Callable[[str], Verdict]] = {
        "tags": lambda text: _judge_tags(text, config.tags),
        "regex": lambda text: _judge_parts({"regex": 1.0 if compiled.fullmatch(text) else 0.0}),
        "d1": lambda text: _judge_parts(d1_parts(text)),
        "d1_strict": lambda text: _judge_parts({"strict": strict_format(text)}),
        "d1_soft": lambda text: _judge_parts({"soft": soft_format(text)}),
        "d1_xml": lambda text: _judge_parts({"xml": count_xml(text)}),
    }
    return table[config.rule]


def _judge_parts(parts: Mapping[str, float]) -> Verdict:
    return Verdict(sum(parts.values()), dict(parts))


def _judge_tags(text: str, tags: Sequence[str]) -> Verdict:
    found = tags_in_order(text, tags)
    return Verdict(len(found) / len(tags), {"found": list(found)})


def d1_parts(text: str) -> dict[str, float]:
    """The three published form rewards by name."""
    return {"strict": strict_format(text), "soft": soft_format(text), "xml": count_xml(text)}


def strict_format(text: str) -> float:
    r"""0.5 where `^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$` matches (DOTALL), else 0.

    `$` also matches before one more line end at the end of the text.
    """
    middle = text.find(_STRICT_MIDDLE, len(_STRICT_OPEN))
    start = middle + len(_STRICT_MIDDLE)
    ends = (text.endswith(_STRICT_CLOSE), text.endswith(_STRICT_CLOSE + "\n"))
    closes = [len(text) - len(_STRICT_CLOSE) - extra for extra, there in enumerate(ends) if there]
    matches = text.startswith(_STRICT_OPEN) and middle >= 0 and any(close >= start for close in closes)
    return 0.5 if matches else 0.0


def soft_format(text: str) -> float:
    r"""0.5 where `<reasoning>.*?</reasoning>\s*<answer>.*?</answer>` matches at the start (DOTALL), else 0."""
    if not text.startswith("<reasoning>"):
        return 0.0
    middle = _SOFT_MIDDLE.search(text, len("<reasoning>"))
    return 0.5 if middle is not None and text.find("</answer>", middle.end()) >= 0 else 0.0


def count_xml(text: str) -> float:
    """The published count, at most 0.5 and without a lower bound; trailing characters are charged once per tag."""
    count = 0.0
    if text.count("<reasoning>\n") == 1:
        count += 0.125
    if text.count("\n</reasoning>\n") == 1:
        count += 0.125
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.rpartition("\n</answer>\n")[2])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.rpartition("\n</answer>")[2]) - 1)
    return count


def tags_in_order(text: str, tags: Sequence[str]) -> list[str]:
    """The tags that occur exactly once, opened and closed, after the end of the one found before them."""
    found: list[str] = []
    end = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            continue
        start, stop = text.find(opening), text.find(closing)
        if end <= start < stop:
            found.append(tag)
            end = stop + len(closing)
    return found
