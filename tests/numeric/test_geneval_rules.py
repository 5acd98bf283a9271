"""GenEval's rules against numbers worked out by hand, and what must hold for every picture and every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.scenes.rules import (
    Box,
    Detection,
    clean,
    flow_grpo,
    geneval_accuracy,
    official,
    overlap,
    relations,
    select,
    threshold_of,
)
from rewards.scenes.task import RELATIONS, TAGS, Clause, Exclusion, Task

A: Box = (0, 0, 100, 100)
B: Box = (300, 0, 400, 100)
CAT_LEFT_OF_DOG = Task("position", (Clause("dog"), Clause("cat", relation="left of", target=0)))
TWO_CATS = Task("counting", (Clause("cat", 2),), (Exclusion("cat", 3),))
CAT_AND_DOG_IN_COLOUR = Task("color_attr", (Clause("cat", colour="red"), Clause("dog", colour="blue")))


def see(*seen: tuple[str, Box]) -> dict[str, list[Detection]]:
    """What was found, best first in the order given."""
    return select([Detection(name, 1 - i / 1000, box) for i, (name, box) in enumerate(seen)], 0.3)


def no_colours(detections: Sequence[Detection]) -> list[str]:
    raise AssertionError("no colour matters here")


def by_class(**colours: str):
    return lambda detections: [colours[detection.name] for detection in detections]


# The published reward. Terms are named in order; each value is their mean.
@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ((("cat", A), ("dog", B)), 1.0),  # dog count 1, cat count 1, position always 1: 3/3
        ((("cat", B), ("dog", A)), 0.75),  # 1, 1, position 0, and always 1: 3/4
        ((("cat", A),), 1 / 3),  # dog count 0, cat count 1, no target 0: 1/3
        ((("dog", B),), 1 / 3),  # dog count 1, cat count 0, and 0 for its position: 1/3
        ((), 0.0),  # 0, 0, 0
        ((("cat", A), ("cat", A), ("dog", B)), 1 / 3),  # dog 1, cats 1 - |1 - 2| / 1 = 0, and 0: 1/3
    ],
)
def test_flow_grpo_position(seen: tuple[tuple[str, Box], ...], expected: float) -> None:
    assert flow_grpo(CAT_LEFT_OF_DOG, see(*seen), no_colours).value == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("found", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (5, -0.5)])
def test_flow_grpo_counting(found: int, expected: float) -> None:
    # 1 - |2 - found| / 2; the exclude clause is not looked at.
    assert flow_grpo(TWO_CATS, see(*[("cat", A)] * found), no_colours).value == expected


@pytest.mark.parametrize(("found", "expected", "right"), [(0, 0.0, 0), (1, 1.0, 1), (2, 0.0, 1), (16, -14.0, 1)])
def test_flow_grpo_punishes_what_the_benchmark_calls_right(found: int, expected: float, right: int) -> None:
    # 1 - |1 - found| / 1, against "at least one".
    task = Task("single_object", (Clause("cat"),))
    seen = see(*[("cat", A)] * found)
    assert flow_grpo(task, seen, no_colours).value == expected
    assert official(task, seen, no_colours).value == right


def test_flow_grpo_colour() -> None:
    both = see(("cat", A), ("dog", B))
    # 1, 1, 1, and 0 for the dog's colour: 3/4
    assert flow_grpo(CAT_AND_DOG_IN_COLOUR, both, by_class(cat="red", dog="green")).value == 0.75
    # cat 1, its colour 1, dog 0, and 0 for its colour: 2/4
    assert flow_grpo(CAT_AND_DOG_IN_COLOUR, see(("cat", A)), by_class(cat="red")).value == 0.5
    assert flow_grpo(CAT_AND_DOG_IN_COLOUR, both, by_class(cat="red", dog="blue")).perfect


def test_flow_grpo_colour_and_position_of_one_clause() -> None:
    task = Task("position", (Clause("dog"), Clause("cat", 1, "red", "left of", 0)))
    seen = see(("cat", A), ("dog", B))
    # dog 1, cat 1, colour 0, and the position is not asked: 2/3
    assert flow_grpo(task, seen, by_class(cat="blue")).value == pytest.approx(2 / 3)
    # dog 1, cat 0, and one 0 for colour and position together: 1/3
    assert flow_grpo(task, see(("dog", B)), by_class()).value == pytest.approx(1 / 3)
    # the clean rule always has four terms: dog 1, cat 1, colour 0, position 0
    assert clean(task, seen, by_class(cat="blue")).value == 0.5


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ((("cat", A), ("dog", B)), 1.0),
        ((("cat", B), ("dog", A)), 2 / 3),  # dog 1, cat 1, position 0
        ((("cat", A),), 1 / 3),
        ((("cat", A), ("cat", A), ("cat", A), ("dog", B)), 1 / 3),  # cats max(0, 1 - 2) = 0, position 0, dog 1
    ],
)
def test_clean_position(seen: tuple[tuple[str, Box], ...], expected: float) -> None:
    assert clean(CAT_LEFT_OF_DOG, see(*seen), no_colours).value == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("found", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (5, 0.0)])
def test_clean_counting_stops_at_nothing(found: int, expected: float) -> None:
    assert clean(TWO_CATS, see(*[("cat", A)] * found), no_colours).value == expected


def test_an_exclusion_that_no_clause_implies_is_a_term_of_the_clean_rule_only() -> None:
    task = Task("single_object", (Clause("cat"),), (Exclusion("dog", 1),))
    seen = see(("cat", A), ("dog", B))
    assert clean(task, seen, no_colours).value == 0.5  # cat 1, a dog too many 0
    assert clean(task, see(("cat", A)), no_colours).value == 1.0
    assert flow_grpo(task, seen, no_colours).perfect
    assert not official(task, seen, no_colours).perfect


@pytest.mark.parametrize(
    ("sure", "unsure", "right", "strict"),
    [("red", "blue", True, False), ("blue", "red", False, False), ("red", "red", True, False)],
)
def test_the_benchmark_looks_at_the_surest_objects_only(sure: str, unsure: str, right: bool, strict: bool) -> None:
    task = Task("colors", (Clause("cat", colour="red"),))
    seen = [Detection("cat", 0.8, B), Detection("cat", 0.9, A)]
    colours = {0.8: unsure, 0.9: sure}
    found = select(seen, 0.3)
    assert official(task, found, lambda ones: [colours[one.score] for one in ones]).perfect == right
    assert clean(task, found, lambda ones: [colours[one.score] for one in ones]).perfect == strict
    two = replace(task, include=(Clause("cat", 2, "red"),))
    assert official(two, found, lambda ones: [colours[one.score] for one in ones]).perfect == (sure == unsure == "red")


def test_every_pair_must_stand_in_the_relation() -> None:
    task = Task("position", (Clause("dog"), Clause("cat", 2, relation="left of", target=0)))
    beyond: Box = (600, 0, 700, 100)
    assert clean(task, see(("cat", A), ("cat", A), ("dog", B)), no_colours).perfect
    mixed = see(("cat", A), ("cat", beyond), ("dog", B))
    assert clean(task, mixed, no_colours).value == pytest.approx(2 / 3)
    assert flow_grpo(task, mixed, no_colours).value == 0.75  # one 0 for the first bad pair, and the 1
    assert not official(task, mixed, no_colours).perfect


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (B, {"right of"}),  # d = 300, d' = 300 - 0.1 * 200 = 280, 280/300 = 0.93
        ((-300, 0, -200, 100), {"left of"}),
        ((0, 300, 100, 400), {"below"}),
        ((0, -300, 100, -200), {"above"}),
        ((300, 300, 400, 400), {"right of", "below"}),  # 280 / 424 = 0.66 each way
        ((300, 200, 400, 300), {"right of"}),  # 280/361 = 0.78; (200 - 20)/361 = 0.499
        ((300, 201, 400, 301), {"right of", "below"}),  # (201 - 20)/361.1 = 0.5013
        ((20, 20, 120, 120), set()),  # 20 - 20 = 0 each way
        ((40, 0, 140, 100), set()),  # (40 - 20)/40 = 0.5, which is not more than half
        ((41, 0, 141, 100), {"right of"}),  # (41 - 20)/41 = 0.512
        (A, set()),
    ],
)
def test_relations_to_the_square_at_the_origin(box: Box, expected: set[str]) -> None:
    assert relations(box, A) == expected


def test_overlap_counts_the_last_pixels() -> None:
    # 11 x 11 pixels each; shared columns 5 to 10: 6 x 11. 66 / (121 + 121 - 66)
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(66 / 176)
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert overlap((0, 0, 10, 10), (12, 0, 15, 10)) == 0.0


def test_which_detections_count() -> None:
    seen = [Detection("cat", 0.3, A), Detection("cat", 0.31, A), Detection("cat", 0.9, A), Detection("dog", 0.1, B)]
    assert [one.score for one in select(seen, threshold_of("position"))["cat"]] == [0.9, 0.31]
    assert select(seen, threshold_of("counting")) == {}
    many = [Detection("cat", 0.4 + i / 100, A) for i in range(20)]
    assert [one.score for one in select(many, 0.3)["cat"]] == sorted((one.score for one in many), reverse=True)[:16]
    assert len(select(many, 0.3, max_overlap=0.99)["cat"]) == 1


def test_accuracy_is_the_mean_over_tags_not_over_pictures() -> None:
    results = [{"tag": "counting", "official": True, "strict": False}] * 3
    results += [{"tag": "position", "official": right, "strict": right} for right in (True, False)]
    accuracy = geneval_accuracy(results)
    assert accuracy["official"].by_tag == {"counting": 1.0, "position": 0.5}
    assert accuracy["official"].overall == 0.75
    assert accuracy["strict"].overall == 0.25
    assert accuracy["strict"].num_by_tag == {"counting": 3, "position": 2}
    with pytest.raises(ValueError, match="no results"):
        geneval_accuracy([])
    with pytest.raises(ValueError, match="no tag 'colour'"):
        geneval_accuracy([{"tag": "colour", "official": True, "strict": True}])


NAMES = ("cat", "dog", "tv")
coordinates = st.integers(0, 12).map(lambda step: step * 25)
boxes = st.tuples(coordinates, coordinates, st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: (box[0], box[1], box[0] + 25 * box[2], box[1] + 25 * box[3])
)
pictures = st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0, 1), boxes), max_size=8)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    clauses: list[Clause] = []
    for i, name in enumerate(draw(st.permutations(NAMES))[: draw(st.integers(1, 3))]):
        relation = draw(st.sampled_from((None, *RELATIONS))) if i else None
        colour = draw(st.sampled_from((None, "red", "blue")))
        clauses.append(Clause(name, draw(st.integers(1, 3)), colour, relation, draw(st.integers(0, max(i - 1, 0)))))
    exclude = st.builds(Exclusion, st.sampled_from(NAMES), st.integers(1, 4))
    return Task(draw(st.sampled_from(TAGS)), tuple(clauses), tuple(draw(st.lists(exclude, max_size=1))))


def by_place(detections: Sequence[Detection]) -> list[str]:
    return ["red" if detection.box[0] % 50 else "blue" for detection in detections]


@given(tasks(), pictures, st.randoms(use_true_random=False))
def test_what_holds_for_every_picture(task: Task, picture: list[tuple[str, float, Box]], random) -> None:
    seen = [Detection(*one) for one in picture]
    found = select(seen, 0.3)
    verdict = clean(task, found, by_place)
    assert 0.0 <= verdict.value <= 1.0
    assert all(0.0 <= term.value <= 1.0 for term in verdict.terms)
    assert verdict.perfect == (verdict.value == 1.0) == (not verdict.reasons)
    published = flow_grpo(task, found, by_place)
    assert -14.0 <= published.value <= 1.0
    forbidden = any(len(found.get(exclusion.name, ())) >= exclusion.count for exclusion in task.exclude)
    assert verdict.perfect == (published.perfect and not forbidden)
    # What is strictly right is right, if the surest objects are all the objects.
    assert official(task, found, by_place).perfect or not verdict.perfect

    random.shuffle(seen)
    again = select(seen, 0.3)
    for rule in (clean, flow_grpo, official):
        assert rule(task, again, by_place) == rule(task, found, by_place)


@given(tasks(), pictures, pictures)
def test_a_task_always_has_the_same_clean_terms(
    task: Task, one: list[tuple[str, float, Box]], other: list[tuple[str, float, Box]]
) -> None:
    kinds = [
        [(term.name, term.aspect) for term in clean(task, select([Detection(*o) for o in seen], 0.3), by_place).terms]
        for seen in (one, other)
    ]
    assert kinds[0] == kinds[1]


@given(boxes, boxes)
def test_relations_mirror(box_a: Box, box_b: Box) -> None:
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(box_a, box_b) == {mirror[relation] for relation in relations(box_b, box_a)}
