"""The sudoku reward: which empty cells does the answer fill correctly?

d1 (diffu-grpo/reward_func.py of dllm-reasoning/d1): the digits of the last `<answer>` block, padded on the right
with 0 or cut to the grid's size; the fraction of the empty cells that equal the solution's. Given cells are not
looked at; no digit, or no empty cell, is 0.

clean: exactly one digit per cell, the given cells unchanged, else 0. A valid completion of the puzzle is 1, be it the
listed one or another; otherwise the fraction of empty cells that equal the solution's (or 0 when `partial` is off).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.text.answers import AnswerIn, find_answer
from rewards.text.rule import Verdict, score_texts, verdict

RULE_VERSION = "1"
SIDES = {16: 4, 81: 9}
"""Number of cells → side of the grid."""
EMPTY = "0"


@dataclass(frozen=True, slots=True)
class Task:
    """Row by row, 0 for an empty cell."""

    puzzle: str
    solution: str

    @property
    def empty(self) -> list[int]:
        """Indices of the empty cells."""
        return [i for i, cell in enumerate(self.puzzle) if cell == EMPTY]


class SudokuConfig(RewardConfig):
    """How much of a 4x4 or 9x9 sudoku is solved."""

    type: Literal["sudoku"] = "sudoku"
    rule_version: Literal["clean", "d1"] = "clean"
    """clean: the whole grid, given cells checked. d1: as published, for comparison."""
    partial: bool = True
    """clean: credit for single cells; off: 1 for a solved puzzle, else 0."""
    answer_in: AnswerIn = "tag"
    """tag: the last `<answer>` block. text: the whole completion, for models too small to write tags."""


class SudokuReward:
    """Judges the answer's digits by the prompt's puzzle and solution."""

    modality: Modality = "text"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {
        "puzzle": "16 or 81 digits, row by row, 0 for an empty cell",
        "solution": "the solved grid, written the same way",
    }

    def __init__(self, config: SudokuConfig) -> None:
        self.name = config.name
        self._rule_version = config.rule_version
        self._partial = config.partial
        self._answer_in: AnswerIn = config.answer_in
        rule = "d1" if config.rule_version == "d1" else f"clean/{'cells' if config.partial else 'board'}"
        self.version = f"{RULE_VERSION}/{rule}" + ("/text" if config.answer_in == "text" else "")

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        prompt = Prompt("probe", "", {"puzzle": "1234341221434320", "solution": "1234341221434321"})
        return RewardSample("probe", prompt, text="<answer>1234341221434321</answer>")

    def check(self, prompt: Prompt) -> None:
        read_task(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_texts(self, samples, self._judge)

    def _judge(self, sample: RewardSample, text: str) -> Verdict:
        task = read_task(sample.prompt)
        if self._rule_version == "d1":
            return judge_d1(task, text, self._answer_in)
        return judge_clean(task, text, self._partial, self._answer_in)


def read_task(prompt: Prompt) -> Task:
    """The prompt's `puzzle` and `solution`. Raises PromptError unless the solution is valid and fits the puzzle."""
    puzzle, solution = prompt.metadata.get("puzzle"), prompt.metadata.get("solution")
    if not isinstance(puzzle, str) or len(puzzle) not in SIDES or not _digits_up_to(puzzle, EMPTY):
        raise PromptError(
            f"prompt {prompt.id!r} has metadata.puzzle {str(puzzle)[:90]!r}; sudoku needs a text of 16 digits 0-4 or "
            "81 digits 0-9, row by row, 0 for an empty cell"
        )
    if not isinstance(solution, str) or len(solution) != len(puzzle) or not completes(puzzle, solution):
        raise PromptError(
            f"prompt {prompt.id!r} has metadata.solution {str(solution)[:90]!r}; it must be a valid grid of "
            f"{len(puzzle)} digits that keeps the given cells of its puzzle {puzzle!r}"
        )
    return Task(puzzle, solution)


def judge_d1(task: Task, text: str, answer_in: AnswerIn = "tag") -> Verdict:
    """The published rule: correct empty cells over empty cells, in [0, 1]."""
    answer = find_answer(text, answer_in)
    if answer is None:
        return verdict(0.0, None, "no_answer", exact=False)
    digits = "".join(character for character in answer if character.isdigit())
    if not digits:
        return verdict(0.0, answer, "no_digits", exact=False)
    size = len(task.puzzle)
    grid = digits[:size].ljust(size, EMPTY)
    value = _correct_fraction(task, grid)
    return verdict(value, digits, "cells", exact=completes(task.puzzle, grid))


def judge_clean(task: Task, text: str, partial: bool = True, answer_in: AnswerIn = "tag") -> Verdict:
    """1 for a solved puzzle, the fraction of correct cells (if `partial`), 0 for what is no filling of the puzzle."""
    answer = find_answer(text, answer_in)
    if answer is None:
        return verdict(0.0, None, "no_answer", exact=False)
    grid = "".join(character for character in answer if character in "0123456789")
    if len(grid) != len(task.puzzle):
        return verdict(0.0, grid, "wrong_length", exact=False)
    if not _keeps(task.puzzle, grid):
        return verdict(0.0, grid, "given_cell_changed", exact=False)
    if completes(task.puzzle, grid):
        return verdict(1.0, grid, "solved", exact=True)
    return verdict(_correct_fraction(task, grid) if partial else 0.0, grid, "unsolved", exact=False)


def completes(puzzle: str, grid: str) -> bool:
    """Whether `grid` is full, keeps the puzzle's given cells, and repeats no digit in a row, column or box."""
    side = SIDES[len(puzzle)]
    box = math.isqrt(side)
    if len(grid) != len(puzzle) or not _digits_up_to(grid, "1") or not _keeps(puzzle, grid):
        return False
    rows = [[side * r + c for c in range(side)] for r in range(side)]
    columns = [[side * r + c for r in range(side)] for c in range(side)]
    boxes = [
        [side * (top + r) + left + c for r in range(box) for c in range(box)]
        for top in range(0, side, box)
        for left in range(0, side, box)
    ]
    return all(len({grid[i] for i in unit}) == side for unit in (*rows, *columns, *boxes))


def _keeps(puzzle: str, grid: str) -> bool:
    return all(given in (EMPTY, filled) for given, filled in zip(puzzle, grid, strict=True))


def _digits_up_to(grid: str, lowest: str) -> bool:
    return all(lowest <= cell <= str(SIDES[len(grid)]) for cell in grid)


def _correct_fraction(task: Task, grid: str) -> float:
    """0 without an empty cell, as published."""
    empty = task.empty
    return sum(grid[i] == task.solution[i] for i in empty) / len(empty) if empty else 0.0
