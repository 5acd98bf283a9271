"""A run's newest numbers as Prometheus families. Pure: from rows of metrics.jsonl to families, no server.

Every metric of a row is in exactly one family: SINGLE and FAMILIES say which, and `raylign_metric` has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(slots=True)
class RunNumbers:
    """What is known of one run."""

    name: str
    num_steps: int
    status: str = "running"
    step: int = 0
    newest: dict[str, float] = field(default_factory=dict[str, float])
    """The newest finite value of every metric."""
    failures: dict[str, float] = field(default_factory=dict[str, float])
    """Sums over all steps, by kind."""
    actors: dict[str, int] = field(default_factory=dict[str, int])
    """Rollout actors by state, where a driver answers."""
    updated_s: float | None = None
    """When the last row was written, seconds since 1970."""

    def take(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One more row, or more of the last one."""
        self.step = max(self.step, step)
        for name, value in metrics.items():
            if value is None or name == "step" or not math.isfinite(value):
                continue
            kind = failure_kind(name)
            if kind is None:
                self.newest[name] = value
            else:
                self.failures[kind] = self.failures.get(kind, 0.0) + value


@dataclass(frozen=True, slots=True)
class Family:
    """One family whose label is what stands for `*` in the metrics' names."""

    name: str
    help: str
    label: str
    prefix: str
    suffix: str = ""

    def value_of(self, metric: str) -> str | None:
        """The label's value for a metric of this family; None for any other."""
        inner = metric[len(self.prefix) : len(metric) - len(self.suffix) or None]
        fits = metric.startswith(self.prefix) and metric.endswith(self.suffix) and inner
        return inner if fits else None


# In this order: a metric belongs to the first that takes it.
FAMILIES: tuple[Family, ...] = (
    Family("raylign_reward_ci95", "Half the width of the 95 % interval of a mean reward", "reward", "ci95/reward/"),
    Family("raylign_heldout_ci95", "Half the width of the 95 % interval of a held-out mean", "metric", "ci95/eval/"),
    Family("raylign_reward", "Mean reward of the newest step, and its details", "reward", "reward/"),
    Family("raylign_heldout", "Held-out means of the newest evaluation", "metric", "eval/"),
    Family("raylign_staleness_versions", "Versions from a sample's weights to the newest", "stat", "staleness/"),
    Family("raylign_phase_seconds", "Wall seconds of the newest step, by phase of the loop", "phase", "time/", "_s"),
    Family("raylign_busy_seconds", "Busy seconds of all workers for the newest step, by phase", "phase", "busy/", "_s"),
    Family("raylign_samples_by_age", "Samples of the newest step, by versions of age", "age", "samples/age_"),
    Family("raylign_gradient", "Gradient norms before clipping", "kind", "grad/"),
    Family("raylign_ratio", "Policy ratio: mean, deviation, clipped share", "stat", "ratio/"),
    Family("raylign_metric", "Every other metric of the newest row, by its name", "metric", ""),
)
SINGLE: Mapping[str, tuple[str, str]] = {
    "loss": ("raylign_loss", "What was minimised, per item"),
    "loss/kl": ("raylign_kl", "Distance to the reference policy"),
    "throughput/samples_per_s": ("raylign_samples_per_second", "Samples trained on per second of the newest step"),
    "weight_version": ("raylign_weight_version", "Version of the weights that were published last"),
    "time/step_s": ("raylign_step_seconds", "Wall seconds of the newest step"),
    "time/since_start_s": ("raylign_run_seconds", "Wall seconds of the run, earlier parts included"),
    "parity/gap": ("raylign_parity_gap", "Relative difference of actors' and learner's answers"),
}
"""Metrics with a family of their own."""
RUN_FAMILIES: Mapping[str, str] = {
    "raylign_step": "Last completed step",
    "raylign_num_steps": "Steps that the run will make",
    "raylign_updated_timestamp_seconds": "When the run last wrote a step",
    "raylign_failures_total": "Samples without a reward, refused updates and left bands, by kind",
    "raylign_actors": "Rollout actors, by state",
    "raylign_runs": "Runs of the folder, by status",
}
"""Families that are no metric of a row."""


def names() -> set[str]:
    """Every name that is exported."""
    return {family.name for family in FAMILIES} | {name for name, _ in SINGLE.values()} | set(RUN_FAMILIES)


def failure_kind(metric: str) -> str | None:
    """The kind of failure that a metric counts; None for a metric that is no such count."""
    return metric.removeprefix("failed/") if metric.startswith("failed/") else None


def families(runs: Iterable[RunNumbers], statuses: Mapping[str, int] | None = None) -> list[Metric]:
    """Families over runs; `statuses` counts all runs of a folder, those without numbers too."""
    found: dict[str, Metric] = {}

    def gauge(name: str, text: str, labels: Mapping[str, str], value: float) -> None:
        family = found.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
        family.add_metric(list(labels.values()), value)  # type: ignore[attr-defined]  # both kinds have it

    for run in runs:
        own = {"run": run.name}
        gauge("raylign_step", RUN_FAMILIES["raylign_step"], own, run.step)
        gauge("raylign_num_steps", RUN_FAMILIES["raylign_num_steps"], own, run.num_steps)
        if run.updated_s is not None:
            name = "raylign_updated_timestamp_seconds"
            gauge(name, RUN_FAMILIES[name], own, run.updated_s)
        for metric, value in run.newest.items():
            _add(gauge, own, metric, value)
        for state, count in run.actors.items():
            gauge("raylign_actors", RUN_FAMILIES["raylign_actors"], {**own, "state": state}, count)
        for kind, count in run.failures.items():
            text = RUN_FAMILIES["raylign_failures_total"]
            family = found.setdefault(
                "raylign_failures_total", CounterMetricFamily("raylign_failures", text, labels=["run", "kind"])
            )
            family.add_metric([run.name, kind], count)  # type: ignore[attr-defined]
    for status, count in (statuses or {}).items():
        gauge("raylign_runs", RUN_FAMILIES["raylign_runs"], {"status": status}, count)
    return list(found.values())


def _add(
    gauge: Callable[[str, str, Mapping[str, str], float], None], own: Mapping[str, str], metric: str, value: float
) -> None:
    if metric in SINGLE:
        name, text = SINGLE[metric]
        gauge(name, text, own, value)
        return
    for family in FAMILIES:
        label = family.value_of(metric)
        if label is not None:
            gauge(family.name, family.help, {**own, family.label: label}, value)
            return
