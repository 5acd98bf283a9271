"""Which curves a report has, in which order, and what bands they have. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from raylign.metrics import MetricsRow
from services.charts import Points, line_chart, stacked_chart
from services.confidence import INTERVAL
from services.guard_config import SIGNALS
from services.headlines import is_metric

_GAP_INTERVAL = "eval/gap_ci95/"
_TIME_TOTALS = ("time/step_s", "time/since_start_s")
_NOT_CURVES = ("step", "weight_version", *_TIME_TOTALS)
_LEVELS = tuple(f"guard/{signal}" for signal in SIGNALS)
_TEXT_MEASURES = ("nfe", "cached_calls", "gamma", "characters")

Series = Mapping[str, Points]


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as the page shows it."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class _ChartRow:
    """One chart: which metrics it shows, and how."""

    title: str
    shows: Callable[[str], bool]
    floor_zero: bool = False


def _is_spread(name: str) -> bool:
    return name.endswith(("/std_within_group", "/diversity")) and name not in _LEVELS


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
    _ChartRow("Clipped ratios (share)", lambda name: name == "ratio/clip_fraction", floor_zero=True),
    _ChartRow("Gradient norm", lambda name: "grad_norm" in name or name.startswith("grad"), floor_zero=True),
    _ChartRow("Policy ratio", lambda name: name.startswith("ratio/") and name != "ratio/clip_fraction"),
    _ChartRow("Guard: levels of its signals (1 is the limit)", lambda name: name in _LEVELS, floor_zero=True),
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


def charts_of(rows: Sequence[MetricsRow], held_out: Collection[str]) -> tuple[list[Chart], list[Chart]]:
    """The page's charts, and one small chart for each metric that none of them shows."""
    everything = series_of(rows)
    bands = {measured: points for name, points in everything.items() if (measured := _measured(name))}
    series = {name: points for name, points in everything.items() if _measured(name) is None}
    phases = {
        name.removeprefix("time/").removesuffix("_s"): points
        for name, points in series.items()
        if name.startswith("time/")
    }
    charts: list[Chart] = []
    shown = {name for name in series if name.startswith("time/")}
    for row in (*_reward_charts(held_out), *_CHARTS):
        chosen = {name: points for name, points in series.items() if row.shows(name)}
        shown |= set(chosen)
        if any(value for points in chosen.values() for _, value in points):
            charts.append(Chart(row.title, Markup(line_chart(_without_echoes(chosen), row.floor_zero, bands))))
    svg = stacked_chart(phases)
    if svg:
        charts.append(Chart("Seconds per step, by phase", Markup(svg)))
    more = [
        Chart(name, Markup(line_chart({name: points}, bands=bands)))
        for name, points in series.items()
        if name not in shown
    ]
    return [c for c in charts if c.svg], [c for c in more if c.svg]


def series_of(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[float, float]]]:
    """Metrics by name over steps; nulls are gaps."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _NOT_CURVES and value is not None:
                series.setdefault(name, []).append((row["step"] or 0, value))
    return series


def _measured(name: str) -> str | None:
    """The metric whose interval this is; None for one that is no interval."""
    if name.startswith(_GAP_INTERVAL):
        return f"eval/gap/{name.removeprefix(_GAP_INTERVAL)}"
    return name.removeprefix(INTERVAL) if name.startswith(INTERVAL) else None


def _without_echoes(series: Series) -> Series:
    """Without `x/mean` where it only repeats a single reward, details that only repeat their reward, `loss/policy`
    where it is the loss, and cached calls where there are none."""
    kept = {
        name: points
        for name, points in series.items()
        if "cached_calls" not in name or any(value for _, value in points)
    }
    if kept.get("loss") == kept.get("loss/policy"):
        kept.pop("loss/policy", None)
    repeated = [name for name, points in kept.items() if name.count("/") > 1 and kept.get(_parent(name)) == points]
    kept = {name: points for name, points in kept.items() if name not in repeated}
    for name, points in kept.items():
        prefix, _, last = name.partition("/")
        others = [other for other in kept if other.startswith(f"{prefix}/") and other.count("/") == 1]
        if last == "mean" and any(other != name and kept[other] == points for other in others):
            return {other: values for other, values in kept.items() if other != name}
    return kept


def _parent(name: str) -> str:
    """The reward that a detail belongs to: "reward/ocr" of "reward/ocr/exact"."""
    return name.rpartition("/")[0]
