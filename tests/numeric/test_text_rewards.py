"""Hand-worked numbers of the rewards for verifiable text, and the published rules' own examples."""

import pytest

from rewards.countdown import Task as Countdown
from rewards.countdown import judge_clean as countdown_clean
from rewards.countdown import judge_d1 as countdown_d1
from rewards.format_tags import count_xml
from rewards.sudoku import Task as Sudoku
from rewards.sudoku import judge_clean as sudoku_clean
from rewards.sudoku import judge_d1 as sudoku_d1

TASK = Countdown((4, 6, 1), 24)


@pytest.mark.parametrize(
    ("expression", "d1", "clean"),
    [
        ("4*6*1", 1.0, 1.0),
        ("4*6+1", 0.1, 0.1),  # 25
        ("4*6", 0.1, 0.0),  # the 1 is missing
        ("4*6*1 = 24", 0.1, 1.0),  # d1: 24 is one more number; clean: cut
        ("46-1", 0.1, 0.0),  # 46 is not given
        ("4*6/1", 1.0, 1.0),
        ("4**6**1", 0.1, 0.0),  # 4096; clean: no expression
        ("(4*6)//1", 1.0, 0.0),
        ("4.6*1", 0.1, 0.0),  # 4.6: d1 counts 4 and 6, the value misses
        ("4*6*1.", 1.0, 0.0),  # d1: 1. is 1.0
        ("4 × 6 ÷ 1", 0.1, 1.0),
        ("-4*-6*1", 1.0, 1.0),
        ("4*6/(1-1)", 0.1, 0.0),
        ("4(6)1", 0.1, 0.0),
        ("four", 0.1, 0.0),
        ("", 0.1, 0.0),
    ],
)
def test_countdown(expression: str, d1: float, clean: float) -> None:
    text = f"<answer>9</answer> no: <answer> {expression}\n</answer>"
    assert countdown_d1(TASK, text).value == d1
    assert countdown_clean(TASK, text).value == clean


def test_countdown_without_a_tag_is_nothing() -> None:
    assert countdown_d1(TASK, "4*6*1").value == 0.0
    assert countdown_clean(TASK, "<answer>4*6*1").value == 0.0


def test_countdown_is_exact_where_floats_are_not() -> None:
    # 1/3*3 = 1 exactly; in floats 49*(1/49) = 0.9999999999999999. A near miss of 1e-6 is a hit for d1 only.
    assert countdown_clean(Countdown((1, 49, 49), 1), "<answer>49*(1/49)</answer>").value == 1.0
    near = Countdown((1, 1_000_000, 1), 1)
    assert countdown_d1(near, "<answer>1+1/1000000</answer>").value == 1.0
    assert countdown_clean(near, "<answer>1+1/1000000</answer>").value == 0.1


# 1 2 3 4 / 3 4 1 2 / 2 1 4 3 / 4 3 2 1, the last four cells of the first two rows empty
SUDOKU = Sudoku("1200340021434321", "1234341221434321")


@pytest.mark.parametrize(
    ("answer", "d1", "clean"),
    [
        ("1234341221434321", 1.0, 1.0),
        ("1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", 1.0, 1.0),
        ("1234344121434321", 0.5, 0.5),  # 3 4 right, 4 1 in place of 1 2 wrong
        ("9934991299999999", 1.0, 0.0),  # d1 does not look at given cells
        ("1234", 0.5, 0.0),  # padded with 0: the first two empty cells are right
        ("12343412214343219", 1.0, 0.0),  # d1 cuts
        ("", 0.0, 0.0),
        ("none", 0.0, 0.0),
    ],
)
def test_sudoku(answer: str, d1: float, clean: float) -> None:
    assert sudoku_d1(SUDOKU, f"<answer>{answer}</answer>").value == d1
    assert sudoku_clean(SUDOKU, f"<answer>{answer}</answer>").value == clean


def test_sudoku_another_completion_is_right_too_when_clean() -> None:
    # Swapping 1 and 2 everywhere in the empty grid's solution is another solution: 8 of 16 cells differ.
    task = Sudoku("0" * 16, "1234341221434321")
    other = "<answer>2134342112434312</answer>"
    assert sudoku_d1(task, other).value == 0.5
    assert sudoku_clean(task, other).value == 1.0


def test_sudoku_partial_credit_can_be_switched_off() -> None:
    assert sudoku_clean(SUDOKU, "<answer>1234344121434321</answer>", partial=False).value == 0.0


def test_sudoku_without_an_empty_cell_is_nothing_for_d1() -> None:
    full = Sudoku("1234341221434321", "1234341221434321")
    assert sudoku_d1(full, "<answer>1234341221434321</answer>").value == 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<reasoning>\na\n</reasoning>\n<answer>\n1\n</answer>\n", 0.5),
        # "abc" after the close: 3 for the opening tag, 4 - 1 for the closing one.
        ("<reasoning>\na\n</reasoning>\n<answer>\n1\n</answer>\nabc", 0.5 - 0.003 - 0.003),
        # No line end after the close: nothing is split off, so all 47 characters (12+2+13+9+2+9)
        # are charged once; 0 - 1 the other time.
        ("<reasoning>\na\n</reasoning>\n<answer>\n1\n</answer>", 0.5 - 0.047 + 0.001),
        ("", 0.0),
        ("<reasoning>\n<reasoning>\n", 0.0),
        ("\n<answer>\n" + "x" * 990, 0.125 - 1.0),
    ],
)
def test_xml_count(text: str, count: float) -> None:
    assert count_xml(text) == pytest.approx(count, abs=1e-12)
