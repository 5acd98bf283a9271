"""Weights & Biases and trackio as sinks of metrics. Both are optional packages, imported by whoever opens one here.

A run keeps its identity in `tracking.json`, so that a resumed run goes on as the same one there. Steps are a metric
like any other: a run that goes back to a checkpoint draws over what it drew, where a tracker's own steps only rise.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylign.errors import ConfigError
from raylign.metrics import fenced
from services.run_dir import write_atomic

if TYPE_CHECKING:
    import numpy as np

    from services.tracking import TrackioConfig, WandbConfig

IDENTITY_FILE = "tracking.json"
_START_S = 60.0


class WandbSink:
    """Numbers to Weights & Biases. Of the machine it sends utilisation; neither code, git, console nor its command."""

    def __init__(
        self, config: WandbConfig, run_dir: Path, shared: Mapping[str, object], package: Any | None = None
    ) -> None:
        """`package` is the module `wandb`. Raises ConfigError if it does not let the run start."""
        if package is None:
            import wandb as package  # type: ignore[import-not-found]  # optional

        self._wandb: Any = package
        self._config = config
        settings = self._wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=_START_S,
        )
        try:
            self._run: Any = self._wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run_dir.resolve().name,
                id=run_identity(run_dir, "wandb"),
                resume="allow",
                mode=config.mode,
                dir=str(run_dir),
                config=dict(shared),
                settings=settings,
            )
        except self._wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases does not let the run start: {error}. Run `wandb login`, set tracking.wandb.mode = "
                "'offline', or leave tracking.wandb out"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **_finite(metrics)})

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        if self._config.pictures:
            self._run.log({"step": step, f"pictures/{name}": self._wandb.Image(image_HWC)})

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        if values:
            self._run.log({"step": step, f"values/{name}": self._wandb.Histogram(list(values))})

    def texts(self, step: int, name: str, text: str) -> None:
        if self._config.texts:
            table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
            self._run.log({"step": step, f"texts/{name}": table})

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()


class TrackioSink:
    """Numbers to trackio."""

    def __init__(
        self, config: TrackioConfig, run_dir: Path, shared: Mapping[str, object], package: Any | None = None
    ) -> None:
        """`package` is the module `trackio`. Raises ConfigError if it does not let the run start."""
        if package is None:
            import trackio as package  # type: ignore[import-not-found]  # optional

        self._trackio: Any = package
        self._config = config
        name = config.name or run_dir.resolve().name
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # its greeting would tear the progress block
                self._run: Any = self._trackio.init(
                    project=config.project,
                    # Names are what trackio knows runs by, so each run directory has its own.
                    name=f"{name}-{run_identity(run_dir, 'trackio')[:6]}",
                    space_id=config.space_id,
                    config=dict(shared),
                    resume="allow",
                    embed=False,
                )
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"trackio does not let the run start: {error}. Mend tracking.trackio, or leave it out"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_finite(metrics), step=step)

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        if self._config.pictures:
            self._run.log({f"pictures/{name}": self._trackio.Image(image_HWC)}, step=step)

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        if values:
            self._run.log({f"values/{name}": self._trackio.Histogram(list(values))}, step=step)

    def texts(self, step: int, name: str, text: str) -> None:
        if self._config.texts:
            self._run.log({f"texts/{name}": self._trackio.Markdown(fenced(text))}, step=step)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                run.finish()


def run_identity(run_dir: Path, tracker: str) -> str:
    """What a tracker knows the run by: drawn once, kept in the run directory."""
    path = run_dir / IDENTITY_FILE
    known: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
    if tracker not in known:
        known[tracker] = uuid.uuid4().hex
        write_atomic(path, json.dumps(known, indent=2).encode() + b"\n")
    return known[tracker]


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what is not finite: a gap in a curve, as in metrics.jsonl."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
