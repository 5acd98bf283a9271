"""`raylign report`: one self-contained HTML page about a run, from its directory alone.

Pictures, texts and charts are inlined, nothing is loaded from anywhere, and every text is escaped. A run that is still
going, or that ended early, gets a page of what there is.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from raylign.errors import RunDirError
from raylign.metrics import MetricsRow, read_metrics
from services.charts import Points, line_chart, stacked_chart
from services.console import duration
from services.headlines import DIVERSITY, direction, headline_label, headline_means, is_metric
from services.run_dir import RunDir, write_atomic

_TEMPLATES = Path(__file__).parent / "templates"
_LIBRARIES = ("raylign", "torch", "ray", "diffusers", "transformers", "peft", "numpy")
_MAX_GRIDS = 8
_INLINE_BYTES = 1_500_000
"""A larger PNG is inlined as JPEG, so that a page with many grids still opens at once."""
_MAX_TEXT = 20_000
"""Characters of one step's texts on the page; the file has them all."""
_TIME_TOTALS = ("time/step_s", "time/since_start_s")
_NOT_CURVES = ("step", "weight_version", *_TIME_TOTALS)

_TEXT_MEASURES = ("nfe", "cached_calls", "gamma", "characters")

Series = Mapping[str, Points]


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class _ChartRow:
    """One chart: which metrics it shows, and how."""

    title: str
    shows: Callable[[str], bool]
    floor_zero: bool = False


def _is_spread(name: str) -> bool:
    return name.endswith(("/std_within_group", "/diversity"))


def _is_reward(name: str, prefix: str) -> bool:
    """A mean reward or one of its details; spreads, counts of groups and measures of texts have other scales."""
    other = _is_spread(name) or name.endswith("_groups") or name.removeprefix(prefix) in (*_TEXT_MEASURES, "failed")
    return name.startswith(prefix) and not other


def _is_measure(name: str, *measures: str) -> bool:
    """A measure of texts, in training ("nfe/mean") or evaluation ("eval/nfe")."""
    return any(name in (f"{measure}/mean", f"eval/{measure}") for measure in measures)


def _is_agreement(name: str) -> bool:
    """How well drafts foretell rewards."""
    return name in ("explore/kendall", "explore/spearman", "explore/recall")


# The order of the page, after the rewards. What no row shows follows under "more metrics".
_CHARTS = (
    _ChartRow("Calls of the network per text (NFE)", lambda name: _is_measure(name, "nfe", "cached_calls"), True),
    _ChartRow("Entropy budget (gamma)", lambda name: _is_measure(name, "gamma"), floor_zero=True),
    _ChartRow("Drafts: agreement of their ranking with the final one", _is_agreement),
    _ChartRow("Drafts: spread of the chosen over that of the pool", lambda name: name == "explore/spread", True),
    _ChartRow("Diversity and spread within groups", _is_spread, floor_zero=True),
    _ChartRow("Loss", lambda name: name in ("loss", "loss/policy")),
    _ChartRow("Distance from the reference (KL)", lambda name: "kl" in name.split("/"), floor_zero=True),
    _ChartRow("Gradient norm", lambda name: "grad_norm" in name or name.startswith("grad"), floor_zero=True),
    _ChartRow("Policy ratio", lambda name: name.startswith("ratio/")),
    _ChartRow("Samples per second", lambda name: name == "throughput/samples_per_s", floor_zero=True),
    _ChartRow("Staleness (versions)", lambda name: name.startswith("staleness/"), floor_zero=True),
    _ChartRow("Failures per step", lambda name: name.startswith("failed/") or name == "eval/failed", floor_zero=True),
)


def _reward_charts(held_out: Collection[str]) -> tuple[_ChartRow, ...]:
    """The rewards, and apart from them the metrics that no reward asked for."""

    def is_held_out(name: str) -> bool:
        return is_metric(name.removeprefix("eval/"), held_out)

    return (
        _ChartRow("Training reward", lambda name: _is_reward(name, "reward/")),
        _ChartRow("Held-out rewards", lambda name: _is_reward(name, "eval/") and not is_held_out(name)),
        _ChartRow("Held-out metrics, not trained on", lambda name: _is_reward(name, "eval/") and is_held_out(name)),
    )


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path. Raises RunDirError if it is none."""
    run = RunDir(run_dir)
    if not run.path.is_dir() or not (run.config.exists() or run.metrics.exists() or run.summary.exists()):
        raise RunDirError(
            f"{run_dir} holds no run (no config.toml, metrics.jsonl or summary.json); give a run's folder"
        )
    rows, summary = read_metrics(run.metrics), run.read_summary()
    held_out = _held_out_metrics(run.config)
    charts, more_charts = _charts(rows, held_out)
    page = render(
        "report.html",
        title=run.path.resolve().name,
        run_dir=run.path.resolve(),
        status=summary.get("status", "no summary yet"),
        status_class={"finished": "good", "failed": "bad"}.get(str(summary.get("status")), ""),
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
        tables=[
            {"title": "Configuration", "rows": _config_rows(run.config)},
            {"title": "Environment and result", "rows": _environment_rows(summary)},
        ],
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
    )
    write_atomic(run.report, page.encode())
    return run.report


def render(template: str, **values: Any) -> str:
    """A page from a template of services/templates, with every value escaped but ready-made markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**values)


def _charts(rows: Sequence[MetricsRow], held_out: Collection[str]) -> tuple[list[_Chart], list[_Chart]]:
    """The page's charts, and one small chart for each metric that none of them shows."""
    series = _series(rows)
    phases = {
        name.removeprefix("time/").removesuffix("_s"): points
        for name, points in series.items()
        if name.startswith("time/")
    }
    charts: list[_Chart] = []
    shown = {name for name in series if name.startswith("time/")}
    for row in (*_reward_charts(held_out), *_CHARTS):
        chosen = {name: points for name, points in series.items() if row.shows(name)}
        shown |= set(chosen)
        if any(value for points in chosen.values() for _, value in points):
            charts.append(_Chart(row.title, Markup(line_chart(_without_echoes(chosen), row.floor_zero))))
    svg = stacked_chart(phases)
    if svg:
        charts.append(_Chart("Seconds per step, by phase", Markup(svg)))
    more = [_Chart(name, Markup(line_chart({name: points}))) for name, points in series.items() if name not in shown]
    return [c for c in charts if c.svg], [c for c in more if c.svg]


def _series(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[float, float]]]:
    """Metrics by name over steps; nulls are gaps."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_CURVES and value is not None:
                series.setdefault(name, []).append((row["step"] or 0, value))
    return series


def _without_echoes(series: Series) -> Series:
    """Without `x/mean` where it only repeats a single reward, and without cached calls where there are none."""
    kept = {
        name: points
        for name, points in series.items()
        if "cached_calls" not in name or any(value for _, value in points)
    }
    for name, points in kept.items():
        prefix, _, last = name.partition("/")
        others = [other for other in kept if other.startswith(f"{prefix}/") and other.count("/") == 1]
        if last == "mean" and any(other != name and kept[other] == points for other in others):
            return {other: values for other, values in kept.items() if other != name}
    return kept


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


def _held_out_metrics(path: Path) -> list[str]:
    """The names of a run's `only_eval` rewards, from its resolved configuration; none if it cannot be read."""
    try:
        rewards = tomllib.loads(path.read_text(encoding="utf-8", errors="replace")).get("rewards", [])
        return [str(reward["name"]) for reward in rewards if reward.get("only_eval")]
    except (OSError, tomllib.TOMLDecodeError, AttributeError, KeyError, TypeError):
        return []


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
            jpeg = io.BytesIO()
            picture.convert("RGB").save(jpeg, format="JPEG", quality=88)
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


def _environment_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the summary says, and where this page was written."""
    told = [row for row in _flatten(summary) if not row[0].startswith(("eval_initial.", "eval_final."))]
    here = [("Python", platform.python_version()), ("system", platform.platform()), ("cores", str(os.cpu_count()))]
    for name in _LIBRARIES:
        try:
            here.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return [*told, *here]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
