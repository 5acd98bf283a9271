"""Where else a run's numbers go, for whoever asks: `[tracking]`. The run directory and TensorBoard have them anyway.

    metrics ──▶ Weights & Biases | trackio     numbers; pictures and texts only where the configuration says so
            ├─▶ a Redis stream              rows as they come, for the dashboard or a program
            ├─▶ /metrics on a port             the newest numbers in Prometheus' text format
            └─▶ OTLP                           a span per step, and one per phase below it

Each is imported only where it is asked for, and looked for before anything starts. What a tracker raises later is told
once and ends its part: no number of the run depends on it, so the run goes on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from raylign.config import Config
from raylign.errors import ConfigError
from raylign.metrics import MetricsSink, SinkFan, make_sinks
from services.run_events import EventsConfig, EventSink

if TYPE_CHECKING:
    import numpy as np

    from services.config import RunConfig
    from services.spans import SpanSink

LOCAL_SINKS = ("jsonl", "tensorboard")

PhaseListener = Callable[[str, float], None]
"""Is told of a phase of the loop and its seconds when it ends."""


class SharedConfig(Config):
    """What a tracker is given of a run. Numbers always are; what people wrote or a model drew only where set here."""

    project: str = Field(default="raylign", min_length=1)
    """Project that the run is listed in."""
    name: str | None = None
    """The run's name there; the run directory's when not given."""
    pictures: bool = False
    """Send sample grids, which have prompts' pictures in them."""
    texts: bool = False
    """Send held-out prompts and answers."""


class WandbConfig(SharedConfig):
    """Weights & Biases. Its key comes from `wandb login` or WANDB_API_KEY, never from here."""

    entity: str | None = None
    """Team or user; the account's own when not given."""
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run directory; `wandb sync` sends it later."""


class TrackioConfig(SharedConfig):
    """trackio: a local data base, or a Hugging Face space."""

    space_id: str | None = None
    """Space to send to, as user/name, with the token of `hf auth login`; this machine only when not given."""


class TrackingConfig(Config):
    """Where else numbers go; nothing of it decides a step."""

    wandb: WandbConfig | None = None
    """Weights & Biases; off when not given. Needs `pip install wandb`."""
    trackio: TrackioConfig | None = None
    """trackio; off when not given. Needs `pip install trackio`."""
    events: EventsConfig | None = None
    """Redis stream of rows; off when not given. The dashboard follows it instead of looking at the run directory."""
    otlp: str | None = None
    """Address of an OTLP/HTTP collector for spans, such as http://127.0.0.1:4318; off when not given. Needs `pip
    install opentelemetry-exporter-otlp-proto-http`."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the driver that answers Prometheus at /metrics; off when not given."""
    metrics_host: str = "127.0.0.1"
    """Address that port listens at: what is there are numbers and names, and asks for no token."""

    @field_validator("otlp")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
            raise ValueError(f"otlp must be an address such as http://127.0.0.1:4318, got {value!r}")
        return value


_PACKAGES: Mapping[str, tuple[str, str]] = {
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "otlp": ("opentelemetry.exporter.otlp.proto.http", "opentelemetry-exporter-otlp-proto-http"),
}
"""Module and package of each key that needs one."""


def check_tracking(config: TrackingConfig, has: Callable[[str], bool] | None = None) -> None:
    """Raise ConfigError, with the command that installs it, for a tracker whose package is not here."""
    there = has or _is_installed
    for key, (module, package) in _PACKAGES.items():
        if getattr(config, key) is not None and not there(module):
            raise ConfigError(
                f"tracking.{key} is set, but its package is not installed: `pip install {package}`, or leave "
                f"tracking.{key} out"
            )


def open_sinks(
    config: RunConfig, run_dir: Path, resumed_step: int | None, note: Callable[[str], None]
) -> tuple[SinkFan, PhaseListener | None]:
    """Every sink of a run, open: the run directory's own and those of `[tracking]`; and who hears of phases, if anyone.

    `note` hears of lost trackers.
    Raises ConfigError for a tracker that cannot be reached when it starts.
    """
    tracking, openings = config.tracking, list[Callable[[], MetricsSink]]()
    if tracking.wandb is not None:
        wandb = tracking.wandb

        def open_wandb() -> MetricsSink:
            from services.tracking_sinks import WandbSink

            return Outlived(WandbSink(wandb, run_dir, shared_config(config)), "Weights & Biases", note)

        openings.append(open_wandb)
    if tracking.trackio is not None:
        trackio = tracking.trackio

        def open_trackio() -> MetricsSink:
            from services.tracking_sinks import TrackioSink

            return Outlived(TrackioSink(trackio, run_dir, shared_config(config)), "trackio", note)

        openings.append(open_trackio)
    if tracking.events is not None:
        events = tracking.events

        def open_events() -> MetricsSink:
            from services.tracking_sinks import run_identity

            return EventSink(events, run_identity(run_dir, "events"), note)

        openings.append(open_events)
    spans: SpanSink | None = None
    if tracking.otlp is not None:
        from services.spans import SpanSink, otlp_provider

        spans = SpanSink(otlp_provider(tracking.otlp), run_dir.resolve().name)
        guarded = Outlived(spans, "OpenTelemetry", note)
        openings.append(lambda: guarded)
    if tracking.metrics_port is not None:
        host, port = tracking.metrics_host, tracking.metrics_port

        def open_exporter() -> MetricsSink:
            from services.run_exporter import ExporterSink

            return ExporterSink(run_dir, config.num_steps, host, port)

        openings.append(open_exporter)
    return make_sinks(LOCAL_SINKS, run_dir, resumed_step, openings), spans.phase if spans is not None else None


class Outlived:
    """A tracker that a run outlives: its first error is told, and then it is left alone."""

    def __init__(self, sink: MetricsSink, name: str, note: Callable[[str], None]) -> None:
        self._sink: MetricsSink | None = sink
        self._name = name
        self._note = note

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.log(step, metrics))

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._try(lambda sink: sink.images(step, name, image_HWC))

    def values(self, step: int, name: str, values: Sequence[float]) -> None:
        self._try(lambda sink: sink.values(step, name, values))

    def texts(self, step: int, name: str, text: str) -> None:
        self._try(lambda sink: sink.texts(step, name, text))

    def close(self) -> None:
        self._try(lambda sink: sink.close())
        self._sink = None

    def _try(self, work: Callable[[MetricsSink], None]) -> None:
        if self._sink is None:
            return
        try:
            work(self._sink)
        except Exception as error:  # noqa: BLE001 - foreign code over a network may raise anything, and decides no step
            self._sink = None
            self._note(f"{self._name} failed and gets nothing more of this run: {type(error).__name__}: {error}")


_SECRET = ("token", "key", "secret", "password", "credential", "auth")
_LONGEST = 200
"""Characters; longer texts are instructions to a judge, not settings."""


def shared_config(config: RunConfig) -> dict[str, object]:
    """The resolved configuration as trackers get it: dotted keys, without secrets, long texts or addresses' users."""
    shared: dict[str, object] = {}

    def add(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, (list, tuple)):
            for place, inner in enumerate(value):
                add(f"{name}.{place}", inner)
        elif not any(word in name.rpartition(".")[2].lower().split("_") for word in _SECRET):
            if not isinstance(value, str):
                shared[name] = value
            elif len(value) <= _LONGEST:
                shared[name] = _without_user(value)

    add("", config.model_dump(mode="json", exclude_none=True, exclude={"tracking"}))
    return shared


def _without_user(text: str) -> str:
    """An address without its user, password and query; any other text as it is."""
    if "://" not in text:
        return text
    parts = urlsplit(text)
    host = parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
