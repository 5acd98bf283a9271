"""One DenoisingPolicy for every diffusers pipeline: what families share, over what sets each apart.

Text encoding, the network and the VAE are diffusers' own modules; a family's file says in an `Architecture` how they
are called. diffusers is imported when a policy is loaded, not when a configuration is read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from raylign.assets import resolve
from raylign.config import Config
from raylign.errors import ModelError
from raylign.models.adapter_start import SavedAdapter, check_start, open_start, read_start
from raylign.models.adapters import LoraSettings, lora_shapes
from raylign.models.base import Conditioning, Role
from raylign.models.pipeline_folder import (
    PipelineForm,
    check_pipeline_folder,
    component_config,
    empty_network,
    load_network,
    load_pipeline,
)
from raylign.models.schedule import NoiseSchedule
from raylign.models.sharding import shard_network
from raylign.models.tuned import TunedWeights
from raylign.precision import Precision, autocast
from raylign.shapes import check_shape
from raylign.types import WeightVersion
from raylign.weights import WeightSnapshot

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ImageModelConfig(Config):
    """Keys of every image model; a subclass adds `type`, a `path` with a default where one ships, and its own."""

    path: str
    """diffusers pipeline directory."""
    height: int = Field(default=512, ge=8)
    """Picture height in pixels."""
    width: int = Field(default=512, ge=8)
    """Picture width in pixels."""
    tuning: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter or every weight of the network."""
    lora: LoraSettings = LoraSettings()
    """The adapter, when tuning is "lora"."""
    decode_slice: int = Field(default=16, ge=1)
    """Pictures that go through the VAE together; fewer need less memory."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one latent, (channels, height, width), and what height and width in pixels must be multiples of."""

    latent_shape: tuple[int, int, int]
    multiple: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """What sets one pipeline family apart. Configurations are the components' JSON files as dicts.

    form: what its directory holds. lora_targets: the adapted modules by published name.
    geometry(config, network's configuration, VAE's): sizes; `check_image` holds the picture to them.
    schedule(config, folder): the noise levels the model was made for.
    encode(pipeline, config, text, device, with_negative): one prompt's conditioning, P = 1.
    velocity(policy, state_BCHW, sigma_B, conditioning): v = eps - x_0 in the network's own precision.
    fp32_components: those that keep single precision in a bf16 rollout.
    check(config, network's configuration): raise ModelError for a key that this network has no use for.
    """

    form: PipelineForm
    lora_targets: tuple[str, ...]
    geometry: Callable[[Any, dict[str, Any], dict[str, Any]], Geometry]
    schedule: Callable[[Any, Path], NoiseSchedule]
    encode: Callable[[Any, Any, str, torch.device, bool], Conditioning]
    velocity: Callable[[ImagePolicy, torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
    fp32_components: tuple[str, ...] = ()
    check: Callable[[Any, dict[str, Any]], None] | None = None


class ImagePolicy:
    """A DenoisingPolicy over diffusers modules. In a learner, text encoders and VAE are absent.

    diffusers' modules and their configurations are typed as Any: their stubs know neither `config.x` nor calls.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: Any,
        network: Any,
        pipeline: Any | None,
        geometry: Geometry,
        schedule: NoiseSchedule,
        weights: TunedWeights,
        compute: Precision = "fp32",
    ) -> None:
        self.config = config
        self.network = network
        self.schedule = schedule
        self.latent_shape = geometry.latent_shape
        self.device = next(network.parameters()).device
        self._architecture = architecture
        self._pipeline = pipeline
        self._weights = weights
        self._compute: Precision = compute

    def with_network(self, network: Any) -> ImagePolicy:
        """The same policy, weights and all, computing with another network that answers to the same calls."""
        other = copy.copy(self)
        other.network = network
        return other

    def encode(self, text: str, with_negative: bool) -> Conditioning:
        """See DenoisingPolicy. Raises ModelError in a learner, which has no text encoders."""
        pipeline = self._need_pipeline("encode a prompt")
        with torch.no_grad():
            return self._architecture.encode(pipeline, self.config, text, self.device, with_negative)

    def predict(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """See DenoisingPolicy."""
        channels, height, width = self.latent_shape
        check_shape(state_BCHW, "state_BCHW", C=channels, H=height, W=width)
        with autocast(self._compute, self.device):
            return self._architecture.velocity(self, state_BCHW, sigma_B, conditioning).float()

    def decode(self, state_BCHW: torch.Tensor) -> np.ndarray:
        """See DenoisingPolicy. Raises ModelError in a learner, which has no VAE."""
        pipeline = self._need_pipeline("decode a picture")
        with torch.no_grad():
            slices = state_BCHW.split(self.config.decode_slice)
            pictures = torch.cat([vae_pixels(pipeline.vae, one).float() for one in slices])
        scaled = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round()
        return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._weights.parameters()

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def shard(self, mesh: DeviceMesh) -> None:
        """See Shardable."""
        shard_network(self.network, mesh)
        self.device = torch.device(mesh.device_type)

    def export_weights(self, version: WeightVersion, tensors: dict[str, torch.Tensor] | None = None) -> WeightSnapshot:
        return self._weights.export(version, tensors)

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        self._weights.load(snapshot)

    def _need_pipeline(self, action: str) -> Any:
        if self._pipeline is None:
            raise ModelError(f"a learner's policy cannot {action}: it holds the network only; load role='rollout'")
        return self._pipeline


def vae_pixels(vae: Any, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1], (B, 3, height, width), in the VAE's precision; not every VAE shifts its latents."""
    latents_BCHW = latents_BCHW / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(latents_BCHW.to(vae.dtype), return_dict=False)[0]


def load_image(
    architecture: Architecture,
    config: ImageModelConfig,
    role: Role,
    device: str = "cpu",
    precision: Precision = "fp32",
    fold: bool = False,
    seed: int = 0,
) -> ImagePolicy:
    """Load a policy from a pipeline directory. Raises ModelError naming the missing or wrong component.

    role "rollout": every component, in `precision`. "learner": the network alone, in `precision`, which must
    be fp32 where it is trained whole; adapters are fp32 always.
    fold: keep no adapter layers and fold published adapters into the weights (rollout with LoRA only).
    seed: initial values of the adapter's A matrices.
    """
    folder, form = resolve(config.path), architecture.form
    geometry, schedule, start = _checked(architecture, config, folder)
    pipeline: Any = None
    if role == "rollout":
        pipeline = load_pipeline(folder, form, precision, architecture.fp32_components).to(device)
        network: Any = getattr(pipeline, form.network)
    else:
        network = load_network(folder, form, precision).to(device)
    network.eval()
    weights = TunedWeights(
        network,
        config.tuning,
        config.lora,
        architecture.lora_targets,
        fold=fold and role == "rollout",
        seed=seed,
        start=None if start is None else read_start(start),
    )
    # Beside an attached adapter the learner's autocast is repeated, so that both compute the same bits.
    compute: Precision = precision if role == "rollout" and not fold else "fp32"
    return ImagePolicy(architecture, config, network, pipeline, geometry, schedule, weights, compute)


def check_image(architecture: Architecture, config: ImageModelConfig, texts: Sequence[str] = ()) -> None:
    """Raise for a directory without a component, what it cannot draw, or an adapter of another model, before
    anything is started.

    Any of `texts` will do: the encoders cut one that is too long.
    """
    _checked(architecture, config, resolve(config.path))


def _checked(
    architecture: Architecture, config: ImageModelConfig, folder: Path
) -> tuple[Geometry, NoiseSchedule, SavedAdapter | None]:
    """What the small files say, once it is sure that they fit; see `check_image`."""
    check_pipeline_folder(folder, architecture.form)
    network = component_config(folder, architecture.form.network)
    geometry = architecture.geometry(config, network, component_config(folder, "vae"))
    for name, size in (("height", config.height), ("width", config.width)):
        if size % geometry.multiple:
            raise ModelError(f"model.{name} must be a multiple of {geometry.multiple} for this model, got {size}")
    if architecture.check is not None:
        architecture.check(config, network)
    schedule = architecture.schedule(config, folder)
    start = None if config.lora.start is None else _checked_start(architecture, config, folder, config.lora.start)
    return geometry, schedule, start


def _checked_start(architecture: Architecture, config: ImageModelConfig, folder: Path, start: str) -> SavedAdapter:
    if config.tuning != "lora":
        raise ModelError(
            "lora.start needs tuning = 'lora'; to train every weight, export the adapter's pipeline and give its path"
        )
    saved = open_start(start, architecture.form.network)
    network = empty_network(folder, architecture.form)
    check_start(saved, config.lora, lora_shapes(network, config.lora, config.lora.targets or architecture.lora_targets))
    return saved
