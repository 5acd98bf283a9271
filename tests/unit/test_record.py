"""The record of groups: what is written, what is thinned, what a resumed run drops, and how failures get out."""

from __future__ import annotations

import errno
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.algorithms.nft import NftConfig
from raylign.config import parse_config
from raylign.errors import ConfigError
from raylign.types import (
    Exploration,
    LatentTrajectory,
    Prompt,
    RewardBreakdown,
    RewardFailure,
    RewardScore,
    RolloutGroup,
    Work,
)
from rollout.prompts import GroupTask
from services.confidence import half_width, interval_metrics
from services.config import RunConfig
from services.group_rows import MAX_TEXT, encode_picture, failure_rows, pack_groups, plain, short
from services.record import GroupRecorder, RecordConfig, shown_part, thinned
from services.record_files import (
    FAILURES_FILE,
    RecordedStep,
    as_ranges,
    picture_type,
    read_failures,
    read_picture,
    read_record,
    recorded_steps,
)
from tests.fakes import make_group
from tests.text_answers import answer_group


def scored(totals: Sequence[float | None], prompt: str = "a kite", version: int = 3, size: int = 4) -> RolloutGroup:
    """A group of grey pictures with these rewards; None failed with a timeout."""
    group = make_group(GroupTask(Prompt("p0", prompt), 2, 5), range(len(totals)), version)
    images = np.full((len(totals), size, size, 3), 90, np.uint8)
    return replace(group, images_GHWC=images).with_rewards([_breakdown(total) for total in totals])


def _breakdown(total: float | None) -> RewardBreakdown:
    if total is None:
        error = RewardFailure("timeout", "no answer in 5 s")
        return RewardBreakdown(None, (RewardScore("judge", None, error),), weights=(1.0,))
    score = RewardScore("judge", total, details={"reasoning": "it flies", "ok": True}, seconds=0.5)
    return RewardBreakdown(total, (score,), weights=(1.0,))


def recorder(run: Path, resumed: int | None = None, **keys: Any) -> GroupRecorder:
    return GroupRecorder(RecordConfig(**keys), NftConfig(), run, resumed)


def test_a_step_is_recorded_with_everything_a_person_asks_for(tmp_path: Path) -> None:
    recording = recorder(tmp_path)
    recording.take("train", 5, [scored([0.0, 1.0])])
    recording.close()
    record = json.loads(read_record(tmp_path, "train", 5) or b"")
    (group,) = record["groups"]
    assert (record["step"], record["num_groups"], group["prompt"]["text"], group["visit"]) == (5, 1, "a kite", 2)
    first, second = group["samples"]
    assert first["key"] == [0, "p0", 2, 0]
    assert (first["versions"], first["age"]) == ([3, 3], 1)
    assert first["scores"] == [
        {
            "name": "judge",
            "value": 0.0,
            "seconds": 0.5,
            "weight": 1.0,
            "details": {"reasoning": "it flies", "ok": True},
            "version": "",
            "cache": "bypass",
        }
    ]
    # Two rewards 0 and 1: mean 1/2, deviation 1/2, so ±0.5 / (0.5 + 1e-4).
    assert [sample["advantage"] for sample in (first, second)] == pytest.approx([-0.5 / 0.5001, 0.5 / 0.5001])
    offset, length, width, height = second["picture"]
    assert (width, height) == (4, 4)
    data = read_picture(tmp_path, "train", 5, offset, length)
    assert data is not None
    assert picture_type(data) == "image/webp"


def test_a_failed_sample_has_no_number_and_a_line_of_its_own(tmp_path: Path) -> None:
    recording = recorder(tmp_path)
    recording.take("train", 1, [scored([0.0, None, 1.0])])
    recording.close()
    sample = json.loads(read_record(tmp_path, "train", 1) or b"")["groups"][0]["samples"][1]
    assert (sample["total"], sample["advantage"], sample["status"]) == (None, None, "reward_failed")
    assert sample["failure"] == {"kind": "timeout", "reward": "judge", "message": "no answer in 5 s"}
    (line,) = read_failures(tmp_path, 10)
    assert (line["step"], line["record"], line["kind"], line["sample"], line["prompt"]) == (
        1, "train", "timeout", 1, "a kite",
    )  # fmt: skip


def test_held_out_groups_have_neither_credit_nor_age(tmp_path: Path) -> None:
    recording = recorder(tmp_path, every_steps=7)
    recording.take("eval", 4, [scored([0.5, 1.0])])
    recording.close()
    sample = json.loads(read_record(tmp_path, "eval", 4) or b"")["groups"][0]["samples"][0]
    assert (sample["advantage"], sample["age"], sample["total"]) == (None, None, 0.5)


def test_only_every_so_many_steps_are_recorded_but_every_failure_is(tmp_path: Path) -> None:
    recording = recorder(tmp_path, every_steps=2, max_groups=1)
    for step in range(1, 5):
        recording.take("train", step, [scored([0.0, None if step == 3 else 1.0]), scored([1.0, 1.0])])
    recording.close()
    assert recorded_steps(tmp_path, "train") == [2, 4]
    assert [line["step"] for line in read_failures(tmp_path, 10)] == [3]
    record = json.loads(read_record(tmp_path, "train", 4) or b"")
    assert (len(record["groups"]), record["num_groups"]) == (1, 2)


def timelines(run: Path) -> dict[int, Any]:
    steps = recorded_steps(run, "train")
    return {step: json.loads(read_record(run, "train", step) or b"").get("timeline") for step in steps}


def test_a_step_tells_when_its_work_was_done(tmp_path: Path) -> None:
    now_s = 1003.0
    recording = GroupRecorder(RecordConfig(every_steps=2), NftConfig(), tmp_path, None, lambda: now_s)
    drawn = (Work("a:1", "sample", 1000.5, 2.0), Work("a:1", "decode", 1002.5, 0.25))
    recording.phase("rollout", 3.0)
    now_s = 1009.0
    recording.phase("train", 6.0)
    recording.pulled("rollout", [Work("a:1", "pull", 1009.0, 0.5)])
    recording.pulled("eval", [Work("a:1", "pull", 1003.5, 0.25)])
    # Held-out groups are drawn and scored while the step is trained; two groups of one chunk share its work.
    recording.take("eval", 2, [replace(scored([0.5, 1.0]), work=(Work("a:1", "sample", 1004.0, 1.0),))])
    groups = [replace(scored([0.0, 1.0]), work=drawn), replace(scored([0.0, 1.0]), work=drawn)]
    now_s = 1012.0
    recording.take("train", 2, groups, step_s=12.0)
    recording.phase("credit", 1.0)  # of step 3, which is not recorded
    recording.take("train", 3, groups, step_s=2.0)
    recording.take("train", 4, groups)
    recording.close()
    assert timelines(tmp_path) == {
        2: {
            "start": 1000.0,
            "seconds": 12.0,
            "work": [
                ["loop", "rollout", 0.0, 3.0],
                ["a:1", "sample", 0.5, 2.0],
                ["a:1", "decode", 2.5, 0.25],
                ["loop", "train", 3.0, 6.0],
                ["a:1", "evaluate", 3.5, 0.25],
                ["a:1", "evaluate", 4.0, 1.0],
                ["a:1", "pull", 9.0, 0.5],
            ],
            "left_out": 0,
        },
        4: None,
    }


def test_phases_of_a_step_that_is_not_recorded_are_not_told_by_the_next_one(tmp_path: Path) -> None:
    recording = recorder(tmp_path, every_steps=2)
    for step in (1, 2):
        recording.phase(f"of step {step}", 0.25)
        recording.take("train", step, [scored([0.0, 1.0])], step_s=1000.0)
    recording.close()
    assert [phase for _, phase, _, _ in timelines(tmp_path)[2]["work"]] == ["of step 2"]


def test_nothing_is_recorded_where_that_is_configured(tmp_path: Path) -> None:
    recording = recorder(tmp_path, every_steps=0)
    recording.phase("train", 1.0)
    recording.pulled("rollout", [Work("a:1", "pull", 0.0, 1.0)])
    recording.take("train", 1, [scored([0.0, None])])
    recording.take("eval", 1, [scored([0.0, 1.0])])
    recording.close()
    assert not (tmp_path / "groups").exists()


def test_texts_carry_their_calls_and_budgets(tmp_path: Path) -> None:
    group = answer_group(
        "a", ["yes", "no"], rewards=[1.0, 0.0], calls=[3, 4], log_gamma=[math.log(0.5), math.log(0.25)]
    )
    (row,) = pack_groups([group], None, None, 64).groups
    assert [(one["text"], one["nfe"]) for one in row["samples"]] == [("yes", 3), ("no", 4)]
    assert [one["gamma"] for one in row["samples"]] == pytest.approx([0.5, 0.25])


def test_drafts_say_which_were_chosen(tmp_path: Path) -> None:
    seen = Exploration((0, 1, 2, 3), (0.1, None, 0.9, 0.2), redrawn=True, images_NHWC=np.zeros((4, 2, 2, 3), np.uint8))
    group = replace(scored([0.0, 1.0]), exploration=seen)
    row = pack_groups([group], None, None, 64).groups[0]
    assert [(one["index"], one["total"], one["chosen"]) for one in row["drafts"]] == [
        (0, 0.1, True),
        (1, None, True),
        (2, 0.9, False),
        (3, 0.2, False),
    ]
    assert row["redrawn"] is True
    assert all("picture" in one for one in row["drafts"])


def test_what_is_recorded_is_bounded_and_strict_json() -> None:
    assert short("x" * (MAX_TEXT + 5)).endswith("… (5 more characters)")
    assert short("a\ud800b") == "a?b"
    deep: Any = {"a": {"b": {"c": {"d": {"e": 1}}}}}
    assert plain(deep) == {"a": {"b": {"c": {"d": "…"}}}}
    assert plain([float("nan"), 1.5, True]) == [None, 1.5, True]
    assert plain(list(range(99))) == list(range(40))


def test_large_pictures_are_scaled_and_small_ones_lose_nothing() -> None:
    from io import BytesIO

    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    with Image.open(BytesIO(encode_picture(noise, 512))) as small:
        assert np.array_equal(np.asarray(small.convert("RGB")), noise)
    with Image.open(BytesIO(encode_picture(np.zeros((600, 300, 3), np.uint8), 128))) as large:
        assert large.size == (64, 128)


def test_a_kind_of_failure_that_is_rare_is_not_crowded_out() -> None:
    crowd = scored([None] * 9)
    rare = scored([0.0]).with_rewards([RewardBreakdown(None, (), RewardFailure("breaker_open", "resting"))])
    kinds = [row["kind"] for row in failure_rows(1, "train", [crowd, rare], most=3)]
    assert kinds == ["timeout", "breaker_open", "timeout"]


def test_a_resumed_run_keeps_each_step_once(tmp_path: Path) -> None:
    recording = recorder(tmp_path)
    for step in (1, 2):
        recording.take("train", step, [scored([0.0, None])])
    recording.take("eval", 2, [scored([0.5, 0.5])])
    recording.close()
    recording = recorder(tmp_path)  # a run that starts anew has none of it
    assert recorded_steps(tmp_path, "train") == []
    for step in (1, 2, 3):
        recording.take("train", step, [scored([0.0, None])])
        if step == 2:
            recording.take("eval", 2, [scored([0.5, 0.5])])
    recording.close()
    (tmp_path / "groups" / ".train_00000004.json.partial").write_text("{")
    with (tmp_path / "groups" / FAILURES_FILE).open("ab") as file:
        file.write(b'{"step": 3, "ki')
    recording = recorder(tmp_path, resumed=2)
    assert recorded_steps(tmp_path, "train") == [1, 2]
    assert recorded_steps(tmp_path, "eval") == [2]
    assert [line["step"] for line in read_failures(tmp_path, 10)] == [2, 1]
    assert not list((tmp_path / "groups").glob(".*"))
    recording.take("train", 3, [scored([1.0, 0.0], prompt="again")])
    recording.close()
    assert json.loads(read_record(tmp_path, "train", 3) or b"")["groups"][0]["prompt"]["text"] == "again"


def test_older_steps_are_thinned_and_newest_ones_stay() -> None:
    kept = [RecordedStep(step, 10) for step in range(1, 101)]
    assert thinned(kept, 1000, 20) == set()
    left = [one.step for one in kept if one.step not in thinned(kept, 600, 20)]
    assert left[-20:] == list(range(81, 101))
    assert left[0] == 1
    assert set(left[1:-20]) == set(range(4, 81, 4))
    assert len(left) * 10 <= 0.8 * 600
    few = [one.step for one in kept if one.step not in thinned(kept, 100, 20)]
    assert few == list(range(93, 101))


def test_the_disk_is_bounded_while_a_run_goes_on(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 96, 3), np.uint8)  # about 28 kB a picture
    recording = recorder(tmp_path, max_mib=1, keep_newest=2)
    for step in range(1, 13):
        group = replace(scored([0.0, 1.0] * 3, size=96), images_GHWC=noise[:6])
        while recording._queue.full():
            threading.Event().wait(0.005)
        recording.take("train", step, [group])
    recording.close()
    left = recorded_steps(tmp_path, "train")
    assert recording.num_skipped == 0
    assert left[-1] == 12
    assert len(left) < 12
    assert sum(path.stat().st_size for path in (tmp_path / "groups").iterdir()) <= 2**20


def test_a_writer_that_is_behind_is_not_waited_for(tmp_path: Path) -> None:
    recording = recorder(tmp_path)
    slow = replace(scored([0.0, 1.0]), images_GHWC=np.zeros((2, 1500, 1500, 3), np.uint8))
    for step in range(1, 40):
        recording.take("train", step, [slow])
    recording.close()
    assert recording.num_skipped > 0
    last = recorded_steps(tmp_path, "train")[-1]
    assert json.loads(read_record(tmp_path, "train", last) or b"")["num_skipped"] > 0
    assert len(recorded_steps(tmp_path, "train")) == 39 - recording.num_skipped


def test_what_stops_the_writer_stops_the_run(tmp_path: Path) -> None:
    recording = recorder(tmp_path)
    (tmp_path / "groups").write_text("in the way")
    recording.take("train", 1, [scored([0.0, 1.0])])
    recording._thread.join(0.2)  # it goes on, so as to leave nobody waiting
    with pytest.raises(OSError, match="groups") as raised:
        recording.take("train", 2, [scored([0.0, 1.0])])
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)
    recording.close()


def test_the_writer_holds_no_states_of_the_way() -> None:
    states = torch.zeros(2, 5, 1, 1, 1)
    group = replace(
        scored([0.0, 1.0]),
        trajectory=LatentTrajectory(torch.zeros(2, 1, 1, 1), torch.linspace(1, 0, 5), states_GS1CHW=states),
    )
    shown = shown_part(group)
    assert shown.latents.states_GS1CHW is None
    assert shown.conditioning is None


def test_steps_are_told_as_ranges() -> None:
    assert as_ranges([]) == []
    assert as_ranges([7]) == [(7, 7, 0)]
    assert as_ranges([1, 2, 3, 8, 16, 24]) == [(1, 3, 1), (8, 24, 8)]


def test_an_interval_is_students_over_prompts() -> None:
    # Prompt means 0 and 1: s = sqrt(1/2), t(0.975, 1) = 12.706, so 12.706 * 0.7071 / 1.4142.
    assert half_width([0.0, 1.0]) == pytest.approx(6.3531, rel=1e-4)
    assert half_width([0.3]) is None
    widths = interval_metrics([scored([0.0, 0.0]), scored([1.0, None])], "reward")
    assert widths == {
        "ci95/reward/mean": pytest.approx(6.3531, rel=1e-4),
        "ci95/reward/judge": widths["ci95/reward/mean"],
    }


def test_the_record_has_a_table_of_its_own() -> None:
    assert RunConfig().record.every_steps == 1
    with pytest.raises(ConfigError, match="max_mib"):
        parse_config(RunConfig, {"record": {"max_mib": 0}}, "test")
