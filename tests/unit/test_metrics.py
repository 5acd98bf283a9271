"""Metrics sinks: each step once, whatever is killed when, and nothing heavy imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.errors import ConfigError, RunDirError
from raylign.metrics import (
    SINKS,
    JsonlSink,
    MetricsSink,
    SinkFan,
    TensorBoardSink,
    histogram,
    make_sinks,
    read_metrics,
)


def _steps(run_dir: Path) -> list[float | None]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


def test_a_step_is_one_flushed_json_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(1, {"reward/mean": 0.25, "weight_version": 1})
    # Read while the sink is open: a person follows a run with `tail -f`.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward/mean": 0.25, "weight_version": 1}\n'
    sink.close()


def test_values_that_are_not_finite_become_null_and_scalars_become_floats(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    values: dict[str, Any] = {"c": np.float32(0.5), "d": torch.tensor(2.0), "e": 3, "f": True}
    sink.log(1, {"a": float("nan"), "b": float("inf"), **values})
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "a": None, "b": None, "c": 0.5, "d": 2.0, "e": 3, "f": 1.0}


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    with pytest.raises(TypeError, match="'reward/mean' must be a number, got 'high'"):
        sink.log(1, {"reward/mean": "high"})  # type: ignore[dict-item]
    sink.close()


def test_metrics_of_one_step_in_two_calls_share_a_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(0, {"eval/ocr": 0.4})
    sink.log(1, {"loss": 0.123456789, "time/since_start_s": 10.25})
    sink.log(1, {"eval/ocr": 0.5, "time/since_start_s": 11})
    sink.log(2, {"loss": 0.1})
    sink.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert _steps(tmp_path) == [0, 1, 2]
    assert rows[1] == {"step": 1, "loss": 0.123456789, "time/since_start_s": 11, "eval/ocr": 0.5}


def test_an_earlier_step_is_refused(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(5, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 4 arrived after step 5"):
        sink.log(4, {"loss": 1.0})
    sink.close()


def test_a_resumed_run_has_each_step_exactly_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(8):
        sink.log(step, {"loss": float(step)})
    sink.close()
    sink = JsonlSink(tmp_path, resumed_step=4)
    for step in range(5, 8):
        sink.log(step, {"loss": -float(step)})
    sink.close()
    assert _steps(tmp_path) == list(range(8))
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, -5, -6, -7]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert _steps(tmp_path) == [1]
    sink = JsonlSink(tmp_path, resumed_step=1)
    sink.log(2, {"loss": 2.0})
    sink.close()
    assert _steps(tmp_path) == [1, 2]


def test_the_step_of_the_checkpoint_may_be_evaluated_again(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.log(4, {"loss": 1.0, "eval/ocr": 0.5})
    sink.close()
    sink = JsonlSink(tmp_path, resumed_step=4)
    sink.log(4, {"eval/ocr": 0.5})
    sink.log(5, {"loss": 0.5})
    sink.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 4, "loss": 1.0, "eval/ocr": 0.5},
        {"step": 5, "loss": 0.5},
    ]


def test_resuming_without_a_record_starts_one(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path, resumed_step=3)
    sink.log(4, {"loss": 1.0})
    sink.close()
    assert _steps(tmp_path) == [4]


def test_a_new_run_does_not_append_to_an_old_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunDirError, match="raylign resume"):
        JsonlSink(tmp_path)


@pytest.mark.parametrize("line", ["not json", '["step"]', '{"loss": 1}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2 .*delete that line"):
        read_metrics(tmp_path / "metrics.jsonl")


def _events(path: Path) -> list[Any]:
    """The events of a file, read by TensorBoard itself, which checks the checksums."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2

    events: Any = event_pb2
    return [events.Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]


def test_tensorboard_reads_scalars_and_pictures(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.log(3, {"reward/mean": 0.5, "loss": float("nan")})
    sink.images(3, "samples", np.full((4, 6, 3), 200, np.uint8))
    sink.close()
    first, scalars, picture = _events(sink.path)
    assert first.file_version == "brain.Event:2"
    assert scalars.step == 3
    assert [value.tag for value in scalars.summary.value] == ["reward/mean", "loss"]
    assert scalars.summary.value[0].simple_value == 0.5
    image = picture.summary.value[0].image
    assert (image.height, image.width, image.encoded_image_string[1:4]) == (4, 6, b"PNG")


def test_tensorboard_itself_reads_histograms_and_texts_as_they_were(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    sink = TensorBoardSink(tmp_path)
    sink.values(2, "reward", [0.0, 0.0, 1.0, 0.5])
    sink.values(3, "reward", [0.25, 0.25])
    sink.values(4, "reward", [])
    sink.texts(2, "samples", "1 < 2 ``` # no heading")
    sink.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    spread, same = read.Tensors("reward")
    table = tensor_util.make_ndarray(spread.tensor_proto)
    assert (table[0, 0], table[-1, 1], table[:, 2].sum()) == (0.0, 1.0, 4.0)
    assert [row[2] for row in table if row[0] <= 0.5 < row[1]] == [1.0]
    assert tensor_util.make_ndarray(same.tensor_proto)[:, 2].sum() == 2.0
    (told,) = read.Tensors("samples")
    assert told.tensor_proto.string_val == [b"````\n1 < 2 ``` # no heading\n````"]


def test_buckets_hold_every_value_once() -> None:
    assert histogram([0.0, 0.5, 1.0], bins=2) == ([0.5, 1.0], [1.0, 2.0])
    limits, counts = histogram([3.0, 3.0])
    assert counts == [2.0]
    assert limits[0] > 3.0
    limits, counts = histogram([-1e-300, 0.0, 1e300, 7.0])
    assert (sum(counts), limits[-1]) == (4.0, 1e300)


def test_a_resumed_run_tells_tensorboard_where_to_cut(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    first.close()
    second = TensorBoardSink(tmp_path, resumed_step=4)
    second.close()
    assert first.path.name < second.path.name
    _, start = _events(second.path)
    assert start.step == 5
    assert start.session_log.status == start.session_log.START


class _ListSink:
    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str]] = []
        self.more: list[object] = []
        self.closed = False
        self._fails = fails

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self.pictures.append((step, name))

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        self.more.append((step, name, list(values)))

    def texts(self, step: int, name: str, text: str) -> None:
        self.more.append((step, name, text))

    def close(self) -> None:
        self.closed = True
        if self._fails:
            raise OSError("disk full")


def test_a_fan_forwards_to_all_and_closes_all_even_if_one_fails() -> None:
    sinks = [_ListSink(), _ListSink(fails=True), _ListSink()]
    fan: MetricsSink = SinkFan(sinks)
    fan.log(1, {"loss": 0.5})
    fan.images(1, "samples", np.zeros((1, 1, 3), np.uint8))
    fan.values(1, "reward", [0.5])
    fan.texts(1, "samples", "a")
    with pytest.raises(OSError, match="disk full"):
        fan.close()
    assert all(sink.rows == [(1, {"loss": 0.5})] and sink.pictures == [(1, "samples")] for sink in sinks)
    assert all(sink.more == [(1, "reward", [0.5]), (1, "samples", "a")] for sink in sinks)
    assert all(sink.closed for sink in sinks)


def test_every_row_of_the_table_is_a_sink_that_starts_and_resumes(tmp_path: Path) -> None:
    for resumed in (None, 1):
        sinks = make_sinks(tuple(SINKS), tmp_path, resumed)
        sinks.log((resumed or 0) + 1, {"loss": 1.0})
        sinks.images((resumed or 0) + 1, "samples", np.zeros((2, 2, 3), np.uint8))
        sinks.values((resumed or 0) + 1, "reward", [0.0, 1.0])
        sinks.texts((resumed or 0) + 1, "samples", "an answer")
        sinks.close()
        sinks.close()
    assert _steps(tmp_path) == [1, 2]


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wandbb'; known sinks: .*jsonl"):
        make_sinks(["jsonl", "wandbb"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_both_records_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from raylign.metrics import make_sinks\n"
        "assert 'tensorboard' not in sys.modules and 'numpy' not in sys.modules\n"
        f"make_sinks(['jsonl', 'tensorboard'], Path({str(tmp_path)!r})).log(1, {{'loss': 1.0}})\n"
        "print(sorted({'torch', 'tensorflow', 'ray'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, check=True
    )
    assert done.stdout.strip() == "[]"
