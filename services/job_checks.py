"""What is checked before a run is sent to a cluster: versions, resources, model, prompts and rewards."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import ray

from raylign.assets import PREFIX, resolve
from raylign.errors import ClusterError, ConfigError
from services.config import RunConfig
from services.jobs import ClusterFacts
from services.nodes import required_resources
from services.run_inputs import checked_prompts


def check_versions(cluster: ClusterFacts) -> None:
    """Raise ClusterError unless Ray is the same and Python the same but for its last number."""
    ours, theirs = platform.python_version(), cluster.python_version
    pairs = (("Ray", ray.__version__, cluster.ray_version), ("Python", _minor(ours), _minor(theirs)))
    wrong = [f"{name} {mine} here and {other} there" for name, mine, other in pairs if mine != other]
    if wrong:
        raise ClusterError(
            f"this client and the cluster do not fit: {', '.join(wrong)}; submit from an environment with the "
            "cluster's versions, or start the cluster with these"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_resources(config: RunConfig, total: Mapping[str, float], driver_cpus: float, address: str) -> None:
    """Raise ClusterError, naming what is missing, for a run that the cluster can never hold.

    Raises ConfigError for a run that would not use the cluster.
    """
    if config.placement == "in_process":
        raise ConfigError("placement = 'in_process' uses no cluster; submit with --placement separate or colocated")
    if config.wait_for_nodes or not total:
        return
    for kind, wanted in required_resources(config).items():
        needed, got = wanted + (driver_cpus if kind == "CPU" else 0.0), float(total.get(kind, 0.0))
        if got < needed:
            raise ClusterError(
                f"this run reserves {needed:g} {kind}s and the Ray cluster at {address} has {got:g}: {needed - got:g} "
                "missing. Add nodes (or let the run --wait_for_nodes true), or lower rollout.num_actors, "
                "learner.num_ranks or reward_service.num_replicas"
            )


def check_inputs(config: RunConfig) -> None:
    """Read prompts as the run will, and let model and rewards check them; a model that is not here is not looked at.

    Raises ConfigError, PromptError or ModelError.
    """
    model = config.model.path
    checked_prompts(config, model_is_here=model.startswith(PREFIX) or resolve(model).exists())
