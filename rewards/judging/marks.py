"""From a judge's marks for aspects to one value, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raylign.types import JsonValue, RewardFailure
from rewards.judging.chat_text import THINK_CLOSE, THINK_OPEN, split_thinking
from rewards.judging.engine import JudgeReply
from rewards.judging.verdict_json import final_object

REASONING = "reasoning"
LOWEST, HIGHEST = 1, 5
MAX_SHOWN = 4000
"""Characters of a judge's reasoning that are kept in details."""


def marks_value(marks: Sequence[float]) -> float:
    """(m - 1) / 4 of the mean m of marks from 1 to 5."""
    return (sum(marks) / len(marks) - LOWEST) / (HIGHEST - LOWEST)


def parse_marks(reply: JudgeReply, aspects: Sequence[str]) -> tuple[float, Mapping[str, JsonValue]] | RewardFailure:
    """The value, and each mark with the reasoning. Every aspect needs a number from 1 to 5; fractions are fine."""
    thinking, content = split_thinking(reply.content)
    if reply.finish_reason == "length" or (THINK_OPEN in reply.content and THINK_CLOSE not in reply.content):
        return RewardFailure("truncated", "the judge's answer was cut off; raise max_tokens")
    found = final_object(content, aspects[0])
    if found is None:
        return RewardFailure("unparseable", "the judge's answer does not end in a JSON object with marks")
    marks: dict[str, float] = {}
    for aspect in aspects:
        raw: object = found.get(aspect)
        if isinstance(raw, bool) or not isinstance(raw, (int, float)):
            return RewardFailure("unparseable", f"the judge gave no number for {aspect!r}")
        if not LOWEST <= raw <= HIGHEST:
            return RewardFailure("out_of_range", f"the judge's mark for {aspect!r} is off the scale")
        marks[aspect] = float(raw)
    reasoning: object = found.get(REASONING, "")
    said = reasoning if isinstance(reasoning, str) else ""
    details: dict[str, JsonValue] = {
        **marks,
        REASONING: said[:MAX_SHOWN],
        "thinking": (reply.thinking or thinking)[:MAX_SHOWN],
        "source": "answer",
    }
    return marks_value(list(marks.values())), details
