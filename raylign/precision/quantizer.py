"""Quantizers: a format and what computes it. `make_quantizer` picks the backend once, at start, and refuses at start.

    reference            any device; emulated
    torch                FP8 from compute capability 8.9 on, NVFP4 from 10.0 on, MXFP4 on 10.x
    torchao              NVFP4 as torch, activations quantised by torchao's kernel
    transformer_engine   NVFP4 with NVIDIA's block-scaling kernels

Nothing here claims speed for an emulated format: `is_native` says whether the device's own units multiply.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from raylign.errors import ConfigError
from raylign.precision import Format
from raylign.precision.config import BackendName, QuantizerConfig
from raylign.precision.packed import Packed, WeightTile
from raylign.precision.reference import ReferenceQuantizer
from raylign.precision.scaled_mm import ScaledMmQuantizer
from raylign.precision.torchao import make_torchao_quantizer
from raylign.precision.transformer_engine import TransformerEngineQuantizer

Capability = tuple[int, int]
"""CUDA compute capability: (8, 9) is Ada, (9, 0) Hopper, (10, 0) and later Blackwell."""


class Quantizer(Protocol):
    """One format on one backend. Stateless: weights are held by the layers (`raylign.precision.linear`)."""

    @property
    def format(self) -> Format:
        """The number format."""
        ...

    @property
    def backend(self) -> str:
        """Its name in `BACKENDS`, or "reference"."""
        ...

    @property
    def is_native(self) -> bool:
        """Whether the device has units for the format and this backend uses them."""
        ...

    def pack(self, weight_OI: torch.Tensor) -> Packed:
        """Quantise a weight; the same bytes on every backend. Raises NumericsError for a NaN or an infinity."""
        ...

    def arrange(self, packed: Packed) -> Packed:
        """`pack`'s result, or one received from elsewhere, in the layout that `linear` reads."""
        ...

    def unpack(self, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        """The weight that `pack`'s result stands for."""
        ...

    def linear(
        self, value: torch.Tensor, weight: Packed | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., I) to (..., O) with an arranged weight; only a quantizer that is not native takes an unpacked one.

        Each sample (first axis) is quantised by itself: its result does not depend on its neighbours, and a NaN stays
        where it is.
        """
        ...


@dataclass(frozen=True, slots=True)
class Units:
    """The hardware that multiplies a format. name: for people. fits: whether a compute capability has it."""

    name: str
    fits: Callable[[Capability], bool]


@dataclass(frozen=True, slots=True)
class Backend:
    """A native backend. formats: what it computes. library: to import, or None. install: how to get it."""

    formats: tuple[Format, ...]
    make: Callable[[Format, WeightTile], Quantizer]
    library: str | None = None
    install: str = ""


UNITS: dict[Format, Units] = {
    "fp8": Units("an Ada, Hopper or Blackwell GPU", lambda capability: capability >= (8, 9)),
    "nvfp4": Units("a Blackwell GPU", lambda capability: capability >= (10, 0)),
    "mxfp4": Units("a B200 or B300 GPU", lambda capability: capability[0] == 10),
}

# In the order in which `backend = "auto"` tries them.
BACKENDS: dict[BackendName, Backend] = {
    "torch": Backend(("fp8", "nvfp4", "mxfp4"), ScaledMmQuantizer),
    "torchao": Backend(
        ("nvfp4",), lambda _, tile: make_torchao_quantizer(tile), "torchao", "`pip install raylign[formats]`"
    ),
    "transformer_engine": Backend(
        ("nvfp4",),
        lambda _, tile: TransformerEngineQuantizer(tile),
        "transformer_engine",
        "`pip install transformer-engine[pytorch]`",
    ),
}


def make_quantizer(format_name: Format, config: QuantizerConfig, device: torch.device | str) -> Quantizer:
    """The quantizer that `config` asks for on `device`.

    `backend = "auto"` is the first that runs natively, else the reference. Raises ConfigError with the remedy for a
    named backend that cannot run here, for `require_native` where nothing is native, and for impossible pairs.
    """
    if config.weight_tile != "1x16" and format_name != "nvfp4":
        raise ConfigError(f"weight_tile = {config.weight_tile!r} is NVFP4's; leave it out for {format_name}")
    reference = ReferenceQuantizer(format_name, config.weight_tile, config.activations)
    if config.backend == "reference" or not config.activations:
        _refuse_native_demands(config)
        return reference
    capability = device_capability(device)
    names: tuple[BackendName, ...] = tuple(BACKENDS) if config.backend == "auto" else (config.backend,)
    for name in names:
        reason = obstacle(name, format_name, capability)
        if reason is None:
            return BACKENDS[name].make(format_name, config.weight_tile)
        if config.backend != "auto":
            raise ConfigError(
                f'backend = "{name}" cannot compute {format_name} on {device}: {reason}; backend = "auto" emulates '
                "where it must"
            )
    if config.require_native:
        raise ConfigError(
            f"require_native = true, but {device} has no units for {format_name}: it needs "
            f"{UNITS[format_name].name}; choose a format that `raylign doctor` lists as native, or drop require_native"
        )
    return reference


def native_backends(device: torch.device | str) -> dict[Format, BackendName | None]:
    """For each format the backend that `auto` takes on `device`; None where it would be emulated."""
    return {format_name: native_backend(format_name, device_capability(device)) for format_name in UNITS}


def native_backend(format_name: Format, capability: Capability | None) -> BackendName | None:
    """The backend that `auto` takes at a compute capability; None where the format would be emulated."""
    return next((name for name in BACKENDS if obstacle(name, format_name, capability) is None), None)


def obstacle(name: BackendName, format_name: Format, capability: Capability | None) -> str | None:
    """Why a native backend cannot compute a format at a compute capability (None: no NVIDIA GPU); None if it can."""
    backend, units = BACKENDS[name], UNITS[format_name]
    if format_name not in backend.formats:
        return f"it computes {', '.join(backend.formats)} only"
    if capability is None:
        return f"there is no NVIDIA GPU; {format_name} needs {units.name}"
    if not units.fits(capability):
        return f"compute capability {capability[0]}.{capability[1]} has no units for it; it needs {units.name}"
    if backend.library is not None and importlib.util.find_spec(backend.library) is None:
        return f"{backend.library} is not installed: {backend.install}"
    return None


def device_capability(device: torch.device | str) -> Capability | None:
    """The compute capability of an NVIDIA device, None for any other."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _refuse_native_demands(config: QuantizerConfig) -> None:
    """Weight-only layers and the reference compute in the working precision, whatever the device."""
    why = 'backend = "reference" emulates' if config.backend == "reference" else "activations = false"
    if config.require_native:
        raise ConfigError(f"require_native = true and {why}: the format's units cannot be used; drop one of the two")
    if config.backend not in ("auto", "reference"):
        raise ConfigError(
            f"activations = false keeps small weights but multiplies in the working precision; backend = "
            f'"{config.backend}" multiplies quantised activations: drop one of the two'
        )
