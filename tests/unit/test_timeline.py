"""When the pieces of a step ran, as its record tells it: what belongs to a step, what is left out, what is shared."""

from __future__ import annotations

from dataclasses import replace

from raylign.types import Prompt, Work
from rollout.prompts import GroupTask
from services.timeline import LOOP, MAX_WORK, REWARDS, as_evaluation, renamed, step_timeline, work_of
from tests.fakes import make_group

ONE, TWO = GroupTask(Prompt("1", "one"), 0, 0), GroupTask(Prompt("2", "two"), 0, 1)


def test_pieces_are_told_from_the_beginning_of_the_step() -> None:
    # The step went from 1000 to 1010. Its second chunk was drawn while the step before was trained.
    drawn = [
        Work("a:1", "sample", 1001.0, 3.0),
        Work("a:1", "decode", 1004.0, 0.5),
        Work("b:2", "sample", 998.5, 1.25),
        Work(REWARDS, "score", 1004.50004, 1.0),
    ]
    beside = [Work(LOOP, "rollout", 1000.0, 5.5), Work(LOOP, "train", 1005.5, 4.0)]
    assert step_timeline(drawn, beside, over_s=1010.0, step_s=10.0) == {
        "start": 1000.0,
        "seconds": 10.0,
        "work": [
            ["b:2", "sample", -1.5, 1.25],
            [LOOP, "rollout", 0.0, 5.5],
            ["a:1", "sample", 1.0, 3.0],
            ["a:1", "decode", 4.0, 0.5],
            [REWARDS, "score", 4.5, 1.0],
            [LOOP, "train", 5.5, 4.0],
        ],
        "left_out": 0,
    }


def test_what_was_over_before_the_step_is_no_part_of_it_unless_its_samples_come_from_it() -> None:
    # From 100 to 104: a hand-off that reaches into it stays; an evaluation and a publication before it do not.
    drawn = [Work("a:1", "sample", 98.0, 1.0), Work("a:1", "sample", 99.0, 2.0)]
    beside = [Work("a:1", "evaluate", 90.0, 4.0), Work(LOOP, "publish", 98.0, 1.5), Work(LOOP, "pull", 99.5, 1.0)]
    told = step_timeline(drawn, beside, over_s=104.0, step_s=4.0)["work"]
    assert told == [["a:1", "sample", -2.0, 1.0], ["a:1", "sample", -1.0, 2.0], [LOOP, "pull", -0.5, 1.0]]


def test_of_too_many_pieces_the_longest_stay() -> None:
    works = [Work("a:1", "sample", float(place), 2.0 if place % 2 else 1.0) for place in range(MAX_WORK + 4)]
    told = step_timeline(works, [Work(LOOP, "train", 5.0, 9.0)], over_s=3000.0, step_s=3000.0)
    assert (len(told["work"]), told["left_out"]) == (MAX_WORK, 5)
    assert [LOOP, "train", 5.0, 9.0] in told["work"]
    assert sum(seconds == 1.0 for *_, seconds in told["work"]) == (MAX_WORK + 4) // 2 - 5
    begun = [start for _, _, start, _ in told["work"]]
    assert begun == sorted(begun)


def test_a_step_without_any_work_is_still_a_step() -> None:
    assert step_timeline([], [], over_s=12.5, step_s=0.5) == {"start": 12.0, "seconds": 0.5, "work": [], "left_out": 0}


def test_groups_of_one_batch_tell_its_work_once() -> None:
    shared, own = Work("a:1", "sample", 1.0, 2.0), Work("b:2", "sample", 1.0, 2.0)
    groups = [make_group(ONE, [0], 0, work=(shared,)), make_group(TWO, [0], 0, work=(replace(shared), own))]
    assert work_of(groups) == (shared, own)


def test_rounds_and_evaluations_rename_what_they_are_made_of() -> None:
    works = (Work("a", "pull", 0.0, 1.0), Work("a", "sample", 1.0, 1.0), Work("a", "decode", 2.0, 1.0))
    assert [work.phase for work in renamed(works, "draft")] == ["pull", "draft", "draft"]
    assert [(work.phase, work.start_s) for work in as_evaluation(works)] == [
        ("evaluate", 0.0),
        ("evaluate", 1.0),
        ("evaluate", 2.0),
    ]
