"""Held-out texts for reading: the file of a step, what is kept for later, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import math

import pytest

from services.text_samples import as_text, before_after_json, example, printable, shown_prompts, to_json
from tests.text_answers import answer_group


def test_a_step_reads_as_prompts_with_answers() -> None:
    groups = [
        answer_group(
            "3 1",
            ["1 3", "3 1", "no\nanswer"],
            rewards=[1.0, 0.25, None],
            exact=[True, False, False],
            calls=[1, 4, 12],
            metadata={"answer": "1 3"},
        ),
        answer_group("2", ["2"], rewards=[1.0], calls=[2]),
    ]
    text = as_text(60, shown_prompts(groups, 3), {"exact_answer": 0.5, "nfe": 4.25})
    assert text.split("\n") == [
        "Held-out answers at step 60",
        "===========================",
        "exact_answer 0.500  nfe 4.250",
        "",
        "[1]  sort 3 1",
        "                   wanted  | 1 3",
        "  +     1.000      1 call  | 1 3",
        "  -     0.250     4 calls  | 3 1",
        "  - no reward    12 calls  | no",
        "                           | answer",
        "",
        "[2]  sort 2",
        "  +     1.000     2 calls  | 2",
        "",
    ]


def test_an_answer_is_good_if_exact_or_else_rewarded_in_full() -> None:
    shaped = answer_group("a", ["x", "y"], rewards=[1.0, 0.5], exact=[False, True], calls=[1, 1])
    plain = answer_group("a", ["x", "y"], rewards=[1.0, 0.98], calls=[1, 1])
    for group, expected in ((shaped, [False, True]), (plain, [True, False])):
        assert [answer.good for answer in shown_prompts([group], 4)[0].answers] == expected


def test_only_so_many_answers_are_shown_with_their_budgets() -> None:
    group = answer_group("a", ["x"] * 3, rewards=[1.0] * 3, calls=[1, 2, 3], log_gamma=[math.log(0.5)] * 3)
    answers = shown_prompts([group], 2)[0].answers
    assert [answer.nfe for answer in answers] == [1, 2]
    assert answers[0].gamma == pytest.approx(0.5)


def test_before_and_after_are_matched_by_prompt() -> None:
    def shown(*ids: str, text: str) -> list:
        return shown_prompts([answer_group(one, [text], rewards=[0.0], calls=[3]) for one in ids], 4)

    first = json.loads(to_json(0, shown("a", "b", text="before")))
    data = json.loads(before_after_json(first, 60, shown("b", "c", text="after")))
    assert (data["before_step"], data["after_step"]) == (0, 60)
    (row,) = data["prompts"]
    assert (row["id"], row["prompt"]) == ("b", "sort b")
    assert [answer["text"] for answer in (*row["before"], *row["after"])] == ["before", "after"]


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[31mred\x07\r\x00\x9b b\n\tc") == "a�[31mred���� b\n\tc"
    assert printable("naïve 数独 🙂") == "naïve 数独 🙂"
    group = answer_group("\x1b]0;title\x07", ["\x1b[2J\ud800"], rewards=[0.0], calls=[1], metadata={"answer": "\x1b"})
    prompts = shown_prompts([group], 1)
    for written in (to_json(0, prompts).decode(), as_text(0, prompts, {}), example(prompts)):
        assert "\x1b" not in written
        written.encode()


def test_an_example_is_one_short_line() -> None:
    group = answer_group("a\nb", ["word " * 40], rewards=[0.0], calls=[1])
    assert example(shown_prompts([group], 1)).startswith("sort a b → word word")
    assert len(example(shown_prompts([group], 1))) < 130
    assert "\n" not in example(shown_prompts([answer_group("a", ["x" * 200], rewards=[0.0], calls=[1])], 1))
    assert example([]) == ""
