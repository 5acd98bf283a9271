"""Spans: a trace per step with its phases at their true times, read back from OpenTelemetry's own exporter."""

from __future__ import annotations

from typing import Any

import pytest

from services.phase_clock import PhaseClock
from services.spans import SpanSink

pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk, which ray[default] brings")

S = 10**9


class _Clock:
    now = 100 * S

    def __call__(self) -> int:
        return self.now


def _spans() -> tuple[SpanSink, _Clock, Any]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, clock, provider = InMemorySpanExporter(), _Clock(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return SpanSink(provider, "my-run", clock), clock, exporter


def test_a_step_holds_its_phases_at_the_times_they_had() -> None:
    sink, clock, exporter = _spans()
    for at, phase, seconds in ((102, "rollout", 2.0), (103, "train", 0.5), (105, "publish", 1.0)):
        clock.now = at * S
        sink.phase(phase, seconds)
    clock.now = 106 * S
    sink.log(7, {"time/step_s": 6.0, "reward/mean": 0.25, "other": 1.0})
    spans = {span.name: span for span in exporter.get_finished_spans()}
    step = spans.pop("step")
    assert (step.start_time, step.end_time, step.parent) == (100 * S, 106 * S, None)
    assert dict(step.attributes) == {"raylign.run": "my-run", "raylign.step": 7, "reward.mean": 0.25}
    assert {name: (span.start_time // S, span.end_time // S) for name, span in spans.items()} == {
        "rollout": (100, 102),
        "train": (102, 103),
        "publish": (104, 105),
    }
    assert all(span.parent.span_id == step.context.span_id for span in spans.values())
    assert {span.context.trace_id for span in spans.values()} == {step.context.trace_id}


def test_what_was_over_before_the_step_is_no_part_of_it_and_steps_are_traces_of_their_own() -> None:
    sink, clock, exporter = _spans()
    sink.phase("evaluate", 20.0)  # before the first step
    sink.log(0, {"eval/mean": 0.5})
    clock.now = 101 * S
    sink.phase("train", 0.5)
    sink.log(1, {"time/step_s": 0.75})
    clock.now = 102 * S
    sink.log(2, {"time/step_s": 1.0})
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["evaluate", "train", "step", "step"]
    evaluate, train, first, second = spans
    assert evaluate.parent is None
    assert train.parent.span_id == first.context.span_id
    assert first.context.trace_id != second.context.trace_id


def test_the_last_hand_off_is_sent_when_the_run_ends_and_nothing_afterwards() -> None:
    sink, _, exporter = _spans()
    sink.phase("publish", 1.0)
    sink.close()
    sink.close()
    (span,) = exporter.get_finished_spans()
    assert (span.name, dict(span.attributes)) == ("publish", {"raylign.run": "my-run"})


def test_the_loop_tells_of_every_phase() -> None:
    heard: list[tuple[str, float]] = []
    clock = PhaseClock(lambda phase, seconds: heard.append((phase, seconds)))
    clock.add("train", 1.0)
    clock.add("train", 2.0)
    assert heard == [("train", 1.0), ("train", 2.0)]
    assert clock.drain() == {"train": 3.0}
    PhaseClock().add("train", 1.0)
