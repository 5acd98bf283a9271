"""The sudoku reward: what it refuses, and what a grid has to be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylign.errors import PromptError
from raylign.types import Prompt
from rewards.sudoku import Task, completes, judge_clean, judge_d1, read_task

SOLUTION = "1234341221434321"
NINE = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))


@pytest.mark.parametrize("metadata", [
    {}, {"puzzle": "0" * 16}, {"puzzle": "0" * 15, "solution": SOLUTION}, {"puzzle": 1234, "solution": SOLUTION},
    {"puzzle": "5" + "0" * 15, "solution": SOLUTION}, {"puzzle": "." * 16, "solution": SOLUTION},
    {"puzzle": "0" * 16, "solution": "1" * 16}, {"puzzle": "2" + "0" * 15, "solution": SOLUTION},
    {"puzzle": "0" * 16, "solution": SOLUTION[:-1]}, {"puzzle": "²" + "0" * 15, "solution": SOLUTION},
])  # fmt: skip
def test_metadata_that_is_no_puzzle_is_refused(metadata: dict) -> None:
    with pytest.raises(PromptError):
        read_task(Prompt("p", "", metadata))


def test_nine_by_nine_works_too() -> None:
    puzzle = "0" * 9 + NINE[9:]
    task = read_task(Prompt("p", "", {"puzzle": puzzle, "solution": NINE}))
    assert judge_clean(task, f"<answer>{NINE}</answer>").value == 1.0
    assert judge_clean(task, f"<answer>{NINE[1]}{NINE[1:]}</answer>").value == pytest.approx(8 / 9)
    assert judge_d1(task, f"<answer>{NINE[:3]}</answer>").value == pytest.approx(3 / 9)


@given(st.permutations("1234"), st.booleans())
def test_renaming_digits_and_transposing_keep_a_grid_valid(names: list[str], transpose: bool) -> None:
    grid = SOLUTION.translate(str.maketrans("1234", "".join(names)))
    if transpose:
        grid = "".join(grid[4 * c + r] for r in range(4) for c in range(4))
    assert completes("0" * 16, grid)
    assert not completes("0" * 16, grid[1] + grid[1:])


@given(st.text(max_size=60), st.sets(st.integers(0, 15)))
def test_any_text_gets_a_value_in_range(text: str, empty: set[int]) -> None:
    task = Task("".join("0" if i in empty else cell for i, cell in enumerate(SOLUTION)), SOLUTION)
    for judge in (judge_d1, judge_clean):
        assert 0 <= judge(task, f"<answer>{text}</answer>").value <= 1
        assert judge(task, f"<answer>{SOLUTION}</answer>").value == (1.0 if empty or judge is judge_clean else 0.0)
