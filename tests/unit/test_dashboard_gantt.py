"""A step's pieces as rows: who comes when, what runs at once, what was for another step, when idle time is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.dashboard.gantt import (
    LABELS,
    MAX_TRACKS,
    Gantt,
    Piece,
    StepWork,
    as_json,
    gantt,
    idle_share,
    packed,
    read_work,
)

Told = tuple[str, str, float, float]


def step_work(*told: Told, step: int = 4, start_s: float = 100.0, seconds: float = 10.0) -> StepWork:
    return StepWork(step, start_s, seconds, tuple(Piece(*one, step) for one in told), 0)


def rows_of(found: Gantt) -> dict[str, list[list[tuple[str, float, float]]]]:
    return {
        row.label: [[(one.phase, one.start_s, one.seconds) for one in track] for track in row.tracks]
        for row in found.rows
    }


def test_a_row_for_each_actor_one_for_the_rewards_and_one_for_the_loop() -> None:
    own = step_work(
        ("loop", "rollout", 0.0, 6.0), ("loop", "train", 6.0, 4.0),
        ("b:9", "sample", 0.0, 3.0), ("b:10", "sample", 0.0, 4.0), ("b:10", "decode", 4.0, 1.0),
        ("a:11", "evaluate", 7.0, 2.0), ("rewards", "score", 3.0, 2.0), ("rewards", "score", 4.0, 2.0),
    )  # fmt: skip
    found = gantt(own, (), True, num_actors=5)
    assert [(row.label, row.who) for row in found.rows] == [
        ("Rollout actor 1", "a:11"),
        ("Rollout actor 2", "b:9"),
        ("Rollout actor 3", "b:10"),
        ("Rewards", "rewards"),
        ("Learner and loop", "loop"),
    ]
    rows = rows_of(found)
    assert rows["Rollout actor 3"] == [[("sample", 0.0, 4.0), ("decode", 4.0, 1.0)]]
    assert rows["Rewards"] == [[("score", 3.0, 2.0)], [("score", 4.0, 2.0)]]
    # Idle: 10 s less 2, 3 and 5; scoring went on from 3 to 6; the learner waited for 6.
    assert [row.idle for row in found.rows] == pytest.approx([0.8, 0.7, 0.5, 0.7, 0.6])
    assert (found.begin_s, found.whole, found.num_resting) == (0.0, True, 2)


def test_one_actor_has_no_number() -> None:
    assert list(rows_of(gantt(step_work(("a:1", "sample", 0.0, 1.0)), (), True, 1))) == ["Rollout actor"]


def test_what_was_drawn_before_the_step_begins_the_axis_and_nothing_else_does() -> None:
    own = step_work(("a:1", "sample", -3.0, 4.0), ("a:1", "pull", -1.0, 1.5), ("loop", "publish", -8.0, 8.5))
    found = gantt(own, (), True, 1)
    assert found.begin_s == -3.0
    assert rows_of(found) == {
        "Rollout actor": [[("sample", -3.0, 4.0)], [("pull", 0.0, 0.5)]],
        "Learner and loop": [[("publish", 0.0, 0.5)]],
    }
    # Of the step the actor was busy for one second, of which half a second twice.
    assert [row.idle for row in found.rows] == pytest.approx([0.9, 0.95])


def test_what_ran_for_later_steps_is_in_their_records() -> None:
    # Step 5 began 10 s after step 4, of which its first chunk was drawn from 6 to 9, and the next from 9 on.
    own = step_work(("a:1", "sample", -2.0, 3.0))
    later = step_work(
        ("a:1", "sample", -4.0, 3.0), ("a:1", "sample", -1.0, 3.0), ("loop", "rollout", -0.0004, 2.0),
        step=5, start_s=110.0,
    )  # fmt: skip
    (row,) = gantt(own, [later], True, 1).rows
    ((first, second, third),) = row.tracks
    assert (first.step, first.start_s, first.seconds) == (4, -2.0, 3.0)
    assert [(one.step, one.start_s, one.seconds) for one in (second, third)] == [(5, 6.0, 3.0), (5, 9.0, 1.0)]
    assert row.idle == pytest.approx(0.5)


def test_idle_time_is_not_told_where_a_record_is_missing_or_cut() -> None:
    own = step_work(("a:1", "sample", 0.0, 3.0))
    for found in (gantt(own, (), False, 3), gantt(replace(own, left_out=1), (), True, 3)):
        assert not found.whole
        assert [row.idle for row in found.rows] == [None]
        assert found.num_resting == 0


def test_a_hand_off_beside_training_has_a_track_of_its_own() -> None:
    own = step_work(
        ("loop", "publish", 0.0, 0.5), ("loop", "rollout", 0.0, 1.0), ("loop", "train", 1.0, 4.0),
        ("loop", "evaluate", 0.5, 3.0), ("loop", "publish", 6.0, 1.0),
    )  # fmt: skip
    assert rows_of(gantt(own, (), True, 1))["Learner and loop"] == [
        [("rollout", 0.0, 1.0), ("train", 1.0, 4.0)],
        [("publish", 0.0, 0.5), ("evaluate", 0.5, 3.0), ("publish", 6.0, 1.0)],
    ]
    in_turn = gantt(step_work(("loop", "train", 0.0, 4.0), ("loop", "pull", 4.0, 1.0)), (), True, 1)
    assert rows_of(in_turn) == {"Learner and loop": [[("train", 0.0, 4.0), ("pull", 4.0, 1.0)]]}


def pieces(*spans: tuple[float, float]) -> list[Piece]:
    return [Piece("a", "score", start, end - start, 1) for start, end in spans]


def spans(tracks: Sequence[Sequence[Piece]]) -> list[list[float]]:
    return [[one.start_s for one in track] for track in tracks]


def test_pieces_take_the_first_track_that_is_free() -> None:
    assert spans(packed(pieces((0, 2), (1, 3), (2, 5), (2.5, 3), (3, 4)))) == [[0, 2], [1, 3], [2.5]]
    assert spans(packed(pieces((0, 1.00005), (1, 2)))) == [[0, 1]], "rounding is no overlap"


def test_more_pieces_at_once_than_tracks_lie_over_those_that_end_first() -> None:
    many = pieces(*((place / 10, 10 - place) for place in range(MAX_TRACKS + 1)))
    tracks = packed(many)
    assert [len(track) for track in tracks] == [1, 1, 1, 1, 1, 2]
    assert sum(len(track) for track in packed(many * 3)) == 3 * len(many), "none is lost"


def test_idle_is_what_no_piece_covers() -> None:
    assert idle_share(pieces((0, 2), (1, 3), (2, 2.5), (8, 9)), 10.0) == pytest.approx(0.6)
    assert idle_share(pieces((-5, 2), (9, 99)), 10.0) == pytest.approx(0.7)
    assert idle_share([], 10.0) == 1.0
    assert idle_share(pieces((-1, 11)), 10.0) == 0.0
    assert idle_share([Piece("loop", "rollout", 0.0, 9.0, 1)], 10.0) == 1.0


def record(**changes: Any) -> bytes:
    line = {"start": 5.0, "seconds": 2.0, "work": [["a:1", "sample", 0.5, 1.0]], "left_out": 0}
    return json.dumps({"step": 3, "timeline": {**line, **changes}}).encode()


def test_a_record_gives_its_timeline_and_a_bad_one_none() -> None:
    assert read_work(record()) == StepWork(3, 5.0, 2.0, (Piece("a:1", "sample", 0.5, 1.0, 3),), 0)
    found = read_work(record(work=[["a", "<b>", 0, 1]]))
    assert found is not None
    assert found.pieces[0].phase == "other", "phases become names of styles"
    assert all(name.isalpha() for name in LABELS)
    for bad in (None, b"", b"[]", b'{"step": 3, "groups": []}', record(work=[["a", "sample"]]), record(seconds=0)):
        assert read_work(bad) is None
    assert read_work(record(seconds=float("nan"))) is None
    assert read_work(record(work=[["a", ["sample"], 0, 1]])) is None
    assert read_work(record(work=7)) is None


def test_rows_travel_as_lists() -> None:
    told = as_json(gantt(step_work(("a:1", "sample", -1.00004, 2.0)), (), True, 1))
    assert told["rows"] == [
        {"who": "a:1", "label": "Rollout actor", "idle": pytest.approx(0.9, abs=1e-4),
         "tracks": [[["sample", -1.0, 2.0, 4]]]}
    ]  # fmt: skip
    assert (told["begin"], told["seconds"], told["whole"]) == (pytest.approx(-1.0, abs=1e-3), 10.0, True)
    assert told["labels"]["sample"] == "generate"
