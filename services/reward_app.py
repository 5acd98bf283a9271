"""The reward service on Ray Serve: one application per reward, and one with the HTTP face if it is wanted.

    training ── handle, one call per group, raw uint8 pictures ──▶ reward "ocr"  ─┐ replicas: calls that arrive
    ingress  ── handle, one call per request ────────────────────▶ reward "jpeg" ─┘ together are scored together
       ▲
       └── HTTP: JSON or multipart (services/reward_http.py)

A handle call carries a list of samples, because a group is what training has in hand: one call costs a few
milliseconds, a call per sample would cost that per sample. `@serve.batch` then joins the lists of several callers.
Each reward is an application of its own, so it starts, fails and scales alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from raylign.errors import ClusterError
from raylign.types import Prompt, RewardBreakdown, RewardFailure, RewardSample, RewardScore
from rewards import RewardUnion, check_names, make_mix, make_reward, mix
from rewards.base import RewardConfig, score_totally
from rewards.wire import RewardInfo, describe
from services.process import local_cluster
from services.reward_config import RewardServerConfig, ServiceConfig
from services.reward_http import build_api, token_digest

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waits between attempts of a call whose replica died; a new one needs about 5 s."""
READY_TIMEOUT_S = 5.0
_LIFECYCLE: dict[str, Any] = {
    "health_check_period_s": 5.0,
    "max_constructor_retry_count": 2,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5.0,
}
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class RewardReplica:
    """One reward in a process of its own. Every call is answered, sample by sample."""

    def __init__(self, config: RewardUnion, service: ServiceConfig) -> None:
        self._config = config
        self._reward = make_reward(config)
        self._reward.load()
        self._stuck_after_s = 2 * service.timeout_s
        self._started: dict[int, float] = {}
        self._ids = itertools.count()
        self._score_batch.set_max_batch_size(service.max_batch_size)  # type: ignore[attr-defined]  # serve.batch adds it
        self._score_batch.set_batch_wait_timeout_s(service.batch_wait_ms / 1000)  # type: ignore[attr-defined]

    async def score(self, samples: list[RewardSample]) -> list[RewardScore]:
        """One score per sample, in order."""
        call = next(self._ids)
        self._started[call] = time.monotonic()
        try:
            return await self._score_batch(samples)
        finally:
            del self._started[call]

    @serve.batch
    async def _score_batch(self, calls: list[list[RewardSample]]) -> list[list[RewardScore]]:
        """Score the samples of several calls as one list; an exception here would fail all of them, so none leaves."""
        scores = iter(await score_totally(self._reward, [sample for samples in calls for sample in samples]))
        return [list(itertools.islice(scores, len(samples))) for samples in calls]

    def describe(self) -> RewardInfo:
        """What clients may know about this reward."""
        return describe(self._config, self._reward)

    def check_health(self) -> None:
        """Have Serve replace a replica whose oldest call waits for ever: batch queues have been seen to hang."""
        oldest = min(self._started.values(), default=time.monotonic())
        if time.monotonic() - oldest > self._stuck_after_s:
            raise RuntimeError(
                f"a call has waited more than {self._stuck_after_s:.0f} s in reward {self._reward.name!r}"
            )


class HandleScorer:
    """Scores by handle and mixes; in the driver of a run and behind the HTTP face."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        handles: Mapping[str, DeploymentHandle],
        timeout_s: float,
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        self._retry_waits_s = retry_waits_s
        self._configs = list(configs)
        self._handles = dict(handles)
        self._timeout_s = timeout_s

    async def score(
        self, samples: Sequence[RewardSample], only: Collection[str] | None = None
    ) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; a replica that cannot be reached costs its reward, not the call."""
        configs = [config for config in self._configs if only is None or config.name in only]
        answers = await asyncio.gather(*(self._ask(config.name, list(samples)) for config in configs))
        return mix({config.name: scores for config, scores in zip(configs, answers, strict=True)}, configs)

    async def describe(self) -> list[RewardInfo]:
        """The served rewards. Raises what Ray raises when one cannot be reached."""
        asked = (self._handles[config.name].describe.remote() for config in self._configs)
        return list(await asyncio.gather(*(_answer(response, self._timeout_s) for response in asked)))

    async def ready(self) -> dict[str, bool]:
        """Which rewards answer within a few seconds."""
        names = [config.name for config in self._configs]
        return dict(zip(names, await asyncio.gather(*map(self._is_ready, names)), strict=True))

    async def _is_ready(self, name: str) -> bool:
        try:
            await _answer(self._handles[name].describe.remote(), READY_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError):
            return False
        return True

    async def _ask(self, name: str, samples: list[RewardSample]) -> list[RewardScore]:
        """One reward's scores. Calls to a dead replica or a full queue are repeated, a bounded number of times."""
        if not samples:
            return []
        waits_s = iter(self._retry_waits_s)
        while True:
            try:
                return await _answer(self._handles[name].score.remote(samples), self._timeout_s)
            except TimeoutError:
                message = f"no answer within {self._timeout_s:.0f} s"
                return _errors(name, samples, RewardFailure("timeout", message, retryable=True))
            except BackPressureError:
                failure = RewardFailure("overloaded", "the reward's queue is full", retryable=True)
            except (RayActorError, RayServeException) as error:
                logger.warning("reward %r: a replica is gone (%s)", name, type(error).__name__)
                failure = RewardFailure("model_error", "the reward's replica died", retryable=True)
            except RayError:
                logger.exception("reward %r: a replica failed", name)
                return _errors(name, samples, RewardFailure("model_error", "the reward's replica failed; see the log"))
            wait_s = next(waits_s, None)
            if wait_s is None:
                return _errors(name, samples, failure)
            await asyncio.sleep(wait_s)


class RewardService:
    """The running service, held by whoever started it."""

    def __init__(
        self, apps: Sequence[str], scorer: HandleScorer, check: Callable[[Prompt], None], address: str | None
    ) -> None:
        self._apps = list(apps)
        self._scorer = scorer
        self._check = check
        self.address = address
        """URL of the HTTP face, or None."""

    @classmethod
    def start(
        cls,
        rewards: Sequence[RewardUnion],
        service: ServiceConfig,
        http: bool | None = None,
        name: str = "rewards",
    ) -> RewardService:
        """Deploy on the connected Ray cluster and wait until every reward has loaded; blocking.

        `http` overrides `service.http`. `name` keeps two services on one cluster apart.
        Raises ConfigError for names or a missing token, ClusterError without Ray or when a reward does not start.
        """
        check_names(rewards)
        with_http = service.http if http is None else http
        token = service.read_token() if with_http else None
        if not ray.is_initialized():
            raise ClusterError(
                "the reward service needs a Ray cluster; call ray.init first, or run `raylign serve-rewards`"
            )
        app_names = {config.name: f"{name}-{config.name}" for config in rewards}
        http_app = f"{name}-http"
        try:
            _start_serve(service, with_http)
            deployed = _deploy(
                {app_names[config.name]: _reward_application(config, service) for config in rewards},
                None,
                service.start_timeout_s,
            )
            if with_http:
                digest = token_digest(token) if token else None
                ingress = _ingress_application(tuple(rewards), service, app_names, digest)
                _deploy({http_app: ingress}, "/", service.start_timeout_s)
                _wait_for_proxy()
        except BaseException:  # whatever stops the start, nothing is left on the cluster
            _remove([*app_names.values(), http_app])
            raise
        handles = {config.name: handle for config, handle in zip(rewards, deployed, strict=True)}
        apps = [*app_names.values(), *([http_app] if with_http else [])]
        scorer = HandleScorer(rewards, handles, service.timeout_s)
        return cls(
            apps, scorer, make_mix(rewards).check, f"http://{service.host}:{service.port}" if with_http else None
        )

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardBreakdown]:
        """One breakdown per sample, in order; errors are values."""
        return await self._scorer.score(samples)

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError if a required reward can never score samples of this prompt."""
        self._check(prompt)

    def shutdown(self) -> None:
        """Remove its applications, and Serve itself when nothing else runs on it."""
        _remove(self._apps)


def run_reward_server(config: RewardServerConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve over HTTP until SIGINT or SIGTERM, then shut down; nothing is left behind.

    Uses the Ray cluster that is connected, else starts one of its own. `on_ready` is told the address.
    Must run in the main thread. Raises as `RewardService.start` does.
    """
    stop = threading.Event()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        stop.set()

    joined = ray.is_initialized()
    # Before anything is started: a signal during the start ends the service as soon as it is up.
    before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _cluster(config):
            service = RewardService.start(config.rewards, config.service, http=True)
            try:
                if on_ready is not None and service.address is not None and not stop.is_set():
                    on_ready(service.address)
                stop.wait()
            finally:
                if joined:  # a cluster of our own goes away as a whole
                    service.shutdown()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _cluster(config: RewardServerConfig) -> Generator[None]:
    """The connected Ray cluster, or a local one that can hold the service."""
    if ray.is_initialized():
        yield
        return
    # Every reward has its replicas, the HTTP face has one.
    num_replicas = len(config.rewards) * config.service.num_replicas + 1
    num_cpus = max(os.cpu_count() or 1, math.ceil(num_replicas * config.service.num_cpus_per_replica))
    with tempfile.TemporaryDirectory(prefix="raylign-rewards-") as folder, local_cluster(num_cpus, Path(folder)):
        yield


def _reward_application(config: RewardUnion, service: ServiceConfig) -> Application:
    as_deployment = serve.deployment(
        name=config.name,
        num_replicas=service.num_replicas,
        # Twice what one batch takes, so that the next one fills while this one is scored.
        max_ongoing_requests=2 * service.max_batch_size,
        # Ray gives a process one OMP thread per whole CPU of this, at least one.
        ray_actor_options={"num_cpus": service.num_cpus_per_replica},
        **_LIFECYCLE,
    )
    return as_deployment(RewardReplica).bind(config, service)


def _ingress_application(
    rewards: tuple[RewardUnion, ...], service: ServiceConfig, app_names: Mapping[str, str], digest: str | None
) -> Application:
    names = dict(app_names)

    def build() -> FastAPI:
        """Runs in the replica; handles are looked up there."""
        handles = {name: serve.get_app_handle(app) for name, app in names.items()}
        return build_api(HandleScorer(rewards, handles, service.timeout_s), rewards, service, digest)

    as_deployment = serve.deployment(
        name="http",
        max_ongoing_requests=64,
        ray_actor_options={"num_cpus": service.num_cpus_per_replica},
        **_LIFECYCLE,
    )
    return as_deployment(serve.ingress(build)()).bind()


def _start_serve(service: ServiceConfig, http: bool) -> None:
    """Start Serve on the cluster; where it already runs, it keeps its own HTTP settings. Raises ClusterError."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its news is not the run's
    location: Literal["HeadOnly", "Disabled"] = "HeadOnly" if http else "Disabled"
    # Above our own limit, so that a slow reward is a result with a status and not a 408.
    options = HTTPOptions(host=service.host, port=service.port, request_timeout_s=2 * service.timeout_s)
    try:
        serve.start(proxy_location=location, http_options=options if http else None, logging_config=_QUIET)
    except (RayError, RayServeException) as error:
        where = f" at {service.host}:{service.port}; is the port taken? Set another service.port" if http else ""
        raise ClusterError(f"Ray Serve did not start{where}") from error


def _deploy(apps: Mapping[str, Application], route_prefix: str | None, timeout_s: float) -> list[DeploymentHandle]:
    """Deploy applications side by side and wait until all run. Raises ClusterError with Serve's reason.

    Serve's own waiting has no end, for instance when no node has the CPUs that a replica asks for.
    """
    targets = [serve.RunTarget(app, name, route_prefix, _QUIET) for name, app in apps.items()]
    handles = serve.run_many(targets, wait_for_applications_running=False)
    deadline = time.monotonic() + timeout_s
    while True:
        status = {name: app for name, app in serve.status().applications.items() if name in apps}
        waiting = [name for name in apps if name not in status or status[name].status != "RUNNING"]
        if not waiting:
            return handles
        failed = next((name for name in waiting if name in status and status[name].status in _FAILED), None)
        if failed is not None or time.monotonic() > deadline:
            name = failed or waiting[0]
            raise ClusterError(
                f"{name!r} of the reward service did not start: {_reason(status.get(name))}; see that the cluster has "
                "CPUs free for every replica (num_cpus_per_replica) and the reward's packages"
            )
        time.sleep(0.05)


def _reason(app: ApplicationStatusOverview | None) -> str:
    """What Serve knows about an application that does not run."""
    if app is None:
        return "Serve does not know it"
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    return "; ".join(message.strip() for message in messages if message.strip()) or app.status.value


def _wait_for_proxy(timeout_s: float = 30.0) -> None:
    """Raise ClusterError unless an HTTP proxy is up: a Serve that was started without one does not get one later."""
    deadline = time.monotonic() + timeout_s
    while not any(status == "HEALTHY" for status in serve.status().proxies.values()):
        if time.monotonic() > deadline:
            raise ClusterError(
                "Ray Serve runs on this cluster without HTTP; use another cluster, or start this service first"
            )
        time.sleep(0.1)


def _remove(apps: Sequence[str]) -> None:
    """Delete applications, and Serve with the last one."""
    running = set(serve.status().applications)
    for app in running & set(apps):
        serve.delete(app, _blocking=False)
    if running <= set(apps):
        serve.shutdown()


async def _answer(response: Any, timeout_s: float) -> Any:
    """A handle call's result. A call that is given up, for whatever reason, is cancelled in the replica too."""
    try:
        return await asyncio.wait_for(response, timeout_s)
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def _errors(name: str, samples: Sequence[RewardSample], failure: RewardFailure) -> list[RewardScore]:
    return [RewardScore(name=name, value=None, error=failure) for _ in samples]
