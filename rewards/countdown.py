"""The countdown reward: does the answer combine the given numbers into the target?

d1 (diffu-grpo/reward_func.py of dllm-reasoning/d1, after TinyZero; reused by wd1, SPG, ESPO): the last `<answer>`
block; none 0; every run of digits in it must be a given number, each once, else 0.1; a value within 1e-5 of the
target 1, anything else 0.1. There `eval` computes the value without a limit, so that `9**9**9**9` hangs the rank.
Ours walks the syntax tree and gives up, for 0.1, on an expression beyond 512 characters and on a power beyond 4096
bits; every other text scores as there.

clean: exact fractions of + - * / and parentheses over whole numbers; a trailing "= value" is cut; `**`, `//` and
decimals are no expression. 1 for the target, `format_score` for a legal expression of exactly the given numbers
with another value, else 0, so that a tag alone earns nothing.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar, cast

from pydantic import Field

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.text.answers import AnswerIn, find_answer
from rewards.text.rule import Verdict, score_texts, verdict

RULE_VERSION = "1"
D1_FORMAT_SCORE = 0.1
MAX_CHARS = 512
"""Longest expression that is parsed; its nesting is bounded by it."""
MAX_POWER_BITS = 4096
"""Largest power that the d1 rule computes."""
MAX_NUMBERS = 32
MAX_MAGNITUDE = 10**12
"""Of the numbers and the target in a prompt's metadata."""

PyNumber = int | float | complex
NumberT = TypeVar("NumberT")
_D1_CHARACTERS = re.compile(r"[\d+\-*/().\s]+")
_CLEAN_CHARACTERS = re.compile(r"[0-9+\-*/()\s]+")
_EQUALS = re.compile(r"=\s*[-−]?[0-9]+(?:\.[0-9]+|/[0-9]+)?\s*\Z")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-"})


@dataclass(frozen=True, slots=True)
class Task:
    """The numbers to combine, each once, and what they should give."""

    numbers: tuple[int, ...]
    target: int


class CountdownConfig(RewardConfig):
    """Whether an arithmetic expression of given numbers hits a target."""

    type: Literal["countdown"] = "countdown"
    rule_version: Literal["clean", "d1"] = "clean"
    """clean: exact, and nothing for an empty tag. d1: as published, for comparison; ignores format_score."""
    format_score: float = Field(default=0.1, ge=0, lt=1)
    """clean: value of a legal expression of exactly the given numbers that misses the target."""
    answer_in: AnswerIn = "tag"
    """tag: the last `<answer>` block. text: the whole completion, for models too small to write tags."""


class CountdownReward:
    """Judges the answer by the prompt's numbers and target."""

    modality: Modality = "text"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {
        "numbers": "the whole numbers to combine, each exactly once",
        "target": "the whole number they should give",
    }

    def __init__(self, config: CountdownConfig) -> None:
        self.name = config.name
        self._rule_version = config.rule_version
        self._format_score = config.format_score
        self._answer_in: AnswerIn = config.answer_in
        rule = config.rule_version if config.rule_version == "d1" else f"clean/{config.format_score}"
        self.version = f"{RULE_VERSION}/{rule}" + ("/text" if config.answer_in == "text" else "")

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        prompt = Prompt("probe", "", {"numbers": [4, 6, 1], "target": 24})
        return RewardSample("probe", prompt, text="<answer>4*6*1</answer>")

    def check(self, prompt: Prompt) -> None:
        read_task(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_texts(self, samples, self._judge)

    def _judge(self, sample: RewardSample, text: str) -> Verdict:
        task = read_task(sample.prompt)
        if self._rule_version == "d1":
            return judge_d1(task, text, self._answer_in)
        return judge_clean(task, text, self._format_score, self._answer_in)


def read_task(prompt: Prompt) -> Task:
    """The prompt's `numbers` and `target`. Raises PromptError."""
    numbers, target = prompt.metadata.get("numbers"), prompt.metadata.get("target")
    if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= MAX_NUMBERS or not all(map(_natural, numbers)):
        raise PromptError(
            f"prompt {prompt.id!r} has metadata.numbers {str(numbers)[:80]}; countdown needs a list of 1 to "
            f"{MAX_NUMBERS} whole numbers from 0 to {MAX_MAGNITUDE}, such as [4, 6, 1]"
        )
    if type(target) is not int or abs(target) > MAX_MAGNITUDE:
        raise PromptError(
            f"prompt {prompt.id!r} has metadata.target {str(target)[:80]}; countdown needs a whole number of at most "
            f"{MAX_MAGNITUDE} in magnitude"
        )
    return Task(tuple(cast(Sequence[int], numbers)), target)


def judge_d1(task: Task, text: str, answer_in: AnswerIn = "tag") -> Verdict:
    """The published rule: 1, 0.1 or 0."""
    answer = find_answer(text, answer_in)
    if answer is None:
        return verdict(0.0, None, "no_answer", exact=False)
    if not _uses_d1(answer, task.numbers):
        return verdict(D1_FORMAT_SCORE, answer, "wrong_numbers", exact=False)
    try:
        value = evaluate_python(answer)
        hit = abs(value - task.target) < 1e-5
    except (ValueError, ArithmeticError):
        return verdict(D1_FORMAT_SCORE, answer, "not_an_expression", exact=False)
    if hit:
        return verdict(1.0, answer, "correct", exact=True)
    return verdict(D1_FORMAT_SCORE, answer, "wrong_value", exact=False)


def judge_clean(task: Task, text: str, format_score: float = 0.1, answer_in: AnswerIn = "tag") -> Verdict:
    """1 for an exact hit, `format_score` for another value of a legal expression of the numbers, else 0."""
    answer = find_answer(text, answer_in)
    if answer is None:
        return verdict(0.0, None, "no_answer", exact=False)
    expression = _EQUALS.sub("", answer).translate(_SIGNS).strip()
    try:
        value, literals = evaluate_exact(expression)
    except ZeroDivisionError:
        return verdict(0.0, answer, "division_by_zero", exact=False)
    except ValueError:
        return verdict(0.0, answer, "not_an_expression", exact=False)
    if sorted(literals) != sorted(task.numbers):
        return verdict(0.0, answer, "wrong_numbers", exact=False)
    hit = value == task.target
    reason = "correct" if hit else "wrong_value"
    return verdict(1.0 if hit else format_score, answer, reason, exact=hit, result=str(value))


def evaluate_exact(expression: str) -> tuple[Fraction, list[int]]:
    """Value and whole numbers of an expression of + - * / and parentheses, a sign allowed before any operand.

    Raises ValueError if it is no such expression or too long, ZeroDivisionError.
    """
    if not _CLEAN_CHARACTERS.fullmatch(expression):
        raise ValueError("only whole numbers, + - * / and parentheses are allowed")
    literals: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)) if number <= MAX_MAGNITUDE:
                literals.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _EXACT_SIGNS:
                return _EXACT_SIGNS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _EXACT:
                return _EXACT[type(op)](value(left), value(right))
            case _:
                raise ValueError(f"{type(node).__name__} is not allowed")

    return _unless_too_deep(value, expression), literals


def evaluate_python(expression: str) -> PyNumber:
    """What Python's `eval` gives for an expression of digits, + - * / ( ) . and white space, within bounds.

    Raises ValueError for anything else, for a value that is no number and beyond the bounds; ArithmeticError.
    """
    if not _D1_CHARACTERS.fullmatch(expression):
        raise ValueError("characters beside digits and + - * / ( ) .")

    def value(node: ast.expr) -> PyNumber:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _PYTHON_SIGNS:
                return _PYTHON_SIGNS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _PYTHON:
                try:
                    return _PYTHON[type(op)](value(left), value(right))
                except TypeError as error:  # `//` of complex numbers
                    raise ValueError(str(error)) from None
            case _:
                raise ValueError(f"{type(node).__name__} is no number")

    return _unless_too_deep(value, expression)


def _power(base: PyNumber, exponent: PyNumber) -> PyNumber:
    """`**` within bounds; raises ValueError beyond."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_POWER_BITS:
        raise ValueError("the power is too large")
    return base**exponent


_EXACT: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_EXACT_SIGNS: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_PYTHON: dict[type[ast.operator], Callable[[PyNumber, PyNumber], PyNumber]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: _power,
}  # fmt: skip
_PYTHON_SIGNS: dict[type[ast.unaryop], Callable[[PyNumber], PyNumber]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def _unless_too_deep(value: Callable[[ast.expr], NumberT], expression: str) -> NumberT:
    """The value of a parsed expression; raises ValueError also where it is nested deeper than the stack goes."""
    try:
        return value(_parse(expression))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse(expression: str) -> ast.expr:
    """Raises ValueError for what is too long or no expression."""
    if len(expression) > MAX_CHARS:
        raise ValueError(f"longer than {MAX_CHARS} characters")
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"no expression: {type(error).__name__}") from None


def _uses_d1(answer: str, numbers: Sequence[int]) -> bool:
    """Whether the runs of digits are the given numbers, each once; "4.5" counts as 4 and 5, as published."""
    if len(answer) > MAX_CHARS:
        return False
    return sorted(int(digits) for digits in re.findall(r"\d+", answer)) == sorted(numbers)


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_MAGNITUDE
