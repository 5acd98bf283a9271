"""The real controller and buffer over simulated roles on a virtual clock: what more actors would bring, and what the
controller itself costs. Nothing here needs a model, Ray or more than one core.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulated_roles import (
    INSTANT,
    Recording,
    SimulatedFleet,
    SimulatedLearner,
    SimulatedScorer,
    StepTimes,
    Stopwatch,
)
from benchmarks.virtual_time import run_virtually
from raylign.config import parse_config
from raylign.types import Prompt
from rollout.prompts import PromptStream
from services.config import RunConfig
from services.controller import Controller

_PROMPTS = [Prompt(str(number), f"prompt {number}") for number in range(512)]


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated: a run's shape, and what befalls it."""

    num_actors: int
    groups_per_step: int
    group_size: int
    max_staleness: int
    num_steps: int
    jitter: float = 0.0
    deaths_per_hour: float = 0.0
    train_factor: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it, and the processor seconds that this took."""

    stopwatch: Stopwatch
    drawing_s: float
    training_s: float
    num_lost: int
    cpu_s: float


def play(cluster: Cluster, times: Callable[[], StepTimes]) -> Outcome:
    """One run of the controller. `times` is asked whenever something takes time."""
    config = parse_config(
        RunConfig,
        {
            "num_steps": cluster.num_steps,
            "group_size": cluster.group_size,
            "groups_per_step": cluster.groups_per_step,
            "max_staleness": cluster.max_staleness,
            "rollout": {"num_actors": cluster.num_actors, "parity_every_steps": cluster.num_steps + 1},
            "checkpoint": {"every_steps": cluster.num_steps + 1},
        },
        "the simulation",
    )
    chance = random.Random(cluster.seed)

    async def run() -> Outcome:
        fleet = SimulatedFleet(cluster.num_actors, times, chance, cluster.jitter, cluster.deaths_per_hour)
        learner, stopwatch = SimulatedLearner(times, cluster.train_factor), Stopwatch()

        async def save(step: int) -> None: ...

        controller = Controller(
            config,
            PromptStream(_PROMPTS, cluster.seed, cluster.groups_per_step),
            [],
            fleet,
            SimulatedScorer(times),
            learner,
            stopwatch,
            save,
        )
        began_s = time.process_time()
        await controller.run(0)
        cpu_s = time.process_time() - began_s
        return Outcome(stopwatch, fleet.busy_s, learner.busy_s, fleet.num_lost, cpu_s)

    return run_virtually(run())


def extrapolate(recording: Recording, cluster: Cluster) -> dict[str, float]:
    """A row of the report: throughput, ages and how busy everybody was, once the run has got going."""
    chance = random.Random(cluster.seed + 1)
    outcome = play(cluster, lambda: chance.choice(recording.steps))
    warm_up = cluster.max_staleness + 2
    watch = outcome.stopwatch
    span_s = watch.done_s[-1] - watch.done_s[warm_up - 1]
    num_steps = cluster.num_steps - warm_up
    samples_per_s = num_steps * cluster.groups_per_step * cluster.group_size / span_s
    ages = watch.mean_ages[warm_up:]
    return {
        "actors": cluster.num_actors,
        "max_staleness": cluster.max_staleness,
        "samples_per_s": samples_per_s,
        "step_s": span_s / num_steps,
        "staleness_mean": sum(ages) / len(ages),
        "staleness_max": max(watch.max_ages),
        "actors_busy": outcome.drawing_s / (cluster.num_actors * watch.done_s[-1]),
        "learner_busy": outcome.training_s / watch.done_s[-1],
        "lost_chunks": outcome.num_lost,
    }


def controller_cost(num_actors: int, group_size: int, max_staleness: int, least_samples: int) -> dict[str, float]:
    """A row: processor time of controller, buffer and event loop per sample record, where nothing else takes any.

    A step holds one group per actor. The simulated roles' own time is counted in.
    """
    num_steps = max(4, -(-least_samples // (num_actors * group_size)))
    cluster = Cluster(num_actors, num_actors, group_size, max_staleness, num_steps)
    cpu_s = play(cluster, lambda: INSTANT).cpu_s
    samples = num_steps * num_actors * group_size
    return {
        "actors": num_actors,
        "samples": samples,
        "cpu_s": cpu_s,
        "samples_per_s": samples / cpu_s,
        "us_per_sample": 1e6 * cpu_s / samples,
    }
