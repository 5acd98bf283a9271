"""Applications of the reward service, and how they come up on Ray Serve and go away again.

training ── handle, one call per group, raw uint8 pictures ──▶ reward "ocr"  ─┐ replicas: calls that arrive
ingress  ── handle, one call per request ────────────────────▶ reward "jpeg" ─┘ together are scored together
   ▲
   └── HTTP: JSON or multipart (services/reward_http.py)
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from raylign.errors import ClusterError
from rewards import RewardUnion
from services.reward_config import HTTP_CPUS, AutoscalingConfig, ServiceConfig, ServingConfig
from services.reward_door import HttpDoor
from services.reward_http import build_api
from services.reward_replica import RewardReplica
from services.reward_scorer import HandleScorer
from services.run_name import left_behind

HEAD_NODE_RESOURCE = "node:__internal_head__"
_DELETE_MARGIN_S = 5.0
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_CONTROL: dict[str, Any] = {
    "health_check_period_s": 5.0,
    "max_constructor_retry_count": 2,
    "graceful_shutdown_wait_loop_s": 0.1,
}


class RewardIngress:
    """The HTTP face in a replica of its own: `services.reward_http` on handles, behind a port that it opens."""

    async def __init__(
        self,
        rewards: Sequence[RewardUnion],
        service: ServiceConfig,
        digest: str | None,
        handles: Mapping[str, DeploymentHandle],
    ) -> None:
        scorer = HandleScorer(rewards, handles, service, waits_when_full=False)
        app = build_api(scorer, rewards, service, digest, config_hash(rewards))
        self._door = await HttpDoor.open(
            app, service.host, service.port, service.drain_timeout_s, shared=service.http_replicas > 1
        )

    def check_health(self) -> None:
        """Have Serve replace a process that listens no more."""
        self._door.check()

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process."""
        await self._door.close()


def config_hash(rewards: Sequence[RewardUnion]) -> str:
    """Equal for services whose rewards are configured alike."""
    tables = [reward.model_dump(mode="json") for reward in rewards]
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:16]


def num_cpus(rewards: Sequence[RewardUnion], service: ServiceConfig) -> float:
    """CPUs that the whole service reserves when every reward has its most replicas."""
    servings = [service.serving(reward.name) for reward in rewards]
    return HTTP_CPUS * service.http_replicas + sum(s.max_replicas * s.num_cpus_per_replica for s in servings)


def reward_application(
    config: RewardUnion, service: ServiceConfig, where: Mapping[str, str] | None = None
) -> Application:
    """One reward. Its deployment has the reward's name. `where`: labels of the nodes that its replicas go to."""
    serving = service.serving(config.name)
    resources: dict[str, Any] = {
        "num_cpus": serving.num_cpus_per_replica,
        "num_gpus": serving.num_gpus_per_replica,
    }
    if where:
        resources["label_selector"] = dict(where)
    as_deployment = serve.deployment(
        name=config.name,
        # Twice what its batches take, so that the next one fills while others are scored.
        max_ongoing_requests=2 * serving.max_batch_size * serving.max_concurrent_batches,
        # Ray gives a process one OMP thread per whole CPU of this, at least one.
        ray_actor_options=resources,
        **_count(serving),
        **_back_pressure(serving, service),
        **_CONTROL,
    )
    return as_deployment(RewardReplica).bind(config, serving)


def ingress_application(
    rewards: Sequence[RewardUnion],
    service: ServiceConfig,
    digest: str | None,
    handles: Mapping[str, DeploymentHandle | Application],
) -> Application:
    """The HTTP face of running rewards, or of applications that then become part of this one."""
    as_deployment = serve.deployment(
        name="http",
        num_replicas=service.http_replicas,
        # The port is this node's, whatever other nodes the cluster has.
        ray_actor_options={"num_cpus": HTTP_CPUS, "resources": {HEAD_NODE_RESOURCE: 0.001}},
        graceful_shutdown_timeout_s=service.drain_timeout_s + _DELETE_MARGIN_S,
        **_CONTROL,
    )
    return as_deployment(RewardIngress).bind(tuple(rewards), service, digest, dict(handles))


def _count(serving: ServingConfig) -> dict[str, Any]:
    """A number of replicas, or how to find one."""
    scaling = serving.autoscaling
    return {"num_replicas": serving.num_replicas} if scaling is None else {"autoscaling_config": _scaling(scaling)}


def _scaling(scaling: AutoscalingConfig) -> dict[str, Any]:
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
    }


def _back_pressure(serving: ServingConfig, service: ServiceConfig) -> dict[str, Any]:
    return {
        "max_queued_requests": serving.max_queued_requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": service.retry_after_s},
        "graceful_shutdown_timeout_s": serving.drain_timeout_s,
    }


def start_serve() -> None:
    """Start Serve on the cluster unless it runs there; the service needs none of its proxies. Raises ClusterError."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its news is not the run's
    try:
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
    except (RayError, RayServeException) as error:
        raise ClusterError("Ray Serve did not start on this cluster; see its logs, and `raylign doctor`") from error


def deploy(apps: Mapping[str, Application], timeout_s: float) -> list[DeploymentHandle]:
    """Deploy applications side by side and wait until all run. Raises ClusterError with Serve's reason.

    Serve's own waiting has no end, for instance when no node has the CPUs that a replica asks for.
    """
    targets = [serve.RunTarget(app, name, None, _QUIET) for name, app in apps.items()]
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


def remove(stages: Sequence[Sequence[str]], drain_timeout_s: float) -> None:
    """Delete applications stage by stage, each when the one before has answered the calls it has.

    Serve itself stays: on a cluster that others use, one of them may be about to deploy on it.
    """
    for stage in stages:
        for app in set(serve.status().applications) & set(stage):
            serve.delete(app, _blocking=False)
        _wait_until_gone(stage, drain_timeout_s + _DELETE_MARGIN_S)


def reap(living: Collection[str]) -> list[str]:
    """Delete the applications of runs that are gone, of which nobody else would; `living` are the runs' names.

    A driver that was killed could not remove its applications, and Serve keeps them for ever. Returns what was deleted.
    """
    left = left_behind(serve.status().applications, living)
    for app in left:
        serve.delete(app, _blocking=False)
    return left


def _wait_until_gone(apps: Sequence[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while set(serve.status().applications) & set(apps) and time.monotonic() < deadline:
        time.sleep(0.05)
