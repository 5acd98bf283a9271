"""The exact answer: what agrees, what is refused, and that no text earns more than the right one."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample
from rewards import make_reward
from rewards.countdown import CountdownConfig
from rewards.exact_answer import ExactAnswerConfig, ExactAnswerReward, judge, read_answer
from rewards.sudoku import SudokuConfig

DIGITS = st.text(alphabet="0123456789", min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("right", "text", "share"),
    [
        ("123", "123", 1.0),
        ("123", " 1 2 3\n", 1.0),
        ("123", "124", 2 / 3),
        ("123", "12", 2 / 3),
        ("123", "1234", 3 / 4),
        ("123", "3123", 0.0),
        ("the red fox", "the  red\nfox", 1.0),
        ("the red fox", "the red dog", 2 / 3),
        ("the red fox", "theredfox", 0.0),
        ("42", "42.0", 2 / 4),
    ],
)
def test_a_share_is_worked_out_by_hand_and_exact_is_all_of_it(right: str, text: str, share: float) -> None:
    shaped, exact = judge(right, text, "share"), judge(right, text)
    assert shaped.value == pytest.approx(share)
    assert exact.value == float(share == 1.0)
    assert shaped.details["exact"] is exact.details["exact"] is (share == 1.0)


@pytest.mark.parametrize(("text", "where"), [("", "text"), ("  \n", "text"), ("123", "tag"), ("<answer>123", "tag")])
def test_no_answer_is_a_counted_status(text: str, where) -> None:
    assert judge("123", text, answer_in=where).details == {"answer": None, "reason": "no_answer", "exact": False}
    assert judge("123", text, "share", where).value == 0.0


def test_a_tag_is_read_only_when_asked_for() -> None:
    assert judge("123", "so <answer>1</answer> or <answer>123</answer>", answer_in="tag").value == 1.0
    assert judge("123", "<answer>123</answer>").value == 0.0


@pytest.mark.parametrize("metadata", [{}, {"answer": ""}, {"answer": True}, {"answer": 1.5}, {"answer": ["1"]}])
def test_a_prompt_without_an_answer_is_refused(metadata: dict) -> None:
    with pytest.raises(PromptError, match="exact_answer needs a text"):
        read_answer(Prompt("p", "", metadata), None)


def test_whole_numbers_and_references_are_answers() -> None:
    assert read_answer(Prompt("p", "", {"answer": 0}), None) == "0"
    assert read_answer(Prompt("p", ""), "12") == "12"


@given(DIGITS, DIGITS)
def test_only_the_answer_itself_is_worth_one(right: str, text: str) -> None:
    assert (judge(right, text, "share").value == 1.0) == (right == text) == (judge(right, text).value == 1.0)
    assert 0.0 <= judge(right, text, "share").value <= 1.0


@pytest.mark.parametrize(
    ("text", "value"), [("1111", 1.0), ("1234", 0.25), ("11", 0.5), ("11111", 0.8), ("4321", 0.25), ("9999", 0.0)]
)
def test_repeated_pays_for_the_first_character_over_and_over(text: str, value: float) -> None:
    verdict = judge("1234", text, "repeated")
    assert verdict.value == value
    assert verdict.details["exact"] is (text == "1234")


def _score(reward, prompt: Prompt, text: str):
    (score,) = asyncio.run(reward.score([RewardSample("s", prompt, text=text)]))
    return score


def test_modes_and_places_have_versions_of_their_own() -> None:
    configs = [ExactAnswerConfig(mode=m, answer_in=a) for m in ("exact", "share", "repeated") for a in ("text", "tag")]
    assert len({ExactAnswerReward(config).version for config in configs}) == 6


@pytest.mark.parametrize("rule", ["clean", "d1"])
def test_rules_of_tagged_answers_read_bare_ones_when_told_to(rule) -> None:
    countdown = Prompt("c", "", {"numbers": [4, 6, 1], "target": 24})
    sudoku = Prompt("s", "", {"puzzle": "1200340021434321", "solution": "1234341221434321"})
    for prompt, text, config in (
        (countdown, "4*6*1", CountdownConfig(rule_version=rule)),
        (sudoku, "1234341221434321", SudokuConfig(rule_version=rule)),
    ):
        tagged, bare = make_reward(config), make_reward(config.model_copy(update={"answer_in": "text"}))
        assert tagged.version != bare.version
        assert dict(_score(tagged, prompt, text).details) == {"answer": None, "reason": "no_answer", "exact": False}
        found = _score(bare, prompt, text)
        assert (found.value, found.details["exact"], found.details["answer"]) == (1.0, True, text)
        assert _score(bare, prompt, "").details["reason"] == "no_answer"
