"""The dashboard's pure parts: curves of thousands of steps, alerts, and where a step's time went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.dashboard.alerts import Alert, Facts, alerts
from services.dashboard.columns import Columns, MetricsTail, sampled_rows
from services.dashboard.series import curve
from services.dashboard.timing import ages, lanes, slowest

FACTS = Facts(groups_per_step=4, group_size=8, parity_tolerance=1e-3)


def columns(**metrics: Sequence[float | None]) -> Columns:
    """Steps 1, 2, … with these metrics; `reward__mean` stands for `reward/mean`."""
    count = max(len(values) for values in metrics.values())
    rows: list[dict[str, Any]] = [{"step": step + 1} for step in range(count)]
    for name, values in metrics.items():
        for row, value in zip(rows, values, strict=False):
            if value is not None:
                row[name.replace("__", "/")] = value
    return Columns.of(rows)


def kinds(found: Columns, facts: Facts = FACTS) -> list[str]:
    return [alert.kind for alert in alerts(found, facts)]


def found_alert(found: Columns) -> Alert:
    (alert,) = alerts(found, FACTS)
    return alert


def test_few_points_are_kept_as_they_are() -> None:
    found = curve(columns(loss=[1.0, None, 3.0]), "loss", 10)
    assert (found.x, found.y, found.band) == ([1, 3], [1.0, 3.0], "")


def test_buckets_are_means_with_the_range_of_what_they_stand_for() -> None:
    found = curve(columns(loss=[1.0, 3.0, 2.0, 10.0]), "loss", 2)
    assert (found.x, found.y) == ([1.5, 3.5], [2.0, 6.0])
    assert (found.low, found.high, found.band) == ([1.0, 2.0], [3.0, 10.0], "range")


def test_intervals_of_a_bucket_add_in_squares() -> None:
    found = curve(columns(loss=[1.0, 3.0, 2.0, 4.0], ci95__loss=[0.3, 0.4, 0.0, 0.0]), "loss", 2)
    # Half-widths 0.3 and 0.4 of independent means: sqrt(0.09 + 0.16) / 2 = 0.25 of their mean.
    assert found.low == pytest.approx([1.75, 3.0])
    assert found.high == pytest.approx([2.25, 3.0])
    assert found.band == "ci95"


def test_ten_thousand_steps_become_hundreds_without_losing_a_spike() -> None:
    values = [0.0] * 10_000
    values[7_777] = 5.0
    found = curve(columns(loss=values), "loss", 400)
    assert len(found.x) == 400
    assert max(value for value in found.high if value is not None) == 5.0


def test_a_metric_that_is_not_there_is_an_empty_curve() -> None:
    assert curve(columns(loss=[1.0]), "none", 10).json() == {"x": [], "y": [], "low": [], "high": [], "band": ""}


def test_hacking_is_suspected_when_training_rises_and_held_out_falls() -> None:
    training = [0.1 * step for step in range(12)]
    held_out = [None, 0.5, None, None, None, 0.6, None, None, None, None, None, 0.4]
    alert = found_alert(columns(reward__mean=training, eval__ocr=held_out))
    assert (alert.kind, alert.level, alert.step) == ("hacking", "bad", 12)
    assert "fell from 0.600 at step 6 to 0.400" in alert.text


def test_hacking_is_not_suspected_within_the_interval_or_when_both_fall() -> None:
    training = [0.1 * step for step in range(12)]
    held_out = [None, 0.5, None, None, None, 0.6, None, None, None, None, None, 0.4]
    widths = [None if value is None else 0.3 for value in held_out]
    assert kinds(columns(reward__mean=training, eval__ocr=held_out, ci95__eval__ocr=widths)) == []
    assert kinds(columns(reward__mean=training[::-1], eval__ocr=held_out)) == []
    assert kinds(columns(reward__mean=training, eval__ocr=[0.5, 0.4])) == []
    assert kinds(columns(reward__mean=training, eval__sharpness=held_out)) == [], "neither way is better"


def test_collapsing_diversity_is_told_against_its_start() -> None:
    assert kinds(columns(eval__diversity=[0.2, 0.15, 0.11])) == []
    assert found_alert(columns(eval__diversity=[0.2, 0.15, 0.09])).level == "warn"
    assert found_alert(columns(eval__diversity=[0.2, 0.15, 0.04])).level == "bad"


def test_groups_without_a_signal_are_a_share_of_the_groups() -> None:
    assert kinds(columns(reward__zero_variance_groups=[1.0] * 12)) == []
    assert found_alert(columns(reward__zero_variance_groups=[2.0] * 12)).level == "warn"
    assert found_alert(columns(reward__zero_variance_groups=[0.0] * 50 + [4.0] * 10)).level == "bad"


def test_clipping_and_parity_have_their_bounds() -> None:
    assert kinds(columns(ratio__clip_fraction=[0.29] * 3)) == []
    assert found_alert(columns(ratio__clip_fraction=[0.4] * 3)).kind == "clip"
    assert kinds(columns(parity__gap=[4e-4])) == []
    assert found_alert(columns(parity__gap=[6e-4])).level == "warn"
    assert found_alert(columns(parity__gap=[2e-3])).level == "bad"


def test_failures_are_a_share_of_the_samples() -> None:
    assert kinds(columns(failed__reward_failed=[0.0] * 9 + [6.0])) == []
    assert found_alert(columns(failed__reward_failed=[0.0] * 9 + [7.0])).kind == "failures"
    assert found_alert(columns(failed__refused_updates=[0.0, 1.0])).kind == "refused"
    assert found_alert(columns(failed__async_kl=[0.0, 1.0], staleness__limit=[2.0, 0.0])).kind == "async"


def test_the_guard_says_what_it_did() -> None:
    assert kinds(columns(guard__tripped=[1.0, 0.0])) == []
    alert = found_alert(columns(guard__tripped=[0.0, 2.0], guard__did_lower_lr=[None, 1.0], guard__did_stop=[0.0, 0.0]))
    assert alert.text == "2 of its signals are out of bounds. It did: lower lr."


def test_the_worst_comes_first() -> None:
    found = columns(eval__diversity=[0.2, 0.09], ratio__clip_fraction=[0.9, 0.9])
    assert kinds(found) == ["clip", "diversity"]


def test_lanes_share_what_a_role_could_have_done() -> None:
    row = {
        "time/step_s": 10.0, "time/rollout_s": 4.0, "time/train_s": 5.0, "time/pull_s": 1.0,
        "busy/sample_s": 8.0, "busy/decode_s": 2.0, "busy/reward_s": 5.0,
    }  # fmt: skip
    actors, rewards, learner = lanes(row, 2)
    # Two actors had 20 s: 8 drawing, 2 decoding, 2 x 1 pulling, 8 idle.
    assert [(part.phase, part.share) for part in actors.parts] == [
        ("sample", pytest.approx(0.4)),
        ("decode", pytest.approx(0.1)),
        ("pull", pytest.approx(0.1)),
        ("idle", pytest.approx(0.4)),
    ]
    assert rewards.parts[0].share == pytest.approx(0.5)
    assert [(part.phase, part.seconds) for part in learner.parts] == [("rollout", 4.0), ("train", 5.0), ("pull", 1.0)]
    assert lanes({"eval/ocr": 1.0}, 2) == []


def test_work_of_overlapping_steps_fills_a_lane_and_no_more() -> None:
    (actors, *_) = lanes({"time/step_s": 1.0, "busy/sample_s": 4.0}, 2)
    assert [(part.phase, part.share) for part in actors.parts] == [("sample", 1.0)]


def test_drafts_have_stages_of_their_own() -> None:
    row = {"time/step_s": 10.0, "busy/sample_s": 9.0, "busy/draft_s": 3.0, "busy/regenerate_s": 6.0}
    assert [part.phase for part in lanes(row, 1)[0].parts] == ["draft", "regenerate", "idle"]


def test_the_slowest_phase_is_over_several_steps() -> None:
    rows = [{"time/step_s": 4.0, "time/train_s": 1.0, "time/rollout_s": 3.0}, {"time/step_s": 6.0, "time/train_s": 6.0}]
    assert [(one["phase"], one["share"]) for one in slowest(rows)] == [("train", 0.7), ("rollout", 0.3)]
    assert slowest([]) == []


def test_ages_are_in_order() -> None:
    row = {"samples/age_5_up": 1.0, "samples/age_0": 3.0, "samples/age_2": 2.0}
    assert [(one["age"], one["samples"]) for one in ages(row)] == [("0", 3.0), ("2", 2.0), ("5+", 1.0)]


def test_a_row_of_another_step_in_place_of_the_last_means_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step}) + "\n" for step in range(1, 6)))
    tail = MetricsTail(path)
    before = tail.refresh()
    with path.open("r+") as file:  # the same file, cut to two lines and grown again
        lines = file.readlines()
        file.truncate(len("".join(lines[:2])))
        file.seek(0, 2)
        file.write("".join(json.dumps({"step": step, "loss": -step}) + "\n" for step in range(3, 9)))
    assert list(tail.refresh().column("loss")) == [1, 2, -3, -4, -5, -6, -7, -8]
    assert list(before.steps) == [1, 2, 3, 4, 5], "what a thread holds does not change under it"
    assert tail.generation == 1


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\nnonsense\n[1]\n{"step": "2"}\n{"step": 3, "loss": null}\n{"step": 4, "lo')
    found = MetricsTail(path).refresh()
    assert list(found.steps) == [1, 3]
    assert found.points("loss") == [(1, 1.0)]
    assert found.row(3) == {}
    assert found.row(2) is None
    assert list(MetricsTail(tmp_path / "none").refresh().steps) == []


def test_a_long_file_is_sampled_from_its_start_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    pad = "x" * 300
    path.write_text("".join(json.dumps({"step": step, "pad": pad}) + "\n" for step in range(1, 5001)))
    steps = [row["step"] for row in sampled_rows(path, 20)]
    assert steps[0] == 1
    assert steps[-1] == 5000
    assert steps == sorted(set(steps))
    assert len(steps) < 700
    assert sampled_rows(tmp_path / "none", 20) == []
