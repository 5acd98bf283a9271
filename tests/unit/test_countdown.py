"""The countdown reward: what it refuses, and that nothing a policy writes can hang or break it."""

import asyncio
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample
from rewards.countdown import (
    CountdownConfig,
    CountdownReward,
    Task,
    evaluate_exact,
    evaluate_python,
    judge_clean,
    judge_d1,
    read_task,
)

TASK = Task((4, 6, 1), 24)


def _answer(expression: str) -> str:
    return f"<reasoning>so</reasoning><answer>{expression}</answer>"


@pytest.mark.parametrize("metadata", [
    {}, {"numbers": [1, 2]}, {"target": 3}, {"numbers": "1 2", "target": 3}, {"numbers": [], "target": 3},
    {"numbers": [1, 2.0], "target": 3}, {"numbers": [1, True], "target": 3}, {"numbers": [-1], "target": 3},
    {"numbers": [1, 2], "target": "3"}, {"numbers": [1, 2], "target": 3.0}, {"numbers": [1] * 33, "target": 3},
    {"numbers": [10**13], "target": 3}, {"numbers": [1], "target": float("nan")},
])  # fmt: skip
def test_metadata_that_is_no_task_is_refused(metadata: dict) -> None:
    with pytest.raises(PromptError, match="countdown needs"):
        read_task(Prompt("p", "", metadata))


@pytest.mark.parametrize(
    "bomb",
    ["9**9**9**9", "(9**9)**(9**9)", "9**9**6", "-" * 5000 + "4*6*1", "(" * 5000, "4" * 100_000, "-" * 500 + "1"],
)
@pytest.mark.parametrize("judge", [judge_d1, judge_clean])
def test_a_bomb_costs_no_time(judge, bomb: str) -> None:
    numbers = tuple(int(digits) for digits in bomb if digits.isdigit())[:30] or (1,)
    started = time.perf_counter()
    assert judge(Task(numbers, 24), _answer(bomb)).value in (0.0, 0.1)
    assert time.perf_counter() - started < 1.0


@given(st.text(alphabet="0123456789+-*/(). \n", max_size=40))
def test_the_d1_evaluator_is_pythons_own_within_its_bounds(expression: str) -> None:
    if "**" in expression:
        return  # eval itself would hang
    try:
        ours = evaluate_python(expression)
    except (ValueError, ArithmeticError):
        ours = None
    try:
        theirs = eval(expression.strip(), {"__builtins__": None}, {})  # noqa: S307  # what the rule is held against
    except Exception:  # noqa: BLE001  # as d1 does
        theirs = None
    if not isinstance(theirs, int | float | complex):
        theirs = None  # an empty tuple, an ellipsis: no number, so no hit
    if expression == expression.strip():
        assert ours == theirs


@given(st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=8,
))  # fmt: skip
def test_the_clean_evaluator_agrees_with_pythons_floats(expression: str) -> None:
    try:
        exact, literals = evaluate_exact(expression)
    except ZeroDivisionError:
        return
    assert isinstance(exact, Fraction)
    assert len(literals) == sum(1 for part in expression.replace("(", " ").replace(")", " ")
                                .translate(str.maketrans("+-*/", "    ")).split() if part)  # fmt: skip
    assert float(exact) == pytest.approx(evaluate_python(expression), rel=1e-6, abs=1e-6)


@given(st.text(max_size=200), st.sampled_from([judge_d1, judge_clean]))
def test_any_text_gets_a_value_in_range(text: str, judge) -> None:
    assert 0 <= judge(TASK, text).value <= 1
    assert 0 <= judge(TASK, _answer(text)).value <= 1


def test_the_reward_names_its_rule_and_reports_what_it_read() -> None:
    reward = CountdownReward(CountdownConfig())
    prompt = Prompt("p", "", {"numbers": [4, 6, 1], "target": 24})
    (score,) = asyncio.run(reward.score([RewardSample("s", prompt, text=_answer("4+6+1"))]))
    assert score.value == 0.1
    assert dict(score.details) == {"answer": "4+6+1", "reason": "wrong_value", "exact": False, "result": "11"}
    versions = {CountdownReward(CountdownConfig(rule_version=rule)).version for rule in ("d1", "clean")}
    assert len(versions) == 2
    assert CountdownReward(CountdownConfig(format_score=0.0)).version not in versions
