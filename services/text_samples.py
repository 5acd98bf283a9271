"""What a person sees of held-out texts: a readable file per evaluation, and before beside after. Pure.

samples/step_00060.txt      prompts, and each answer with its reward and calls
samples/first.json          the first evaluation, for what comes later (also in a resumed run)
samples/before_after.json   the first and the newest evaluation by prompt; the report makes a table of it
"""

from __future__ import annotations

import json
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raylign.types import Rollout, RolloutGroup
from services.frontier import budget_of, exact_of

GOOD_REWARD = 0.99
"""Where no reward tells whether a text is exactly right, it is good from here on."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One answer. `good`: exactly right, or rewarded in full where no reward tells. `nfe`: calls of the network."""

    text: str
    reward: float | None
    good: bool
    nfe: int
    gamma: float | None


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """One held-out prompt and its answers; `wanted` is the right one where the prompt tells it."""

    id: str
    prompt: str
    wanted: str
    answers: tuple[ShownAnswer, ...]


def shown_prompts(groups: Sequence[RolloutGroup], num_samples: int) -> list[ShownPrompt]:
    """Groups of texts as what is shown of them."""
    return [
        ShownPrompt(
            group.prompt.id,
            printable(group.prompt.text),
            _wanted(group.prompt.metadata),
            tuple(_answer(group, place) for place in range(min(num_samples, len(group.texts or ())))),
        )
        for group in groups
    ]


def printable(text: str) -> str:
    """The text without control characters and lone surrogates: a model may write anything, a terminal obeys it."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def example(prompts: Sequence[ShownPrompt]) -> str:
    """One prompt and its first answer, on one line."""
    if not prompts or not prompts[0].answers:
        return ""
    first = prompts[0]
    return f"{_short(first.prompt)} → {_short(first.answers[0].text)}"


def as_text(step: int, prompts: Sequence[ShownPrompt], means: Mapping[str, float]) -> str:
    """An evaluation for reading: its means, then prompts with their answers, `+` before the good ones."""
    title = f"Held-out answers at step {step}"
    lines = [title, "=" * len(title), "  ".join(f"{name} {value:.3f}" for name, value in means.items()), ""]
    for number, prompt in enumerate(prompts, start=1):
        lines.append(_hanging(f"{f'[{number}]':<4} ", prompt.prompt))
        if prompt.wanted:
            lines.append(_hanging(f"{'wanted':>25}  | ", prompt.wanted))
        lines += [_answer_lines(answer) for answer in prompt.answers]
        lines.append("")
    return "\n".join(lines)


def to_json(step: int, prompts: Sequence[ShownPrompt]) -> bytes:
    """An evaluation as `first.json`."""
    return _encode({"step": step, "prompts": [asdict(prompt) for prompt in prompts]})


def before_after_json(first: Mapping[str, Any], step: int, prompts: Sequence[ShownPrompt]) -> bytes:
    """`before_after.json` from what `to_json` wrote and a later evaluation: the prompts that are in both."""
    before = {prompt["id"]: prompt for prompt in first["prompts"]}
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "wanted": prompt.wanted,
            "before": before[prompt.id]["answers"],
            "after": [asdict(answer) for answer in prompt.answers],
        }
        for prompt in prompts
        if prompt.id in before
    ]
    return _encode({"before_step": first["step"], "after_step": step, "prompts": rows})


def _answer(group: RolloutGroup, place: int) -> ShownAnswer:
    tokens, rollout = group.tokens, group.rollouts[place]
    texts = group.texts or ()
    gamma = None if tokens.log_gamma_G is None else budget_of(float(tokens.log_gamma_G[place]))
    return ShownAnswer(printable(texts[place]), rollout.total, _is_good(rollout), int(tokens.nfe_G[place]), gamma)


def _is_good(rollout: Rollout) -> bool:
    if rollout.total is None:
        return False
    exact = exact_of(rollout)
    return rollout.total > GOOD_REWARD if exact is None else exact


def _wanted(metadata: Mapping[str, Any]) -> str:
    answer = metadata.get("answer", metadata.get("solution"))
    return printable(str(answer)) if isinstance(answer, str | int | float) else ""


def _answer_lines(answer: ShownAnswer) -> str:
    reward = "no reward" if answer.reward is None else f"{answer.reward:.3f}"
    calls = f"{answer.nfe} call{'' if answer.nfe == 1 else 's'}"
    return _hanging(f"  {'+' if answer.good else '-'} {reward:>9} {calls:>11}  | ", answer.text.rstrip("\n"))


def _hanging(head: str, text: str) -> str:
    """The text after a head, its further lines below its first; a bar at the end of the head goes on."""
    rest = head[-2:].rjust(len(head)) if head.endswith("| ") else " " * len(head)
    return head + text.replace("\n", f"\n{rest}")


def _short(text: str, width: int = 60) -> str:
    """The text on one line."""
    return textwrap.shorten(text, width, placeholder=" …") or text[:width]


def _encode(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
