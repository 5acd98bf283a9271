"""The reward service on Ray Serve: one application per reward, and one with the HTTP face if it is wanted.

Each reward is an application of its own, so it starts, fails and scales alone. What they are made of is in
`services/reward_deploy.py`; one reward's process is in `services/reward_replica.py`, the caller's side in
`services/reward_scorer.py`. `build_application` is the same service for `serve run` and `serve deploy`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.serve import Application

from raylign.assets import find_config
from raylign.config import Config, load_config, parse_config
from raylign.errors import ClusterError
from raylign.types import Prompt, RewardBreakdown, RewardSample
from rewards import RewardMix, RewardUnion, check_names, make_mix, mix
from rewards.base import RewardAsk
from rewards.grouping import any_compares, in_groups
from services.process import local_cluster
from services.reward_config import RewardServerConfig, ServiceConfig
from services.reward_deploy import (
    deploy,
    ingress_application,
    num_cpus,
    remove,
    reward_application,
    start_serve,
)
from services.reward_door import check_free
from services.reward_http import token_digest
from services.reward_scorer import HandleScorer


class RewardService:
    """The running service, held by whoever started it."""

    def __init__(
        self,
        stages: Sequence[Sequence[str]],
        drain_timeout_s: float,
        scorer: HandleScorer,
        local: RewardMix,
        address: str | None,
    ) -> None:
        """`local`: the same rewards in this process, unloaded; they check prompts."""
        self._stages = stages
        self._drain_timeout_s = drain_timeout_s
        self._scorer = scorer
        configs = [config for config, _ in local.rewards]
        self._eval_asks = [RewardAsk(config.name, config.weight, config.required) for config in configs]
        self._asks = [ask for ask, config in zip(self._eval_asks, configs, strict=True) if not config.only_eval]
        self._check = local.check
        self.compares = any_compares(reward for _, reward in local.rewards)
        """Whether a reward scores a group as a whole."""
        self.address = address
        """URL of the HTTP face, or None."""

    @classmethod
    def start(
        cls,
        rewards: Sequence[RewardUnion],
        service: ServiceConfig,
        http: bool | None = None,
        name: str = "rewards",
        where: Mapping[str, Mapping[str, str]] | None = None,
    ) -> RewardService:
        """Deploy on the connected Ray cluster and wait until every reward has loaded; blocking.

        `http` overrides `service.http`. `name` keeps two services on one cluster apart. `where`: labels of the
        nodes that a reward's replicas go to, by its name.
        Raises ConfigError for names or a missing token, ClusterError without Ray or when a reward does not start.
        """
        check_names(rewards)
        service.check_per_reward([config.name for config in rewards])
        with_http = service.http if http is None else http
        token = service.read_token() if with_http else None
        if not ray.is_initialized():
            raise ClusterError(
                "the reward service needs a Ray cluster; call ray.init first, or run `raylign serve-rewards`"
            )
        app_names = {config.name: f"{name}-{config.name}" for config in rewards}
        http_app = f"{name}-http"
        # The door closes first: requests that are inside still need the rewards.
        stages = [[http_app], [*app_names.values()]] if with_http else [[*app_names.values()]]
        try:
            start_serve()
            deployed = deploy(
                {
                    app_names[config.name]: reward_application(config, service, (where or {}).get(config.name))
                    for config in rewards
                },
                service.start_timeout_s,
            )
            handles = dict(zip(app_names, deployed, strict=True))
            if with_http:
                digest = token_digest(token) if token else None
                ingress = ingress_application(rewards, service, digest, handles)
                deploy({http_app: ingress}, service.start_timeout_s)
        except BaseException:  # whatever stops the start, nothing is left on the cluster
            remove(stages, service.drain_timeout_s)
            raise
        return cls(
            stages,
            service.drain_timeout_s,
            HandleScorer(rewards, handles, service),
            make_mix(rewards),
            f"http://{service.host}:{service.port}" if with_http else None,
        )

    async def score(self, samples: Sequence[RewardSample], evaluation: bool = False) -> list[RewardBreakdown]:
        """One breakdown per sample, in order, mixed as configured; errors are values.

        Held-out metrics are asked in an `evaluation` only. If a reward compares, the samples of each `group_id` are
        scored together.
        """
        asks = self._eval_asks if evaluation else self._asks

        async def score_group(group: Sequence[RewardSample]) -> list[RewardBreakdown]:
            return mix(await self._scorer.score_group(group, asks), asks)

        if self.compares:
            return await in_groups(samples, score_group)
        return mix(await self._scorer.score(samples, asks), asks)

    def check(self, prompt: Prompt) -> None:
        """Raise PromptError if a required reward can never score samples of this prompt."""
        self._check(prompt)

    async def close(self) -> None:
        """Let go of the cache's connections; they belong to the event loop that scored."""
        await self._scorer.close()

    def shutdown(self) -> None:
        """Close the door, answer what is inside, and remove the applications; blocking. Serve itself stays."""
        remove(self._stages, self._drain_timeout_s)


class DeployArgs(Config):
    """The `args` of the application in a Serve file."""

    config: str
    """A configuration as `raylign serve-rewards` takes it: a TOML file, or the name of one that is shipped."""


def build_application(args: dict[str, Any]) -> Application:
    """The service as one application, for `import_path` in a Serve file: see deploy/rewards_serve.yaml.

    It listens at the configuration's host and port; the token comes from the configuration's `token_file`, or its
    environment variable on the node that builds the application. Raises ConfigError.
    """
    given = parse_config(DeployArgs, args, "args of the application")
    config = load_config(RewardServerConfig, find_config(given.config))
    token = config.service.read_token()
    rewards = {reward.name: reward_application(reward, config.service) for reward in config.rewards}
    return ingress_application(config.rewards, config.service, token_digest(token) if token else None, rewards)


def run_reward_server(config: RewardServerConfig, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve over HTTP until SIGINT or SIGTERM, then shut down; nothing is left behind.

    Uses the Ray cluster that is connected, else starts one of its own. `on_ready` is told the address.
    Must run in the main thread. Raises as `RewardService.start` does.
    """
    stop = threading.Event()

    def request_stop(signum: int, frame: FrameType | None) -> None:
        stop.set()

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
    check_free(config.service.host, config.service.port)
    needed = max(os.cpu_count() or 1, math.ceil(num_cpus(config.rewards, config.service)))
    with tempfile.TemporaryDirectory(prefix="raylign-rewards-") as folder, local_cluster(needed, Path(folder)):
        yield
