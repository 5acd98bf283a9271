"""A step's seconds by phase, composed of what the probe measured, for the placement, actors, ranks and cores at hand.

    rollout   rounds of chunks over the actors; their work and the rewards' shares the cores; the last group's reward
    credit, train, publish, pull   one after the other; ranks that have no core of their own take turns
    max_staleness > 0: drawing goes on while the learner trains, so a step is the longer of the two, or, where both
    share the cores, their work over the cores

Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.config import RunConfig
from services.plan.batches import Batches
from services.plan.probe import Measured

RAY_CALL_S = 0.002
"""A call of an actor and its answer, half a look of the fleet's loop included."""
RAY_GROUP_S = 0.001
"""Pickling one scored group for the ranks, its rollouts and scores object by object."""
STORE_BYTES_PER_S = 1e9
"""Into Ray's object store and out of it, pickled and copied, on one machine."""


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """What one unit of each kind of work takes, in seconds, on the machine of the probe."""

    chunk_s: float
    draft_chunk_s: float
    eval_sample_s: float
    reward_sample_s: Mapping[str, float]
    credit_sample_s: float
    micro_first_s: float
    micro_later_s: float
    optimise_s: float
    publish_s: float
    pull_s: float
    items_per_sample: float
    sample_bytes: float
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step without an evaluation, those of an evaluation, and of the whole run."""

    rollout_s: float
    credit_s: float
    train_s: float
    publish_s: float
    pull_s: float
    step_s: float
    evaluate_s: float
    run_s: float
    samples_per_s: float
    bound_by: str


def unit_times(measured: Measured, config: RunConfig) -> UnitTimes:
    """What the probe measured, by unit. Rewards that could not be scored take no time here."""
    rollout, learner = measured["rollout"], measured["learner"]
    rewards: Mapping[str, Mapping[str, Any]] = measured["rewards"]["rewards"]
    trained = {reward.name for reward in config.rewards if not reward.only_eval}
    return UnitTimes(
        chunk_s=rollout["chunk_s"],
        draft_chunk_s=rollout.get("draft_chunk_s", 0.0),
        eval_sample_s=rollout["eval_chunk_s"] / rollout["eval_samples"],
        reward_sample_s={name: one.get("sample_s", 0.0) for name, one in rewards.items() if name in trained},
        credit_sample_s=learner["credit_s"],
        micro_first_s=learner["micro_first_s"],
        micro_later_s=learner["micro_later_s"],
        optimise_s=learner["optimise_s"],
        publish_s=learner["publish_s"],
        pull_s=rollout["pull_s"],
        items_per_sample=learner["items_per_sample"],
        sample_bytes=rollout["group_bytes"] / config.group_size + rollout["picture_bytes"],
        payload_bytes=rollout["payload_bytes"],
    )


def step_time(config: RunConfig, batches: Batches, work: UnitTimes, cores: int) -> StepTime:
    """Compose a step. `cores`: what processes without a GPU share; those with one are taken to have a core."""
    alone = config.placement == "in_process"
    rollout_s, drawing = _rollout(config, batches, work, cores)
    rows = batches.rows_per_share
    micro = rows / min(batches.micro_batch_size, max(rows, 1)) * work.items_per_sample
    # A smaller micro-batch takes less, about in proportion.
    share = min(1.0, rows / batches.micro_batch_size)
    updates = batches.updates
    gradients_s = share * micro * (work.micro_first_s + (updates - 1) * work.micro_later_s)
    ranks = _turns(batches.ranks, config.learner.num_threads, cores, config.learner.num_gpus_per_rank)
    calls_s = 0.0 if alone else RAY_CALL_S
    train_s = ranks * gradients_s + updates * (work.optimise_s * ranks + 2 * calls_s)
    sent_s = batches.samples * work.sample_bytes / STORE_BYTES_PER_S + config.groups_per_step * RAY_GROUP_S
    sent_s = 0.0 if alone else sent_s
    handed_s = 0.0 if alone else work.payload_bytes / STORE_BYTES_PER_S
    credit_s = ranks * batches.samples * work.credit_sample_s + calls_s + sent_s
    publish_s = work.publish_s + calls_s + handed_s
    actors = 1 if alone else config.rollout.num_actors
    pull_s = (
        work.pull_s * _turns(actors, config.rollout.num_threads, cores, config.rollout.num_gpus) + calls_s + handed_s
    )
    learning_s = credit_s + train_s + publish_s + pull_s
    step_s, bound_by = rollout_s + learning_s, "rollout and learner in turn"
    if config.max_staleness > 0:
        shared = config.rollout.num_gpus == 0 and config.learner.num_gpus_per_rank == 0
        busy_s = (drawing + batches.ranks * train_s / max(ranks, 1.0)) / cores if shared else 0.0
        step_s, bound_by = max((rollout_s, "rollout"), (learning_s, "learner"), (busy_s, "the cores that both share"))
    evaluate_s = _evaluation(config, batches, work, cores)
    run_s = config.num_steps * step_s + batches.evaluations * evaluate_s
    return StepTime(
        rollout_s,
        credit_s,
        train_s,
        publish_s,
        pull_s,
        step_s,
        evaluate_s,
        run_s,
        batches.samples / step_s if step_s else math.inf,
        bound_by,
    )


def _rollout(config: RunConfig, batches: Batches, work: UnitTimes, cores: int) -> tuple[float, float]:
    """Wall seconds until a step's groups are drawn and scored, and the work in it on one core."""
    per_sample = sum(work.reward_sample_s.values())
    scored = batches.drafts + (batches.samples if batches.chunks else 0)
    drawing = batches.chunks * work.chunk_s + batches.draft_chunks * work.draft_chunk_s
    scoring = scored * per_sample
    last_group = config.group_size * max(work.reward_sample_s.values(), default=0.0)
    if config.placement == "in_process":
        return drawing + scoring, drawing + scoring
    workers = config.rollout.num_actors
    rounds = math.ceil(batches.chunks / workers) * work.chunk_s
    rounds += math.ceil(batches.draft_chunks / workers) * work.draft_chunk_s
    rounds *= _turns(workers, config.rollout.num_threads, cores, config.rollout.num_gpus)
    replicas_s = max(
        (
            scored * seconds / config.reward_service.serving(name).min_replicas
            for name, seconds in work.reward_sample_s.items()
        ),
        default=0.0,
    )
    on_cores = (0.0 if config.rollout.num_gpus > 0 else drawing) + scoring
    calls = (batches.chunks + batches.draft_chunks + 2 * config.groups_per_step) * RAY_CALL_S
    first = min(work.chunk_s, work.draft_chunk_s or work.chunk_s)
    wall = max(rounds + last_group, replicas_s + first, on_cores / cores)
    if batches.drafts and batches.chunks:
        wall += last_group  # the second round of the last prompt waits for the rewards of its first
    return wall + calls / max(1, min(workers, cores)), drawing + scoring


def _evaluation(config: RunConfig, batches: Batches, work: UnitTimes, cores: int) -> float:
    workers = 1 if config.placement == "in_process" else config.rollout.num_actors
    turns = _turns(workers, config.rollout.num_threads, cores, config.rollout.num_gpus)
    points = 1 + (len(config.eval_points) if config.modality == "image" else 0)
    drawing = batches.eval_samples * work.eval_sample_s * turns / workers
    scoring = batches.eval_samples * sum(work.reward_sample_s.values())
    if config.placement == "in_process":
        return points * (batches.eval_samples * work.eval_sample_s + scoring)
    return points * max(drawing, scoring, (batches.eval_samples * work.eval_sample_s + scoring) / cores)


def _turns(workers: int, threads: int, cores: int, num_gpus: float) -> float:
    """How much longer a worker takes because others are on its core at the same time."""
    return 1.0 if num_gpus > 0 else max(1.0, workers * threads / cores)
