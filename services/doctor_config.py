"""What one run's configuration needs, and whether it is there: `raylign doctor CONFIG`. Starts nothing, loads no model.

The servers that a run asks (judges, other reward services, Redis) are asked who they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from raylign.assets import resolve
from raylign.errors import ConfigError, RaylignError
from raylign.models import check_model
from rewards import AnyRewardConfig, RemoteConfig, make_reward
from rewards.judging.openai_engine import OpenAIEngine, OpenAIEngineConfig
from rollout.prompts import load_prompts
from services.config import RunConfig, load_run_config
from services.doctor import Check, Status, is_taken
from services.plan.rewards import missing_files, reward_weights
from services.topology import required_resources

ANSWER_TIMEOUT_S = 5.0


def diagnose_config(names: Sequence[str], overrides: Mapping[str, str]) -> list[Check]:
    """Every check of a configuration; only the first, where it cannot be read."""
    try:
        config = load_run_config(names, overrides)
    except ConfigError as error:
        remedy = "mend these keys; docs/reference/config.md lists all of them"
        return [Check("configuration", Status.FAIL, str(error), remedy)]
    checks = [
        Check("configuration", Status.OK, f"{', '.join(names)}: {config.model.type}, {config.algorithm.type}"),
        check_run_model(config),
        *(check_prompts(config, key) for key in ("train", "heldout") if getattr(config.prompts, key) is not None),
        *check_rewards(config.rewards),
        check_resources(config),
    ]
    if config.reward_service.cache.type == "redis":
        checks.append(check_redis(config.reward_service.cache.address()))
    if config.tracking.events is not None:
        remedy = "start it (`redis-server`), or mend tracking.events.url; metrics.jsonl has every row without it"
        checks.append(check_redis(config.tracking.events.address(), "Redis of events", remedy))
    if config.reward_service.http or config.reward_service.transport == "http":
        checks.append(check_service_port(config.reward_service.port))
    return checks


def check_run_model(config: RunConfig) -> Check:
    """The model's folder, its files against each other."""
    path = config.model.path
    try:
        check_model(config.model)
    except RaylignError as error:
        remedy = f"download the checkpoint into a folder and give it: --model.path FOLDER (got {path!r})"
        return Check("model", Status.FAIL, str(error), remedy)
    return Check("model", Status.OK, f"{path} is a {config.model.type} that can be loaded")


def check_prompts(config: RunConfig, key: str) -> Check:
    """A prompt file, and whether every required reward can score samples of its prompts."""
    name, given = f"{key} prompts", getattr(config.prompts, key)
    try:
        prompts = load_prompts(resolve(given), config.prompts.fields)
        rewards = [make_reward(reward) for reward in config.rewards if reward.required]
        for prompt in prompts:
            for reward in rewards:
                reward.check(prompt)
    except (RaylignError, OSError) as error:
        return Check(name, Status.FAIL, str(error), f"give another file: --prompts.{key} FILE (got {given!r})")
    return Check(name, Status.OK, f"{len(prompts)} in {given}")


def check_rewards(rewards: Sequence[AnyRewardConfig]) -> list[Check]:
    """One check per reward: its model files, or the server that it asks."""
    missing = missing_files(reward_weights(rewards))
    checks: list[Check] = []
    for reward in rewards:
        name = f"reward {reward.name}"
        engine = getattr(reward, "engine", None)
        if reward.name in missing:
            files = missing[reward.name]
            told = ", ".join(f"{file.key} = {file.path!r}" for file in files)
            checks.append(Check(name, Status.FAIL, f"not on this machine: {told}", _how_to_get(files[0].key)))
        elif isinstance(engine, OpenAIEngineConfig):
            checks.append(check_judge(engine, name))
        elif isinstance(reward, RemoteConfig):
            checks.append(_loaded(reward.model_copy(update={"timeout_s": ANSWER_TIMEOUT_S}), name))
        else:
            checks.append(_made(reward, name))
    return checks


def check_judge(engine: OpenAIEngineConfig, name: str = "judge") -> Check:
    """Whether a judge server answers, and which model it runs."""
    quick = engine.model_copy(update={"timeout_s": ANSWER_TIMEOUT_S, "max_attempts": 1})
    try:
        asked = OpenAIEngine(quick)
        asked.load()
    except RaylignError as error:
        remedy = "start the server (docs/judge_engine.md), or mend its address: `curl ADDRESS/models` must list models"
        return Check(name, Status.FAIL, f"{engine.base_url}: {error}", remedy)
    return Check(name, Status.OK, f"the judge at {engine.base_url} answers")


def judge_at(url: str) -> OpenAIEngineConfig:
    """A judge by its address alone. Raises ConfigError for one that is no address of an API."""
    from raylign.config import parse_config

    return parse_config(OpenAIEngineConfig, {"base_url": url}, "--judge")


_CACHE_REMEDY = "start it (`redis-server`), or mend reward_service.cache.url; scores are not remembered without it"


def check_redis(url: str, name: str = "Redis", remedy: str = _CACHE_REMEDY) -> Check:
    """Whether Redis answers. A run goes on without it."""
    import redis

    shown = url.rpartition("@")[2] if "@" in url else url
    try:
        client = redis.Redis.from_url(url, socket_timeout=ANSWER_TIMEOUT_S, socket_connect_timeout=ANSWER_TIMEOUT_S)
        with client:
            version = client.info("server")["redis_version"]  # type: ignore[index]  # the client is a synchronous one
    except (redis.RedisError, ValueError, OSError) as error:
        return Check(name, Status.FAIL, f"{shown} does not answer: {error}", remedy)
    return Check(name, Status.OK, f"{version} at {shown}")


def check_resources(config: RunConfig) -> Check:
    """Whether this machine has what the run reserves. A cluster that is joined may have more."""
    import torch

    needed = required_resources(config) if config.placement != "in_process" else _in_process(config)
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    told = f"reserves {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs; here are {cores} and {gpus}"
    if needed["GPU"] > gpus:
        return Check(
            "resources",
            Status.FAIL,
            told,
            "join a cluster that has them (`raylign train --address`), or lower rollout.num_actors, learner.num_ranks, "
            "rollout.num_gpus and learner.num_gpus_per_rank",
        )
    if needed["CPU"] > 2 * cores:
        return Check(
            "resources",
            Status.WARN,
            told,
            "processes take turns on the cores: lower rollout.num_actors for this machine",
        )
    return Check("resources", Status.OK, told)


def check_service_port(port: int) -> Check:
    """Whether the port of the run's own reward service is free."""
    if not is_taken(port):
        return Check("reward service's port", Status.OK, f"{port} is free")
    remedy = "take another: --reward_service.port 8001"
    return Check("reward service's port", Status.FAIL, f"somebody listens at {port} already", remedy)


def _in_process(config: RunConfig) -> dict[str, float]:
    on_gpu = config.rollout.num_gpus > 0 or config.learner.num_gpus_per_rank > 0
    return {"CPU": 1.0, "GPU": 1.0 if on_gpu else 0.0}


def _made(reward: AnyRewardConfig, name: str) -> Check:
    try:
        make_reward(reward)
    except RaylignError as error:
        return Check(name, Status.FAIL, str(error), "mend the reward's keys, or install what it names")
    return Check(name, Status.OK, f"{reward.type}, nothing to fetch")


def _loaded(reward: RemoteConfig, name: str) -> Check:
    try:
        make_reward(reward).load()
    except RaylignError as error:
        remedy = f"start that service (`raylign serve-rewards`), or mend its address {reward.url}"
        return Check(name, Status.FAIL, str(error), remedy)
    return Check(name, Status.OK, f"{reward.reward!r} is served at {reward.url}")


def _how_to_get(key: str) -> str:
    folder = Path(key).name.rpartition(".")[2]
    return f"download it (`HF_HUB_OFFLINE=0 hf download NAME`), or give its {folder} as a folder: --{key} FOLDER"
