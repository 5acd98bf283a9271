"""The prompts of R3 and mR3 judges, byte for byte as the models were trained on them.

R3 (arXiv 2505.13388): one user message; rubricreward/r3:src/dataset_gen/rubrics_gen/{prompts,evaluation_schema}.py,
Apache-2.0, as outlines 0.1.14 renders it. mR3 (arXiv 2510.01146): a system and a user message;
rubricreward/mr3:src/evaluation/dataset_gen.py, Apache-2.0, its stray indentation included. Where mR3 shuffles the
rubric's lines with Python's `hash`, which differs from process to process, the order here comes from sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raylign.types import JsonValue
from rewards.judging.engine import JudgeMessage

if TYPE_CHECKING:
    import numpy as np

Mode = Literal["point", "pair", "binary"]
Layout = Literal["r3", "mr3"]
PAIR_LABELS: Mapping[Layout, tuple[str, str]] = {
    "r3": ("Response 1", "Response 2"),
    "mr3": ("Assistant A", "Assistant B"),
}
_MR3_SYSTEM = "You are Qwen3, an AI assistant that reasons, thinks, and answers strictly in English."


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked about: one response, or two to choose from."""

    task: str
    input: str
    responses: tuple[str, ...]
    options: Mapping[str, str]
    """What each verdict means, by label: "1" to "5", "true" and "false", or the names of the two responses."""


@dataclass(frozen=True, slots=True)
class _Format:
    """A mode's lines in R3's output format: the descriptions of the two keys."""

    responses: str
    explanation: str
    score: str


_FORMATS: Mapping[Mode, _Format] = {
    "point": _Format(
        "response",
        "Explanation of why the response received a particular score",
        "Score assigned to the response based on the rubric between 1 to 5",
    ),
    "pair": _Format(
        "two responses",
        "Explanation of why one response is preferred over the other",
        "Final selection between 'Response 1' or 'Response 2'",
    ),
    "binary": _Format(
        "response",
        "Explanation of why the answer is true or false",
        "Final boolean answer between true or false",
    ),
}


def r3_prompt(mode: Mode, question: Question) -> str:
    """R3's one user message."""
    form = _FORMATS[mode]
    headers = ["RESPONSE"] if len(question.responses) == 1 else ["RESPONSE 1", "RESPONSE 2"]
    opening = (
        f"Evaluate the response based on the given task, input, {form.responses}, and evaluation rubric.  \n"
        "Provide a fair and detailed assessment following the rubric."
    )
    sections = [
        opening,
        f"### TASK\n{question.task}",
        f"### INPUT\n{question.input}",
        *(f"### {header}\n{text}" for header, text in zip(headers, question.responses, strict=True)),
        "### EVALUATION RUBRIC\n" + "\n".join(f"{label}: {text}" for label, text in question.options.items()),
        "### OUTPUT FORMAT\nReturn a JSON response in the following format:",
        f'{{\n  "explanation": "{form.explanation}",\n  "score": "{form.score}"\n}}',
        "### EVALUATION",
    ]
    return "\n\n".join(sections)


def mr3_prompts(mode: Mode, question: Question, input_tag: str = "Input") -> tuple[str, str]:
    """mR3's system and user message; the options are shown in the order they have in `question`.

    mR3 prints its response schema as Python prints a dict, and so does this.
    """
    rubric = "".join(f"{label}: {text}\n" for label, text in question.options.items())
    schema = _mr3_schema(mode, list(question.options))
    system = (
        f"{_MR3_SYSTEM}\n\n# Instruction\n    {question.task}\n\n    # Evaluation Rubric\n    {rubric}\n\n"
        f"    # Response Format\n\n    {schema}"
    )
    headers = ["Response"] if len(question.responses) == 1 else list(PAIR_LABELS["mr3"])
    parts = [f"# {input_tag}\n    {question.input}\n\n"]
    parts += [f"    # {header}\n    {text}\n\n" for header, text in zip(headers, question.responses, strict=True)]
    return system, "".join([*parts, "    # Your Response\n    "])


def messages(
    layout: Layout, mode: Mode, question: Question, images_HWC: tuple[np.ndarray, ...] = ()
) -> tuple[JudgeMessage, ...]:
    """The chat that asks the question; pictures go into the user's message, before its text."""
    if layout == "r3":
        return (JudgeMessage("user", r3_prompt(mode, question), images_HWC),)
    system, user = mr3_prompts(mode, question)
    return JudgeMessage("system", system), JudgeMessage("user", user, images_HWC)


def option_order(labels: Sequence[str], key: str) -> list[str]:
    """The labels in an order that depends on the key alone, the same in every process."""
    return sorted(labels, key=lambda label: hashlib.sha256(f"{key}\n{label}".encode()).digest())


def answer_schema(layout: Layout, mode: Mode) -> Mapping[str, JsonValue]:
    """JSON schema that constrains the answer; keys in the order the model was taught, none besides."""
    score: Mapping[Mode, Mapping[str, JsonValue]] = {
        "point": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
        "pair": {"type": "string", "enum": list(PAIR_LABELS[layout])},
        "binary": {"type": "boolean"} if layout == "r3" else {"type": "string", "enum": ["true", "false"]},
    }
    return {
        "type": "object",
        "properties": {"explanation": {"type": "string"}, "score": score[mode]},
        "required": ["explanation", "score"],
        "additionalProperties": False,
    }


_MR3_DESCRIPTIONS: Mapping[Mode, tuple[str, str]] = {
    "point": (
        "A brief reasoning of the score based on the evaluation rubric.",
        "The verdict: one of '1', '2', '3', '4' or '5'.",
    ),
    "pair": (
        "A brief reasoning comparing Assistant A and Assistant B based on the evaluation factors.",
        "The verdict: one of 'Assistant A' or 'Assistant B'.",
    ),
    "binary": ("A brief reasoning whether the response is true or false.", "The verdict: either 'true' or 'false'."),
}


def _mr3_schema(mode: Mode, labels: Sequence[str]) -> dict[str, object]:
    explanation, score = _MR3_DESCRIPTIONS[mode]
    return {
        "type": "object",
        "properties": {
            "explanation": {"type": "string", "description": explanation},
            "score": {"type": "string", "description": score, "enum": sorted(labels, key=_official_place)},
        },
        "required": ["explanation", "score"],
    }


def _official_place(label: str) -> tuple[bool, str]:
    """ "true" comes before "false", everything else in the order of the alphabet."""
    return label == "false", label
