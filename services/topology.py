"""Who plays which role: the only file that creates actors, starts the reward service and wires handles."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from learner.parallel import RankGroup
from raylign.errors import ClusterError
from rewards import make_mix
from rewards.remote import RewardClient
from services.assembly import build_engine, build_learner
from services.config import RunConfig
from services.elastic import most_that_fit
from services.in_process import LocalFleet, LocalLearner
from services.nodes import (
    actor_needs,
    might_fit,
    rank_needs,
    required_resources,
    reward_selector,
    selector,
    served,
    serves_http,
)
from services.patience import Patience
from services.ray_errors import answer
from services.roles import Fleet, LearnerRole, Scorer
from services.run_name import new_run_name
from services.scoring import HttpScorer, WithLightMetrics
from services.weight_stores import DirectStoreConfig

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

    from services.fleet import RayFleet
    from services.reward_app import RewardService
    from services.worker_actor import Worker

Phase = Callable[[str], AbstractContextManager[Any]]

_MEMORY_TIMEOUT_S = 10.0
# Serve puts another process in the place of a dead HTTP face within 10 to 20 s, and attempts go on for about a minute.
_HTTP_ATTEMPTS = 12
_HTTP_PATIENCE = 4
# A node counts as dead after half a minute of silence.
_DEATH_KNOWN_AFTER_S = 60.0


@dataclass(slots=True)
class Topology:
    """The roles of one run and how to stop them."""

    fleet: Fleet
    scorer: Scorer
    learner: LearnerRole
    pool: RayFleet | None = None
    """The fleet again, where its number of actors can change: actors and ranks are separate."""
    _workers: Workers | None = None
    _close: tuple[Callable[[], Awaitable[None]], ...] = ()
    _stop: tuple[Callable[[], None], ...] = ()

    async def num_lost_ranks(self) -> int:
        """How many learner ranks are gone; 0 where the learner is this process."""
        return 0 if self._workers is None else await self._workers.num_lost_ranks()

    async def renew_learner(self, phase: Phase) -> None:
        """Make every learner rank anew, those that live too: they may be halfway through a step with the dead.

        Rollout actors and the reward service stay, unless the actors are the ranks. Raises ClusterError if there is no
        place for the ranks, and what Ray raises for one that dies again. `learner`, and colocated `fleet`, are others
        afterwards, without weights.
        """
        assert self._workers is not None
        with phase("learner, again"):
            if self.pool is None:
                await self.fleet.close()
            await self._workers.renew_ranks()
        self.learner = self._workers.learner()
        if self.pool is None:
            self.fleet = self._workers.fixed_fleet()
        else:
            self.pool.begin_again()

    async def peak_memory_bytes(self) -> dict[str, int]:
        """Peak resident memory by worker, without workers that are away; this process alone when there are none."""
        if self._workers is None:
            return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        # A colocated worker has the learner's name.
        handles = {} if self.pool is None else self.pool.handles()
        names = {actor: f"rollout_{number}" for number, actor in handles.items()}
        names |= {rank: f"learner_{place}" for place, rank in enumerate(self._workers.ranks)}
        asked = {asyncio.ensure_future(worker.peak_memory_bytes.remote()): name for worker, name in names.items()}
        done, silent = await asyncio.wait(asked, timeout=_MEMORY_TIMEOUT_S)
        for task in silent:
            task.cancel()
        return {name: task.result() for task, name in asked.items() if task in done and task.exception() is None}

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


def most_actors(config: RunConfig) -> int:
    """How many rollout actors the connected cluster could ever hold beside the run's other roles."""
    if config.wait_for_nodes:
        return sys.maxsize
    import ray

    nodes = ray.nodes()
    where = selector(nodes, "rollout", config.nodes.rollout.labels)
    fit = [node["Resources"] for node in nodes if might_fit(node, where)]
    return most_that_fit(fit, ray.cluster_resources(), actor_needs(config), required_resources(config, num_actors=0))


def check_cluster(config: RunConfig) -> None:
    """Raise ClusterError, naming what is missing, when the cluster can never hold the run."""
    if config.wait_for_nodes:
        return
    import ray

    available = ray.cluster_resources()
    for kind, wanted in required_resources(config).items():
        got = float(available.get(kind, 0.0))
        if got < wanted:
            raise ClusterError(
                f"this run reserves {wanted:g} {kind}s and the Ray cluster has {got:g}: {wanted - got:g} missing. "
                "Add nodes (or let the run --wait_for_nodes true), or lower rollout.num_actors, learner.num_ranks or "
                "reward_service.num_replicas"
            )
    nodes = ray.nodes()
    for role, place in (("learner", config.nodes.learner), ("rollout", config.nodes.rollout)):
        if not any(might_fit(node, place.labels) for node in nodes):
            told = ", ".join(f"{name} = {value}" for name, value in place.labels.items())
            raise ClusterError(
                f"no node of the Ray cluster has what nodes.{role}.labels asks for ({told}); `ray list nodes --detail` "
                "shows their labels"
            )


def _build_in_process(config: RunConfig, phase: Phase) -> Topology:
    with phase("model and learner"):
        engine = build_engine(config)
        learner = build_learner(config, RankGroup.single())
    with phase("rewards"):
        scorer = make_mix(config.rewards)
    return Topology(LocalFleet(engine), scorer, LocalLearner(learner))


async def _build_on_ray(config: RunConfig, phase: Phase, own_cluster: bool) -> Topology:
    name = new_run_name()
    workers = Workers(config, name)
    with phase("workers starting"):
        workers.start()
        # These imports take seconds and the workers load their models meanwhile.
        from services.fleet import RayFleet
        from services.reward_app import RewardService
        from services.reward_deploy import reap
    stop: list[Callable[[], None]] = [] if own_cluster else [workers.kill]
    try:
        with phase("reward service"):
            if not own_cluster:
                reap(_living())
            service = RewardService.start(
                served(config), config.reward_service, serves_http(config), name, _reward_places(config)
            )
            if not own_cluster:
                stop.append(service.shutdown)
        async with _start_timeout(config.start_timeout_s):
            with phase("learner"):
                await workers.join_ranks()
            with phase("rollout actors"):
                up, late = await _first_up(workers.rollout, workers.least)
    except BaseException:  # also Ctrl-C: a joined cluster is left as it was
        for stop_one in stop:
            stop_one()
        raise
    over_http = config.reward_service.transport == "http"
    reached = _http_scorer(config, service) if over_http else service
    light = [reward for reward in config.rewards if reward not in served(config)]
    scorer = WithLightMetrics(reached, make_mix(light)) if light else reached
    pool = None if workers.colocated else RayFleet(up, workers.rollout_actor, late, workers.patience())
    fleet = workers.fixed_fleet() if pool is None else pool
    return Topology(fleet, scorer, workers.learner(), pool, workers, (reached.close,), tuple(stop))


def _reward_places(config: RunConfig) -> dict[str, dict[str, str]]:
    """By reward: the label of the nodes that its replicas are kept on, where nodes are set aside."""
    import ray

    nodes = ray.nodes()
    serving = config.reward_service.serving
    return {reward.name: reward_selector(nodes, serving(reward.name).num_gpus_per_replica) for reward in served(config)}


def _living() -> set[str]:
    """Names of the runs that have an actor on the cluster."""
    from ray.util import list_named_actors

    named: Any = list_named_actors(all_namespaces=True)
    return {actor["name"].partition("/")[0] for actor in named}


async def _first_up(workers: Sequence[ActorHandle], least: int) -> tuple[list[ActorHandle], list[ActorHandle]]:
    """The workers that are up as soon as `least` are, and those that are late. Raises what a worker refuses with."""
    asked = {asyncio.ensure_future(answer(worker.ping.remote())): worker for worker in workers}
    waiting = set(asked)
    try:
        while len(asked) - len(waiting) < least:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in asked:
            # Only the first refusal is told; asyncio complains of errors that nobody takes.
            task.cancel() if not task.done() else task.exception()
    up = [worker for task, worker in asked.items() if task not in waiting]
    return up, [worker for worker in workers if worker not in up]


def _http_scorer(config: RunConfig, service: RewardService) -> HttpScorer:
    """A client of the run's own service, more patient than the service is with its rewards."""
    settings = config.reward_service
    slowest_s = max(settings.serving(reward.name).timeout_s for reward in served(config))
    assert service.address is not None  # it was started with its HTTP face
    once_s = 2 * slowest_s + 30
    client = RewardClient(service.address, settings.read_token(), timeout_s=once_s, max_attempts=_HTTP_ATTEMPTS)
    trained = [reward.name for reward in served(config) if not reward.only_eval]
    return HttpScorer(client, service.compares, trained, deadline_s=_HTTP_PATIENCE * once_s)


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


class Workers:
    """The actors of one run: rollout actors and learner ranks, or colocated workers that are both.

    All are named after the run, so that it counts as living for as long as one of them does.
    """

    def __init__(self, config: RunConfig, run_name: str) -> None:
        self._config = config
        self._run_name = run_name
        self._made = 0
        self.colocated = config.placement == "colocated"
        """Whether each worker is rollout actor and learner rank, which fixes their number."""
        self.ranks: list[ActorHandle] = []
        self._places: PlacementGroup | None = None
        self.rollout: list[ActorHandle] = []
        """The rollout actors that the run starts with."""

    @property
    def least(self) -> int:
        """The fewest rollout actors that the run starts with."""
        return len(self.rollout) if self.colocated else self._config.rollout.bounds.least

    def start(self) -> None:
        """Create them all. Returns before they are up."""
        self._start_ranks()
        many = self._config.rollout.num_actors
        self.rollout = self.ranks if self.colocated else [self.rollout_actor() for _ in range(many)]

    def rollout_actor(self) -> ActorHandle:
        """One more of them, which comes back by itself when it dies."""
        from services.worker_actor import RolloutWorker

        return self._create(RolloutWorker, None)

    async def join_ranks(self) -> None:
        """Rank 0 names a free port on its node, and all ranks meet there."""
        address = await answer(self.ranks[0].free_address.remote())
        await asyncio.gather(*(answer(rank.join_ranks.remote(f"tcp://{address}")) for rank in self.ranks))

    async def num_lost_ranks(self) -> int:
        """How many ranks are gone. What comes of a death may be seen before it is known, so this waits for answers."""
        from ray.exceptions import RayActorError

        asked = {asyncio.ensure_future(answer(rank.ping.remote())) for rank in self.ranks}
        done, silent = await asyncio.wait(asked, timeout=_DEATH_KNOWN_AFTER_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in silent:
            task.cancel()
        return sum(isinstance(task.exception(), RayActorError) for task in done)

    async def renew_ranks(self) -> None:
        """End all ranks and bring up as many new ones, without weights."""
        _kill(self.ranks)
        self._start_ranks()
        async with _start_timeout(self._config.start_timeout_s):
            await self.join_ranks()
            if self.colocated:
                self.rollout = self.ranks
                await asyncio.gather(*(answer(rank.ping.remote()) for rank in self.ranks))

    def learner(self) -> LearnerRole:
        """The ranks as one learner."""
        from services.publication import make_broadcasts
        from services.ray_learner import RayLearner

        learner = self._config.learner
        broadcasts = make_broadcasts(self._config, self.ranks[0])
        return RayLearner(
            self.ranks, deltas=learner.publish == "delta", sharded=learner.sharding == "fsdp", broadcasts=broadcasts
        )

    def fixed_fleet(self) -> RayFleet:
        """The colocated workers as a fleet."""
        from services.fleet import RayFleet

        return RayFleet(self.rollout, patience=self.patience())

    def patience(self) -> Patience:
        """When a rollout actor counts as hung."""
        seconds = self._config.rollout.hung_after_s
        return Patience(least_s=seconds, restart_after_s=seconds)

    def kill(self) -> None:
        """End those that the run started with, and all ranks."""
        _kill({*self.rollout, *self.ranks})
        if self._places is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._places)

    def _start_ranks(self) -> None:
        from services.worker_actor import ColocatedWorker, LearnerWorker

        kind = ColocatedWorker if self.colocated else LearnerWorker
        if self._places is None and self._config.learner.num_ranks > 1:
            self._places = _reserve_ranks(self._config)
        self.ranks = [self._create(kind, rank) for rank in range(self._config.learner.num_ranks)]

    def _create(self, kind: type[Worker], rank: int | None) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from services.worker_actor import LearnerWorker

        config = self._config
        role, needs = ("rollout", actor_needs(config)) if rank is None else ("learner", rank_needs(config))
        place = config.nodes.rollout if rank is None else config.nodes.learner
        others = {kind: amount for kind, amount in needs.items() if kind not in ("CPU", "GPU")}
        self._made += 1
        options: dict[str, Any] = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs["GPU"],
            "resources": others or None,
            # A lost rollout actor comes back by itself; a lost rank would come back without its optimiser.
            "max_restarts": -1 if rank is None else 0,
            # Never the same again: Ray keeps the name of a dead actor for a moment.
            "name": f"{self._run_name}/{self._made}",
        }
        if rank is not None and self._places is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._places, rank)
        else:
            options["label_selector"] = selector(ray.nodes(), role, place.labels) or None
            options["scheduling_strategy"] = "SPREAD" if place.spread else "DEFAULT"
        if isinstance(config.weight_store, DirectStoreConfig):
            options["enable_tensor_transport"] = True
        return ray.remote(kind).options(**options).remote(config, kind is not LearnerWorker, rank)


def _reserve_ranks(config: RunConfig) -> PlacementGroup | None:
    """Places for all ranks at once or none, so that of two runs neither waits for what the other holds half of.

    None where ranks reserve nothing.
    """
    import ray
    from ray.util import placement_group

    needs = {kind: amount for kind, amount in rank_needs(config).items() if amount > 0}
    if not needs:
        return None
    where = selector(ray.nodes(), "learner", config.nodes.learner.labels)
    count = config.learner.num_ranks
    strategy = "SPREAD" if config.nodes.learner.spread else "PACK"
    labels: Any = [where] * count if where else None
    return placement_group([needs] * count, strategy, bundle_label_selector=labels)


def _kill(workers: Iterable[ActorHandle]) -> None:
    import ray

    for worker in workers:
        ray.kill(worker, no_restart=True)
