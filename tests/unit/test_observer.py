"""What a run leaves for people: files of a text run and of a picture run, and that a resumed one goes on with them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from raylign.types import RolloutGroup
from rollout.drawn import AS_CONFIGURED, EvalPoint
from services.console import RunConsole
from services.observer import RunObserver
from services.run_dir import RunDir
from tests.picture_groups import rewarded_group
from tests.text_answers import answer_group


class _Sink:
    """A MetricsSink that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str]] = []
        self.singles: list[tuple[int, str, list[float]]] = []
        self.told: list[tuple[int, str, str]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self.pictures.append((step, name))

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        self.singles.append((step, name, list(values)))

    def texts(self, step: int, name: str, text: str) -> None:
        self.told.append((step, name, text))

    def close(self) -> None:
        pass


class _Watched:
    """An observer of a run in a folder, and what it printed and logged."""

    def __init__(self, folder: Path, held_out: Collection[str] = ()) -> None:
        self.run = RunDir(folder)
        self.run.samples.mkdir(parents=True, exist_ok=True)
        self.sink = _Sink()
        self.screen = io.StringIO()
        self.observer = RunObserver(self.run, self.sink, RunConsole(Console(file=self.screen)), held_out=held_out)

    def json(self, name: str) -> dict:
        return json.loads((self.run.samples / name).read_bytes())


def _texts(right: int, calls: int) -> list[RolloutGroup]:
    """Two prompts of two answers, `right` of the four correct, after `calls` calls each."""
    exact = [place < right for place in range(4)]
    return [
        answer_group(
            name,
            ["good" if one else "bad" for one in some],
            rewards=[float(one) for one in some],
            exact=some,
            calls=[calls, calls],
            log_gamma=[math.log(0.2)] * 2,
        )
        for name, some in (("a", exact[:2]), ("b", exact[2:]))
    ]


def test_an_evaluation_of_texts_is_written_to_read_and_announced_once(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.observer.evaluated(0, _texts(right=1, calls=4))
    watched.observer.evaluated(60, _texts(right=3, calls=2))
    assert sorted(path.name for path in watched.run.samples.iterdir()) == [
        "before_after.json",
        "first.json",
        "step_00000.txt",
        "step_00060.txt",
    ]
    text = (watched.run.samples / "step_00060.txt").read_text()
    assert "exact_answer 0.750  exact_answer/exact 0.750  nfe 2.000" in text
    assert "+     1.000     2 calls  | good" in text
    rows = watched.json("before_after.json")["prompts"]
    assert [[answer["text"] for answer in rows[0][side]] for side in ("before", "after")] == [
        ["good", "bad"],
        ["good", "good"],
    ]
    printed = watched.screen.getvalue()
    assert printed.count("first texts: ") == 1
    assert "step_00000.txt  sort a -> good" in printed
    assert "nfe 4.000 -> 2.000" in printed
    assert [(step, name) for step, name, _ in watched.sink.told] == [(0, "samples"), (60, "samples")]
    assert watched.sink.told[1][2] == text
    assert watched.sink.singles == [(0, "eval", [1.0, 0.0, 0.0, 0.0]), (60, "eval", [1.0, 1.0, 1.0, 0.0])]


def test_a_resumed_run_still_compares_with_the_first_evaluation(tmp_path: Path) -> None:
    _Watched(tmp_path).observer.evaluated(0, _texts(right=0, calls=4))
    later = _Watched(tmp_path)
    later.observer.evaluated(60, _texts(right=4, calls=1))
    data = later.json("before_after.json")
    assert (data["before_step"], data["after_step"]) == (0, 60)
    assert [answer["good"] for answer in data["prompts"][0]["before"]] == [False, False]
    assert [answer["good"] for answer in data["prompts"][0]["after"]] == [True, True]


def test_sweeps_become_a_frontier_with_the_operating_points(tmp_path: Path) -> None:
    first = _Watched(tmp_path)
    first.observer.swept(
        0,
        {
            AS_CONFIGURED: _texts(right=1, calls=4),
            EvalPoint(gamma=1.0): _texts(right=0, calls=2),
            EvalPoint(gamma=0.0): _texts(right=1, calls=6),
        },
    )
    with Image.open(tmp_path / "samples" / "frontier.png") as picture:
        assert picture.size == (1240, 720)
    assert first.sink.pictures == [(0, "frontier")]
    later = _Watched(tmp_path)
    later.observer.swept(60, {AS_CONFIGURED: _texts(right=3, calls=2), EvalPoint(gamma=0.0): _texts(right=4, calls=6)})
    data = later.json("frontier.json")
    assert data["quality"] == "exact"
    before, after = data["series"]["before"], data["series"]["after"]
    assert [(p["gamma"], p["accuracy"], p["nfe"], p["samples"]) for p in before["points"]] == [
        (0.0, 0.25, 6.0, 4),
        (1.0, 0.0, 2.0, 4),
    ]
    assert (before["own"]["accuracy"], before["own"]["nfe"]) == (0.25, 4.0)
    assert (after["step"], after["own"]["accuracy"], after["own"]["nfe"]) == (60, 0.75, 2.0)
    assert round(after["own"]["gamma"], 6) == 0.2


def test_sweeps_without_any_reward_leave_nothing(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.observer.swept(0, {EvalPoint(gamma=0.0): [answer_group("a", ["x"], rewards=[None], calls=[1])]})
    assert not list(watched.run.samples.iterdir())


def test_the_calls_of_a_step_are_printed_beside_its_reward(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.observer.stepped(1, {"reward/mean": 0.5, "nfe/mean": 3.5}, [])
    assert "reward 0.500  nfe 3.50" in watched.screen.getvalue()
    assert watched.sink.rows[0][1]["time/since_start_s"] >= 0


def test_an_evaluation_of_pictures_is_a_grid_and_a_sheet(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    for step, groups in ((0, _pictures(0.1)), (20, _pictures(1.0))):
        watched.observer.evaluated(step, groups)
    names = sorted(path.name for path in watched.run.samples.iterdir())
    assert names == ["before_after.png", "first.npz", "step_00000.png", "step_00020.png"]
    assert watched.sink.pictures == [(0, "samples"), (20, "samples")]
    assert watched.observer.first_eval["exact_answer"] == 0.1
    assert watched.observer.last_eval["exact_answer"] == 1.0


def test_held_out_metrics_get_a_line_of_their_own_on_the_sheet(tmp_path: Path) -> None:
    heights: list[int] = []
    for name, held_out in (("a", ()), ("b", ("exact_answer",))):
        watched = _Watched(tmp_path / name, held_out)
        for step, reward in ((0, 0.1), (20, 1.0)):
            group = answer_group("a", ["x"], rewards=[reward], calls=[1])
            watched.observer.evaluated(step, [replace(group, texts=None, images_GHWC=np.zeros((1, 8, 8, 3), np.uint8))])
        with Image.open(watched.run.before_after) as sheet:
            heights.append(sheet.height)
    assert heights[1] > heights[0] + 20, "the mean stays on the first line"


def _pictures(reward: float) -> Sequence[RolloutGroup]:
    group = answer_group("a", ["x", "y"], rewards=[reward, reward], calls=[1, 1])
    pictures = np.full((2, 8, 8, 3), round(reward * 200), np.uint8)
    return [replace(group, texts=None, images_GHWC=pictures)]


def _gap_sweep(gain: float) -> dict[EvalPoint, list[RolloutGroup]]:
    """Three prompts by the ODE, and noisily with `gain` more reward but for the last, which gains twice that."""
    ode = [rewarded_group(name, [0.4, 0.6], num_steps=6) for name in "abc"]
    noisy = [
        rewarded_group(name, [0.4 + more, 0.6 + more], num_steps=6)
        for name, more in (("a", gain), ("b", gain), ("c", 2 * gain))
    ]
    return {AS_CONFIGURED: ode, EvalPoint(eta=0.5): noisy, EvalPoint(eta=1.0): ode}


def test_sweeps_of_pictures_become_the_reward_gap(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    watched.observer.swept(0, _gap_sweep(0.3))
    (step, row), *_ = watched.sink.rows
    assert step == 0
    assert round(row["eval/eta_0.5/mean"], 6) == 0.9
    assert round(row["eval/gap/eta_0.5"], 6) == 0.4
    # Differences 0.3, 0.3, 0.6: standard deviation 0.1732, over the root of three prompts 0.1, times t(2) = 4.303.
    assert round(row["eval/gap_ci95/eta_0.5"], 4) == 0.4303
    assert (row["eval/gap/eta_1"], row["eval/gap_ci95/eta_1"]) == (0, 0)
    with Image.open(tmp_path / "samples" / "reward_gap.png") as picture:
        assert picture.size == (1280, 600)
    assert watched.sink.pictures == [(0, "reward_gap")]
    printed = " ".join(watched.screen.getvalue().split())
    assert "reward gap at step 0: eta_0.5 +0.4000 +- 0.4303 | eta_1 +0.0000 +- 0.0000" in printed


def test_a_resumed_run_goes_on_with_its_series_of_gaps(tmp_path: Path) -> None:
    for step, gain in ((0, 0.3), (20, 0.2), (40, 0.1)):
        _Watched(tmp_path).observer.swept(step, _gap_sweep(gain))
    later = _Watched(tmp_path)
    later.observer.swept(20, _gap_sweep(0.15))
    points = [
        (one["step"], one["eta"], round(one["gap"]["mean"], 6)) for one in later.json("reward_gap.json")["points"]
    ]
    assert points == [(0, 0.5, 0.4), (0, 1.0, 0.0), (20, 0.5, 0.2), (20, 1.0, 0.0)]


def test_gaps_without_any_reward_leave_no_file(tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    failed = [rewarded_group("a", [None], num_steps=6)]
    watched.observer.swept(0, {AS_CONFIGURED: failed, EvalPoint(eta=1.0): failed})
    assert not list(watched.run.samples.iterdir())
    assert list(watched.sink.rows[0][1]) == ["time/since_start_s"]
