"""What low precision buys on image models of published sizes, and whether its drafts rank alike.

Networks are those of benchmarks/image_geometry.py: published sizes, random weights made on the device, random
embeddings for a prompt. Which layers are quantised, and how, is what a run's actors would do.

rollout  the rollout engine's own loop of S Euler steps, in bf16 and in FP8, as it is and with torch.compile: images per
         second. Beside it the matmul roofline: products alone, at the shapes and counts of the model's quantised
         layers, are timed in both formats; all other operations of a call (torch's count) are put at the rate of the
         bf16 products. That bounds images per second from above, and the ratio of both bounds what FP8 can gain.
         `quantise_s` is what quantising those layers' inputs takes per call when nothing is fused.
fold     an adapter of rank 32: verifying a snapshot, folding it into the resident weights (verification included), and
         quantising these anew, by format.
memory   bytes of the network and of its packed copies; on CUDA what the allocator says they take as well.
ranks    the same keys at S steps in bf16 and as drafts of T steps in bf16, FP8 and NVFP4 (emulated where the device has
         no units for it). With random weights there is no picture and so no reward: the score is a fixed random linear
         read-out of the final latent. As the first noise is most of that latent, and drafts share it, `final` flatters;
         `moved` reads out what the network added, the final latent less the first noise. Means over pools and
         read-outs; `error` is the distance of draft and full-quality latents over the distance that the latter moved.
         None of this says how drafts of a trained model rank its rewards.

    python benchmarks/precision_geometry.py --device cuda --hardware "1 x H200 141 GB" \\
        --json docs/benchmarks/precision_geometry.json
    python benchmarks/precision_geometry.py --device cpu --size small      # any machine

prints one JSON object. Seconds are the median, least and most of the repeats after a warm-up, device synchronised.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import ScalingType

from benchmarks.image_geometry import MODES, RUN_SEED, Bench, count_flops
from benchmarks.measuring import Clock, make_parser, parse_with_device, publish, spread, tell, use_device
from raylign.keys import generator, normal, sample_generators
from raylign.models.adapters import lora_shapes
from raylign.models.image_policy import ImagePolicy
from raylign.models.schedule import FlowSchedule
from raylign.precision import Format, fp8
from raylign.precision.config import QuantizerConfig
from raylign.precision.kept_high import layers_to_quantise
from raylign.precision.quantizer import make_quantizer
from raylign.precision.shadow import Shadow, linear_sizes
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs, SampleKey
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot
from rollout.images import SamplerSetup, denoise
from rollout.rank_agreement import kendall, recall

PARTS = ("rollout", "fold", "memory", "ranks")
PUBLISHED = ("sd3.5-medium", "flux.1")
FORMATS: tuple[Format, ...] = ("fp8", "nvfp4", "mxfp4")
DRAFT_FORMATS: tuple[Format, ...] = ("fp8", "nvfp4")
DRAFT_STEPS = (4, 6, 8)
POOL, BEST, READ_OUTS = 24, 12, 8


@dataclass(frozen=True, slots=True)
class Product:
    """Tokens (M, K) times a weight (N, K), transposed."""

    tokens: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.tokens * self.inner * self.outer


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds of one product in either format, and of quantising its tokens alone."""

    high_s: float
    low_s: float
    quantise_s: float


@dataclass(frozen=True, slots=True)
class Low:
    """A low-precision copy of a policy's network, and the policy over it."""

    policy: ImagePolicy
    shadow: Shadow


def make_low(bench: Bench, policy: ImagePolicy, format_name: Format) -> Low:
    """The copy that a rollout actor would make."""
    config = QuantizerConfig()
    family = bench.published.config.model_fields["type"].default
    layers = layers_to_quantise(linear_sizes(policy.network), family, config)
    shadow = Shadow(policy.network, make_quantizer(format_name, config, bench.device), layers)
    return Low(policy.with_network(shadow.network), shadow)


@torch.no_grad()
def products_of(bench: Bench, policy: ImagePolicy, layers: Sequence[str]) -> tuple[Counter[Product], int]:
    """What the named layers multiply in one call for a batch, and the operations of the whole call.

    Seen with one picture, as counting writes attention out; a batch has as many times the tokens and operations.
    """
    found: Counter[Product] = Counter()
    batch = bench.options.batch

    def note(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        tokens = batch * inputs[0].numel() // layer.in_features
        found[Product(tokens, layer.in_features, layer.out_features)] += 1

    state = torch.randn(1, *policy.latent_shape, generator=generator("precision_geometry", "state"))
    sigma, told = torch.full((1,), 0.5, device=bench.device), bench.conditioning.to(bench.device)
    with ExitStack() as hooks:
        for name in layers:
            hooks.enter_context(policy.network.get_submodule(name).register_forward_pre_hook(note))
        flops = batch * count_flops(partial(policy.predict, state.to(bench.device), sigma, told))
    return found, flops


@torch.no_grad()
def time_product(product: Product, device: torch.device, dtype: torch.dtype, repeats: int) -> Rate:
    """Best seconds of a product in `dtype` and by the FP8 units, operands quantised before.

    A CPU has no units, but a kernel that takes the same operands, slowly.
    """
    clock = Clock(device)
    draw = torch.Generator(device).manual_seed(RUN_SEED)
    tokens = torch.randn(product.tokens, product.inner, generator=draw, device=device).to(dtype)
    weight = torch.randn(product.outer, product.inner, generator=draw, device=device).to(dtype)
    left, right, by_row = fp8.quantize(tokens), fp8.quantize(weight), ScalingType.RowWise
    multiply = partial(
        functional.scaled_mm,
        left["codes"], right["codes"].t(), left["scales"], by_row, right["scales"].t(), by_row,
    )  # fmt: skip
    jobs = (partial(functional.linear, tokens, weight), multiply, partial(fp8.quantize, tokens))
    best: list[float] = []
    for job in jobs:
        clock.timed(job, 3)
        best.append(min(clock.timed(job, 5 * repeats)))
    return Rate(*best)


def roofline(
    products: Counter[Product], rates: dict[Product, Rate], call_flops: int, batch: int, steps: int
) -> dict[str, Any]:
    """Bounds of images per second, in the base precision and with the products in FP8; see the module's docstring."""
    flops = sum(product.flops * count for product, count in products.items())
    high_s = sum(rates[product].high_s * count for product, count in products.items())
    low_s = sum(rates[product].low_s * count for product, count in products.items())
    others_s = (call_flops - flops) * high_s / flops
    return {
        "shapes": [
            {
                "tokens": product.tokens,
                "in": product.inner,
                "out": product.outer,
                "per_call": count,
                "flops_per_s": product.flops / rates[product].high_s,
                "fp8_flops_per_s": product.flops / rates[product].low_s,
            }
            for product, count in products.items()
        ],
        "share_of_flops": flops / call_flops,
        "flops_per_s": flops / high_s,
        "fp8_flops_per_s": flops / low_s,
        "quantise_s": sum(rates[product].quantise_s * count for product, count in products.items()),
        "images_per_s": batch / (steps * (high_s + others_s)),
        "fp8_images_per_s": batch / (steps * (low_s + others_s)),
        "products_speedup": high_s / low_s,
        "speedup": (high_s + others_s) / (low_s + others_s),
    }


@torch.no_grad()
def measure_rollout(bench: Bench) -> dict[str, Any]:
    """Images per second in both formats and every mode at one size, and their bounds."""
    options, policy = bench.options, bench.policy(adapter=False, vae=True)
    low = make_low(bench, policy, "fp8")
    products, flops = products_of(bench, policy, list(low.shadow.layers))
    rates = {product: time_product(product, bench.device, bench.dtype, options.repeats) for product in products}
    bound = roofline(products, rates, flops, options.batch, options.steps)
    rows: dict[str, Any] = {"roofline": bound, "fp8": low.shadow.describe()}
    keys = [SampleKey(RUN_SEED, "p", 0, index) for index in range(options.batch)]
    told = bench.conditioning.repeat(options.batch).to(bench.device)
    setup = SamplerSetup(bench.sampler, 1.0, Needs.FINAL)

    def draw_low() -> Any:
        with low.shadow.prepared():
            return denoise(low.policy, setup, told, keys)

    draws: dict[str, Callable[[], Any]] = {"": partial(denoise, policy, setup, told, keys), "fp8_": draw_low}
    latents = draws["fp8_"]().final_GCHW.to(bench.device)
    if not bool(torch.isfinite(latents).all()):
        raise SystemExit("the FP8 rollout was not finite")
    for mode in options.modes:
        if mode == "compiled":
            policy.network.compile()
            low.shadow.network.compile()
        row: dict[str, Any] = {}
        for prefix, draw in draws.items():
            bench.clock.forget_peak(release=True)
            (first_s,) = bench.clock.timed(draw, 1)
            told_s = spread(bench.clock.timed(draw, options.repeats))
            images_per_s = options.batch / told_s["median"]
            row |= {
                f"{prefix}seconds": told_s | {"first": first_s},
                f"{prefix}images_per_s": images_per_s,
                f"{prefix}of_roofline": images_per_s / bound[f"{prefix}images_per_s"],
                f"{prefix}peak_bytes": bench.clock.peak_bytes(),
            }
        rows[mode] = row | {"speedup": row["fp8_images_per_s"] / row["images_per_s"]}
    rows["decode_s"] = statistics.median(bench.clock.timed(partial(policy.decode, latents), 2))
    return rows


def measure_fold(bench: Bench) -> dict[str, Any]:
    """A new adapter in resident weights."""
    policy, repeats = bench.policy(adapter=False), bench.options.repeats
    snapshot = make_adapter(bench, policy)
    shapes = {entry.name: entry.shape for entry in snapshot.entries}
    verify_s = spread(bench.clock.timed(partial(view_snapshot, snapshot, shapes), repeats))
    load = partial(policy.load_weights, snapshot)
    (first_s,) = bench.clock.timed(load, 1)
    row: dict[str, Any] = {
        "rank": bench.options.rank,
        "adapter_bytes": snapshot.num_bytes,
        "verify_s": verify_s,
        "load_s": spread(bench.clock.timed(load, repeats)) | {"first": first_s},
        "requantise_s": {},
    }
    row["fold_s"] = max(0.0, row["load_s"]["median"] - verify_s["median"])
    for format_name in FORMATS:
        shadow = make_low(bench, policy, format_name).shadow
        shadow.refresh()
        row["requantise_s"][format_name] = spread([shadow.refresh().seconds for _ in range(repeats)])
    return row


def make_adapter(bench: Bench, policy: ImagePolicy) -> WeightSnapshot:
    """A published adapter of the family's targets, small random values in both of its factors."""
    shapes = lora_shapes(policy.network, bench.config.lora, bench.published.architecture.lora_targets)
    draw = generator("precision_geometry", "adapter")
    tensors = {name: 0.01 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return make_snapshot(tensors, 1, "adapter", bench.config.lora.scale)


def measure_memory(bench: Bench) -> dict[str, Any]:
    """What the network and its copies take."""
    before = allocated(bench.device)
    policy = bench.policy(adapter=False)
    parameters = list(policy.network.parameters())
    rows: dict[str, Any] = {
        "network": {
            "bytes": sum(parameter.nbytes for parameter in parameters),
            "allocated": _growth(before, allocated(bench.device)),
            "parameters": sum(parameter.numel() for parameter in parameters),
        }
    }
    for format_name in FORMATS:
        bench.clock.forget_peak(release=True)
        before = allocated(bench.device)
        shadow = make_low(bench, policy, format_name).shadow
        quantised = sum(layer.in_features * layer.out_features for layer in shadow.layers.values())
        rows[format_name] = {
            "bytes": shadow.packed_bytes,
            "allocated": _growth(before, allocated(bench.device)),
            "values": quantised,
            "bytes_per_value": shadow.packed_bytes / quantised,
            "computes": shadow.describe(),
        }
        del shadow
    return rows


def allocated(device: torch.device) -> int | None:
    """Bytes that torch holds on a GPU; nobody counts them on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


@torch.no_grad()
def measure_ranks(bench: Bench) -> dict[str, Any]:
    """How drafts rank the keys of pools, by what is read out of their latents."""
    options, policy = bench.options, bench.policy(adapter=False)
    pools = [
        [SampleKey(RUN_SEED, f"pool {number}", 0, index) for index in range(POOL)] for number in range(options.pools)
    ]
    keys = [key for pool in pools for key in pool]
    start = normal(sample_generators(keys, "latent"), policy.latent_shape)
    full = draw_all(bench, policy, keys, options.steps)
    rows: dict[str, Any] = {"pools": len(pools), "of": POOL, "best": BEST, "read_outs": READ_OUTS, "drafts": {}}
    for format_name in (None, *DRAFT_FORMATS):
        low = None if format_name is None else make_low(bench, policy, format_name)
        with ExitStack() as drafting:
            if low is not None:
                drafting.enter_context(low.shadow.prepared())
            for steps in [steps for steps in DRAFT_STEPS if steps <= options.steps]:
                drafts = draw_all(bench, policy if low is None else low.policy, keys, steps)
                row = {"computes": low.shadow.describe()} if low is not None else {}
                name = f"{format_name or options.precision}, {steps} steps"
                rows["drafts"][name] = row | agreement(start, drafts, full)
    return rows


def draw_all(bench: Bench, policy: ImagePolicy, keys: Sequence[SampleKey], steps: int) -> torch.Tensor:
    """Final latents (B, C, H, W) of keys, on the CPU, drawn in batches of the size asked for."""
    setup = SamplerSetup(make_sampler(EulerOdeConfig(num_steps=steps), FlowSchedule(3.0)), 1.0, Needs.FINAL)
    finals: list[torch.Tensor] = []
    for first in range(0, len(keys), bench.options.batch):
        some = keys[first : first + bench.options.batch]
        told = bench.conditioning.repeat(len(some)).to(bench.device)
        finals.append(denoise(policy, setup, told, some).final_GCHW.cpu().float())
    return torch.cat(finals)


def agreement(start: torch.Tensor, drafts: torch.Tensor, full: torch.Tensor) -> dict[str, Any]:
    """Rank agreement of read-outs of latents (B, C, H, W), B whole pools; see the module's docstring."""
    moved = (full - start).double().flatten(1).norm(dim=1)
    error = ((drafts - full).double().flatten(1).norm(dim=1) / moved).mean().item()
    read = {"final": (drafts, full), "moved": (drafts - start, full - start)}
    return {"error": error} | {name: _ranking(*(read_outs(one) for one in pair)) for name, pair in read.items()}


def read_outs(latents: torch.Tensor) -> torch.Tensor:
    """Scores (B, read-outs) of latents (B, C, H, W): fixed random weights of unit norm on average, in fp64."""
    flat = latents.double().flatten(1)
    draw = generator("precision_geometry", "read-outs")
    weights = torch.randn(flat.shape[1], READ_OUTS, generator=draw, dtype=torch.float64)
    return flat @ weights / flat.shape[1] ** 0.5


def _ranking(drafts: torch.Tensor, full: torch.Tensor) -> dict[str, float | None]:
    """Means over pools of consecutive rows and over columns; those without a ranking say nothing."""
    found: dict[str, list[float | None]] = {"kendall": [], f"recall_at_{BEST}": []}
    for first in range(0, len(full), POOL):
        for column in range(full.shape[1]):
            draft_scores, full_scores = (one[first : first + POOL, column].tolist() for one in (drafts, full))
            found["kendall"].append(kendall(draft_scores, full_scores))
            found[f"recall_at_{BEST}"].append(recall(draft_scores, full_scores, BEST))
    told = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: statistics.fmean(values) if values else None for name, values in told.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every part of every geometry that was asked for."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    found: dict[str, Any] = {**use_device(options), "geometries": {}}
    jobs: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "rollout": measure_rollout,
        "fold": measure_fold,
        "memory": measure_memory,
        "ranks": measure_ranks,
    }
    for name in options.geometry:
        rows: dict[str, Any] = {}
        for part in options.parts:
            # Only the rollout's cost depends on the size of pictures; latents are ranked at the smallest.
            for pixels in options.pixels if part == "rollout" else [min(options.pixels)]:
                bench = Bench(name, argparse.Namespace(**{**vars(options), "size": pixels}))
                title = part if part in ("fold", "memory") else f"{part}, {pixels} x {pixels}"
                rows[title] = jobs[part](bench)
                tell(f"{name}: {title}", rows[title])
                if "compiled" in options.modes:
                    torch.compiler.reset()  # what was compiled keeps its network
                bench.clock.forget_peak(release=True)
        found["geometries"][name] = rows
    return found


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits for what cannot be measured."""
    parser = make_parser(
        __doc__,
        (
            ("steps", 10, "denoising steps of full quality"),
            ("batch", 8, "pictures drawn at once"),
            ("rank", 32, "of the adapter"),
            ("pools", 2, f"pools of {POOL} keys to rank"),
        ),
    )
    parser.add_argument("--size", choices=("published", "small"), default="published", help="of the models")
    for name, choices, default in (("geometry", PUBLISHED, PUBLISHED), ("parts", PARTS, PARTS)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(default), help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all on CUDA, eager on a CPU")
    parser.add_argument("--pixels", type=int, nargs="+", help="height and width (default 512 1024; small: 16 32)")
    options = parse_with_device(parser, arguments, small="--size small")
    small = options.size == "small"
    if options.device == "cpu" and not small and not options.force:
        parser.error(
            "published sizes take gigabytes and minutes per call on a CPU; use --size small to try the program, "
            "--device cuda to measure, or --force to wait"
        )
    if small:
        options.geometry = ["small"]
    options.pixels = options.pixels or ([16, 32] if small else [512, 1024])
    options.modes = options.modes or (list(MODES) if options.device == "cuda" else ["eager"])
    if min(options.batch, options.repeats, options.pools, options.rank) < 1:
        parser.error("--batch, --repeats, --pools and --rank must be at least 1")
    if options.steps < min(DRAFT_STEPS):
        parser.error(f"--steps must be at least {min(DRAFT_STEPS)}, the fewest draft steps, got {options.steps}")
    return options


def main() -> None:
    """Measure and print."""
    options = parse_options()
    publish(__file__, options, measure(options))


if __name__ == "__main__":
    main()
