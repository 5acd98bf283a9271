"""The math reward: which answer counts, what Math-Verify says of it, and that a bomb is an error or 0, never a hang."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.math_answer import (
    MathAnswerConfig,
    MathAnswerReward,
    exponent_depth,
    final_answer,
    gold_answer,
    gsm8k_parts,
    refusal,
)


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswerReward]:
    built = MathAnswerReward(MathAnswerConfig(timeout_s=3.0))
    built.load()
    yield built
    built.close()


def _score(reward: MathAnswerReward, *pairs: tuple[object, str]) -> list[RewardScore]:
    samples = [
        RewardSample(f"s{i}", Prompt("p", "", {"answer": gold}), text=text)  # type: ignore[dict-item]
        for i, (gold, text) in enumerate(pairs)
    ]
    return asyncio.run(reward.score(samples))


RIGHT = [
    ("42", r"\boxed{42}"), (42, r"so <answer>42</answer>"), ("1/2", r"\boxed{0.5}"),
    (r"\frac12", r"\boxed{\frac{1}{2}}"), (r"\frac12", r"\boxed{\frac12}"), ("1234", r"\boxed{1,234}"),
    ("5", r"\boxed{5\text{ cm}}"), ("18", r"\boxed{\$18}"),
    (r"we get \boxed{2\pi}", r"\boxed{\pi + \pi}"), ("7 * 6 = 42 #### 42", r"<answer>\boxed{42}</answer>"),
    ("(x+1)^2", r"\boxed{x^2+2x+1}"), (r"\{1,2\}", r"\boxed{\{2,1\}}"), ("[1,2)", r"\boxed{[1,2)}"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"), ("1<x<2", r"\boxed{(1,2)}"), ("3", r"\boxed{x=3}"),
]  # fmt: skip
WRONG = [
    ("42", r"\boxed{43}", "different"), ("42", "it is 42", "no_answer"), ("2", r"\boxed{2} or \boxed{3}", "different"),
    ("42", r"\boxed{1, 42}", "different"), ("42", r"\boxed{}", "unreadable"),
    ("42", r"\boxed{9^{9^{9^9}}}", "power_tower"),
    ("42", r"\boxed{" + "1+" * 300 + "1}", "too_long"), ("42", r"\boxed{10^{1000000}}", "huge_exponent"),
    ("42", r"\boxed{1000000!}", "huge_factorial"), ("1<x<2", r"\boxed{(1,3)}", "different"),
    ("(1,2)", r"\boxed{1<x<2}", "different"),  # the comparison is not symmetric: the other way round it is right
]  # fmt: skip


def test_right_answers_are_1(reward: MathAnswerReward) -> None:
    scores = _score(reward, *RIGHT)
    assert [(pair, score.value) for pair, score in zip(RIGHT, scores, strict=True) if score.value != 1.0] == []


def test_wrong_answers_are_0_and_say_why(reward: MathAnswerReward) -> None:
    scores = _score(reward, *[(gold, text) for gold, text, _ in WRONG])
    assert [(score.value, score.details.get("reason")) for score in scores] == [(0.0, why) for *_, why in WRONG]


def test_an_unreadable_gold_is_no_ones_wrong_answer(reward: MathAnswerReward) -> None:
    (score,) = _score(reward, (r"\frac{", r"\boxed{1}"))
    assert score.error is not None
    assert score.error.code == "invalid_input"


@pytest.mark.parametrize("gold", [None, True, [1], "", "9^{9^9}", "1" * 600])
def test_metadata_without_an_answer_is_refused(reward: MathAnswerReward, gold: object) -> None:
    prompt = Prompt("p", "", {"answer": gold})  # type: ignore[dict-item]
    with pytest.raises(PromptError, match=r"metadata\.answer"):
        reward.check(prompt)
    (score,) = asyncio.run(reward.score([RewardSample("s", prompt, text=r"\boxed{1}")]))
    assert score.error is not None
    assert score.error.code == "invalid_input"


def test_a_reference_stands_in_for_metadata(reward: MathAnswerReward) -> None:
    sample = RewardSample("s", Prompt("p", ""), text=r"\boxed{3}", reference="3.0")
    (score,) = asyncio.run(reward.score([sample]))
    assert score.value == 1.0


def test_a_comparison_without_end_is_a_timeout_and_its_neighbours_are_scored() -> None:
    # A power of sums that no gate can know: expanding it takes minutes.
    bomb = r"\boxed{(a+b+c+d+e+f+g+h)^{900}}"
    reward = MathAnswerReward(MathAnswerConfig(timeout_s=0.5, num_workers=1))
    reward.load()
    started = time.monotonic()
    late, fine = _score(reward, (r"(a+b+c+d+e+f+g+h)^{901}", bomb), ("1", r"\boxed{1.0}"))
    reward.close()
    assert time.monotonic() - started < 20
    assert late.error is not None
    assert late.error.code == "timeout"
    assert fine.value == 1.0


@pytest.mark.parametrize(("text", "answer"), [
    (r"<answer>5</answer>", "5"), (r"<answer>$5$</answer>", "5"), (r"\boxed{4} <answer>5</answer>", "4"), ("5", None),
    (r"\boxed{4} and \boxed{$5$}", "5"),
])  # fmt: skip
def test_one_final_answer_is_chosen(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_gold_may_be_a_worked_solution() -> None:
    assert gold_answer("a\n#### 1,234") == "1,234"
    assert gold_answer(r"thus $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert gold_answer("$7$") == "7"


@pytest.mark.parametrize(
    "fine", ["e^{x^{2}}", "e^{-x^2}", "2^{10}", "10!", "n^{n}", "x^{2y}", r"\sqrt{2}^{3}", "10^{-9}"]
)
def test_ordinary_answers_pass_the_gate(fine: str) -> None:
    assert refusal(fine) is None


@pytest.mark.parametrize(("text", "depth"), [("x", 0), ("x^2", 0), ("x^{2}", 1), ("e^{x^{2}}", 2), ("x^{a^{b^{c}}}", 3),
                                             ("2**(3**(x))", 2), ("x^{2}+y^{3}", 1), ("}}x^{2}", 1)])  # fmt: skip
def test_exponent_depth(text: str, depth: int) -> None:
    assert exponent_depth(text) == depth


def test_gsm8k_parts_by_hand() -> None:
    good = "<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>\n"
    assert gsm8k_parts("42", good) == {"correct": 2.0, "integer": 0.5, "strict": 0.5, "soft": 0.5, "xml": 0.5}
    assert gsm8k_parts("42", "42") == {"correct": 2.0, "integer": 0.5, "strict": 0.0, "soft": 0.0, "xml": 0.0}
    # Literal: 42.0 is not 42 and not all digits.
    assert gsm8k_parts("42", "<answer>42.0</answer>")["correct"] == 0.0
    reward = MathAnswerReward(MathAnswerConfig(mode="gsm8k"))
    (score,) = _score(reward, ("6*7 = 42\n#### 42", good))
    assert score.value == 4.0
    assert score.details["answer"] == "42"


def test_the_exact_rate_can_be_shown_beside_a_shaped_value() -> None:
    prompt = Prompt("p", "", {"answer": "#### 42"})
    texts = ("<answer>42</answer>", "<answer>41</answer>", "no tag at all")
    samples = [RewardSample(str(n), prompt, text=text) for n, text in enumerate(texts)]
    for mode in ("gsm8k", "verify"):
        scores = asyncio.run(MathAnswerReward(MathAnswerConfig(mode=mode)).score(samples))
        assert [score.details["exact"] for score in scores] == [True, False, False], mode
