"""Where a run's numbers go: one JSON line per step, TensorBoard, or several at once.

    controller ──log(step, metrics)──▶ SinkFan ──▶ JsonlSink        metrics.jsonl, the record that reports read
                                               └─▶ TensorBoardSink  tensorboard/events.out.tfevents.*

A sink that opens an interrupted run is told the step it resumes from and drops what lies beyond it, so that the
record holds each step exactly once. Importing this module loads neither torch, numpy nor TensorBoard.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from raylign.errors import ConfigError, RunDirError

if TYPE_CHECKING:
    import numpy as np

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

MetricsRow = dict[str, float | None]
"""One step as read back: `step` and every metric; None where the value was not finite."""


class MetricsSink(Protocol):
    """A place that numbers and pictures go to. Steps never decrease."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. A second call for the latest step adds to it."""
        ...

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Record one RGB uint8 picture (a sample grid)."""
        ...

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Record the finite numbers behind a mean, such as the rewards of a step's samples."""
        ...

    def texts(self, step: int, name: str, text: str) -> None:
        """Record prompts and answers, as people read them."""
        ...

    def close(self) -> None:
        """Flush and let go of files. Calling it twice is fine."""
        ...


class JsonlSink:
    """`metrics.jsonl`: one object per step, flushed as it is written; non-finite values become null.

    Metrics that arrive in several calls for one step (training, then evaluation) are merged into its one line.
    Pictures are not kept here; they lie in the run's `samples/`.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None = None) -> None:
        """`resumed_step` is the last finished step of the checkpoint that the run goes on from; None starts anew."""
        self.path = run_dir / METRICS_FILE
        self._row: MetricsRow = {}
        if resumed_step is None:
            if self.path.exists() and self.path.stat().st_size:
                raise RunDirError(
                    f"{self.path} already holds a run's metrics; go on with `raylign resume {run_dir}`, "
                    "or choose another --run-dir"
                )
        else:
            self._row = self._keep_until(resumed_step)
        self._file = self.path.open("ab")
        self._row_offset = self._file.tell() - (len(_encode(self._row)) if self._row else 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        last = self._row.get("step")
        if last is not None and step < last:
            raise ValueError(f"metrics of step {step} arrived after step {last:g}; log steps in order")
        row: MetricsRow = dict(self._row) if step == last else {"step": step}
        row.update((name, _finite(name, value)) for name, value in metrics.items() if name != "step")
        if step == last:
            self._file.truncate(self._row_offset)
        else:
            self._row_offset = os.fstat(self._file.fileno()).st_size
        self._row = row
        self._file.write(_encode(row))
        self._file.flush()

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Nothing: a text record has no place for pictures."""

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """Nothing: the run's `groups/` have every sample's."""

    def texts(self, step: int, name: str, text: str) -> None:
        """Nothing: they lie in the run's `samples/`."""

    def close(self) -> None:
        self._file.close()

    def _keep_until(self, resumed_step: int) -> MetricsRow:
        """Drop a torn last line and every later step; return the last row kept."""
        rows = [row for row in read_metrics(self.path) if (row["step"] or 0) <= resumed_step]
        partial = self.path.with_suffix(".jsonl.partial")
        partial.write_bytes(b"".join(_encode(row) for row in rows))
        os.replace(partial, self.path)
        return rows[-1] if rows else {}


class TensorBoardSink:
    """Scalars and picture grids as TensorBoard events, written by TensorBoard's own record writer.

    Neither torch nor TensorFlow is imported: the event protocol buffers and the record framing are all it takes.
    A resumed run opens a further event file whose first event tells TensorBoard to drop the steps beyond it.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None = None) -> None:
        # Imported here because it takes 0.2 s, and only a run that trains pays for it.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Protocol buffers make their classes at import, so a type checker cannot know them.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder = run_dir / TENSORBOARD_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.time_ns()
        # TensorBoard reads the files of a folder in the order of their names, so the time leads.
        self.path = folder / f"events.out.tfevents.{stamp // 10**9}.{stamp % 10**9:09d}.{socket.gethostname()}"
        self._file = self.path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(self._events.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed_step is not None:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(self._events.Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write_summary(step, values)

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        from PIL import Image

        height, width, _ = image_HWC.shape
        png = io.BytesIO()
        Image.fromarray(image_HWC).save(png, format="PNG")
        image = self._summaries.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
        )
        self._write_summary(step, [self._summaries.Summary.Value(tag=name, image=image)])

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        """As a histogram."""
        if not values:
            return
        limits, counts = histogram(values)
        histo = self._summaries.HistogramProto(
            min=min(values),
            max=max(values),
            num=len(values),
            sum=math.fsum(values),
            sum_squares=math.fsum(value * value for value in values),
            bucket_limit=limits,
            bucket=counts,
        )
        self._write_summary(step, [self._summaries.Summary.Value(tag=name, histo=histo)])

    def texts(self, step: int, name: str, text: str) -> None:
        """In a code block, for TensorBoard reads Markdown."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2

        tensors: Any = tensor_pb2
        shapes: Any = tensor_shape_pb2
        types: Any = types_pb2
        metadata = self._summaries.SummaryMetadata(
            plugin_data=self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        )
        value = tensors.TensorProto(
            dtype=types.DT_STRING, string_val=[fenced(text).encode()], tensor_shape=shapes.TensorShapeProto()
        )
        self._write_summary(step, [self._summaries.Summary.Value(tag=name, metadata=metadata, tensor=value)])

    def close(self) -> None:
        self._file.close()

    def _write_summary(self, step: int, values: Sequence[object]) -> None:
        summary = self._summaries.Summary(value=values)
        self._write(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()


class Closeable(Protocol):
    """What has files or threads of its own to let go of."""

    def close(self) -> None: ...


CloseableT = TypeVar("CloseableT", bound=Closeable)


class SinkFan:
    """Several sinks as one. Every sink is closed even if one of them fails to."""

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self._sinks = tuple(sinks)
        self._others: list[Closeable] = []

    def closing(self, other: CloseableT) -> CloseableT:
        """Something else that is written during the run, to be closed with the sinks; returns it."""
        self._others.append(other)
        return other

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        for sink in self._sinks:
            sink.images(step, name, image_HWC)

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        for sink in self._sinks:
            sink.values(step, name, values)

    def texts(self, step: int, name: str, text: str) -> None:
        for sink in self._sinks:
            sink.texts(step, name, text)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for one in (*self._sinks, *self._others):
                stack.callback(one.close)


SINKS: dict[str, Callable[[Path, int | None], MetricsSink]] = {
    "jsonl": JsonlSink,
    "tensorboard": TensorBoardSink,
}


def make_sinks(
    names: Sequence[str],
    run_dir: Path,
    resumed_step: int | None = None,
    more: Sequence[Callable[[], MetricsSink]] = (),
) -> SinkFan:
    """Open the named sinks in a run directory, and `more`. Raises ConfigError naming the known ones."""
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise ConfigError(f"no metrics sink called {unknown[0]!r}; known sinks: {', '.join(SINKS)}")
    opened: list[MetricsSink] = []
    try:
        opened.extend(SINKS[name](run_dir, resumed_step) for name in names)
        opened.extend(opening() for opening in more)
    except BaseException:  # whatever stops the opening, what is open is closed
        SinkFan(opened).close()
        raise
    return SinkFan(opened)


def histogram(values: Sequence[float], bins: int = 30) -> tuple[list[float], list[float]]:
    """Upper limits and counts of equally wide buckets over the values' range; one narrow bucket where they are equal.

    Example:
        limits, counts = histogram([0.0, 0.5, 1.0], bins=2)  # [0.5, 1.0], [1.0, 2.0]
    """
    low, high = min(values), max(values)
    if high == low:
        return [math.nextafter(high, math.inf)], [float(len(values))]
    width = (high - low) / bins
    counts = [0.0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1.0
    return [*(low + width * place for place in range(1, bins)), high], counts


def fenced(text: str) -> str:
    """A text as a code block of Markdown, which it cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def read_metrics(path: Path) -> list[MetricsRow]:
    """Every row of a `metrics.jsonl`, [] if there is none yet. A torn last line (a killed run) is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[MetricsRow] = []
    # What follows the last newline was cut off while it was written; a whole file ends with an empty piece.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunDirError(f"{path}:{number} is not JSON ({error}); delete that line to go on") from None
        if not isinstance(row, dict) or "step" not in row:
            raise RunDirError(f"{path}:{number} is no metrics row with a `step`: {line[:80]!r}; delete that line")
        rows.append(row)
    return rows


def _encode(row: MetricsRow) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _finite(name: str, value: Any) -> float | None:
    """The value as plain JSON: null if not finite. Counts stay integers; numpy and torch scalars become floats."""
    if type(value) not in (int, float):
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metric {name!r} must be a number, got {value!r}") from None
    return value if math.isfinite(value) else None
