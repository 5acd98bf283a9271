"""Prometheus' /metrics: of a folder of runs on the run API, and of one run on a port of its driver.

raylign serve-runs runs          GET /metrics    every run of the folder that is live
tracking.metrics_port = 9464     GET /metrics    this run, as long as its driver lives
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from raylign.errors import ConfigError
from raylign.metrics import read_metrics
from services.dashboard.columns import Columns, MetricsTail
from services.run_dir import RunDir
from services.run_metrics import RunNumbers, failure_kind, families

if TYPE_CHECKING:
    import numpy as np

    from services.run_api import RunView

CONTENT_TYPE: str = CONTENT_TYPE_LATEST


class ExporterSink:
    """Answers at http://host:port/metrics with a run's newest numbers, until it is closed."""

    def __init__(self, run_dir: Path, num_steps: int, host: str, port: int) -> None:
        """Raises ConfigError if the port cannot be had. Of a resumed run the earlier rows count too."""
        self._numbers = RunNumbers(run_dir.resolve().name, num_steps)
        for row in read_metrics(RunDir(run_dir).metrics):
            self._numbers.take(int(row["step"] or 0), row)
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(_Collected(self._families))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"tracking.metrics_port {port} of {host} cannot be listened at: {error.strerror}; choose another, or "
                "leave it out"
            ) from None
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._numbers.take(step, metrics)
            self._numbers.updated_s = time.time()

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Nothing: Prometheus has numbers only."""

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Nothing: their mean and spread are metrics."""

    def texts(self, step: int, name: str, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def _families(self) -> list[Metric]:
        with self._lock:
            return families([self._numbers])


class FolderMetrics:
    """The live runs of a folder in Prometheus' text format. Threads may share it."""

    def __init__(self, view: Callable[[Path], RunView]) -> None:
        """`view` says what a run's directory and driver tell of it."""
        self._view = view
        self._tails: dict[Path, MetricsTail] = {}
        self._lock = threading.Lock()

    def text(self, runs: Iterable[Path]) -> bytes:
        """The exposition of now."""
        views = {path: self._view(path) for path in runs}
        live = [self._numbers(path, view) for path, view in views.items() if view.live]
        statuses = Counter(view.status for view in views.values())
        registry = CollectorRegistry()
        registry.register(_Collected(lambda: families(live, statuses)))
        return generate_latest(registry)

    def _numbers(self, path: Path, view: RunView) -> RunNumbers:
        metrics = RunDir(path).metrics
        with self._lock:
            tail = self._tails.setdefault(path, MetricsTail(metrics))
        numbers = numbers_of(path.name, tail.refresh())
        if metrics.exists():
            numbers.updated_s = metrics.stat().st_mtime
        state = view.state
        if state is not None:
            numbers.step, numbers.num_steps = state.step, state.num_steps
            if state.pool is not None:
                kinds = ("wanted", "in_service", "joining", "away", "leaving", "hung")
                numbers.actors = {kind: int(getattr(state.pool, kind)) for kind in kinds}
        return numbers


def numbers_of(name: str, columns: Columns) -> RunNumbers:
    """A run's numbers from its metrics as columns: the newest of each, and sums of failures."""
    numbers = RunNumbers(name, 0, step=columns.steps[-1] if columns.steps else 0)
    for metric in columns.values:
        points = [value for _, value in columns.points(metric)]
        if not points:
            continue
        kind = failure_kind(metric)
        if kind is None:
            numbers.newest[metric] = points[-1]
        else:
            numbers.failures[kind] = sum(points)
    return numbers


class _Collected:
    """What prometheus_client calls a collector: an object that is asked for its families at every scrape."""

    def __init__(self, made: Callable[[], list[Metric]]) -> None:
        self._made = made

    def collect(self) -> Any:
        return self._made()

    def describe(self) -> Any:
        return []
