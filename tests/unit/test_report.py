"""The report: one page from a run directory alone, whatever is missing, with every text escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.recorded_run import append_rows, make_run, metrics_row
from raylign.errors import RunDirError
from services.environment import write_environment
from services.pictures import save_png
from services.report import report_failure, write_report

EVERYTHING: dict[str, Any] = {
    "status": "finished",
    "num_steps": 3,
    "weight_version": 3,
    "weights_sha256": "3f9ab2" * 10,
    "eval_initial": {"mean": 0.39, "ocr": 0.39, "diversity": 0.2},
    "eval_final": {"mean": 0.86, "ocr": 0.86, "diversity": 0.1},
    "train_s": 12.0,
    "total_s": 20.0,
}


class _Page(HTMLParser):
    """Titles, cells and everything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loaded: list[str] = []
        self.images: list[str] = []
        self.scripts = 0
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href") and value:
                (self.images if value.startswith("data:") else self.loaded).append(value)
        if tag == "img":
            self._in.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._in:
            while self._in.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] in ("h2", "h3"):
            self.headings.append(data)


def _write(
    run: Path, rows: list[dict[str, Any]], summary: dict[str, Any] | None = None, config: str = "seed = 1"
) -> str:
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(config)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text()


def _rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "weight_version": step,
            "reward/mean": 0.3 + 0.1 * step,
            "reward/ocr": 0.3 + 0.1 * step,
            "loss": 1.0 / step,
            "loss/kl": 0.01 * step,
            "grad/norm": 2.0,
            "ratio/mean": 1.0,
            "time/sample_s": 1.0,
            "time/train_s": 2.0,
            "time/step_s": 3.0,
            "time/since_start_s": 3.0 * step,
            "throughput/samples_per_s": 24.0,
            "failed/reward_failed": 0,
            "velocity/old_gap": 0.1,
            "reward/zero_variance_groups": 2,
        }
        for step in range(1, count + 1)
    ]


def _picture(path: Path, size: int = 8) -> None:
    save_png(path, np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))


def test_a_whole_run_makes_a_whole_page(tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    _picture(run / "samples" / "before_after.png")
    _picture(run / "samples" / "step_00000.png")
    _picture(run / "samples" / "step_00015.png")
    eval_rows = [{"step": 0, "eval/ocr": 0.39, "eval/diversity": 0.2}]
    text = _write(
        run, [*eval_rows, *_rows()], EVERYTHING, 'seed = 1\n[algorithm]\ntype = "nft"\n[[rewards]]\ntype = "ocr"'
    )
    page = _Page(text)
    assert page.headings == [
        "Look at this first",
        "Before and after",
        "Curves",
        "Training reward",
        "Held-out rewards",
        "Diversity and spread within groups",
        "Loss",
        "Distance from the reference (KL)",
        "Gradient norm",
        "Policy ratio",
        "Samples per second",
        "Seconds per step, by phase",
        "velocity/old_gap",
        "reward/zero_variance_groups",
        "Where the time went",
        "Failures",
        "Held-out samples over time",
        "Configuration",
        "Environment and result",
    ]
    assert len(page.images) == 3
    assert "step 15" in text
    assert re.search(r"held-out ocr.*?0\.390 →.*?better.*?0\.860", text, re.DOTALL)
    assert re.search(r"held-out metric diversity.*?worse.*?0\.100", text, re.DOTALL)
    assert "held-out mean" not in text
    assert "3 steps · trained for 12 s · in all 20 s · 24.0 samples/s · weights 3f9ab23f9ab2" in text
    assert re.search(r"algorithm\.type</td><td class=\"mono\">nft", text)
    assert re.search(r"rewards\.0\.type</td><td class=\"mono\">ocr", text)


CONFIG = """seed = 1
[[rewards]]
type = "ocr"
name = "ocr"
[[rewards]]
type = "glyph_pixels"
name = "second"
only_eval = true
"""


def _evaluation(step: int, reward: float, second: float, diversity: float) -> dict[str, Any]:
    names = {"diversity": diversity, "mean": reward, "ocr": reward, "second": second, "second/exact": second / 2}
    return {"step": step, **{f"eval/{name}": value for name, value in names.items()}}


def _asked(text: str) -> list[list[str]]:
    """Cells of the table of the trained reward and what it did not ask for, row by row."""
    _, _, after = text.partition("Trained reward and what it did not ask for")
    rows = re.findall(r"<tr>(.*?)</tr>", after.partition("</table>")[0], re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_what_the_reward_did_not_ask_for_stands_beside_it(tmp_path: Path) -> None:
    rows = [_evaluation(0, 0.4, 0.4, 0.2), _evaluation(2, 0.9, 0.5, 0.1), _evaluation(4, 0.8, 0.3, 0.25)]
    summary = {
        "status": "finished",
        "eval_initial": {"ocr": 0.4, "second": 0.4},
        "eval_final": {"ocr": 0.8, "second": 0.3},
    }
    text = _write(tmp_path / "run", rows, summary, CONFIG)
    assert _asked(text) == [
        ["held-out prompts", "", "first (step 0)", "best reward (step 2)", "last (step 4)", "change"],
        ["reward", "trained on", "0.400", "0.900", "0.800", "+0.400"],
        ["second", "held-out metric", "0.400", "0.500", "0.300", "-0.100"],
        ["second/exact", "held-out metric", "0.200", "0.250", "0.150", "-0.050"],
        ["diversity", "held-out metric", "0.200", "0.100", "0.250", "+0.050"],
    ]
    assert re.search(r'class="num worse">-0\.100', text)
    assert re.search(r"held-out ocr.*?better.*?0\.800.*?held-out metric second.*?worse.*?0\.300", text, re.DOTALL)
    charts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, re.DOTALL))
    assert "eval/second" not in charts["Held-out rewards"]
    assert "eval/ocr" in charts["Held-out rewards"]
    assert "eval/second/exact" in charts["Held-out metrics, not trained on"]


def test_a_metric_that_is_missing_once_is_a_dash(tmp_path: Path) -> None:
    first = {name: value for name, value in _evaluation(0, 0.4, 0.4, 0.2).items() if "second" not in name}
    text = _write(tmp_path / "run", [first, _evaluation(3, 0.6, 0.5, 0.1)], None, CONFIG)
    cells = {row[0]: row[2:] for row in _asked(text)}
    assert cells["second"] == ["–", "0.500", "0.500", "–"]


@pytest.mark.parametrize("config", ["= no toml", "rewards = 3", "[[rewards]]\nonly_eval = true", "rewards = [1]"])
def test_a_broken_configuration_has_no_held_out_metrics(tmp_path: Path, config: str) -> None:
    text = _write(tmp_path / "run", [_evaluation(0, 0.4, 0.4, 0.2)], None, config)
    assert [row[0] for row in _asked(text)] == ["held-out prompts", "reward", "diversity"]


def test_a_reward_alone_needs_no_table_beside_it(tmp_path: Path) -> None:
    text = _write(tmp_path / "run", [{"step": 0, "eval/mean": 0.4, "eval/ocr": 0.4}])
    assert _asked(text) == []


def test_a_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    _picture(tmp_path / "run" / "samples" / "before_after.png")
    text = _write(tmp_path / "run", _rows(), EVERYTHING)
    page = _Page(text)
    assert page.loaded == []
    assert page.scripts == 0
    assert "url(" not in text


def test_every_text_is_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    rows = [{"step": step, nasty: 1.0, f"reward/{nasty}": 1.0 + step} for step in (1, 2)]
    summary = {**EVERYTHING, "status": nasty, "eval_initial": {nasty: 1}, "eval_final": {nasty: 2}, nasty: nasty}
    text = _write(tmp_path / "run", rows, summary, f"'{nasty}' = '{nasty}'")
    assert _Page(text).scripts == 0
    assert nasty not in text
    assert "&lt;script&gt;" in text


def test_a_run_without_a_step_or_a_summary_still_gets_a_page(tmp_path: Path) -> None:
    text = _write(tmp_path / "run", [])
    assert "No step has been logged yet" in text
    assert "no summary yet" in text
    assert "0 steps" in text


def test_a_running_run_shows_the_training_reward_so_far(tmp_path: Path) -> None:
    text = _write(tmp_path / "run", _rows())
    assert re.search(r"training reward.*?0\.400 →.*?0\.600", text, re.DOTALL)


def test_nulls_torn_lines_and_broken_files_are_borne(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "step_00001.png").write_bytes(b"\x89PNG not really")
    _picture(run / "samples" / "before_after.png")
    (run / "samples" / "before_after.png").write_bytes((run / "samples" / "before_after.png").read_bytes()[:60])
    rows = [{"step": 1, "loss": None, "reward/mean": 0.5}, {"step": 2, "loss": 0.5, "reward/mean": None}]
    run.joinpath("config.toml").write_text("= no toml")
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    text = write_report(run).read_text()
    page = _Page(text)
    assert page.images == []
    assert "cannot be parsed" in text
    assert {"Training reward", "Loss"} <= set(page.headings)


def test_evaluation_that_is_missing_at_the_end_is_a_dash(tmp_path: Path) -> None:
    text = _write(tmp_path / "run", [], {"status": "stopped", "eval_initial": {"ocr": 0.4}, "eval_final": {}})
    assert re.search(r"0\.400 →</small> <span class=\"\">–", text)


def test_many_sample_grids_are_thinned_with_both_ends_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(40):
        _picture(run / "samples" / f"step_{step:05d}.png")
    text = _write(run, _rows())
    captions = re.findall(r"<figcaption>step (\d+)</figcaption>", text)
    assert len(captions) == 8
    assert (captions[0], captions[-1]) == ("0", "39")


def test_a_large_picture_is_inlined_smaller(tmp_path: Path) -> None:
    _picture(tmp_path / "run" / "samples" / "before_after.png", 900)
    text = _write(tmp_path / "run", _rows())
    assert "data:image/jpeg;base64," in text
    assert len(text) < (tmp_path / "run" / "samples" / "before_after.png").stat().st_size


def test_the_reward_gap_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    assert "Reward gap" not in _Page(_write(tmp_path / "plain", _rows())).headings
    _picture(tmp_path / "run" / "samples" / "reward_gap.png")
    assert "Reward gap" in _Page(_write(tmp_path / "run", _rows())).headings


def _answer(text: str, good: bool, calls: int) -> dict[str, Any]:
    return {"text": text, "reward": float(good), "good": good, "nfe": calls, "gamma": 0.15}


def test_a_text_run_shows_answers_before_and_after_the_frontier_and_its_calls(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _picture(run / "samples" / "frontier.png")
    (run / "samples" / "step_00000.txt").write_text("answers & <b>more</b>")
    (run / "samples" / "step_00060.txt").write_text("better answers")
    row = {
        "id": "a",
        "prompt": "sort 3 <1>",
        "wanted": "1 3",
        "before": [_answer("3 <i>1", False, 4), _answer("", False, 6)],
        "after": [_answer("1 3", True, 1)],
    }
    table = {"before_step": 0, "after_step": 60, "prompts": [row]}
    (run / "samples" / "before_after.json").write_text(json.dumps(table))
    rows = [
        {"step": step, "reward/sort": 0.1 * step, "nfe/mean": 4.0 / step, "gamma/mean": 0.1, "characters/mean": 5.0}
        for step in (1, 2)
    ]
    rows.append({"step": 3, "eval/sort": 0.5, "eval/nfe": 2.0, "eval/gamma": 0.1, "eval/characters": 5.0})
    summary = {**EVERYTHING, "eval_initial": {"sort": 0.2, "nfe": 4.0}, "eval_final": {"sort": 0.8, "nfe": 1.5}}
    text = _write(run, rows, summary)
    page = _Page(text)
    assert page.headings[:7] == [
        "Before and after",
        "Accuracy against calls of the network",
        "Curves",
        "Training reward",
        "Held-out rewards",
        "Calls of the network per text (NFE)",
        "Entropy budget (gamma)",
    ]
    charts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, re.DOTALL))
    assert "eval/nfe" not in charts["Held-out rewards"]
    assert "eval/nfe" in charts["Calls of the network per text (NFE)"]
    assert re.search(r"held-out nfe.*?4\.000 →.*?better.*?1\.500", text, re.DOTALL), "fewer calls are better"
    assert len(re.findall('<div class="answer good">', text)) == 1
    assert len(re.findall('<div class="answer">', text)) == 2
    assert "reward 1.000 · 1 call · gamma 0.15" in text
    assert "(nothing)" in text
    assert re.findall(r"<figcaption>(.*?)</figcaption><pre>(.*?)</pre>", text) == [
        ("step 0", "answers &amp; &lt;b&gt;more&lt;/b&gt;"),
        ("step 60", "better answers"),
    ]
    assert "<i>" not in text.replace("<i style", "")
    assert len(page.images) == 1


@pytest.mark.parametrize("broken", ["{", "[]", '{"prompts": [{"before": [{}], "after": []}]}', '{"prompts": []}'])
def test_a_broken_table_of_answers_is_left_out(tmp_path: Path, broken: str) -> None:
    samples = tmp_path / "run" / "samples"
    samples.mkdir(parents=True)
    (samples / "before_after.json").write_text(broken)
    assert "Before and after" not in _Page(_write(tmp_path / "run", _rows())).headings


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunDirError, match="holds no run"):
            write_report(path)


def test_writing_again_replaces_the_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write(run, _rows(1))
    assert "3 steps" in _write(run, _rows(3))
    assert not list(run.glob(".*"))


def test_intervals_are_bands_of_their_curves_and_no_charts_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"step": step, "reward/ocr": 0.5, "reward/mean": 0.5, "ci95/reward/ocr": 0.2, "ci95/reward/mean": 0.2}
        for step in (1, 2, 3)
    ]
    text = _write(tmp_path / "run", rows)
    charts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, re.DOTALL))
    assert charts["Training reward"].count("<polygon") == 1
    assert "ci95" not in text
    del rows[1]["ci95/reward/ocr"], rows[2]["ci95/reward/ocr"]
    assert "<polygon" not in _write(tmp_path / "gaps", rows), "one step is no band"


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"status": "failed", "num_steps": 3, "error": "RewardError: <b>no</b>"}, "This run failed after step 3 of 60"),
        ({"status": "stopped", "num_steps": 3}, "This run was stopped after step 3 of 60"),
        (None, "This run has no summary: it is still going, or was killed"),
    ],
)
def test_a_run_that_is_not_finished_says_so(tmp_path: Path, summary: dict[str, Any] | None, words: str) -> None:
    text = _write(tmp_path / "run", _rows(), summary, "num_steps = 60")
    assert words in text
    assert ("RewardError: &lt;b&gt;no&lt;/b&gt;" in text) == (summary is not None and "error" in summary)
    assert "This run" not in _write(tmp_path / "done", _rows(), EVERYTHING)


def test_a_failure_leaves_a_report_with_its_cause_and_hides_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    report_failure(run, RunDirError("before the first number"))
    assert not list(run.iterdir())
    _write(run, _rows(), {"status": "failed", "num_steps": 3})
    report_failure(run, RunDirError("no room"))
    assert "RunDirError: no room" in (run / "report.html").read_text()
    assert json.loads((run / "summary.json").read_text())["error"] == "RunDirError: no room"
    (run / "metrics.jsonl").write_text("no json\n")
    report_failure(run, RunDirError("again"))


def test_time_failures_and_events_are_told_in_tables(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "time/step_s": 10.0,
            "time/train_s": 7.0,
            "time/rollout_s": 3.0,
            "actors/wanted": 1.0 + step // 2,
        }
        for step in (1, 2, 3)
    ]
    rows[0] |= {"failed/reward_failed": 2.0, "eval/failed": 1.0}
    rows[1] |= {"time/recovery_s": 4.5, "failed/async_kl": 1.0, "failed/refused_updates": 1.0}
    rows[2] |= {"async/returned": 1.0}
    run = tmp_path / "run"
    (run / "groups").mkdir(parents=True)
    failed = {"step": 1, "kind": "timeout", "reward": "judge", "message": "<i>slow", "prompt": "a cat", "sample": 4}
    (run / "groups" / "failures.jsonl").write_text(json.dumps(failed) + "\n" + json.dumps(failed) + '\n{"torn')
    guard = [{"step": 2, "signal": "metric", "actions": ["warn", "stop"], "told": "fell by 12 %"}]
    changes = [{"step": 1, "changed": {"learner.lr": [1e-4, 1e-5]}}]
    summary = {**EVERYTHING, "guard": guard, "config_changes": changes, "origin": {"step": 0, "run": "parent"}}
    text = _write(run, rows, summary)
    assert re.search(
        r"<td>train</td><td class=\"num\">7 s</td><td class=\"num\">21 s</td><td class=\"num\">70.0%", text
    )
    assert re.search(r"reward failed</td><td class=\"num\">2<", text)
    assert re.search(r"held-out samples</td><td class=\"num\">1<", text)
    assert 'timeout</td><td class="num">2 recorded<' in text
    assert "&lt;i&gt;slow" in text
    assert "step 1, sample 4 of: a cat" in text
    happened = re.findall(r"<tr><td class=\"num\">(\d+)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert [(step, kind) for step, kind, _ in happened] == [
        ("0", "fork"),
        ("1", "configuration"),
        ("2", "recovery"),
        ("2", "scaling"),
        ("2", "guard"),
        ("2", "refused"),
        ("2", "guard: metric"),
        ("3", "guard"),
    ]
    assert "from 1 to 2 rollout actors" in text
    assert "fell by 12 % (warn, stop)" in text
    assert "None: every sample" not in text
    assert "None: every sample" in _write(tmp_path / "clean", [{"step": 1, "time/step_s": 1.0, "time/train_s": 1.0}])
    assert "Failures" not in _Page(_write(tmp_path / "empty", [])).headings


def test_thousands_of_events_do_not_make_a_long_page(tmp_path: Path) -> None:
    rows = [{"step": step, "failed/refused_updates": 1.0} for step in range(1, 301)]
    text = _write(tmp_path / "run", rows)
    assert text.count("not finite were refused</td>") == 200
    assert "100 more are left out" in text


def _sample(total: float | None) -> dict[str, Any]:
    score = {"name": "ocr", "value": total, "details": {"reason": "<u>read</u>", "exact": True}}
    failed = {} if total is not None else {"failure": {"kind": "x", "message": "gone"}}
    return {"index": 0, "total": total, "scores": [score], **failed}


def _record(run: Path, kind: str, step: int, totals: Mapping[str, Sequence[float | None]], **more: Any) -> None:
    groups = [
        {
            "prompt": {"id": name, "text": f"<b>{name}"},
            "samples": [_sample(total) | more for total in some],
        }
        for name, some in totals.items()
    ]
    (run / "groups").mkdir(parents=True, exist_ok=True)
    (run / "groups" / f"{kind}_{step:08d}.json").write_text(json.dumps({"step": step, "groups": groups}) + "\n")


def _shown(text: str, heading: str) -> list[str]:
    _, _, after = text.partition(f"<h2>{heading}</h2>")
    return re.findall(
        r'<figcaption><span class="text">&lt;b&gt;(.*?)</span> <span class="facts">(.*?)<', after.partition("<h2>")[0]
    )


def test_the_best_the_worst_and_the_most_changed_groups_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = {"a": [0.0, 0.2], "b": [0.5], "c": [0.9, 0.9], "d": [0.4], "e": [None, None]}
    last = {"a": [0.9, 1.0], "b": [0.5], "c": [0.0, None], "d": [0.6], "e": [None, None]}
    _record(run, "eval", 0, first, text="an <script>answer")
    _record(run, "eval", 20, last, text="an <script>answer")
    _record(run, "train", 20, {"t": [1.0]})
    text = _write(run, _rows())
    assert _shown(text, "Best groups") == [("a", "mean reward 0.950"), ("d", "mean reward 0.600")]
    assert _shown(text, "Worst groups") == [("c", "mean reward 0.000"), ("b", "mean reward 0.500")]
    assert _shown(text, "Groups without a reward") == [("e", "mean reward –")]
    assert _shown(text, "Most changed groups") == [
        ("c", "mean reward 0.900 → 0.000"),
        ("a", "mean reward 0.100 → 0.950"),
        ("d", "mean reward 0.400 → 0.600"),
    ], "b did not change, e has no reward"
    assert "drawn with the same keys at step 0 and step 20" in text
    assert "ocr reason: &lt;u&gt;read&lt;/u&gt;" in text
    assert "gone" in text
    assert _Page(text).scripts == 0
    assert "<u>" not in text


def test_a_run_without_held_out_prompts_shows_groups_of_its_last_training_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _record(run, "train", 1, {"a": [0.0]})
    _record(run, "train", 2, {"b": [1.0], "c": [0.5]})
    text = _write(run, _rows())
    assert _shown(text, "Best groups") == [("b", "mean reward 1.000")]
    assert "training prompts, step 2" in text
    assert "Most changed groups" not in text


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"groups": [{}]}', '{"groups": [{"prompt": {}, "samples": []}]}', "null"]
)
def test_a_broken_record_of_groups_is_left_out(tmp_path: Path, broken: str) -> None:
    (tmp_path / "run" / "groups").mkdir(parents=True)
    (tmp_path / "run" / "groups" / "eval_00000001.json").write_text(broken + "}\n")
    assert "Best groups" not in _Page(_write(tmp_path / "run", _rows())).headings


def test_records_between_the_first_and_the_last_are_not_read(tmp_path: Path) -> None:
    """There may be thousands of them; these would fail if they were."""
    run = tmp_path / "run"
    for step, total in ((0, 0.1), (9, 0.9)):
        _record(run, "eval", step, {"a": [total, total]})
        _record(run, "train", step, {"a": [total, total]})
    for kind in ("eval", "train"):
        (run / "groups" / f"{kind}_00000005.json").mkdir()
    assert "0.100 → 0.900" in _write(run, _rows())
    for step in (0, 5, 9):
        path = run / "groups" / f"eval_{step:08d}.json"
        path.rmdir() if path.is_dir() else path.unlink()
    assert "training prompts, step 9" in _write(run, _rows())


def test_what_the_run_ran_on_is_told_and_not_where_the_page_was_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "python (of this page)" in _write(run, _rows())
    write_environment(run)
    write_environment(run)
    parts = json.loads((run / "environment.json").read_text())
    assert len(parts) == 2
    parts[1]["python"] = "9.9.9"
    parts[1]["gpus"] = ["H200", "H200"]
    (run / "environment.json").write_text(json.dumps(parts))
    text = _write(run, _rows())
    assert "9.9.9" in text
    assert "H200, H200" in text
    assert "part 2 began" in text
    assert "of this page" not in text
    assert parts[0]["libraries"]["torch"] in text
    (run / "environment.json").write_text("{")
    assert "python (of this page)" in _write(run, _rows())


def test_alerts_stand_first(tmp_path: Path) -> None:
    rows = [{"step": step, "reward/zero_variance_groups": 4.0, "reward/mean": 0.5} for step in (1, 2)]
    text = _write(tmp_path / "run", rows, None, "groups_per_step = 4")
    page = _Page(text)
    assert page.headings[0] == "Look at this first"
    assert "Groups without a signal" in text


def test_levels_of_the_guard_have_a_chart_of_their_own(tmp_path: Path) -> None:
    row = {"eval/diversity": 0.2, "guard/diversity": 0.5, "guard/held_out": 0.1}
    text = _write(tmp_path / "run", [{"step": step, **row} for step in (1, 2)])
    charts = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</figure>", text, re.DOTALL))
    assert [title for title, body in charts.items() if "guard/diversity" in body] == [
        "Guard: levels of its signals (1 is the limit)"
    ]


def test_a_parity_gap_beyond_what_the_configuration_tolerates_is_an_alert(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    assert "Parity gap" not in write_report(tmp_path / "run").read_text(encoding="utf-8")
    append_rows(tmp_path / "run", [{**metrics_row(4, 4), "parity/gap": 0.5}])
    assert "Parity gap" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_a_page_stays_small(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = [{"step": step, **{f"m/{index}": float(step % 7) for index in range(60)}} for step in range(2000)]
    for step in range(20):
        _picture(run / "samples" / f"step_{step:05d}.png", 700)
    assert len(_write(run, rows)) < 6_000_000
