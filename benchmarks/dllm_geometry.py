"""What a diffusion language model of LLaDA-8B's sizes costs: decoding, training steps, and the roofline of both.

Weights are random and made on the device (no download, no checkpoint): time and memory do not depend on their values.
What does depend on them is how many tokens a sampler reveals per call: random weights are sure of nothing, so
`threshold` and `entropy_bounded` reveal one token per call here and far more in a trained model. So beside tokens per
second stand the seconds of one call of each kind, which the roofline speaks of.

calls   one call of the network: full (every position), prefix (from the middle block of the canvas on) and dual (that
        block alone), against the floor: the larger of operations / rate and bytes / bandwidth.
decode  whole canvases with `plain` (low confidence, L / 2 calls as d1 has it), `threshold` and `entropy_bounded`,
        each with every cache: answer tokens per second, calls (NFE) and cached calls per answer.
train   steps of the real learner (forward, backward, clip, AdamW) on one group: LoRA on all linear layers of the
        blocks, frozen base, activations recomputed. Seconds and peak memory; `bgpo` once per number of samples.

Rate and bandwidth are the device's own: the matrix products of all MLPs at the full call's shape and dtype, and a
large copy, best of the repeats. All else is the median, least and most of the repeats after a warm-up, device
synchronised. Each row is told on stderr when it is done.

    python benchmarks/dllm_geometry.py --device cuda --hardware "1 x H100 80 GB" \\
        --json docs/benchmarks/dllm_geometry.json                     # by estimate 6 minutes and 40 GiB
    python benchmarks/dllm_geometry.py --geometry small --canvas-length 64 --prompt-length 32 --repeats 2   # any CPU

prints one JSON object. Peak memory is the allocator's on CUDA (of the row alone); on a CPU it is the process's largest
resident set so far, which only ever grows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

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
from benchmarks.roofline import Ledger, Machine, block_parameters, call_bytes, call_flops, floor_s, head_parameters
from learner.algorithms import AlgorithmUnion
from learner.algorithms.bgpo import BgpoConfig
from learner.algorithms.d1 import D1Config
from learner.algorithms.diffpo import DiffpoConfig
from learner.learner import Learner, LearnerConfig
from raylign.keys import generator
from raylign.models.adapters import LoraSettings
from raylign.models.bidirectional import BidirectionalNetwork
from raylign.models.llada import LLADA, LladaConfig
from raylign.models.text_policy import TextPolicy
from raylign.models.tokens import CacheKind, TokenPrompts, Vocabulary
from raylign.precision import DTYPES
from raylign.samplers import TokenSampler, make_token_sampler
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.samplers.threshold import ThresholdConfig
from raylign.types import Needs, Prompt, Rollout, RolloutGroup, RolloutStatus, SampleKey, TokenTrajectory
from rollout.texts import TokenSetup, unmask

GEOMETRIES: dict[str, dict[str, int]] = {
    # GSAI-ML/LLaDA-8B-Instruct, config.json
    "llada-8b": {
        "layers": 32,
        "width": 4096,
        "heads": 32,
        "mlp": 12288,
        "vocabulary": 126464,
        "mask_id": 126336,
        "eos_id": 126081,
    },
    "small": {"layers": 2, "width": 64, "heads": 2, "mlp": 192, "vocabulary": 512, "mask_id": 511, "eos_id": 510},
}
CACHES: tuple[CacheKind, ...] = ("none", "prefix", "dual")
SAMPLERS = ("plain", "threshold", "entropy_bounded")
ALGORITHMS = ("d1", "diffpo", "bgpo")
RUN_SEED = 0
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


class Bench:
    """A network on its device, what it is asked, and how that is timed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.clock = Clock(self.device)
        self.dtype = DTYPES[options.precision]
        self.config = LladaConfig(
            path="random weights",
            canvas_length=options.canvas_length,
            max_prompt_length=options.prompt_length,
            lora=LoraSettings(rank=options.rank, alpha=options.alpha),
        )
        sizes = GEOMETRIES[options.geometry]
        self.network = make_network(sizes, self.config, self.device, self.dtype)
        self.ledger = Ledger(self.network)
        self.vocabulary = Vocabulary(sizes["vocabulary"], sizes["mask_id"], sizes["eos_id"], sizes["eos_id"])
        # Ids below the special ones; all prompts of one length, so that there is no padding to mask.
        shape, draw = (1, options.prompt_length), generator("dllm_geometry", "prompt")
        ids_PL = torch.randint(sizes["eos_id"], shape, generator=draw)
        self.prompt = TokenPrompts(ids_PL, torch.ones_like(ids_PL, dtype=torch.bool))
        self.machine = self._measure_machine()

    def policy(self, *, adapter: bool) -> TextPolicy:
        """The network as an actor has it (adapter folded away), or as the learner has it (adapter attached).

        Nothing here encodes or decodes a text, so there is no tokenizer.
        """
        targets = LLADA.names.own_targets(())
        return TextPolicy(self.config, self.network, None, self.vocabulary, targets, fold=not adapter, seed=RUN_SEED)

    def sampler(self, name: str, cache: CacheKind) -> TokenSampler:
        """One of SAMPLERS, or "hurried": two calls per block, for warming up and for the learner's samples."""
        length, block = self.options.canvas_length, self.options.block_length
        values: dict[str, Any] = {"block_length": block, "cache": cache, "stop_at_eos": False}
        configs = {
            "plain": LowConfidenceConfig(num_steps=length // 2, **values),
            "hurried": LowConfidenceConfig(num_steps=2 * length // block, **values),
            "threshold": ThresholdConfig(**values),
            "entropy_bounded": EntropyBoundedConfig(**values),
        }
        return make_token_sampler(configs[name], length)

    def timed(self, job: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each repetition; `ledger` has the calls of the last one."""

        def alone() -> None:
            self.ledger.calls = []
            job()

        return self.clock.timed(alone, repeats)

    def against_floor(self, job: Callable[[], Any], repeats: int) -> dict[str, Any]:
        """A job's seconds, beside the least that the calls of one repetition can take, and its peak memory."""
        self.clock.forget_peak()
        seconds = self.timed(job, repeats)
        least_s = floor_s(self.network.shape, self.ledger.calls, self.dtype.itemsize, self.machine)
        told = spread(seconds)
        return {
            "seconds": told,
            "floor_s": least_s,
            "measured_over_floor": told["median"] / least_s,
            "peak_bytes": self.clock.peak_bytes(),
        }

    @torch.no_grad()
    def _measure_machine(self) -> Machine:
        """The MLPs' products over all positions of a full call, layer after layer as in a call; and a copy."""
        options, shape = self.options, self.network.shape
        num_tokens = options.batch * (options.prompt_length + options.canvas_length)
        draw = generator("dllm_geometry", "states")
        states = torch.randn(num_tokens, shape.hidden_size, generator=draw).to(self.device, self.dtype)
        ups, downs = (
            [weight.T for name, weight in self.network.named_parameters() if name.endswith(f".mlp.{kind}_proj.weight")]
            for kind in ("up", "down")
        )

        def multiply() -> None:
            for up, down in zip(ups, downs, strict=True):
                torch.mm(torch.mm(states, up), down)

        source = torch.ones(COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        best_s: list[float] = []
        for job in (multiply, lambda: target.copy_(source)):
            self.timed(job, 2)
            best_s.append(min(self.timed(job, CALLS_PER_REPEAT * options.repeats)))
        flops = 4 * num_tokens * shape.hidden_size * shape.intermediate_size * shape.num_layers
        return Machine(flops / best_s[0], 2 * source.numel() / best_s[1])


def make_network(
    sizes: dict[str, int], config: LladaConfig, device: torch.device, dtype: torch.dtype
) -> BidirectionalNetwork:
    """LLaDA's own network with matrices of deviation .02 and norms of 1, filled where they lie."""
    described = {
        "d_model": sizes["width"],
        "mlp_hidden_size": sizes["mlp"],
        "n_layers": sizes["layers"],
        "n_heads": sizes["heads"],
        "vocab_size": sizes["vocabulary"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_sequence_length": 4096,
    }
    with torch.device("meta"):
        network = LLADA.build(described, config)
    draws = torch.Generator(device).manual_seed(RUN_SEED)
    values: dict[str, torch.Tensor] = {}
    for name, parameter in network.named_parameters():
        value = torch.ones(parameter.shape, dtype=dtype, device=device)
        values[name] = value.normal_(0.0, 0.02, generator=draws) if value.dim() == 2 else value
    network.load_state_dict(values, assign=True)
    return network.to(device)  # what is computed and not loaded: rotary frequencies


@torch.no_grad()
def measure_calls(bench: Bench) -> dict[str, Any]:
    """One call of each kind at the canvas's middle block."""
    options, shape, policy = bench.options, bench.network.shape, bench.policy(adapter=False)
    start = options.canvas_length // options.block_length // 2 * options.block_length
    span = slice(start, start + options.block_length)
    canvas_BL = torch.full((options.batch, options.canvas_length), bench.vocabulary.mask_id, device=bench.device)
    prompts = bench.prompt.repeat(options.batch).to(bench.device)
    rows: dict[str, Any] = {}
    for name, kind in zip(("full", "prefix", "dual"), CACHES, strict=True):
        cache = policy.start_cache(kind, span)

        def job(cache: Any = cache) -> None:
            policy.predict(canvas_BL, prompts, span, cache)

        bench.timed(job, 3)  # warm-up; with a cache the first of them fills it
        row = bench.against_floor(job, CALLS_PER_REPEAT * options.repeats)
        (call,) = bench.ledger.calls
        flops, num_bytes = call_flops(shape, call), call_bytes(shape, call, bench.dtype.itemsize)
        computing = flops / bench.machine.flops_per_s > num_bytes / bench.machine.bytes_per_s
        rows[name] = row | {
            "floor_is": "operations" if computing else "bytes",
            "positions_computed": call.rows * call.computed,
            "flops": flops,
            "bytes": num_bytes,
            "flops_per_s": flops / row["seconds"]["median"],
        }
        tell(f"call {name}", rows[name])
    return rows


@torch.no_grad()
def measure_decoding(bench: Bench) -> dict[str, Any]:
    """Whole canvases with each sampler and cache."""
    options, policy = bench.options, bench.policy(adapter=False)
    prompts = bench.prompt.repeat(options.batch)
    keys = [SampleKey(RUN_SEED, "p", 0, index) for index in range(options.batch)]
    rows: dict[str, Any] = {}
    for name, cache in product(options.samplers, options.caches):
        drawn: list[TokenTrajectory] = []

        def job(sampler: TokenSampler, drawn: list[TokenTrajectory] = drawn) -> None:
            drawn.append(unmask(policy, TokenSetup(sampler, Needs.FINAL), prompts, keys))

        job(bench.sampler("hurried", cache))  # warm-up
        row = bench.against_floor(partial(job, bench.sampler(name, cache)), options.repeats)
        if bool((drawn[-1].tokens_GL == bench.vocabulary.mask_id).any()):
            raise SystemExit(f"{name}, cache {cache}: the network's answer was not finite")
        num_calls, nfe = len(bench.ledger.calls), float(drawn[-1].nfe_G.double().mean())
        rows[f"{name}, cache {cache}"] = row | {
            "tokens_per_s": options.batch * options.canvas_length / row["seconds"]["median"],
            "nfe_per_answer": nfe,
            "cached_calls_per_answer": float(drawn[-1].cached_calls_G.double().mean()),
            "tokens_per_call": options.canvas_length / nfe,
            "network_calls": num_calls,
            "seconds_per_network_call": row["seconds"]["median"] / num_calls,
        }
        tell(f"{name}, cache {cache}", rows[f"{name}, cache {cache}"])
    return rows


@torch.no_grad()
def draw_group(bench: Bench, sampler: TokenSampler) -> RolloutGroup:
    """One prompt's answers with unequal rewards."""
    size = bench.options.batch
    keys = [SampleKey(RUN_SEED, "p", 0, sibling) for sibling in range(size)]
    setup = TokenSetup(sampler, Needs.FINAL)
    trajectory = unmask(bench.policy(adapter=False), setup, bench.prompt.repeat(size), keys)
    rollouts = tuple(Rollout(key, RolloutStatus.OK, 0, 0) for key in keys)
    return rising_rewards(RolloutGroup(Prompt("p", "random tokens"), 0, 0, rollouts, trajectory, bench.prompt))


def measure_training(bench: Bench) -> dict[str, Any]:
    """Steps of the learner with each algorithm. Call it last: the adapter stays attached."""
    options = bench.options
    sampler = bench.sampler("hurried", "none")
    group = draw_group(bench, sampler)
    policy = bench.policy(adapter=True)
    configs: dict[str, AlgorithmUnion] = {"d1": D1Config(), "diffpo": DiffpoConfig()}
    configs |= {f"bgpo, num_samples {count}": BgpoConfig(num_samples=count) for count in options.samples}
    learner_config = LearnerConfig(precision=options.precision, gradient_checkpointing=True)
    rows: dict[str, Any] = {}
    for name, config in configs.items():
        if config.type not in options.algorithms:
            continue
        learner = Learner(learner_config, config, policy, sampler, 1.0, options.micro_batch, RUN_SEED)
        take_step(learner, group)  # warm-up; makes Adam's moments
        row = bench.against_floor(partial(take_step, learner, group), options.repeats)
        rows[name] = row | {
            "answers_per_s": options.batch / row["seconds"]["median"],
            "network_calls_with_gradient": sum(call.trained for call in bench.ledger.calls),
            "network_calls_without": sum(not call.trained for call in bench.ledger.calls),
        }
        tell(name, rows[name])
        del learner
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for; the learner's last, as it attaches an adapter."""
    device = use_device(options)
    bench = Bench(options)
    shape = bench.network.shape
    found: dict[str, Any] = {
        **device,
        "num_parameters": sum(parameter.numel() for parameter in bench.network.parameters()),
        "matrix_parameters": {"blocks": block_parameters(shape), "output_layer": head_parameters(shape)},
        "machine": {"flops_per_s": bench.machine.flops_per_s, "bytes_per_s": bench.machine.bytes_per_s},
    }
    tell("machine", found["machine"])
    parts = {"calls": measure_calls, "decode": measure_decoding, "train": measure_training}
    return found | {name: part(bench) for name, part in parts.items() if name in options.parts}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits for what cannot be measured."""
    parser = make_parser(
        __doc__,
        (
            ("batch", 4, "answers decoded at once, and siblings in the learner's group"),
            ("canvas-length", 256, "answer tokens, a multiple of the block"),
            ("prompt-length", 128, "prompt tokens"),
            ("block-length", 32, "canvas positions filled together, an even number"),
            ("micro-batch", 4, "answers per forward of the learner"),
            ("rank", 128, "of the adapter, as d1 has it"),
        ),
    )
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="llada-8b")
    parser.add_argument("--alpha", type=float, default=64.0, help="of the adapter (default 64)")
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 16], help="BGPO's samples per answer")
    for name, choices in (
        ("parts", ("calls", "decode", "train")),
        ("samplers", SAMPLERS),
        ("caches", CACHES),
        ("algorithms", ALGORITHMS),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), help="default: all")
    options = parse_with_device(parser, arguments)
    if options.geometry == "llada-8b" and options.device == "cpu" and not options.force:
        parser.error(
            "llada-8b on a CPU takes 16 GB of weights and minutes per call of the network; use --geometry small to try "
            "the program, --device cuda to measure, or --force to wait"
        )
    if options.block_length % 2 or options.canvas_length % options.block_length:
        parser.error(
            f"--block-length {options.block_length} must be even and divide --canvas-length {options.canvas_length}"
        )
    if min(options.repeats, options.batch - 1) < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1 and --batch {options.batch} at least 2")
    return options


def main() -> None:
    """Measure and print."""
    options = parse_options()
    found = {
        "geometry": GEOMETRIES[options.geometry],
        "setting": {key: value for key, value in vars(options).items() if key not in ("json", "hardware")},
        **measure(options),
    }
    publish(__file__, options, found)


if __name__ == "__main__":
    main()
