"""Who plays which role: the only file that creates actors, starts the reward service and wires handles."""

from __future__ import annotations

import asyncio
import resource
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from learner.parallel import RankGroup
from raylign.errors import ClusterError
from rewards import AnyRewardConfig, make_mix
from rewards.remote import RewardClient
from services.assembly import build_engine, build_learner
from services.config import RunConfig
from services.in_process import LocalFleet, LocalLearner
from services.ray_errors import answer
from services.reward_config import HTTP_CPUS
from services.roles import Fleet, LearnerRole, Scorer
from services.scoring import HttpScorer, WithLightMetrics

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from services.reward_app import RewardService

Phase = Callable[[str], AbstractContextManager[Any]]

ROLE_LABEL = "raylign.io/role"
"""Ray label of nodes that are set aside: `learner` or `rollout`; deploy/ labels its worker groups with it."""


@dataclass(slots=True)
class Topology:
    """The roles of one run and how to stop them."""

    fleet: Fleet
    scorer: Scorer
    learner: LearnerRole
    workers: tuple[ActorHandle, ...] = ()
    worker_names: tuple[str, ...] = ()
    _close: tuple[Callable[[], Awaitable[None]], ...] = ()
    _stop: tuple[Callable[[], None], ...] = ()

    async def peak_memory_bytes(self) -> dict[str, int]:
        """Peak resident memory by worker, without workers that are away; this process alone when there are none."""
        if not self.workers:
            return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        asked = (worker.peak_memory_bytes.remote() for worker in self.workers)
        peaks = await asyncio.gather(*asked, return_exceptions=True)
        return {name: peak for name, peak in zip(self.worker_names, peaks, strict=True) if isinstance(peak, int)}

    async def close(self) -> None:
        await self.fleet.close()
        for close in self._close:
            await close()
        for stop in self._stop:
            stop()


async def build(config: RunConfig, phase: Phase, own_cluster: bool = True) -> Topology:
    """Every role, ready to work. `phase` wraps each stage of starting up, for the person who waits.

    On the run's own cluster nothing is stopped by `close`: it all goes away with the cluster.
    """
    if config.placement == "in_process":
        return _build_in_process(config, phase)
    return await _build_on_ray(config, phase, own_cluster)


def required_resources(config: RunConfig) -> dict[str, float]:
    """CPUs and GPUs that the run's actors and reward replicas reserve on a Ray cluster."""
    service = config.reward_service
    servings = [service.serving(reward.name) for reward in _served(config)]
    cpus = sum(serving.min_replicas * serving.num_cpus_per_replica for serving in servings)
    cpus += HTTP_CPUS * service.http_replicas if _serves_http(config) else 0
    reward_gpus = sum(serving.min_replicas * serving.num_gpus_per_replica for serving in servings)
    gpus = config.rollout.num_actors * config.rollout.num_gpus
    if config.placement == "colocated":
        cpus += config.learner.num_ranks
        gpus = config.learner.num_ranks * max(config.rollout.num_gpus, config.learner.num_gpus_per_rank)
    else:
        cpus += config.rollout.num_actors + config.learner.num_ranks
        gpus += config.learner.num_ranks * config.learner.num_gpus_per_rank
    return {"CPU": cpus, "GPU": gpus + reward_gpus}


def role_selector(nodes: Sequence[Mapping[str, Any]], role: str) -> dict[str, str]:
    """Keeps a role on the nodes that are set aside for it; {} if none is, and then any node will do."""
    set_aside = any(node["Alive"] and node["Labels"].get(ROLE_LABEL) == role for node in nodes)
    return {ROLE_LABEL: role} if set_aside else {}


def check_cluster(config: RunConfig) -> None:
    """Raise ClusterError, naming what is missing, when the cluster can never hold the run."""
    import ray

    available = ray.cluster_resources()
    for kind, wanted in required_resources(config).items():
        got = float(available.get(kind, 0.0))
        if got < wanted:
            raise ClusterError(
                f"this run reserves {wanted:g} {kind}s and the Ray cluster has {got:g}: {wanted - got:g} missing. "
                "Add nodes, or lower rollout.num_actors, learner.num_ranks or reward_service.num_replicas"
            )


def _build_in_process(config: RunConfig, phase: Phase) -> Topology:
    with phase("model and learner"):
        engine = build_engine(config)
        learner = build_learner(config, RankGroup.single())
    with phase("rewards"):
        scorer = make_mix(config.rewards)
    return Topology(LocalFleet(engine), scorer, LocalLearner(learner))


async def _build_on_ray(config: RunConfig, phase: Phase, own_cluster: bool) -> Topology:
    with phase("workers starting"):
        rollout_workers, rank_workers = _create_workers(config)
        # These imports take seconds and the workers load their models meanwhile.
        from services.fleet import RayFleet
        from services.ray_learner import RayLearner
        from services.reward_app import RewardService
    names = {worker: f"rollout_{place}" for place, worker in enumerate(rollout_workers)}
    names |= {worker: f"learner_{place}" for place, worker in enumerate(rank_workers)}
    workers = tuple(names)
    stop: list[Callable[[], None]] = [] if own_cluster else [lambda: _kill(workers)]
    try:
        with phase("reward service"):
            # Runs that share a cluster must not share, replace or delete each other's rewards.
            name = f"raylign-{uuid.uuid4().hex[:8]}"
            service = RewardService.start(_served(config), config.reward_service, _serves_http(config), name)
            if not own_cluster:
                stop.append(service.shutdown)
        async with _start_timeout(config.start_timeout_s):
            with phase("learner"):
                await _join_ranks(rank_workers)
            with phase("rollout actors"):
                await asyncio.gather(*(answer(worker.ping.remote()) for worker in rollout_workers))
    except BaseException:  # also Ctrl-C: a joined cluster is left as it was
        for stop_one in stop:
            stop_one()
        raise
    fleet, learner = RayFleet(rollout_workers), RayLearner(rank_workers, deltas=config.learner.publish == "delta")
    over_http = config.reward_service.transport == "http"
    reached = _http_scorer(config, service) if over_http else service
    light = [reward for reward in config.rewards if reward not in _served(config)]
    scorer = WithLightMetrics(reached, make_mix(light)) if light else reached
    return Topology(fleet, scorer, learner, workers, tuple(names.values()), (reached.close,), tuple(stop))


def _served(config: RunConfig) -> list[AnyRewardConfig]:
    """The rewards that get replicas: all but light held-out metrics, unless `per_reward` says how to serve them."""
    told = config.reward_service.per_reward
    return [one for one in config.rewards if not (one.only_eval and one.is_light) or one.name in told]


def _serves_http(config: RunConfig) -> bool:
    return config.reward_service.http or config.reward_service.transport == "http"


def _http_scorer(config: RunConfig, service: RewardService) -> HttpScorer:
    """A client of the run's own service, more patient than the service is with its rewards."""
    settings = config.reward_service
    slowest_s = max(settings.serving(reward.name).timeout_s for reward in _served(config))
    assert service.address is not None  # it was started with its HTTP face
    client = RewardClient(service.address, settings.read_token(), timeout_s=2 * slowest_s + 30)
    trained = [reward.name for reward in _served(config) if not reward.only_eval]
    return HttpScorer(client, service.compares, trained)


@asynccontextmanager
async def _start_timeout(seconds: float) -> AsyncGenerator[None]:
    """Raise ClusterError, saying what is free, when workers do not come up in time."""
    import ray

    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        free = ray.available_resources()
        raise ClusterError(
            f"workers did not start within start_timeout_s = {seconds:g} s; the cluster has "
            f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs free. Wait for other jobs, add nodes, or "
            "raise start_timeout_s if the model is slow to load"
        ) from None


def _create_workers(config: RunConfig) -> tuple[list[ActorHandle], list[ActorHandle]]:
    """Rollout workers and learner ranks; the same actors when colocated. Returns before they are up."""
    import ray

    from services.worker_actor import ColocatedWorker, LearnerWorker, RolloutWorker, Worker

    nodes = ray.nodes()

    def create(kind: type[Worker], rank: int | None, num_gpus: float) -> Any:
        # A lost rollout actor comes back by itself; a lost rank would come back without its optimiser.
        restarts = -1 if rank is None else 0
        where = role_selector(nodes, "rollout" if rank is None else "learner")
        actor = ray.remote(kind).options(
            num_cpus=1, num_gpus=num_gpus, max_restarts=restarts, label_selector=where or None
        )
        return actor.remote(config, kind is not LearnerWorker, rank)

    rollout, learner = config.rollout, config.learner
    if config.placement == "colocated":
        gpus = max(rollout.num_gpus, learner.num_gpus_per_rank)
        both = [create(ColocatedWorker, rank, gpus) for rank in range(learner.num_ranks)]
        return both, both
    ranks = [create(LearnerWorker, rank, learner.num_gpus_per_rank) for rank in range(learner.num_ranks)]
    actors = [create(RolloutWorker, None, rollout.num_gpus) for _ in range(rollout.num_actors)]
    return actors, ranks


async def _join_ranks(ranks: list[ActorHandle]) -> None:
    """Rank 0 names a free port on its node, and all ranks meet there."""
    address = await answer(ranks[0].free_address.remote())
    await asyncio.gather(*(answer(rank.join_ranks.remote(f"tcp://{address}")) for rank in ranks))


def _kill(workers: tuple[ActorHandle, ...]) -> None:
    import ray

    for worker in workers:
        ray.kill(worker, no_restart=True)
