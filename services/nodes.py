"""Where a run's processes go and what each reserves there. Pure: no Ray, so it can be asked before there is a cluster.

Nodes that carry the label `raylign.io/role` are kept to that role; `[nodes.learner]` and `[nodes.rollout]` say the
rest: other labels, other resources, whether to fill nodes or to spread over them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from raylign.config import Config
from rewards import AnyRewardConfig
from services.reward_config import HTTP_CPUS

if TYPE_CHECKING:
    from services.config import RunConfig

ROLE_LABEL = "raylign.io/role"
"""Ray label of nodes that are set aside: `learner`, `rollout`, `rewards` or `judge` (rewards that need a GPU).

deploy/ labels its worker groups with it.
"""
_OWN_KEYS = {"CPU": "num_cpus", "GPU": "rollout.num_gpus or learner.num_gpus_per_rank"}


class RoleNodes(Config):
    """Where the processes of one role go; GPUs are `rollout.num_gpus` and `learner.num_gpus_per_rank`."""

    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that each reserves; a fraction lets several share one."""
    resources: dict[str, float] = Field(default_factory=dict[str, float])
    """Other Ray resources that each reserves, by name."""
    labels: dict[str, str] = Field(default_factory=dict[str, str])
    """Ray labels of the nodes: a value, "!value", "in(a, b)" or "!in(a, b)"; "ray.io/accelerator-type" is the GPU's."""
    spread: bool = False
    """One per node as far as that goes, instead of filling nodes; learner ranks are best kept together."""

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in _OWN_KEYS:
                raise ValueError(f"{name} is set by {_OWN_KEYS[name]}; leave it out of resources")
            if amount <= 0:
                raise ValueError(f"{name} must be above 0, got {amount:g}; leave it out to reserve none")
        return resources


class NodesConfig(Config):
    """Where learner ranks and rollout actors go. Colocated workers are learner ranks."""

    learner: RoleNodes = RoleNodes()
    rollout: RoleNodes = RoleNodes()


def actor_needs(config: RunConfig) -> dict[str, float]:
    """What one rollout actor reserves."""
    nodes = config.nodes.rollout
    return {"CPU": nodes.num_cpus, "GPU": config.rollout.num_gpus, **nodes.resources}


def rank_needs(config: RunConfig) -> dict[str, float]:
    """What one learner rank reserves; a colocated one is a rollout actor as well."""
    nodes, gpus = config.nodes.learner, config.learner.num_gpus_per_rank
    if config.placement == "colocated":
        gpus = max(config.rollout.num_gpus, gpus)
    return {"CPU": nodes.num_cpus, "GPU": gpus, **nodes.resources}


def required_resources(config: RunConfig, num_actors: int | None = None) -> dict[str, float]:
    """What the run's actors and reward replicas reserve on a Ray cluster.

    `num_actors`: with so many rollout actors; by default with the fewest that the run starts with.
    """
    service = config.reward_service
    servings = [service.serving(reward.name) for reward in served(config)]
    needed = {
        "CPU": sum(serving.min_replicas * serving.num_cpus_per_replica for serving in servings),
        "GPU": sum(serving.min_replicas * serving.num_gpus_per_replica for serving in servings),
    }
    needed["CPU"] += HTTP_CPUS * service.http_replicas if serves_http(config) else 0
    actors = config.rollout.bounds.least if num_actors is None else num_actors
    roles = [(rank_needs(config), config.learner.num_ranks)]
    if config.placement != "colocated":
        roles.append((actor_needs(config), actors))
    for each, count in roles:
        for kind, amount in each.items():
            needed[kind] = needed.get(kind, 0.0) + count * amount
    return needed


def local_cpus(config: RunConfig) -> int:
    """CPUs of a run's own cluster: the machine's, or what the run may reserve at most.

    Phases take turns at staleness 0, so a small machine may well hold more processes than cores.
    """
    return max(os.cpu_count() or 1, math.ceil(required_resources(config, config.rollout.bounds.most)["CPU"]))


def selector(nodes: Sequence[Mapping[str, Any]], role: str, labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that a role's nodes must have: those given, and the role's own if nodes are set aside for it.

    nodes: as Ray lists them.
    """
    return {**role_selector(nodes, role), **labels}


def role_selector(nodes: Sequence[Mapping[str, Any]], role: str) -> dict[str, str]:
    """Keeps a role on the nodes that are set aside for it; {} if none is, and then any node will do."""
    set_aside = any(node["Alive"] and node["Labels"].get(ROLE_LABEL) == role for node in nodes)
    return {ROLE_LABEL: role} if set_aside else {}


def reward_selector(nodes: Sequence[Mapping[str, Any]], num_gpus: float) -> dict[str, str]:
    """Where replicas of a reward go: rewards that need a GPU to judges' nodes, or to rewards' nodes that have one."""
    able = [node for node in nodes if float(node.get("Resources", {}).get("GPU", 0.0)) >= num_gpus]
    roles = ("judge", "rewards") if num_gpus > 0 else ("rewards",)
    return next((found for role in roles if (found := role_selector(able, role))), {})


def might_fit(node: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a node lives and has these labels; conditions other than a plain value are taken as met."""
    plain = {name: value for name, value in labels.items() if not value.startswith("!") and "(" not in value}
    return bool(node["Alive"]) and plain.items() <= node["Labels"].items()


def served(config: RunConfig) -> list[AnyRewardConfig]:
    """The rewards that get replicas: all but light held-out metrics, unless `per_reward` says how to serve them."""
    told = config.reward_service.per_reward
    return [one for one in config.rewards if not (one.only_eval and one.is_light) or one.name in told]


def serves_http(config: RunConfig) -> bool:
    """Whether the run's reward service has an HTTP face."""
    return config.reward_service.http or config.reward_service.transport == "http"
