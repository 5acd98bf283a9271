"""How a step is cut and what it computes: chunks, units, shares, micro-batches, calls of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from learner.algorithms import make_algorithm
from learner.algorithms.base import LossSetting
from learner.batching import ABSENT
from raylign.assets import resolve
from raylign.models.tokens import Vocabulary
from raylign.samplers import make_sampler, make_token_sampler
from raylign.samplers.left_to_right import LeftToRightConfig
from raylign.types import (
    LatentTrajectory,
    Needs,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    TokenTrajectory,
)
from rollout.draft_sampler import draft_sampler
from rollout.images import stochastic_steps
from services.config import RunConfig
from services.plan.sizes import ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Batches:
    """One step in numbers. What depends on the texts that are drawn is an upper bound, and `bounded` says so."""

    samples: int
    drafts: int
    chunk_size: int
    chunks: int
    draft_chunks: int
    unit: str
    units: int
    updates: int
    ranks: int
    units_per_share: tuple[int, int]
    micro_batch_size: int
    blocks_per_share: int
    """Forward passes of a rank in one update, each item apart: the most of any rank."""
    rows_per_share: int
    items_per_sample: int
    backward_passes: int
    """Of one rank in a step."""
    pixels: int
    tokens: int
    calls_per_sample: int
    draft_calls: int
    nfe: int
    """Rows through the network in a step's rollouts, drafts included."""
    bounded: bool
    eval_samples: int
    evaluations: int
    notes: tuple[str, ...]


def step_batches(config: RunConfig, num_heldout: int) -> Batches:
    """How a validated configuration's steps are cut. `num_heldout`: prompts of an evaluation."""
    explore, learner = config.rollout.explore, config.learner
    samples = config.groups_per_step * config.group_size
    chunks = math.ceil(samples / config.chunk_size)
    drafts = 0 if explore is None else config.groups_per_step * explore.pool_size
    draft_chunks = math.ceil(drafts / config.draft_chunk_size)
    if explore is not None and not explore.regenerate:
        chunks = 0
    unit, unit_rows = _unit(config)
    units = math.ceil(samples / unit_rows)
    shares = learner.updates_per_step * learner.num_ranks
    rows = math.ceil(units / shares) * unit_rows
    blocks = math.ceil(rows / config.micro_batch_size)
    items = items_per_sample(config)
    calls, bounded = _calls(config)
    draft_calls = 0
    if explore is not None:
        draft_calls = (
            getattr(draft_sampler(config.sampler, explore), "num_steps", calls) if explore.regenerate else calls
        )
    image = _any(config.model)
    is_image = config.modality == "image"
    guided = 2 if config.sampler.guidance_scale > 1 else 1
    drawn = samples if chunks else 0
    first = 0 if config.prompts.heldout is None else 1
    evaluations = first + math.ceil(config.num_steps / config.eval.every_steps) if first else 0
    return Batches(
        samples=samples,
        drafts=drafts,
        chunk_size=config.chunk_size,
        chunks=chunks,
        draft_chunks=draft_chunks,
        unit=unit,
        units=units,
        updates=learner.num_updates,
        ranks=learner.num_ranks,
        units_per_share=(units // shares, math.ceil(units / shares)),
        micro_batch_size=config.micro_batch_size,
        blocks_per_share=blocks,
        rows_per_share=rows,
        items_per_sample=items,
        backward_passes=learner.num_updates * blocks * items,
        pixels=samples * image.height * image.width if is_image else 0,
        tokens=0 if is_image else samples * image.canvas_length,
        calls_per_sample=calls * guided,
        draft_calls=draft_calls * guided,
        nfe=guided * (drawn * calls + drafts * draft_calls),
        bounded=bounded,
        eval_samples=num_heldout * config.eval.samples_per_prompt,
        evaluations=evaluations,
        notes=tuple(_notes(config, chunks, rows, unit_rows)),
    )


def items_per_sample(config: RunConfig) -> int:
    """Backward passes that a sample takes part in, in one update: the algorithm is asked about a made-up group."""
    image = config.modality == "image"
    model, wanted = _any(config.model), _any(config.sampler)
    if image:
        sampler: Any = make_sampler(wanted, ARCHITECTURES[type(model)].schedule(model, resolve(model.path)))
    else:
        sampler = make_token_sampler(wanted, model.canvas_length)
    vocabulary = None if image else Vocabulary(4, mask_id=0, eos_id=1, pad_id=2)
    setting = LossSetting(sampler, 1.0, vocabulary, config.learner.epochs_per_step)
    algorithm = make_algorithm(config.algorithm, setting)
    mask_S = stochastic_steps(sampler, config.seed, 1) if image else ()
    items_GK = algorithm.items(_made_up(config, mask_S, sampler), config.seed, 1)
    return int((items_GK != ABSENT).sum(dim=1).max())


def _made_up(config: RunConfig, mask_S: tuple[bool, ...], sampler: Any) -> RolloutGroup:
    """A group of the configured size whose texts took one call per token, or the sampler's number of calls."""
    size = config.group_size
    if config.modality == "image":
        final = torch.zeros(size, 1, 1, 1)
        trajectory: Any = LatentTrajectory(final, sampler.sigmas_S1, stochastic_S=torch.tensor(mask_S))
    else:
        length = int(_any(config.model).canvas_length)
        calls, _ = _calls(config)
        reveal_L = torch.arange(length) * min(calls, length) // length
        logprob_GL = torch.zeros(size, length)
        tokens_GL, nfe_G = torch.full((size, length), 3), torch.full((size,), calls)
        trajectory = TokenTrajectory(
            tokens_GL, reveal_L.repeat(size, 1), logprob_GL, logprob_GL, nfe_G, torch.zeros_like(nfe_G)
        )
    keys = [SampleKey(config.seed, "plan", 0, place) for place in range(size)]
    rollouts = tuple(Rollout(key, RolloutStatus.OK, 0, 0) for key in keys)
    return RolloutGroup(Prompt("plan", ""), 0, 0, rollouts, trajectory, None)


def _any(value: Any) -> Any:
    """Of one of several kinds, whose own keys are asked for."""
    return value


def _unit(config: RunConfig) -> tuple[str, int]:
    """What is never cut between updates or ranks, in words, and its samples."""
    if Needs.CHUNKS in config.algorithm.needs:
        return f"chunk of {config.micro_batch_size} samples", config.micro_batch_size
    if Needs.GROUPS in config.algorithm.needs:
        return f"group of {config.group_size} samples", config.group_size
    return "sample", 1


def _calls(config: RunConfig) -> tuple[int, bool]:
    """Calls of the network that draw one sample, and whether that is only the most there can be."""
    sampler = _any(config.sampler)
    fixed = getattr(sampler, "num_steps", None)
    if fixed is not None:
        return int(fixed), False
    return int(_any(config.model).canvas_length), not isinstance(sampler, LeftToRightConfig)


def _notes(config: RunConfig, chunks: int, rows: int, unit_rows: int) -> list[str]:
    """What divides badly, and the key to change."""
    notes: list[str] = []
    micro, actors = config.micro_batch_size, config.rollout.num_actors
    if config.placement != "in_process" and chunks and actors > chunks:
        notes.append(
            f"a step has {chunks} chunk(s), so {actors - chunks} of {actors} rollout actors idle at max_staleness = 0; "
            "lower rollout.num_actors or rollout.chunk_size"
        )
    elif config.placement != "in_process" and chunks % actors and config.max_staleness == 0:
        notes.append(
            f"{chunks} chunks do not divide among {actors} rollout actors: {chunks % actors} of them draw in the last "
            "round; a rollout.chunk_size that gives a multiple of the actors uses all"
        )
    if rows % micro and rows > micro:
        notes.append(
            f"an update's share of {rows} samples ends in a micro-batch of {rows % micro}; learner.micro_batch_size = "
            f"{_divisor(rows, micro)} divides it evenly"
        )
    elif rows < micro:
        notes.append(
            f"an update's share has {rows} samples, fewer than a micro-batch of {micro}; lower "
            "learner.updates_per_step, or raise groups_per_step, to fill it"
        )
    if unit_rows > 1 and config.learner.micro_batch_size not in (None, config.chunk_size):
        notes.append(
            f"learner.micro_batch_size = {micro} is not the rollouts' chunk of {config.chunk_size}, so on-policy "
            "ratios differ from 1 by rounding; leave the key out for exact ones"
        )
    return notes


def _divisor(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`."""
    return next(size for size in range(most, 0, -1) if rows % size == 0)
