"""Bytes of each role, part by part: what is held all the time, and what comes and goes.

Of the parts that come and go (`passing`) no two are there at once, so a role needs the held ones and the largest of
the others, on its device and on the host apart. Where a probe ran, processes and working memory are what it measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from raylign.precision import DTYPES, Format, base_precision
from raylign.precision.kept_high import layers_to_quantise
from raylign.precision.packed import pack_weight
from raylign.types import Needs
from rollout.drawn import Slot
from services.config import RunConfig
from services.plan.activations import Kept
from services.plan.batches import Batches
from services.plan.probe import Measured
from services.plan.rewards import RewardWeights
from services.plan.sizes import ModelSizes
from services.precision_checks import low_precision_slots

FP32 = 4
MIB, GIB = 2**20, 2**30
TYPICAL_PROCESS = {"image": 505 * MIB, "text": 430 * MIB}
"""What a worker's imports hold without a probe: torch, diffusers, transformers and PEFT as pinned, on a CPU."""
TYPICAL_DRIVER, TYPICAL_REPLICA = 450 * MIB, 380 * MIB
RAY_WORKER = 42 * MIB
"""What Ray's own runtime adds to a process that imported it, measured of 2.60: threads, gRPC, its native library."""
STORE_VERSIONS = 4
"""Published versions whose pages of the shared object store a process has touched: those of its slots, the one that
comes, and one that is gone but not yet overwritten."""
CUDA_CONTEXT = 512 * MIB
"""Of a process on a GPU, beside its tensors."""
_DECODER_COPIES = 6
"""Tensors of a VAE decoder's largest stage that are there at once: input, output, norm, activation, residual."""

Place = Literal["host", "device"]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a role's memory. passing: it comes and goes. Bytes are None where they cannot be known here."""

    name: str
    num_bytes: int | None
    place: Place = "device"
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Role:
    """One kind of process of a run. num_gpus: of each; 0 has host memory only."""

    name: str
    count: int
    num_gpus: float
    parts: tuple[Part, ...]

    @property
    def host_bytes(self) -> int:
        """Memory of one process on its node: everything, where it has no GPU."""
        return _most(self.parts) if self.num_gpus == 0 else _most(_at(self.parts, "host"))

    @property
    def device_bytes(self) -> int:
        """Memory that the tensors of one process take, wherever they lie: on its GPU, if it has one."""
        return _most(_at(self.parts, "device"))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Parts of unknown size."""
        return tuple(part.name for part in self.parts if part.num_bytes is None)


def _at(parts: tuple[Part, ...], place: Place) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.place == place)


def _most(parts: tuple[Part, ...]) -> int:
    held = sum(part.num_bytes or 0 for part in parts if not part.passing)
    return held + max((part.num_bytes or 0 for part in parts if part.passing), default=0)


def run_roles(
    config: RunConfig,
    sizes: ModelSizes,
    batches: Batches,
    learner_kept: Kept | None,
    rollout_kept: Kept | None,
    rewards: Mapping[str, RewardWeights],
    measured: Measured | None,
) -> list[Role]:
    """Every kind of process of the run. The activations are None where the network's code cannot be counted."""
    seen: Measured = measured or {}
    actor = Role(
        "rollout actor",
        config.rollout.num_actors,
        config.rollout.num_gpus,
        tuple(_actor_parts(config, sizes, rollout_kept, seen.get("rollout"))),
    )
    rank = Role(
        "learner rank",
        config.learner.num_ranks,
        config.learner.num_gpus_per_rank,
        tuple(_rank_parts(config, sizes, batches, learner_kept, seen.get("learner"), seen.get("rollout"))),
    )
    if config.placement == "in_process":
        scored = [part for role in _reward_roles(config, rewards, seen, everyone=True) for part in role.parts]
        parts = _together(actor.parts, rank.parts, tuple(part for part in scored if part.name != "process"), RAY_WORKER)
        return [Role("process", 1, max(actor.num_gpus, rank.num_gpus), parts)]
    roles = [_driver(config, sizes, seen)]
    if config.placement == "colocated":
        gpus = max(actor.num_gpus, rank.num_gpus)
        roles.append(Role("colocated worker", rank.count, gpus, _together(actor.parts, rank.parts, (), 0)))
    else:
        roles += [rank, actor]
    return roles + _reward_roles(config, rewards, seen)


def _together(actor: tuple[Part, ...], rank: tuple[Part, ...], others: tuple[Part, ...], less: int) -> tuple[Part, ...]:
    """Two roles in one process: its imports are there once, `less` what it has no need of."""
    known = [part.num_bytes or 0 for part in (*actor, *rank) if part.name == "process"]
    process = Part("process", max(known, default=0) - less, "host")
    named = [replace(part, name=f"drawing: {part.name}") for part in actor if part.name != "process"]
    named += [replace(part, name=f"training: {part.name}") for part in rank if part.name != "process"]
    return (process, *named, *others)


def payload_bytes(config: RunConfig, sizes: ModelSizes) -> int:
    """A publication of the rollout policy: the most, where only changes are sent."""
    if config.learner.publish != "packed":
        return FP32 * sizes.num_trained
    packed, layers = _packed(config, sizes, "rollout")
    return packed + FP32 * (sizes.num_trained - sum(rows * columns for rows, columns in layers.values()))


def _packed(config: RunConfig, sizes: ModelSizes, slot: Slot) -> tuple[int, Mapping[str, tuple[int, int]]]:
    """The quantised weights of a slot, in bytes, and which layers they are; none for a slot in high precision."""
    formats = low_precision_slots(config.rollout.precision, config.rollout.explore)
    if slot not in formats:
        return 0, {}
    quantizer = config.rollout.quantizer
    inputs = {name: (columns, rows) for name, (rows, columns) in sizes.linears.items()}
    layers = {name: sizes.linears[name] for name in layers_to_quantise(inputs, config.model.type, quantizer)}
    return sum(_packed_bytes(formats[slot], rows, columns) for rows, columns in layers.values()), layers


def _packed_bytes(format_name: Format, rows: int, columns: int) -> int:
    """By packing a slice: every row is packed alike, but for a scale or two of the whole tensor."""
    slice_rows = min(rows, 32)
    return round(pack_weight(format_name, torch.zeros(slice_rows, columns)).num_bytes * rows / slice_rows)


def _actor_parts(config: RunConfig, sizes: ModelSizes, kept: Kept | None, seen: Mapping[str, Any] | None) -> list[Part]:
    rollout, on_gpu = config.rollout, config.rollout.num_gpus > 0
    base = DTYPES[base_precision(rollout.precision)].itemsize
    built = [Part("network", base * sizes.num_network)]
    built += [
        Part(one.name, None if one.num_values is None else (FP32 if one.always_fp32 else base) * one.num_values)
        for one in sizes.others
    ]
    later: list[Part] = []
    if config.model.tuning == "lora" and config.fold_lora:
        later.append(Part("adapted layers, kept untouched for folding", base * sizes.num_adapted))
    elif config.model.tuning == "lora":
        built.append(Part("adapter", FP32 * sizes.num_trained))
    for slot, name in low_precision_slots(rollout.precision, rollout.explore).items():
        packed, layers = _packed(config, sizes, slot)
        built.append(Part(f"quantised copy for {slot}s ({name})", packed))
        if not on_gpu:
            unpacked = base * sum(rows * columns for rows, columns in layers.values())
            later.append(Part("quantised layers unpacked to emulate them", unpacked, passing=True))
    working = (
        []
        if kept is None
        else [Part("working memory of a forward", kept.working * config.chunk_size // kept.rows, passing=True)]
    )
    decode = _decode_bytes(config, sizes)
    if decode:
        working.append(Part(f"decoding {min(config.chunk_size, _decode_slice(config))} pictures", decode, passing=True))
    store = Part("published versions in shared memory", STORE_VERSIONS * payload_bytes(config, sizes), "host")
    if config.placement == "in_process":
        store = Part("published versions", 2 * payload_bytes(config, sizes), "host")
    if seen is None:
        process = TYPICAL_PROCESS[config.modality] + RAY_WORKER
        return [Part("process", process, "host"), *_context(on_gpu), *built, *later, *working, store]
    process, measured = _process(seen, sum(part.num_bytes or 0 for part in built), on_gpu)
    held = sum(part.num_bytes or 0 for part in later)
    own = 2 * payload_bytes(config, sizes)  # the probe's two snapshots lie in its own memory, the run's in Ray's
    work = max(0, measured - held - (0 if on_gpu else own))
    return [
        process,
        *_context(on_gpu),
        *built,
        *later,
        Part("drawing and decoding, measured", work, passing=True),
        store,
    ]


def _rank_parts(
    config: RunConfig,
    sizes: ModelSizes,
    batches: Batches,
    kept: Kept | None,
    seen: Mapping[str, Any] | None,
    drawn: Mapping[str, Any] | None,
) -> list[Part]:
    learner, on_gpu = config.learner, config.learner.num_gpus_per_rank > 0
    lora = config.model.tuning == "lora"
    shards = learner.num_ranks if learner.sharding == "fsdp" else 1
    whole = FP32 * sizes.num_trained
    trained = whole // shards
    base = DTYPES[learner.precision if lora else "fp32"].itemsize
    built = [Part("network", base * sizes.num_network // shards)]
    built += [Part("adapter", trained)] if lora else []
    relatives = _relatives(config)
    built += [Part("gradients", trained), *(Part(f"{name} policy", trained) for name in relatives)]
    moments = Part("AdamW's two moments", 2 * trained)
    gathered = [Part("blocks gathered from other ranks", _gathered(sizes, base))] if shards > 1 else []
    samples = Part("the step's samples", _samples_bytes(config, kept, batches, drawn), "host")
    snapshots = 2 if learner.publish == "delta" else 1
    published = payload_bytes(config, sizes)
    if config.placement != "in_process":
        published *= STORE_VERSIONS + snapshots - 1
    host = [samples, Part("published versions", published, "host")]
    saved = Part("a checkpoint's copy and its file", 2 * (3 + len(relatives)) * whole, "host", passing=True)
    if seen is None:
        passing: list[Part] = []
        if kept is not None:
            share = kept.recomputed if learner.gradient_checkpointing else kept.whole
            rows = min(config.micro_batch_size, batches.rows_per_share)
            passing.append(
                Part(
                    "activations of a micro-batch",
                    share * rows // kept.rows + kept.working * rows // kept.rows // 2,
                    passing=True,
                )
            )
        if not lora and learner.precision == "bf16":
            built.append(Part("weights cast to bf16", 2 * sizes.num_trained))
        process = TYPICAL_PROCESS[config.modality] + RAY_WORKER
        return [Part("process", process, "host"), *_context(on_gpu), *built, *gathered, moments, *passing, *host, saved]
    # The probe's one rank holds everything whole, whatever the run's ranks do.
    alone = base * sizes.num_network + (whole if lora else 0) + whole * (1 + len(relatives))
    process, measured = _process(seen, alone, on_gpu)
    work = max(0, measured - 2 * whole - (0 if on_gpu else whole))
    return [
        process,
        *_context(on_gpu),
        *built,
        *gathered,
        moments,
        Part("activations and working memory, measured", work, passing=True),
        *host,
        saved,
    ]


def _process(seen: Mapping[str, Any], built: int, on_gpu: bool) -> tuple[Part, int]:
    """A process by what the probe measured of one, and the bytes that came on top of it while it worked."""
    cuda = seen.get("cuda")
    if on_gpu and cuda is not None:
        return Part("process", int(seen["resident_bytes"]) + RAY_WORKER, "host"), max(0, cuda["reserved"] - built)
    return Part("process", int(seen["built_bytes"]) - built + RAY_WORKER, "host"), int(
        seen.get("trained_peak_bytes", seen["peak_bytes"])
    ) - int(seen["built_bytes"])


def _gathered(sizes: ModelSizes, base: int) -> int:
    """Two blocks whole, the one that computes and the next: the largest numbered part of the network's names."""
    by_block: dict[str, int] = {}
    for name, shape in sizes.network.items():
        found = re.match(r"(.*?\.\d+)\.", name)
        block = found[1] if found else ""
        by_block[block] = by_block.get(block, 0) + math.prod(shape)
    return 2 * base * max(by_block.values())


def _relatives(config: RunConfig) -> list[str]:
    needs = config.algorithm.needs
    asked = {"old": Needs.OLD, "sampling": Needs.SAMPLING, "reference": Needs.REFERENCE}
    found = [name for name, need in asked.items() if need in needs]
    return found + (["averaged"] if config.learner.ema_decay is not None else [])


def _samples_bytes(config: RunConfig, kept: Kept | None, batches: Batches, drawn: Mapping[str, Any] | None) -> int:
    """Trajectories and conditioning of a step's groups."""
    if drawn is not None:
        return round(config.groups_per_step * float(drawn["group_bytes"]))
    model: Any = config.model
    told = 0 if kept is None else FP32 * kept.told * config.groups_per_step
    if config.modality == "text":
        return told + batches.samples * model.canvas_length * (8 + 8 + FP32 + FP32)
    states = getattr(config.sampler, "num_steps", 1) + 1 if Needs.STEPS in config.algorithm.needs else 0
    latent = model.height * model.width * 16 // 64  # 16 channels at an eighth of the height and width
    return told + batches.samples * latent * (FP32 + states * DTYPES[config.rollout.latents].itemsize)


def _decode_slice(config: RunConfig) -> int:
    return int(getattr(config.model, "decode_slice", 1))


def _decode_bytes(config: RunConfig, sizes: ModelSizes) -> int:
    """The largest stage of the VAE's decoder, at the picture's full size."""
    if config.modality == "text":
        return 0
    from raylign.assets import resolve
    from raylign.models.pipeline_folder import component_config

    model: Any = config.model
    vae = component_config(resolve(model.path), "vae")
    channels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [128]
    wide = channels[1] if len(channels) > 1 and "down_block_types" in vae else channels[0]
    fp32 = any(one.name == "vae" and one.always_fp32 for one in sizes.others)
    item = FP32 if fp32 else DTYPES[base_precision(config.rollout.precision)].itemsize
    pictures = min(config.chunk_size, model.decode_slice)
    return pictures * model.height * model.width * wide * item * _DECODER_COPIES // 2


def _context(on_gpu: bool) -> list[Part]:
    return [Part("CUDA context", CUDA_CONTEXT)] if on_gpu else []


def _driver(config: RunConfig, sizes: ModelSizes, seen: Measured) -> Role:
    model: Any = config.model
    measured = seen.get("driver")
    process = TYPICAL_DRIVER if measured is None else int(measured["process_bytes"])
    admitted = (config.max_staleness + 1) * config.groups_per_step * config.group_size
    outputs = admitted * (3 * model.height * model.width if config.modality == "image" else 64 * model.canvas_length)
    if "rollout" in seen:
        outputs += (config.max_staleness + 1) * config.groups_per_step * int(seen["rollout"]["group_bytes"])
    return Role(
        "driver",
        1,
        0.0,
        (Part("process", process + RAY_WORKER, "host"), Part("groups in the buffer", outputs, "host")),
    )


def _reward_roles(
    config: RunConfig, rewards: Mapping[str, RewardWeights], seen: Measured, everyone: bool = False
) -> list[Role]:
    """One role per reward that gets replicas of its own; `everyone`: those of a run in one process too."""
    measured = seen.get("rewards")
    service, roles = config.reward_service, list[Role]()
    for reward in config.rewards:
        light = reward.only_eval and reward.is_light and reward.name not in service.per_reward
        if light and not everyone:
            continue
        serving, found = service.serving(reward.name), rewards[reward.name]
        added = None if measured is None else measured["rewards"].get(reward.name, {}).get("added_bytes")
        process = TYPICAL_REPLICA if measured is None else int(measured["process_bytes"])
        place: Place = "device" if found.on_gpu else "host"
        own = (
            [Part("model and scoring, measured", int(added), place)]
            if added is not None
            else list(_weights(found, place))
        )
        context = _context(found.on_gpu)
        roles.append(
            Role(
                f"reward {reward.name}",
                serving.max_replicas,
                serving.num_gpus_per_replica,
                (Part("process", process + RAY_WORKER, "host"), *context, *own),
            )
        )
    return roles


def _weights(found: RewardWeights, place: Place) -> list[Part]:
    return [Part("model", found.num_bytes, place)] if found.needs_files else []
