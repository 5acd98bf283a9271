"""Trackers: refused before anything starts, given numbers only unless told, resumed as the same run, and outlived."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylign.config import load_config
from raylign.errors import ConfigError
from raylign.metrics import read_metrics
from services.config import RunConfig
from services.config_changes import NEUTRAL
from services.tracking import (
    Outlived,
    TrackingConfig,
    TrackioConfig,
    WandbConfig,
    check_tracking,
    open_sinks,
    shared_config,
)
from services.tracking_sinks import TrackioSink, WandbSink

PICTURE = np.zeros((2, 2, 3), np.uint8)


class _Run:
    """A run of either package, as far as a sink knows it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.finished = 0

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        self.rows.append(row if step is None else {"at": step, **row})

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def finish(self) -> None:
        print("Run finished. Uploading logs")  # noqa: T201 - as trackio does
        self.finished += 1


class _Package:
    """`wandb` and `trackio`, as far as a sink knows them."""

    class Error(Exception):
        pass

    def __init__(self, fails: Exception | None = None) -> None:
        self.begun: list[dict[str, Any]] = []
        self.run = _Run()
        self._fails = fails

    def init(self, **given: Any) -> _Run:
        if self._fails is not None:
            raise self._fails
        print("* Created new run")  # noqa: T201 - as trackio does
        self.begun.append(given)
        return self.run

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def Image(self, image: np.ndarray) -> tuple[str, tuple[int, ...]]:
        return "picture", image.shape

    def Histogram(self, values: Sequence[float]) -> tuple[str, list[float]]:
        return "histogram", list(values)

    def Table(self, columns: list[str], data: list[list[Any]]) -> tuple[str, list[list[Any]]]:
        return "table", data

    def Markdown(self, text: str) -> tuple[str, str]:
        return "markdown", text


def _log_everything(sink: Any) -> None:
    sink.log(1, {"loss": 0.5, "reward/mean": float("nan")})
    sink.images(1, "samples", PICTURE)
    sink.values(1, "reward", [0.0, 1.0])
    sink.values(1, "reward", [])
    sink.texts(1, "samples", "a ``` b")
    sink.close()
    sink.close()


def test_wandb_gets_numbers_alone_and_nothing_of_the_machine_but_its_load(tmp_path: Path) -> None:
    package = _Package()
    _log_everything(WandbSink(WandbConfig(), tmp_path / "first", {"seed": 1}, _made(tmp_path / "first", package)))
    (begun,) = package.begun
    assert (begun["project"], begun["name"], begun["mode"], begun["resume"]) == ("raylign", "first", "online", "allow")
    assert begun["config"] == {"seed": 1}
    assert begun["settings"]["console"] == "off", "the console shows prompts"
    assert begun["settings"]["disable_git"]
    assert begun["settings"]["x_disable_meta"], "the command line may hold anything"
    assert package.run.rows == [{"step": 1, "loss": 0.5}, {"step": 1, "values/reward": ("histogram", [0.0, 1.0])}]
    assert package.run.defined == [("step", None), ("*", "step")]
    assert package.run.finished == 1


def test_trackio_gets_numbers_alone_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = _Package()
    _log_everything(TrackioSink(TrackioConfig(project="p"), tmp_path / "first", {}, _made(tmp_path / "first", package)))
    (begun,) = package.begun
    assert begun["project"] == "p"
    assert begun["name"].startswith("first-")
    assert (begun["space_id"], begun["resume"], begun["embed"]) == (None, "allow", False)
    assert package.run.rows == [{"at": 1, "loss": 0.5}, {"at": 1, "values/reward": ("histogram", [0.0, 1.0])}]
    assert package.run.finished == 1
    assert capsys.readouterr().out == ""


def test_pictures_and_texts_go_where_they_are_asked_for(tmp_path: Path) -> None:
    asked = {"pictures": True, "texts": True}
    package = _Package()
    _log_everything(WandbSink(WandbConfig.model_validate(asked), tmp_path, {}, package))
    assert {"step": 1, "pictures/samples": ("picture", (2, 2, 3))} in package.run.rows
    assert {"step": 1, "texts/samples": ("table", [[1, "a ``` b"]])} in package.run.rows
    package = _Package()
    _log_everything(TrackioSink(TrackioConfig.model_validate(asked), tmp_path, {}, package))
    assert {"at": 1, "pictures/samples": ("picture", (2, 2, 3))} in package.run.rows
    assert {"at": 1, "texts/samples": ("markdown", "````\na ``` b\n````")} in package.run.rows


def test_a_resumed_run_is_the_same_run_there_and_another_directory_is_another(tmp_path: Path) -> None:
    wandb, trackio = _Package(), _Package()
    for folder in ("a", "a", "b"):
        WandbSink(WandbConfig(), tmp_path / folder, {}, _made(tmp_path / folder, wandb)).close()
        TrackioSink(TrackioConfig(name="named"), tmp_path / folder, {}, trackio).close()
    first, again, other = (begun["id"] for begun in wandb.begun)
    assert first == again != other
    first, again, other = (begun["name"] for begun in trackio.begun)
    assert first == again != other
    assert first.startswith("named-")


@pytest.mark.parametrize("error", [_Package.Error("api_key not configured"), _Package.Error("")])
def test_a_tracker_that_does_not_let_the_run_start_says_what_to_do(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ConfigError, match="wandb login"):
        WandbSink(WandbConfig(), tmp_path, {}, _Package(error))
    with pytest.raises(ConfigError, match=r"Mend tracking\.trackio"):
        TrackioSink(TrackioConfig(), tmp_path, {}, _Package(ValueError("no such space")))


def test_a_tracker_whose_package_is_absent_is_refused_with_the_command(tmp_path: Path) -> None:
    everything = TrackingConfig(wandb=WandbConfig(), trackio=TrackioConfig(), otlp="http://127.0.0.1:4318")
    check_tracking(TrackingConfig(), has=lambda module: False)
    check_tracking(everything, has=lambda module: True)
    for absent, command in (
        ("wandb", "pip install wandb"),
        ("trackio", "pip install trackio"),
        ("opentelemetry.exporter.otlp.proto.http", "pip install opentelemetry-exporter-otlp-proto-http"),
    ):
        with pytest.raises(ConfigError, match=command):
            check_tracking(everything, has=lambda module, absent=absent: module != absent)


@pytest.mark.parametrize("address", ["127.0.0.1:4318", "ftp://host", "http://", ""])
def test_an_address_for_spans_is_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="otlp must be an address such as"):
        load_config(RunConfig, None, {"tracking.otlp": f'"{address}"'})


class _Broken:
    """A sink that fails from its second call on."""

    def __init__(self) -> None:
        self.calls = 0

    def _called(self) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionResetError("the tracker's process is gone")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._called()

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._called()

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        self._called()

    def texts(self, step: int, name: str, text: str) -> None:
        self._called()

    def close(self) -> None:
        self._called()


def test_a_run_outlives_its_tracker_and_says_so_once() -> None:
    told: list[str] = []
    broken = _Broken()
    _log_everything(Outlived(broken, "trackio", told.append))
    assert broken.calls == 2, "nothing more after the first error"
    assert told == [
        "trackio failed and gets nothing more of this run: ConnectionResetError: the tracker's process is gone"
    ]


def test_ctrl_c_goes_through_a_tracker() -> None:
    class Interrupted(_Broken):
        def _called(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Outlived(Interrupted(), "trackio", lambda text: None).log(1, {})


def test_the_configuration_is_shared_without_secrets_users_of_addresses_and_long_texts(tmp_path: Path) -> None:
    config = load_config(
        RunConfig,
        None,
        {
            "prompts.train": f'"https://me:hunter2@data.example/p.txt?sig=s3cret{"x" * 20}"',
            "prompts.heldout": f'"{"long" * 100}"',
            "tracking.wandb.project": '"mine"',
        },
    )
    shared = shared_config(config)
    assert shared["seed"] == 0
    assert shared["algorithm.type"] == "nft"
    assert shared["rewards.0.type"] == "ocr"
    assert shared["prompts.train"] == "https://data.example/p.txt"
    assert "prompts.heldout" not in shared
    assert not [name for name in shared if name.startswith("tracking")]
    assert not [name for name in shared if name.endswith(("token_env", "token", "api_key_env"))]
    assert "hunter2" not in json.dumps(shared)


def test_a_run_that_asks_for_no_tracker_has_its_own_sinks_and_hears_no_phases(tmp_path: Path) -> None:
    sinks, heard = open_sinks(load_config(RunConfig, None), tmp_path, None, lambda text: None)
    _log_everything(sinks)
    assert heard is None
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert list((tmp_path / "tensorboard").iterdir())
    assert not (tmp_path / "tracking.json").exists()


def test_trackers_may_change_when_a_run_goes_on() -> None:
    assert "tracking" in NEUTRAL


def _made(folder: Path, package: _Package) -> _Package:
    folder.mkdir(exist_ok=True)
    return package
