"""`raylign report`: one self-contained HTML page about a run, from its directory alone.

Pictures, texts and charts are inlined, nothing is loaded from anywhere, and every text is escaped. A run that is still
going, or that ended early, gets a page of what there is.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from raylign.errors import RunDirError
from raylign.metrics import MetricsRow, read_metrics
from services.console import duration
from services.dashboard.alerts import alerts
from services.dashboard.columns import Columns
from services.dashboard.runs import facts_of, held_out_names
from services.environment import environment, read_environment
from services.headlines import DIVERSITY, direction, headline_label, headline_means, is_metric
from services.record_files import read_failures
from services.report_curves import charts_of
from services.report_groups import groups_of
from services.report_tables import environment_rows, events, failures, timings
from services.run_dir import RunDir, write_atomic

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_GRIDS = 8
_INLINE_BYTES = 350_000
"""A larger PNG is inlined as JPEG, so that a page with many grids still opens at once."""
_INLINE_SIDE = 1600
"""Pixels of the longer side of what is inlined as JPEG."""
_MAX_TEXT = 20_000
"""Characters of one step's texts on the page; the file has them all."""
_MAX_FAILURES = 2000
_TOLD_ELSEWHERE = ("eval_initial.", "eval_final.", "guard.", "recoveries.", "config_changes.", "origin.", "error")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path. Raises RunDirError if it is none."""
    run = RunDir(run_dir)
    if not run.path.is_dir() or not (run.config.exists() or run.metrics.exists() or run.summary.exists()):
        raise RunDirError(
            f"{run_dir} holds no run (no config.toml, metrics.jsonl or summary.json); give a run's folder"
        )
    rows, summary = read_metrics(run.metrics), run.read_summary()
    columns = Columns.of(rows)
    config, facts = facts_of(run.path, columns)
    held_out = held_out_names(config)
    charts, more_charts = charts_of(rows, held_out)
    happened, left_out = events(rows, summary)
    page = render(
        "report.html",
        title=run.path.resolve().name,
        run_dir=run.path.resolve(),
        status=summary.get("status", "no summary yet"),
        status_class={"finished": "good", "failed": "bad"}.get(str(summary.get("status")), ""),
        condition=_condition(rows, summary, config),
        error=str(summary.get("error", "")),
        alerts=alerts(columns, facts),
        facts=_facts(rows, summary),
        outcomes=_outcomes(rows, summary, held_out),
        asked=_asked(rows, held_out),
        before_after=inline(run.before_after),
        texts=_texts(run.samples / "before_after.json"),
        frontier=inline(run.samples / "frontier.png"),
        reward_gap=inline(run.samples / "reward_gap.png"),
        drafts=_drafts(run.samples),
        charts=charts,
        more_charts=more_charts,
        samples=_samples(run.samples),
        shown_groups=groups_of(run.path),
        timings=timings(rows),
        failures=failures(rows, read_failures(run.path, _MAX_FAILURES)),
        events=happened,
        events_left_out=left_out,
        tables=[
            {"title": "Configuration", "rows": _config_rows(run.config)},
            {"title": "Environment and result", "rows": _environment_rows(run.path, summary)},
        ],
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )
    write_atomic(run.report, page.encode())
    return run.report


def report_failure(run_dir: Path, error: BaseException) -> None:
    """After a run that failed: keep why in its summary, and write its report. Never hides the failure.

    A run that failed before its first number leaves nothing to report.
    """
    run = RunDir(run_dir)
    with suppress(OSError, RunDirError):
        if not run.metrics.exists():
            return
        summary = run.read_summary()
        if summary.get("status") == "failed":
            run.write_summary({**summary, "error": f"{type(error).__name__}: {error}"})
        write_report(run_dir)


def render(template: str, **values: Any) -> str:
    """A page from a template of services/templates, with every value escaped but ready-made markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def _outcomes(
    rows: Sequence[MetricsRow], summary: Mapping[str, Any], held_out: Collection[str]
) -> list[dict[str, str]]:
    """What changed, as the cards of the header: held-out means, or else the training reward."""
    initial, final = summary.get("eval_initial") or {}, summary.get("eval_final") or {}
    pairs = {name: (initial.get(name), final.get(name)) for name in headline_means({**initial, **final}, held_out)}
    rewards = [value for row in rows if (value := row.get("reward/mean")) is not None]
    if not pairs and len(rewards) > 1:
        return [_change("training reward", "reward", rewards[0], rewards[-1])]
    return [_change(headline_label(name, held_out), name, *pair) for name, pair in pairs.items()]


def _change(label: str, name: str, before: float | None, after: float | None) -> dict[str, str]:
    return {
        "name": label,
        "before": _number(before),
        "after": _number(after),
        "change": "–" if before is None or after is None else f"{after - before:+.3f}",
        "direction": direction(name, before, after),
    }


def _asked(rows: Sequence[MetricsRow], held_out: Collection[str]) -> dict[str, Any] | None:
    """The trained reward and what it did not ask for, over the evaluations: at the first, at the one with the best
    reward, and at the last; None where there is nothing but the reward.
    """
    evaluations = [row for row in rows if row.get("eval/mean") is not None]
    names = dict.fromkeys(name.removeprefix("eval/") for row in evaluations for name in row if name.startswith("eval/"))
    metrics = [name for name in names if is_metric(name, held_out)]
    if not metrics:
        return None
    # The diversity comes last, and a metric's details after the metric.
    metrics.sort(key=lambda name: name == DIVERSITY)
    best = max(evaluations, key=lambda row: row["eval/mean"] or 0.0)
    chosen = {"first": evaluations[0], "best reward": best, "last": evaluations[-1]}

    def line(name: str, kind: str) -> dict[str, Any]:
        first, highest, last = (row.get(f"eval/{name}") for row in chosen.values())
        shown = name if name != "mean" else "reward"
        return {**_change(shown, name, first, last), "kind": kind, "best": _number(highest)}

    return {
        "columns": [f"{title} (step {int(row['step'] or 0)})" for title, row in chosen.items()],
        "rows": [line("mean", "trained on"), *(line(name, "held-out metric") for name in metrics)],
    }


def _condition(rows: Sequence[MetricsRow], summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What a reader must know of a run that is not finished; "" for one that is."""
    done = summary.get("num_steps") or max((int(row["step"] or 0) for row in rows), default=0)
    where = f"step {done} of {config.get('num_steps', '?')}"
    status = summary.get("status")
    if status == "finished":
        return ""
    if status == "failed":
        return f"This run failed after {where}. What follows is what there was until then."
    if status == "stopped":
        return f"This run was stopped after {where}: the last numbers here are not those of a finished run."
    return f"This run has no summary: it is still going, or was killed before it could write one. It is at {where}."


def _facts(rows: Sequence[MetricsRow], summary: Mapping[str, Any]) -> list[str]:
    """One line: steps, time, throughput, weights."""
    steps = summary.get("num_steps") or max((int(row["step"] or 0) for row in rows), default=0)
    facts = [f"{steps} steps"]
    for word, key in (("trained for", "train_s"), ("in all", "total_s")):
        if summary.get(key) is not None:
            facts.append(f"{word} {duration(float(summary[key]))}")
    rates = [rate for row in rows if (rate := row.get("throughput/samples_per_s")) is not None]
    if rates:
        facts.append(f"{statistics.median(rates):.1f} samples/s")
    if summary.get("weights_sha256"):
        facts.append(f"weights {str(summary['weights_sha256'])[:12]}")
    return facts


def _samples(folder: Path) -> list[dict[str, str]]:
    """The sample grids or texts, first and last included; evenly thinned out if there are many."""
    paths = sorted([*folder.glob("step_*.png"), *folder.glob("step_*.txt")])
    if len(paths) > _MAX_GRIDS:
        chosen = {round(index * (len(paths) - 1) / (_MAX_GRIDS - 1)) for index in range(_MAX_GRIDS)}
        paths = [path for index, path in enumerate(paths) if index in chosen]
    samples: list[dict[str, str]] = []
    for path in paths:
        number = path.stem.removeprefix("step_")
        title = f"step {int(number)}" if number.isdigit() else path.stem
        if path.suffix == ".txt":
            samples.append({"title": title, "text": path.read_text(errors="replace")[:_MAX_TEXT], "data": ""})
        elif (data := inline(path)) is not None:
            samples.append({"title": title, "text": "", "data": data})
    return samples


def _drafts(folder: Path) -> list[dict[str, str]]:
    """The first and the last picture of drafts and what was chosen of them; none if drafts were not explored."""
    paths = sorted(folder.glob("explore_step_*.png"))
    shown = [(path, inline(path)) for path in dict.fromkeys([*paths[:1], *paths[-1:]])]
    return [{"title": f"step {int(path.stem[-5:])}", "data": data} for path, data in shown if data is not None]


def _texts(path: Path) -> dict[str, Any] | None:
    """Held-out answers before and after; None if there are none, or the file is half written."""
    try:
        data = json.loads(path.read_bytes())
        for answer in (one for row in data["prompts"] for one in (*row["before"], *row["after"])):
            reward = "no reward" if answer["reward"] is None else f"reward {answer['reward']:.3f}"
            calls = f"{answer['nfe']} call{'' if answer['nfe'] == 1 else 's'}"
            budget = [] if answer["gamma"] is None else [f"gamma {answer['gamma']:.3g}"]
            answer["facts"] = " · ".join([reward, calls, *budget])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data if data["prompts"] else None


def inline(path: Path) -> str | None:
    """A picture as a data URL; None if there is none or it is half written."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if len(data) <= _INLINE_BYTES:
                picture.verify()
                return f"data:image/png;base64,{base64.b64encode(data).decode()}"
            jpeg, small = io.BytesIO(), picture.convert("RGB")
            small.thumbnail((_INLINE_SIDE, _INLINE_SIDE), Image.Resampling.LANCZOS)
            small.save(jpeg, format="JPEG", quality=85)
    except (OSError, SyntaxError):  # Pillow reports a broken PNG as a SyntaxError
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def _config_rows(path: Path) -> list[tuple[str, str]]:
    """The resolved configuration, flat; its text if it cannot be parsed."""
    if not path.exists():
        return [("config.toml", "missing")]
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return _flatten(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        return [("config.toml", f"cannot be parsed: {error}")]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            rows.extend(_flatten(item, f"{name}."))
        elif isinstance(item, list) and item and all(isinstance(part, dict) for part in item):
            for index, part in enumerate(item):
                rows.extend(_flatten(part, f"{name}.{index}."))
        else:
            rows.append((name, str(item)))
    # Plain keys above tables, as in the file that a person writes.
    return sorted(rows, key=lambda row: row[0].count(".") > prefix.count("."))


def _environment_rows(run: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the summary says, and on what the run ran; of a run that did not write that, where this page was written."""
    told = [row for row in _flatten(summary) if not row[0].startswith(_TOLD_ELSEWHERE)]
    ran = environment_rows(read_environment(run))
    return [*told, *(ran or [(f"{key} (of this page)", value) for key, value in environment_rows([environment()])])]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
