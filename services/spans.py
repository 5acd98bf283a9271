"""Steps and phases as OpenTelemetry spans.

A step is the root of its own trace, with the run's name, its step and its reward; the phases of the loop lie below it
with the times at which they really began and ended, so that a hand-off beside training is seen beside it. A phase that
was over before its step began (the first publication, an evaluation before training) is a root of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_TOLD = ("reward/mean", "loss", "throughput/samples_per_s", "staleness/max")
"""Metrics that a step's span carries."""
_TRACES = "/v1/traces"
_TIMEOUT_S = 5
_NS = 10**9


class SpanSink:
    """See the module. Phases come in by `phase`, steps by `log`."""

    def __init__(self, provider: Any, run: str, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """`provider` is an OpenTelemetry SDK TracerProvider of this sink's own; `close` shuts it down."""
        self._provider = provider
        self._tracer: Any = provider.get_tracer("raylign")
        self._run = run
        self._clock_ns = clock_ns
        self._phases: list[tuple[str, int, int]] = []

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the loop has just ended, and took so long."""
        end = self._clock_ns()
        self._phases.append((name, end - int(seconds * _NS), end))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's row closes its span. Rows without a duration (an evaluation's) close none."""
        seconds = metrics.get("time/step_s")
        if seconds is None:
            return
        from opentelemetry.trace import set_span_in_context

        end = self._clock_ns()
        start = end - int(seconds * _NS)
        told = {name.replace("/", "."): float(metrics[name]) for name in _TOLD if name in metrics}
        span: Any = self._tracer.start_span("step", start_time=start, attributes=self._attributes(step) | told)
        below = set_span_in_context(span)
        for name, begin, over in self._phases:
            self._emit(name, begin, over, step, below if over > start else None)
        self._phases.clear()
        span.end(end_time=end)

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Nothing: spans tell of time."""

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Nothing."""

    def texts(self, step: int, name: str, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Calling it twice is fine."""
        phases, self._phases = self._phases, []
        for name, begin, over in phases:
            self._emit(name, begin, over, None, None)
        self._provider.shutdown()

    def _emit(self, name: str, begin: int, over: int, step: int | None, below: Any) -> None:
        span: Any = self._tracer.start_span(name, below, start_time=begin, attributes=self._attributes(step))
        span.end(end_time=over)

    def _attributes(self, step: int | None) -> dict[str, str | int]:
        return {"raylign.run": self._run, **({} if step is None else {"raylign.step": step})}


def otlp_provider(address: str) -> Any:
    """A provider that sends spans in the background to an OTLP/HTTP collector, and drops them where none answers."""
    import importlib

    # Optional, so a type checker may not know it; it brings the SDK.
    traces: Any = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    endpoint = address if address.rstrip("/").endswith(_TRACES) else address.rstrip("/") + _TRACES
    provider = TracerProvider(resource=Resource.create({"service.name": "raylign"}), shutdown_on_exit=False)
    exporter = traces.OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, export_timeout_millis=1000 * _TIMEOUT_S))
    return provider
