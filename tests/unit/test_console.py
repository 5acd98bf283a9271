"""What a person sees: plain lines in a log, a live block on a terminal, and no number that misleads."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from raylign.errors import RewardError
from services.console import RunConsole, ascii_picture, duration, phase_bar, sparkline
from services.headlines import direction, headline_label, headline_means

SUMMARY: Mapping[str, Any] = {
    "status": "finished",
    "num_steps": 60,
    "weight_version": 60,
    "weights_sha256": "3f9ab2" * 10,
    "eval_initial": {"mean": 0.39, "ocr": 0.39, "ocr/exact": 0.05, "std_within_group": 0.2},
    "eval_final": {"mean": 0.86, "ocr": 0.86, "ocr/exact": 0.7, "std_within_group": 0.1},
    "train_s": 131.2,
    "total_s": 3725,
}


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class _Screen:
    """A RunConsole on a text buffer, and what it printed."""

    def __init__(self, terminal: bool = False, encoding: str = "utf-8", **kwargs: Any) -> None:
        self.bytes = io.BytesIO()
        stream = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        self.clock = _Clock()
        rich = Console(
            file=stream,
            force_terminal=terminal,
            width=100,
            color_system="truecolor" if terminal else None,
            highlight=False,
            _environ={"TERM": "xterm-256color"},
        )
        self.run = RunConsole(rich, clock=self.clock, **kwargs)

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode()

    @property
    def words(self) -> str:
        """The text without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)


def _metrics(reward: float, **more: float) -> dict[str, float]:
    return {"reward/mean": reward, "time/sample_s": 1.25, "throughput/samples_per_s": 24.0, **more}


def test_a_log_gets_plain_ascii_lines_without_control_codes(tmp_path: Path) -> None:
    screen = _Screen()
    with screen.run as run:
        with run.phase("Ray cluster"):
            screen.clock.now += 4.1
        run.pictures(tmp_path / "step_00000.png", np.zeros((4, 8, 3), np.uint8), "mean 0.31")
        run.begin(2)
        run.evaluated(0, {"eval/ocr": 0.39})
        screen.clock.now += 5
        run.step(1, _metrics(0.5))
        screen.clock.now += 5
        run.step(2, _metrics(0.75))
        run.note("stopping → soon …")
        run.finish(SUMMARY, tmp_path)
    assert "\x1b" not in screen.text
    assert screen.text.isascii()
    lines = screen.text.splitlines()
    assert re.fullmatch(r"ok Ray cluster +4\.1 s", lines[0])
    assert lines[1] == f"ok first pictures: {tmp_path}/step_00000.png  mean 0.31"
    assert lines[2] == "held-out at step 0: ocr 0.390"
    assert lines[3] == "step 1/2  reward 0.500  24.0 samples/s  5.0 s elapsed, 5.0 s left"
    assert lines[4] == "step 2/2  reward 0.750 (+0.250)  24.0 samples/s  10 s elapsed, 0.0 s left"
    assert lines[5] == "| stopping -> soon ..."
    assert lines[6] == f"finished: {tmp_path}"


def test_a_long_line_of_a_log_is_not_wrapped() -> None:
    screen = _Screen()
    screen.run.note("word " * 60)
    assert screen.text.count("\n") == 1


def test_plain_steps_are_printed_at_intervals_but_the_first_and_last_always() -> None:
    screen = _Screen(plain_every_s=10)
    screen.run.begin(9)
    for step in range(1, 10):
        screen.clock.now += 3
        screen.run.step(step, _metrics(0.1 * step))
    assert re.findall(r"step (\d)/9", screen.text) == ["1", "5", "9"]


def test_time_left_counts_only_the_steps_of_this_process() -> None:
    screen = _Screen()
    screen.run.begin(60, start_step=40)
    screen.clock.now += 20
    screen.run.step(50, _metrics(0.5))
    screen.run.step(60, _metrics(0.5))
    assert "going on after step 40 of 60" in screen.text
    assert "step 60/60" in screen.text
    screen.run.step(50, _metrics(0.5))
    assert screen.run._remaining() == "20 s elapsed, 20 s left"


def test_failures_add_up_and_staleness_shows_only_when_there_is_some() -> None:
    screen = _Screen(plain_every_s=0)
    screen.run.begin(4)
    screen.run.step(1, _metrics(0.5, **{"failed/reward_failed": 0, "staleness/max": 0}))
    screen.run.step(2, _metrics(0.5, **{"failed/reward_failed": 2, "staleness/max": 1}))
    screen.run.step(3, _metrics(0.5, **{"failed/reward_failed": 1, "staleness/max": 0}))
    first, second, third = screen.text.splitlines()
    assert "failed" not in first
    assert "staleness" not in first
    assert second.endswith("2 reward failed | staleness 1")
    assert third.endswith("3 reward failed")


def test_a_reward_that_is_missing_or_not_finite_is_not_shown_as_a_number() -> None:
    screen = _Screen(plain_every_s=0)
    screen.run.begin(2)
    screen.run.step(1, {"loss": 1.0})
    screen.run.step(2, _metrics(float("nan")))
    assert "reward" not in screen.text


def test_evaluations_are_compared_with_the_first() -> None:
    screen = _Screen()
    screen.run.evaluated(0, {"eval/ocr": 0.39, "eval/mean": 0.39, "eval/std_within_group": 0.1})
    screen.run.evaluated(20, {"eval/ocr": 0.25, "eval/mean": 0.25, "eval/std_within_group": 0.1})
    assert screen.text.splitlines()[1] == "held-out at step 20: ocr 0.390 -> 0.250"


def test_the_bar_of_phases_is_cut_by_their_shares() -> None:
    bar = phase_bar({"rollout": 3.0, "train": 1.0, "pull": 0.001}, width=8)
    assert bar.plain == "█" * 8
    assert [(span.start, span.end, str(span.style)) for span in bar.spans] == [(0, 6, "cyan"), (6, 8, "green")]
    assert len(phase_bar(dict.fromkeys("abcdefg", 1.0), width=28)) == 28
    assert phase_bar({}).plain == phase_bar({"train": 0.0}).plain == ""


def test_a_phase_that_fails_says_so_and_raises() -> None:
    screen = _Screen()

    def fail() -> None:
        with screen.run.phase("reward service"):
            screen.clock.now += 2
            raise RewardError("no model")

    with pytest.raises(RewardError):
        fail()
    assert screen.text == "failed: reward service after 2.0 s\n"


def test_only_the_first_pictures_are_announced() -> None:
    screen = _Screen()
    screen.run.pictures(Path("a.png"))
    screen.run.pictures(Path("b.png"))
    assert screen.text == "ok first pictures: a.png\n"


def test_only_the_first_texts_are_announced_with_an_example() -> None:
    screen = _Screen()
    screen.run.texts(Path("a.txt"), "sort 3 1 → 1 3")
    screen.run.texts(Path("b.txt"), "sort 2 1 → 1 2")
    assert screen.text == "ok first texts: a.txt  sort 3 1 -> 1 3\n"


def test_calls_of_the_network_are_shown_beside_the_reward_and_fewer_are_green() -> None:
    screen = _Screen(terminal=True)
    with screen.run as run:
        run.begin(4)
        run.evaluated(0, {"eval/sort": 0.5, "eval/nfe": 4.0, "eval/gamma": 0.1})
        run.evaluated(1, {"eval/sort": 0.25, "eval/nfe": 2.0, "eval/gamma": 0.2})
        run.step(1, _metrics(0.5, **{"nfe/mean": 4.0}))
        run.step(2, _metrics(0.25, **{"nfe/mean": 1.5}))
        assert run._block is not None
        run._block.refresh()
    assert "nfe 1.50 (-2.500)  █▁" in screen.words
    green, red = "\x1b[1;32m", "\x1b[1;31m"
    assert f"{green}2.000" in screen.text
    assert f"{red}0.250" in screen.text
    assert f"{green}0.200" not in screen.text, "a budget is neither better nor worse"
    assert "\x1b[32m (-2.500)" in screen.text
    assert "\x1b[31m (-0.250)" in screen.text


@pytest.mark.parametrize(
    ("name", "first", "last", "expected"),
    [
        ("ocr", 0.1, 0.2, "better"),
        ("ocr", 0.2, 0.1, "worse"),
        ("nfe", 4.0, 2.0, "better"),
        ("nfe", 2.0, 4.0, "worse"),
        ("failed", 0.0, 3.0, "worse"),
        ("gamma", 0.1, 0.2, ""),
        ("ocr", 0.2, 0.2, ""),
        ("ocr", None, 0.2, ""),
        ("nfe", 2.0, None, ""),
    ],
)
def test_better_is_more_reward_and_fewer_calls(
    name: str, first: float | None, last: float | None, expected: str
) -> None:
    assert direction(name, first, last) == expected


def test_the_end_says_what_changed_and_where_to_look(tmp_path: Path) -> None:
    for name in ("samples", "checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "report.html").touch()
    screen = _Screen()
    screen.run.finish(SUMMARY, tmp_path)
    text = screen.text
    assert re.search(r"held-out ocr +0\.390 -> 0\.860", text)
    assert re.search(r"held-out ocr/exact +0\.050 -> 0\.700", text)
    assert "held-out mean" not in text, "one reward: the mean is the same number again"
    assert "60 steps | training 2m 11s | in all 1h 02m | weights 3f9ab23f9ab2 (version 60)" in text
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in text
    assert f"raylign export {tmp_path} DIR" in text
    assert "before_after.png" not in text, "only what exists"
    assert "raylign resume" not in text


def test_a_stopped_run_says_how_to_go_on_and_an_empty_summary_is_bearable(tmp_path: Path) -> None:
    screen = _Screen()
    screen.run.finish({"status": "stopped", "eval_initial": {"ocr": 0.4}, "eval_final": {}}, tmp_path)
    assert f"raylign resume {tmp_path}" in screen.text
    assert "0.400 -> -" in screen.text
    screen.run.finish({}, tmp_path)


def test_an_error_is_shown_with_its_notes_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    error = RewardError("12 of 48 samples failed")
    error.add_note("what the workers wrote is in logs")
    screen = _Screen()
    screen.run.begin(9)
    screen.run.step(7, _metrics(0.5))
    screen.run.failed(error, tmp_path)
    assert screen.text.splitlines()[-4:] == [
        "stopped step 7/9  reward 0.500",
        "failed: RewardError: 12 of 48 samples failed",
        "what the workers wrote is in logs",
        f"go on from the last checkpoint: raylign resume {tmp_path}",
    ]


def test_a_terminal_shows_a_live_block_and_is_restored(tmp_path: Path) -> None:
    screen = _Screen(terminal=True)
    with screen.run as run:
        with run.phase("Ray cluster"):
            pass
        run.pictures(tmp_path / "a.png", np.full((4, 8, 3), 255, np.uint8))
        run.begin(4)
        run.evaluated(0, {"ocr": 0.25})
        for step in (1, 2):
            run.step(step, _metrics(0.25 * step, **{"time/since_start_s": 9.0, "time/idle_s": 0.0}))
        assert run._block is not None
        run._block.refresh()
        run.finish(SUMMARY, tmp_path)
    words = screen.words
    assert "✓ Ray cluster" in words
    assert "▀▀▀▀▀▀▀▀" in words
    assert "2/4" in words
    assert "reward 0.500 (+0.250)  ▁█" in words
    assert "sample 1.2 s · 24.0 samples/s" in words, "phases of no length and running totals are left out"
    assert "╭─ finished" in words
    assert screen.text.count("\x1b[?25h") == screen.text.count("\x1b[?25l") == 1, "the cursor comes back"


def test_the_terminal_is_restored_after_an_error() -> None:
    screen = _Screen(terminal=True)

    def fail() -> None:
        with screen.run:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert screen.text.rstrip().endswith("\x1b[?25h")
    screen.run.close()


def test_a_terminal_without_utf8_gets_plain_lines() -> None:
    screen = _Screen(terminal=True, encoding="ascii")
    with screen.run as run, run.phase("Ray cluster"):
        pass
    assert "\x1b" not in screen.text
    assert screen.text.startswith("ok Ray cluster")


def test_a_half_block_shows_two_pixels() -> None:
    image = np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8)
    picture = ascii_picture(image, 1)
    assert picture.plain == "▀"
    style = picture.spans[0].style
    assert str(style) == "#ff0000 on #0000ff"


def test_a_picture_keeps_its_proportions() -> None:
    lines = ascii_picture(np.zeros((32, 96, 3), np.uint8), 48).plain.split("\n")
    assert [len(line) for line in lines] == [48] * 8
    assert ascii_picture(np.zeros((1, 96, 3), np.uint8), 4).plain == "▀▀▀▀"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0.0, 7.0, 3.5], "▁█▅"),
        ([float("nan"), 0.0, float("inf"), 1.0], "▁█"),
        ([0.0] * 50 + [1.0] * 50, "▁" * 16 + "█" * 16),
    ],
)
def test_a_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (7620, "2h 07m"),
    ],
)
def test_a_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_the_mix_is_a_headline_only_if_rewards_are_mixed() -> None:
    assert list(headline_means({"mean": 0.5, "ocr": 0.5, "ocr/exact": 0.1, "diversity": 0.2})) == [
        "ocr",
        "ocr/exact",
        "diversity",
    ]
    assert list(headline_means({"mean": 0.5, "ocr": 0.5, "clip": 0.1})) == ["mean", "ocr", "clip"]


def test_held_out_metrics_are_headlines_of_their_own_behind_the_rewards() -> None:
    means = {"diversity": 0.2, "sharpness": 0.1, "mean": 0.5, "ocr": 0.5, "px": 0.4, "px/exact": 0.3, "ocr/exact": 0.1}
    # One reward is trained on, so the mix only repeats it; without a word on the metrics they all count as rewards.
    assert list(headline_means(means, ["px", "sharpness"])) == ["ocr", "ocr/exact", "diversity", "sharpness", "px"]
    assert list(headline_means(means))[:3] == ["sharpness", "mean", "ocr"]
    labels = [headline_label(name, ["px"]) for name in ("ocr", "px", "px/exact", "pxx", "diversity")]
    assert labels == [
        "held-out ocr",
        "held-out metric px",
        "held-out metric px/exact",
        "held-out pxx",
        "held-out metric diversity",
    ]


def test_an_evaluation_tells_held_out_metrics_from_rewards(tmp_path: Path) -> None:
    screen = _Screen()
    with screen.run as run:
        run.begin(2, held_out=["px"])
        run.evaluated(0, {"eval/ocr": 0.4, "eval/px": 0.3, "eval/px/exact": 0.1, "eval/diversity": 0.2})
        run.evaluated(2, {"eval/ocr": 0.9, "eval/px": 0.2, "eval/px/exact": 0.1, "eval/diversity": 0.2})
        finals = {"eval_initial": {"ocr": 0.4, "px": 0.3}, "eval_final": {"ocr": 0.9, "px": 0.2}}
        run.finish({**SUMMARY, **finals}, tmp_path)
    lines = screen.text.splitlines()
    assert lines[0] == "held-out at step 0: ocr 0.400  |  held-out metrics: px 0.300  |  diversity 0.200"
    assert "ocr 0.400 -> 0.900  |  held-out metrics: px 0.300 -> 0.200  |  diversity 0.200" in lines[1]
    assert re.fullmatch(r"held-out ocr +0\.400 -> 0\.900", lines[3])
    assert re.fullmatch(r"held-out metric px +0\.300 -> 0\.200", lines[4])


def test_sharpness_has_no_better_end() -> None:
    assert (direction("sharpness", 0.1, 0.9), direction("diversity", 0.1, 0.9)) == ("", "better")


def test_measures_of_texts_are_no_rewards() -> None:
    means = {"mean": 0.5, "sort": 0.5, "failed": 2.0, "nfe": 2.0, "cached_calls": 0.0, "gamma": 0.1, "characters": 9.0}
    assert list(headline_means(means)) == ["sort", "failed", "nfe", "gamma"]
    assert "cached_calls" in headline_means({**means, "cached_calls": 1.0})


def test_the_console_loads_no_heavy_library() -> None:
    code = "import sys, services.console; print(sorted({'torch', 'ray', 'numpy', 'PIL'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, check=True
    )
    assert done.stdout.strip() == "[]"
