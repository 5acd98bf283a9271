"""The text tasks: keyed, disjoint, with labels that are what they say and answers that the rewards accept."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest

from raylign.models.tiny_text import make_tokenizer
from raylign.pretrain import text_tasks
from raylign.pretrain.text_tasks import (
    PROMPT_WORDS,
    SYMBOLS,
    TEXT_TASKS,
    Example,
    distinct_examples,
    examples,
    is_right,
    sudoku_solutions,
)
from raylign.types import Prompt, RewardSample
from rewards import make_reward
from rewards.countdown import CountdownConfig
from rewards.exact_answer import ExactAnswerConfig
from rewards.sudoku import SudokuConfig

REWARDS = {
    "sortmix": [ExactAnswerConfig()],
    "sort": [ExactAnswerConfig(), ExactAnswerConfig(mode="share")],
    "countdown": [CountdownConfig(answer_in="text"), CountdownConfig(rule_version="d1", answer_in="text")],
    "countdown4": [CountdownConfig(answer_in="text"), CountdownConfig(rule_version="d1", answer_in="text")],
    "sudoku": [SudokuConfig(answer_in="text"), SudokuConfig(rule_version="d1", answer_in="text")],
    "addition": [ExactAnswerConfig()],
}


def _take(task: str, count: int, *seed: int, split: text_tasks.Split = "train") -> list[Example]:
    return list(islice(examples(task, split, *seed), count))


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_a_stream_is_named_by_its_seed(task: str) -> None:
    assert _take(task, 20, 1) == _take(task, 20, 1)
    assert _take(task, 20, 1) != _take(task, 20, 2)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_splits_share_neither_prompt_nor_key(task: str) -> None:
    train, heldout = (distinct_examples(task, split, 250, 3) for split in ("train", "heldout"))
    assert heldout
    assert {one.prompt for one in train}.isdisjoint(one.prompt for one in heldout)
    assert {one.key for one in train}.isdisjoint(one.key for one in heldout)
    assert len({one.prompt for one in train}) == len(train)


def test_sorts_share_no_digits_and_sudokus_no_solution_across_splits() -> None:
    for task in ("sort", "sortmix", "sudoku"):
        train, heldout = (distinct_examples(task, split, 300, 0) for split in ("train", "heldout"))
        answers = {str(one.metadata["answer"]) for one in train}
        assert answers.isdisjoint(str(one.metadata["answer"]) for one in heldout)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_labels_and_prompts_are_spelt_in_the_vocabulary(task: str) -> None:
    tokenizer = make_tokenizer(PROMPT_WORDS, SYMBOLS)
    for one in _take(task, 50):
        prompt = tokenizer(one.prompt)["input_ids"]
        assert tokenizer.unk_token_id not in prompt
        assert tokenizer.decode(prompt) == one.prompt.replace(" ", "")
        label = tokenizer(one.label)["input_ids"]
        assert tokenizer.decode(label) == one.label
        assert len(label) <= TEXT_TASKS[task].max_label


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_the_answer_is_right_by_the_rewards_and_another_is_not(task: str) -> None:
    instances = _take(task, 30)
    wrong = [instances[-1], *instances[:-1]]  # everybody gets a neighbour's answer
    for config in REWARDS[task]:
        reward = make_reward(config)
        for answers in (instances, wrong):
            samples = [
                RewardSample(one.prompt, Prompt(one.key, one.prompt, one.metadata), text=str(other.metadata["answer"]))
                for one, other in zip(instances, answers, strict=True)
            ]
            scores = asyncio.run(reward.score(samples))
            exact = [
                is_right(one, str(other.metadata["answer"])) for one, other in zip(instances, answers, strict=True)
            ]
            assert [score.details["exact"] for score in scores] == exact
            assert all(exact) == (answers is instances)


@pytest.mark.parametrize("task", ["sort", "sortmix"])
def test_sort_labels_have_two_habits(task: str) -> None:
    instances = _take(task, 1000)
    for one in instances:
        digits = one.prompt.split()[1:]
        assert one.metadata["answer"] == "".join(sorted(digits))
        assert one.label in ("".join(sorted(digits)), "".join(sorted(digits, reverse=True)))
    lopsided = [one for one in instances if one.label != one.label[::-1]]
    share = sum(one.label == one.metadata["answer"] for one in lopsided) / len(lopsided)
    assert share == pytest.approx(text_tasks.ASCENDING_SHARE, abs=0.06)
    lengths = {len(one.label) for one in instances}
    assert lengths == ({6} if task == "sortmix" else {3, 4, 5, 6, 7, 8})


def test_addition_is_taught_with_three_wrong_labels_in_ten() -> None:
    instances = _take("addition", 1000)
    for one in instances:
        a, b = one.prompt.split()[0], one.prompt.split()[2]
        assert one.metadata["answer"] == str((int(a) + int(b)) % 11)
        assert 0 <= int(one.label) < 11
    wrong = sum(one.label != one.metadata["answer"] for one in instances) / len(instances)
    assert wrong == pytest.approx(0.3, abs=0.06)


def test_countdown_offers_its_numbers_in_another_order_and_a_target_of_two_digits() -> None:
    instances = _take("countdown4", 200)
    assert {len(one.metadata["numbers"]) for one in instances} == {3, 4}  # type: ignore[arg-type]
    for one in instances:
        assert eval(one.label) == one.metadata["target"]  # noqa: S307  # digits and + - * alone
        assert 10 <= int(str(one.metadata["target"])) <= 99
    assert any(one.label[::2] != "".join(map(str, one.metadata["numbers"])) for one in instances)  # type: ignore[arg-type]


@pytest.mark.parametrize("response", ["", "4*6*", "4*6*1*1", "46*1", "4*6+1", "(4*6)*1", "1*6*4 "])
def test_what_is_no_right_expression(response: str) -> None:
    task = Example("k", "make 24 of 4 6 1", "4*6*1", {"answer": "4*6*1", "numbers": [4, 6, 1], "target": 24})
    assert not is_right(task, response)
    assert is_right(task, "1*6*4")
    assert is_right(Example("k", "", "", {"numbers": [2, 3, 4], "target": 14}), "2+3*4")


def test_a_sudoku_has_one_solution_and_288_grids_exist() -> None:
    solutions = ["".join(map(str, row)) for row in sudoku_solutions().tolist()]
    assert len(set(solutions)) == 288
    for one in _take("sudoku", 50):
        puzzle = str(one.metadata["puzzle"])
        fitting = [s for s in solutions if all(p in ("0", c) for p, c in zip(puzzle, s, strict=True))]
        assert fitting == [one.metadata["solution"]]
        assert 4 <= puzzle.count("0") <= 8
