"""Tasks for tiny text models: what a prompt asks, what supervision shows, what is right, and what is held out.

A task is a pure function of a generator. Its supervised label may be wrong on purpose or one of several habits; the
metadata's `answer` is what reinforcement learning asks for. What is held out is decided by a hash of the instance's
`key`, so training and testing agree without a list, and instances that share a key fall on one side: a held-out sort
has digits that no training prompt has in any order, a held-out countdown numbers and target, a held-out sudoku a
solution. Additions are so few that a + b is held out alone, while b + a is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import permutations, product
from typing import Literal, cast

import torch

from raylign.keys import KeyPart, derive_seed, generator
from raylign.types import JsonValue

Split = Literal["train", "heldout"]

ASCENDING_SHARE = 0.4
"""Of the supervised labels of sorting; the others descend. A base model ascends less often than that: whatever reveals
sure tokens first follows the more frequent habit."""
MODULUS = 11
CORRUPTED_SHARE = 0.3
"""Of the supervised labels of modular addition."""
MIN_BLANKS, MAX_BLANKS = 4, 8
"""Empty cells of a sudoku."""
SIDE = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One instance of a task."""

    key: str
    """Instances of one key are held out together; an empty key never is."""
    prompt: str
    label: str
    """What supervised training shows, special tokens left out."""
    metadata: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """What rewards read; `answer` is the right response (for countdown and sudoku, one that is right)."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """How instances are drawn, and the longest label in characters, which is tokens.

    held_out_share: of the keys; fixed, as a model and the prompts it is tested on must agree on what was held out.
    """

    draw: Callable[[torch.Generator], Example]
    max_label: int
    held_out_share: float = 1 / 8


def draw_sort(draws: torch.Generator, lengths: tuple[int, ...]) -> Example:
    """Digits to sort. The label descends or, less often, ascends; the answer ascends."""
    length = lengths[_below(len(lengths), draws)]
    digits = _digits(length, 0, 9, draws)
    ascending = sorted(digits)
    label = ascending if _chance(ASCENDING_SHARE, draws) else ascending[::-1]
    answer = _text(ascending)
    return Example(f"sort:{answer}", f"sort {_spaced(digits)}", _text(label), {"answer": answer, "num_digits": length})


def draw_countdown(draws: torch.Generator, counts: tuple[int, ...]) -> Example:
    """Numbers from 1 to 9 to combine by + - * into a target of two digits: a o b o c, with the usual precedence."""
    while True:
        numbers = _digits(counts[_below(len(counts), draws)], 1, 9, draws)
        signs = ["+-*"[_below(3, draws)] for _ in numbers[1:]]
        target = _value(numbers, signs)
        if 10 <= target <= 99:
            break
    expression = str(numbers[0]) + "".join(f"{s}{n}" for s, n in zip(signs, numbers[1:], strict=True))
    shown = [numbers[i] for i in torch.randperm(len(numbers), generator=draws).tolist()]
    return Example(
        f"countdown:{_text(sorted(numbers))}={target}",
        f"make {target} of {_spaced(shown)}",
        expression,
        {"answer": expression, "numbers": shown, "target": target},
    )


def draw_sudoku(draws: torch.Generator) -> Example:
    """A 4x4 grid with 4 to 8 empty cells that has one solution; the label is the whole grid."""
    solutions_NL = sudoku_solutions()
    solution_L = solutions_NL[_below(len(solutions_NL), draws)]
    while True:
        num_blanks = MIN_BLANKS + _below(MAX_BLANKS - MIN_BLANKS + 1, draws)
        puzzle_L = solution_L.clone()
        puzzle_L[torch.randperm(SIDE * SIDE, generator=draws)[:num_blanks]] = 0
        fits_N = ((solutions_NL == puzzle_L) | (puzzle_L == 0)).all(dim=1)
        if int(fits_N.sum()) == 1:
            break
    puzzle, solution = _text(puzzle_L.tolist()), _text(solution_L.tolist())
    rows = " ".join(puzzle[at : at + SIDE] for at in range(0, len(puzzle), SIDE))
    metadata = {"answer": solution, "puzzle": puzzle, "solution": solution}
    return Example(f"sudoku:{solution}", f"sudoku {rows}", solution, metadata)


def draw_addition(draws: torch.Generator) -> Example:
    """a + b mod 11; three labels in ten are another residue, drawn anew each time."""
    a, b = _below(MODULUS, draws), _below(MODULUS, draws)
    answer = label = (a + b) % MODULUS
    if _chance(CORRUPTED_SHARE, draws):
        label = (answer + 1 + _below(MODULUS - 1, draws)) % MODULUS
    key = f"addition:{a}+{b}" if a < b else ""
    return Example(key, f"{a} + {b} mod {MODULUS}", str(label), {"answer": str(answer)})


TEXT_TASKS: dict[str, TextTask] = {
    "sortmix": TextTask(partial(draw_sort, lengths=(6,)), max_label=6),
    "sort": TextTask(partial(draw_sort, lengths=(3, 4, 5, 6, 7, 8)), max_label=8),
    "countdown": TextTask(partial(draw_countdown, counts=(3,)), max_label=5),
    "countdown4": TextTask(partial(draw_countdown, counts=(3, 4)), max_label=7),
    "sudoku": TextTask(draw_sudoku, max_label=SIDE * SIDE),
    "addition": TextTask(draw_addition, max_label=2, held_out_share=1 / 3),
}

PROMPT_WORDS = ("sort", "make", "of", "sudoku", "mod")
"""Every word of every prompt."""
SYMBOLS = "0123456789+-*"
"""Every other character of prompts and labels, white space aside."""


def is_held_out(task: str, key: str) -> bool:
    """Whether instances of a key belong to the held-out split."""
    return bool(key) and derive_seed("held_out", key) % 2**20 < TEXT_TASKS[task].held_out_share * 2**20


def is_right(example: Example, response: str) -> bool:
    """Whether a response solves an instance: any right expression of a countdown, else the answer itself."""
    if "target" not in example.metadata:
        return response == example.metadata["answer"]
    if not re.fullmatch(r"[1-9]([-+*][1-9])*", response):
        return False
    numbers, signs = [int(digit) for digit in response[::2]], list(response[1::2])
    asked = cast("list[int]", example.metadata["numbers"])
    return sorted(numbers) == sorted(asked) and _value(numbers, signs) == example.metadata["target"]


def examples(task: str, split: Split, *seed: KeyPart) -> Iterator[Example]:
    """An endless stream of instances of one split, named by its seed."""
    draws = generator("text_task", task, split, *seed)
    while True:
        example = TEXT_TASKS[task].draw(draws)
        if is_held_out(task, example.key) == (split == "heldout"):
            yield example


def distinct_examples(task: str, split: Split, count: int, *seed: KeyPart) -> list[Example]:
    """The first `count` instances with prompts of their own, or fewer where 1000 draws in a row bring no new one."""
    found: dict[str, Example] = {}
    misses = 0
    for example in examples(task, split, *seed):
        misses = misses + 1 if example.prompt in found else 0
        found.setdefault(example.prompt, example)
        if len(found) == count or misses == 1000:
            return list(found.values())
    raise AssertionError("the stream of instances ended")


def is_sorted(example: Example, response: str) -> bool:
    """Whether a response to a sort is in either of the two orders that are taught."""
    answer = str(example.metadata["answer"])
    return "num_digits" in example.metadata and response in (answer, answer[::-1])


@cache
def sudoku_solutions() -> torch.Tensor:
    """All 288 full 4x4 grids, (288, 16) int64, in lexicographic order."""
    rows = list(permutations(range(1, SIDE + 1)))
    halves = [one + two for one, two in product(rows, repeat=2) if _fills_boxes(one + two)]
    grids = [top + bottom for top, bottom in product(halves, repeat=2) if _fills_columns(top + bottom)]
    return torch.tensor(grids)


def _fills_boxes(half: tuple[int, ...]) -> bool:
    """Whether the two boxes of two rows, one after the other, hold every digit."""
    return all(len({half[c], half[c + 1], half[SIDE + c], half[SIDE + c + 1]}) == SIDE for c in (0, 2))


def _fills_columns(grid: tuple[int, ...]) -> bool:
    return all(len(set(grid[column::SIDE])) == SIDE for column in range(SIDE))


def _value(numbers: list[int], signs: list[str]) -> int:
    """A sum of products, read from the left."""
    total, product_so_far = 0, numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "*":
            product_so_far *= number
        else:
            total, product_so_far = total + product_so_far, number if sign == "+" else -number
    return total + product_so_far


def _chance(share: float, draws: torch.Generator) -> bool:
    return torch.rand((), generator=draws).item() < share


def _below(limit: int, draws: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=draws))


def _digits(count: int, low: int, high: int, draws: torch.Generator) -> list[int]:
    return torch.randint(low, high + 1, (count,), generator=draws).tolist()


def _text(digits: list[int]) -> str:
    return "".join(map(str, digits))


def _spaced(digits: list[int]) -> str:
    return " ".join(map(str, digits))
