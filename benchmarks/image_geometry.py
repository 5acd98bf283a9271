"""What image models of published sizes cost: drawing pictures and training steps, and how near they come to the rate of
the card.

Networks and VAEs have the sizes of their published config.json files and random weights, made on the device (no
download): time and memory do not depend on values. Text encoders are left out, as a run encodes each prompt once; the
prompt is random embeddings of the published lengths.

call     one call of the network for a batch of latents, as in a rollout (adapter folded away).
rollout  the rollout engine's own loop of S Euler steps, then the VAE's decoder: images per second.
train    a step of the real learner with DiffusionNFT on one group: for each trained level of each picture the current
         policy forward and backward, the old one and the reference forward; frozen base in the precision asked for,
         fp32 LoRA on the family's targets, activations recomputed, then clip and AdamW.

Each is measured as it is and with torch.compile, every row with a network of its own. Operations are torch's count
(FlopCounterMode: matrix products, attention, convolutions; of the step uncompiled, recomputing included), and the rate
they are held against is the device's own: a matrix product of the network's tokens and width, best of the repeats.
Seconds are the median, least and most of the repeats after a warm-up (which compiles), device synchronised.

    python benchmarks/image_geometry.py --device cuda --hardware "1 x H100 80 GB" \\
        --json docs/benchmarks/image_geometry.json
    python benchmarks/image_geometry.py --geometry small --size 64 --modes eager --repeats 2      # any CPU

prints one JSON object. Peak memory is the allocator's on CUDA (of the row alone); on a CPU it is the process's largest
resident set so far, which only ever grows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import (
    CALLS_PER_REPEAT,
    Clock,
    make_parser,
    parse_with_device,
    publish,
    rising_rewards,
    spread,
    take_step,
    tell,
    use_device,
)
from learner.algorithms.nft import NftConfig
from learner.learner import Learner, LearnerConfig
from raylign.keys import generator
from raylign.models.adapters import LoraSettings
from raylign.models.base import Conditioning
from raylign.models.flux import FLUX, FluxConfig
from raylign.models.image_policy import Architecture, ImageModelConfig, ImagePolicy
from raylign.models.sana import SANA, SanaConfig
from raylign.models.schedule import FlowSchedule
from raylign.models.sd3 import SD3, Sd3Config
from raylign.models.tuned import TunedWeights
from raylign.precision import DTYPES
from raylign.samplers import Sampler, make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs, Prompt, Rollout, RolloutGroup, RolloutStatus, SampleKey
from rollout.images import SamplerSetup, denoise

RUN_SEED = 0
PARTS, MODES = ("call", "rollout", "train"), ("eager", "compiled")


@dataclass(frozen=True, slots=True)
class Published:
    """A model's sizes. text: tokens, their width, and the pooled vector's, 0 for none. vae: its class and config."""

    architecture: Architecture
    config: type[ImageModelConfig]
    network: dict[str, Any]
    vae: tuple[str, dict[str, Any]]
    text: tuple[int, int, int]


def _kl_vae(latent_channels: int, channels: list[int], layers: int, groups: int = 32) -> tuple[str, dict[str, Any]]:
    return "AutoencoderKL", {
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
    }


GEOMETRIES: dict[str, Published] = {
    # stabilityai/stable-diffusion-3.5-medium
    "sd3.5-medium": Published(
        SD3,
        Sd3Config,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
        _kl_vae(16, [128, 256, 512, 512], 2),
        (77 + 256, 4096, 2048),
    ),
    # Efficient-Large-Model/Sana_1600M_512px_diffusers, with the DC-AE f32c32
    "sana-1.6b": Published(
        SANA,
        SanaConfig,
        {
            "sample_size": 16,
            "patch_size": 1,
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
        (
            "AutoencoderDC",
            {
                "latent_channels": 32,
                "attention_head_dim": 32,
                "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
                "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
                "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
                "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
                "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
                "upsample_block_type": "interpolate",
                "downsample_block_type": "Conv",
                "scaling_factor": 0.41407,
            },
        ),
        (300, 2304, 0),
    ),
    # black-forest-labs/FLUX.1-dev
    "flux.1": Published(
        FLUX,
        FluxConfig,
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
        _kl_vae(16, [128, 256, 512, 512], 2),
        (512, 4096, 768),
    ),
    "small": Published(
        SD3,
        Sd3Config,
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 32,
        },
        _kl_vae(4, [8, 8], 1, groups=4),
        (8, 32, 32),
    ),
}


class Bench:
    """One model on its device, what it is asked, and how that is timed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options = options
        self.published = published = GEOMETRIES[name]
        self.device, self.dtype = torch.device(options.device), DTYPES[options.precision]
        self.clock = Clock(self.device)
        lora = LoraSettings(rank=options.rank, alpha=2.0 * options.rank)
        self.config = published.config(path="random weights", height=options.size, width=options.size, lora=lora)
        network, vae = published.network, empty(*published.vae).config
        self.geometry = published.architecture.geometry(self.config, network, dict(vae))
        self.sampler: Sampler = make_sampler(EulerOdeConfig(num_steps=options.steps), FlowSchedule(3.0))
        length, width, pooled = published.text
        draw = generator("image_geometry", "prompt")
        self.conditioning = Conditioning(
            torch.randn(1, length, width, generator=draw),
            torch.randn(1, pooled, generator=draw) if pooled else None,
            mask_PL=torch.ones(1, length, dtype=torch.int64) if published.architecture is SANA else None,
        )

    def policy(self, *, adapter: bool, vae: bool = False) -> ImagePolicy:
        """A new network, as an actor has it (adapter folded away) or as the learner has it (adapter attached)."""
        published, architecture = self.published, self.published.architecture
        network = filled(empty(architecture.form.network_class, published.network), self.device, self.dtype)
        # Decoders stay in fp32 where the family's do.
        kept = torch.float32 if "vae" in architecture.fp32_components else self.dtype
        pipeline = SimpleNamespace(vae=filled(empty(*published.vae), self.device, kept)) if vae else None
        weights = TunedWeights(
            network, "lora", self.config.lora, architecture.lora_targets, fold=not adapter, seed=RUN_SEED
        )
        return ImagePolicy(architecture, self.config, network, pipeline, self.geometry, FlowSchedule(3.0), weights)

    def row(self, job: Callable[[], Any], flops: int, rate: float, repeats: int) -> dict[str, Any]:
        """Warm up, then a job's seconds, what of the device's rate it reaches, and its peak memory."""
        self.clock.forget_peak(release=True)
        (first_s,) = self.clock.timed(job, 1)
        told = spread(self.clock.timed(job, repeats))
        return {
            "seconds": told | {"first": first_s},
            "flops": flops,
            "flops_per_s": flops / told["median"],
            "of_measured_rate": flops / told["median"] / rate,
            "peak_bytes": self.clock.peak_bytes(),
        }

    @torch.no_grad()
    def matmul_rate(self) -> float:
        """Operations per second of tokens times a feed-forward matrix of the network's width."""
        network = self.published.network
        width = network["num_attention_heads"] * network["attention_head_dim"]
        tokens = self.options.batch * (self.options.size // self.geometry.multiple) ** 2
        draw = generator("image_geometry", "matrices")
        left = torch.randn(tokens, width, generator=draw).to(self.device, self.dtype)
        right = torch.randn(width, 4 * width, generator=draw).to(self.device, self.dtype)
        multiply = partial(torch.mm, left, right)
        self.clock.timed(multiply, 3)
        return 2 * tokens * width * 4 * width / min(self.clock.timed(multiply, 5 * self.options.repeats))


def empty(name: str, config: dict[str, Any]) -> Any:
    """A diffusers model without values, on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, name).from_config(config)


@torch.no_grad()
def filled(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with matrices of deviation .02, norms of 1 and biases of 0, filled where they lie."""
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    draws = torch.Generator(device).manual_seed(RUN_SEED)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=draws)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in network.buffers():
        buffer.zero_()
    return network


def count_flops(job: Callable[[], Any]) -> int:
    """torch's count of a job's operations; attention as the two products it stands for."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        job()
    return counter.get_total_flops()


@torch.no_grad()
def measure_call(bench: Bench, rate: float, *, compiled: bool) -> dict[str, Any]:
    """One call of the network."""
    policy, batch = bench.policy(adapter=False), bench.options.batch
    state = torch.randn(batch, *policy.latent_shape, generator=generator("image_geometry", "state")).to(bench.device)
    sigma = torch.full((batch,), 0.5, device=bench.device)
    call = partial(policy.predict, state, sigma, bench.conditioning.repeat(batch).to(bench.device))
    flops = count_flops(call)
    if compiled:
        policy.network.compile()
    return bench.row(call, flops, rate, CALLS_PER_REPEAT * bench.options.repeats)


@torch.no_grad()
def measure_rollout(bench: Bench, rate: float, *, compiled: bool) -> dict[str, Any]:
    """Whole pictures, then the decoder by itself."""
    options, policy = bench.options, bench.policy(adapter=False, vae=True)
    keys = [SampleKey(RUN_SEED, "p", 0, index) for index in range(options.batch)]
    told = bench.conditioning.repeat(options.batch).to(bench.device)
    setup = SamplerSetup(bench.sampler, 1.0, Needs.FINAL)
    draw = partial(denoise, policy, setup, told, keys)
    flops = count_flops(draw)
    latents = draw().final_GCHW.to(bench.device)
    if not bool(torch.isfinite(latents).all()):
        raise SystemExit("the rollout was not finite")
    if compiled:
        policy.network.compile()
    drawn = bench.row(draw, flops, rate, options.repeats)
    decoded = bench.row(partial(policy.decode, latents), count_flops(partial(policy.decode, latents)), rate, 2)
    total_s = drawn["seconds"]["median"] + decoded["seconds"]["median"]
    return drawn | {
        "images_per_s": options.batch / drawn["seconds"]["median"],
        "images_per_s_decoded": options.batch / total_s,
        "decode": decoded,
    }


def measure_train(bench: Bench, rate: float, *, compiled: bool) -> dict[str, Any]:
    """Steps of the learner."""
    options, policy = bench.options, bench.policy(adapter=True)
    group = make_group(bench, policy)
    config = LearnerConfig(precision=options.precision, gradient_checkpointing=True)
    algorithm = NftConfig(num_train_times=options.levels)
    learner = Learner(config, algorithm, policy, bench.sampler, 1.0, options.micro_batch, RUN_SEED)
    flops = count_flops(partial(take_step, learner, group))
    if compiled:
        policy.network.compile()
    row = bench.row(partial(take_step, learner, group), flops, rate, options.repeats)
    num_items = options.batch * options.levels
    return row | {
        "images_per_s": options.batch / row["seconds"]["median"],
        "seconds_per_trained_level": row["seconds"]["median"] / num_items,
        "trained_parameters": sum(p.numel() for p in policy.trainable_parameters().values()),
    }


def make_group(bench: Bench, policy: ImagePolicy) -> RolloutGroup:
    """One prompt's pictures after one step of sampling, with unequal rewards."""
    size = bench.options.batch
    keys = [SampleKey(RUN_SEED, "p", 0, sibling) for sibling in range(size)]
    once = make_sampler(EulerOdeConfig(num_steps=1), FlowSchedule(3.0))
    with torch.no_grad():
        told = bench.conditioning.repeat(size).to(bench.device)
        trajectory = denoise(policy, SamplerSetup(once, 1.0, Needs.FINAL), told, keys)
    rollouts = tuple(Rollout(key, RolloutStatus.OK, 0, 0) for key in keys)
    group = RolloutGroup(Prompt("p", "random embeddings"), 0, 0, rollouts, trajectory, bench.conditioning)
    return rising_rewards(group)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "call": measure_call,
    "rollout": measure_rollout,
    "train": measure_train,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every part of every geometry that was asked for, in every mode."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    found: dict[str, Any] = {**use_device(options), "geometries": {}}
    for name in options.geometry:
        bench = Bench(name, options)
        rate = bench.matmul_rate()
        network = empty(bench.published.architecture.form.network_class, bench.published.network)
        rows: dict[str, Any] = {
            "num_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "measured_flops_per_s": rate,
        }
        tell(name, rows)
        for part in options.parts:
            for mode in options.modes:
                torch.compiler.reset()
                rows[f"{part}, {mode}"] = JOBS[part](bench, rate, compiled=mode == "compiled")
                tell(f"{name}: {part}, {mode}", rows[f"{part}, {mode}"])
        found["geometries"][name] = rows
    return found


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits for what cannot be measured."""
    parser = make_parser(
        __doc__,
        (
            ("size", 512, "height and width of the pictures in pixels"),
            ("steps", 10, "denoising steps"),
            ("batch", 16, "pictures drawn at once, and siblings in the learner's group"),
            ("micro-batch", 8, "pictures per forward of the learner"),
            ("levels", 2, "noise levels trained per picture"),
            ("rank", 32, "of the adapter"),
        ),
    )
    published = [name for name in GEOMETRIES if name != "small"]
    for name, choices, default in (
        ("geometry", list(GEOMETRIES), published),
        ("parts", PARTS, PARTS),
        ("modes", MODES, MODES),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(default), help="default: all")
    options = parse_with_device(parser, arguments)
    if options.device == "cpu" and options.geometry != ["small"] and not options.force:
        parser.error(
            "published sizes take gigabytes and minutes per call on a CPU; use --geometry small to try the program, "
            "--device cuda to measure, or --force to wait"
        )
    if options.batch < 2 or min(options.repeats, options.levels, options.micro_batch) < 1:
        parser.error("--batch must be at least 2 and --repeats, --levels and --micro-batch at least 1")
    if options.levels > options.steps:
        parser.error(f"--levels {options.levels} must be at most --steps {options.steps}, the levels there are")
    return options


def main() -> None:
    """Measure and print."""
    options = parse_options()
    publish(__file__, options, measure(options))


if __name__ == "__main__":
    main()
