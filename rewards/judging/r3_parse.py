"""From an R3 judge's answer to its verdict, or to the reason why it has none. Never a default.

The answer's content alone is read: thinking names scores that it then drops. Where the published parser takes the
first thing that looks like a score anywhere (rubricreward/r3:src/evaluation/eval.py), this one wants a JSON object
at the end, the right type, a known label and a score on the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rewards.judging.chat_text import THINK_CLOSE, THINK_OPEN, split_thinking
from rewards.judging.engine import JudgeReply
from rewards.judging.r3_prompts import PAIR_LABELS, Layout, Mode
from rewards.judging.verdict_json import final_object

HalfScores = Literal["reject", "down", "up"]
_LOWEST, _HIGHEST = 1, 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """A usable answer. `score` is 1 to 5 (point), whether the first response won (pair), or the truth (binary)."""

    score: int | bool
    explanation: str
    thinking: str = ""


@dataclass(frozen=True, slots=True)
class NoVerdict:
    """Why an answer cannot be used."""

    code: Literal["unparseable", "out_of_range", "truncated"]
    message: str


def parse_reply(
    reply: JudgeReply, layout: Layout, mode: Mode, half_scores: HalfScores = "reject"
) -> Verdict | NoVerdict:
    """The verdict of one reply. A reply that was cut off is `truncated`, whatever it says."""
    thinking, content = split_thinking(reply.content)
    if reply.finish_reason == "length" or (THINK_OPEN in reply.content and THINK_CLOSE not in reply.content):
        return NoVerdict("truncated", "the judge's answer was cut off; raise max_tokens or bound thinking_budget")
    verdict = parse_content(content, layout, mode, half_scores)
    if isinstance(verdict, NoVerdict):
        return verdict
    return Verdict(verdict.score, verdict.explanation, reply.thinking or thinking)


def parse_content(content: str, layout: Layout, mode: Mode, half_scores: HalfScores = "reject") -> Verdict | NoVerdict:
    """The verdict in an answer's content, thinking already taken off."""
    found = final_object(content, "score")
    if found is None:
        return NoVerdict("unparseable", "the judge's answer does not end in a JSON object with a score")
    raw: object = found["score"]
    if mode == "point":
        score = _point(raw, half_scores)
    elif mode == "binary":
        score = _binary(raw)
    else:
        score = _pair(raw, PAIR_LABELS[layout])
    if isinstance(score, NoVerdict):
        return score
    explanation: object = found.get("explanation", "")
    return Verdict(score, explanation if isinstance(explanation, str) else "")


def _point(raw: object, half_scores: HalfScores) -> int | NoVerdict:
    """An integer from 1 to 5, also as text or as 4.0; halves as configured, other fractions never."""
    if isinstance(raw, str) and raw.strip() in {"1", "2", "3", "4", "5"}:
        return int(raw)
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return NoVerdict("unparseable", "the judge's score is no number")
    if not _LOWEST <= raw <= _HIGHEST:
        return NoVerdict("out_of_range", f"the judge's score is off the scale of {_LOWEST} to {_HIGHEST}")
    whole = int(raw // 1)
    if raw == whole:
        return whole
    if raw - whole == 0.5 and half_scores != "reject":
        return whole if half_scores == "down" else whole + 1
    return NoVerdict("unparseable", "the judge's score lies between two levels of the rubric")


def _binary(raw: object) -> bool | NoVerdict:
    if isinstance(raw, bool):
        return raw
    truth = {"true": True, "false": False}.get(_label(raw))
    return NoVerdict("unparseable", "the judge's score is neither true nor false") if truth is None else truth


def _pair(raw: object, labels: tuple[str, str]) -> bool | NoVerdict:
    known = [label.casefold() for label in labels]
    if _label(raw) not in known:
        return NoVerdict("unparseable", f"the judge chose neither {labels[0]!r} nor {labels[1]!r}")
    return _label(raw) == known[0]


def _label(raw: object) -> str:
    return " ".join(raw.casefold().split()) if isinstance(raw, str) else ""
