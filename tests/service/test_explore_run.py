"""Explored runs end with the same weights whoever draws, and whichever actor is killed in either round."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.actor import ActorHandle

from learner.parallel import RankGroup
from raylign.types import RolloutGroup
from rewards import make_mix
from rollout.drawn import EvalPoint, Slot
from rollout.engine import ChunkRequest
from rollout.prompts import PromptStream, load_prompts
from services.assembly import build_engine, build_learner
from services.config import RunConfig, load_run_config
from services.controller import Controller
from services.fleet import RayFleet
from services.in_process import LocalFleet, LocalLearner
from services.process import local_cluster
from services.ray_learner import RayLearner
from services.roles import Fleet, LearnerRole
from services.worker_actor import LearnerWorker, RolloutWorker
from tests.service import command_line as cli

NUM_STEPS = 2
EXPLORE = """
[rollout]
chunk_size = 1
[rollout.explore]
pool_size = 6
num_steps = 2
chunk_size = 2
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flow-GRPO on a random SD3: drafts by the ODE, siblings drawn again by the sampler that has a density."""
    folder = tmp_path_factory.mktemp("explore")
    (folder / "explore.toml").write_text(EXPLORE)
    return [str(cli.write_config(folder, NUM_STEPS)), str(folder / "explore.toml")]


class Watching:
    """An Observer that remembers, and asks for a stop after a step."""

    def __init__(self, stop_after: int) -> None:
        self.metrics: list[dict[str, float]] = []
        self.stop: Callable[[], None] = lambda: None
        self._stop_after = stop_after

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        self.metrics.append(dict(metrics))
        if step == self._stop_after:
            self.stop()

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None: ...

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None: ...


class KillingFleet(RayFleet):
    """Kills one of its actors while a chunk of a slot is being drawn, once for each slot it was given."""

    def __init__(self, actors: Sequence[ActorHandle], victims: Mapping[Slot, psutil.Process]) -> None:
        super().__init__(actors)
        self._victims = dict(victims)
        self.killed: list[Slot] = []

    async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
        drawing = asyncio.ensure_future(super().generate(request))
        if request.slot in self._victims:
            await asyncio.sleep(0.02)  # the queue has handed out its first chunks
            # Of chunks that come together the first has killed already.
            with contextlib.suppress(KeyError):
                self._victims.pop(request.slot).kill()
                self.killed.append(request.slot)
        return await drawing


async def _run(
    config: RunConfig,
    fleet: Fleet,
    learner: LearnerRole,
    start_from: Path | None = None,
    save_to: Path | None = None,
) -> tuple[str, list[dict[str, float]]]:
    """The loop without its command line: the weights at the end, and the metrics.

    From the checkpoint of step 1, if there is one; up to step 1 if one is to be written.
    """
    prompts = PromptStream(load_prompts(Path(config.prompts.train)), config.seed, config.groups_per_step)
    observer = Watching(1 if save_to is not None else NUM_STEPS)

    async def save(step: int) -> None:
        if save_to is not None:
            await learner.save(save_to, {"step": step, "config_sha256": ""})

    controller = Controller(config, prompts, [], fleet, make_mix(config.rewards), learner, observer, save)
    observer.stop = controller.stop.set
    if start_from is not None:
        await learner.load(start_from)
    await controller.run(0 if start_from is None else 1)
    return await learner.weights_sha256(), observer.metrics


def _in_process(config: RunConfig, **folders: Path) -> tuple[str, list[dict[str, float]]]:
    fleet, learner = LocalFleet(build_engine(config)), LocalLearner(build_learner(config, RankGroup.single()))
    return asyncio.run(_run(config, fleet, learner, **folders))


def _on_ray(config: RunConfig, kills: Sequence[Slot] = ()) -> str:
    """The weights that rollout actors and a learner in processes of their own end with."""

    async def work() -> str:
        rollout: Any = ray.remote(RolloutWorker)
        learner: Any = ray.remote(LearnerWorker)
        alive = rollout.options(num_cpus=0.5, max_restarts=-1)
        actors = [alive.remote(config, True, None) for _ in range(config.rollout.num_actors)]
        rank = learner.options(num_cpus=0.5).remote(config, False, 0)
        await rank.join_ranks.remote(f"tcp://{await rank.free_address.remote()}")
        pids = [await actor.pid.remote() for actor in actors]
        fleet = KillingFleet(actors, dict(zip(kills, map(psutil.Process, pids), strict=False)))
        try:
            weights, _ = await _run(config, fleet, RayLearner([rank]))
        finally:
            await fleet.close()
        assert set(fleet.killed) == set(kills)
        for worker in (*actors, rank):
            ray.kill(worker)
        return weights

    return asyncio.run(asyncio.wait_for(work(), 300))


@pytest.fixture(scope="module")
def reference(configs: list[str]) -> tuple[str, list[dict[str, float]]]:
    """An uninterrupted run in this process."""
    return _in_process(load_run_config(configs, {"placement": "in_process"}))


def test_what_is_drawn_again_is_scored_as_it_was_drawn(reference: tuple[str, list[dict[str, float]]]) -> None:
    _, metrics = reference
    assert len(metrics) == NUM_STEPS
    # The learner sees the chunks of the second round: on policy, every ratio is exactly one.
    assert [row["ratio/deviation_max"] for row in metrics] == [0.0] * NUM_STEPS
    assert all(row["busy/draft_s"] > 0 and row["explore/spread"] > 0 for row in metrics)


def test_actors_end_with_the_same_weights_whichever_dies_in_either_round(
    configs: list[str], reference: tuple[str, list[dict[str, float]]], tmp_path: Path
) -> None:
    with local_cluster(3, tmp_path):
        assert _on_ray(load_run_config(configs, {"rollout.num_actors": "1"})) == reference[0]
        # One actor dies among the drafts, the other one among those that are drawn again.
        both = load_run_config(configs, {"rollout.num_actors": "2"})
        assert _on_ray(both, kills=("draft", "rollout")) == reference[0]


def test_a_run_goes_on_exactly_from_its_checkpoint(
    configs: list[str], reference: tuple[str, list[dict[str, float]]], tmp_path: Path
) -> None:
    config = load_run_config(configs, {"placement": "in_process"})
    stopped, first = _in_process(config, save_to=tmp_path / "step_1")
    assert stopped != reference[0]
    weights, last = _in_process(config, start_from=tmp_path / "step_1")
    assert weights == reference[0]
    told = [[row[name] for row in rows] for rows in (first + last, reference[1]) for name in ("reward/mean", "loss")]
    assert told[:2] == told[2:]
