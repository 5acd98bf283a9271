"""One role of a run in a process of its own, for a moment: `python -m services.plan.probe_role ROLE FOLDER`.

It imports what the role's process imports, builds what the role builds by the same functions, does its work once or a
few times, and writes seconds and memory to FOLDER/ROLE.json. FOLDER has the run's configuration and, for rewards and
learner, the groups that the rollout role drew.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

MOST_REPEATS = 3
ENOUGH_S = 10.0
"""What took so long is not repeated."""


def main() -> None:
    """Play one role; what it measured is in the folder afterwards."""
    role, folder = sys.argv[1], Path(sys.argv[2])
    from raylign.errors import RaylignError

    try:
        found = ROLES[role](folder)
    except RaylignError as error:
        print(f"raylign: {error}", file=sys.stderr)  # noqa: T201 - read by the process that started this one
        raise SystemExit(1) from None
    (folder / f"{role}.json").write_text(json.dumps(found), encoding="utf-8")


def play_driver(folder: Path) -> dict[str, Any]:
    """The process that `raylign train` is: its imports are what it holds."""
    _load("services.run", "services.fleet", "services.ray_learner", "services.reward_app")
    return {"process_bytes": _resident(), "peak_bytes": _peak()}


def play_rollout(folder: Path) -> dict[str, Any]:
    """An actor: pull, draw a chunk, a chunk of drafts where they are explored, and one of an evaluation."""
    import torch

    from raylign.assets import resolve
    from rollout.engine import ChunkRequest, chunk_requests
    from rollout.prompts import PromptStream, load_prompts
    from services.assembly import build_engine
    from services.config import read_resolved_config
    from services.exploration import requests_of
    from services.plan.samples import group_bytes, save_groups

    _load("services.worker_actor")
    config = read_resolved_config(folder / "config.toml")
    stream = PromptStream(load_prompts(resolve(config.prompts.train), config.prompts.fields), config.seed)
    imported = _resident()
    started_s = time.perf_counter()
    engine: Any = build_engine(config)
    load_s, built = time.perf_counter() - started_s, _resident()
    snapshot = _first_snapshot(config, engine.policy)
    pull_s = _timed(lambda: engine.pull(snapshot, "rollout"))
    engine.pull(snapshot, "eval")
    calls, handle = _counted_calls(engine, config)
    tasks = [stream.task(place) for place in range((MOST_REPEATS + 1) * config.chunk_prompts)]
    requests = chunk_requests(tasks, config.group_size, config.chunk_size)[: MOST_REPEATS + 1]
    drawn: list[Any] = []
    chunk_s = _timed_each([lambda one=one: drawn.append(engine.generate(one)) for one in requests])
    num_calls = calls() / len(drawn)
    handle()
    found: dict[str, Any] = {"draw_peak_bytes": _peak()}
    explore = config.rollout.explore
    if explore is not None:
        slot = "draft" if explore.regenerate else "rollout"
        drafts = requests_of(tasks[0], range(explore.pool_size), config.draft_chunk_size, slot)
        found["draft_chunk_s"] = _timed_each([lambda one=one: engine.generate(one) for one in drafts[:MOST_REPEATS]])
    samples = config.eval.samples_per_prompt
    size = max(samples, config.chunk_size // samples * samples)
    evaluated = ChunkRequest(tuple(tasks[: max(1, size // samples)]), tuple(range(samples)), "eval")
    found["eval_chunk_s"] = _timed(lambda: engine.generate(evaluated), most=2)
    found["eval_samples"] = len(evaluated.tasks) * samples
    groups = drawn[0]
    save_groups(groups, folder)
    texts = [group.tokens for group in groups if group.texts is not None]
    return found | {
        "process_bytes": imported,
        "built_bytes": built,
        "resident_bytes": _resident(),
        "peak_bytes": _peak(),
        "cuda": _cuda(torch),
        "load_s": load_s,
        "pull_s": pull_s,
        "payload_bytes": snapshot.num_bytes,
        "chunk_s": chunk_s,
        "decode_s": sum(group.seconds["decode"] for group in drawn[-1]),
        "network_calls": num_calls,
        "nfe": sum(float(one.nfe_G.float().mean()) for one in texts) / len(texts) if texts else None,
        "group_bytes": sum(map(group_bytes, groups)) / sum(group.group_size for group in groups) * config.group_size,
        "picture_bytes": 0 if groups[0].images_GHWC is None else groups[0].images_GHWC[0].nbytes,
    }


def play_rewards(folder: Path) -> dict[str, Any]:
    """Replicas, one after the other in one process: what each adds to it, and a group's score."""
    from raylign.errors import ModelError
    from raylign.types import RewardSample
    from rewards import make_reward
    from rewards.base import score_totally
    from services.config import read_resolved_config
    from services.plan.samples import load_groups

    _load("services.reward_replica")
    config = read_resolved_config(folder / "config.toml")
    group = load_groups(folder)[0]
    samples = [
        RewardSample(
            id=str(place),
            prompt=group.prompt,
            image_HWC=None if group.images_GHWC is None else group.images_GHWC[place],
            text=None if group.texts is None else group.texts[place],
            group_id="probe",
        )
        for place in range(group.group_size)
    ]
    found: dict[str, Any] = {"process_bytes": _resident(), "rewards": {}}
    for reward_config in config.rewards:
        before = _resident()
        try:
            reward = make_reward(reward_config)
            reward.load()
        except ModelError as error:
            found["rewards"][reward_config.name] = {"problem": str(error)}
            continue
        scores: list[Any] = []

        def score(reward: Any = reward, scores: list[Any] = scores) -> None:
            scores.extend(asyncio.run(score_totally(reward, samples)))

        seconds = _timed(score)
        failed = next((score.error for score in scores if score.error is not None), None)
        found["rewards"][reward_config.name] = {
            "added_bytes": max(0, _peak() - before),
            "sample_s": seconds / len(samples),
            **({"problem": failed.message} if failed is not None else {}),
        }
    return found


def play_learner(folder: Path) -> dict[str, Any]:
    """A rank: credit, one micro-batch of each kind forth and back, the optimiser's step, publication, a checkpoint."""
    import torch

    from learner.parallel import RankGroup
    from services.assembly import build_learner
    from services.config import read_resolved_config
    from services.plan.samples import load_groups

    _load("services.worker_actor")
    config = read_resolved_config(folder / "config.toml")
    passes = min(2, config.learner.num_updates)
    alone = {"updates_per_step": 1, "epochs_per_step": passes, "num_ranks": 1, "sharding": "none"}
    config = config.model_copy(update={"learner": config.learner.model_copy(update=alone)})
    groups = _filled(load_groups(folder), config)
    imported = _resident()
    started_s = time.perf_counter()
    learner: Any = build_learner(config, RankGroup.single())
    load_s, built = time.perf_counter() - started_s, _resident()
    learner.publish(0)
    seconds: dict[str, list[float]] = {"credit": [], "first": [], "later": [], "optimise": [], "publish": []}
    rows = sum(group.group_size for group in groups)
    items, calls = 0.0, 0.0
    for step in range(1, MOST_REPEATS + 2):
        seconds["credit"].append(_timed(lambda step=step: learner.begin_step(groups, step), most=1))
        for update in range(passes):
            counted, stop = _hooked(learner.policy.network)
            kind = "first" if update == 0 else "later"
            seconds[kind].append(_timed(lambda update=update: learner.forward_backward(update), most=1))
            calls = counted()
            stop()
            began_s = time.perf_counter()
            items = learner.optimise(update).metrics["batch/num_items"]
            seconds["optimise"].append(time.perf_counter() - began_s)
        learner.end_step(step)
        seconds["publish"].append(_timed(lambda step=step: learner.publish(step), most=1))
        if step > 1 and sum(seconds["first"]) > ENOUGH_S:
            break
    trained_peak = _peak()
    learner.state_dict()
    micro_batches = items / min(rows, config.micro_batch_size)
    return {
        "process_bytes": imported,
        "built_bytes": built,
        "resident_bytes": _resident(),
        "trained_peak_bytes": trained_peak,
        "peak_bytes": _peak(),
        "cuda": _cuda(torch),
        "load_s": load_s,
        "credit_s": min(seconds["credit"]) / rows,
        "micro_first_s": _typical(seconds["first"]) / micro_batches,
        "micro_later_s": _typical(seconds["later"] or seconds["first"]) / micro_batches,
        "optimise_s": _typical(seconds["optimise"]),
        "publish_s": _typical(seconds["publish"]),
        "items_per_sample": items / rows,
        "calls_per_micro_batch": calls / micro_batches,
        "num_groups": len(groups),
    }


def _load(*modules: str) -> None:
    """What the role's process has loaded before it builds anything."""
    for module in modules:
        importlib.import_module(module)


def _first_snapshot(config: Any, policy: Any) -> Any:
    """What the first publication holds: the weights as they are, or an adapter that changes nothing yet."""
    import torch

    from raylign.weights import make_snapshot
    from services.plan.sizes import model_sizes

    if config.model.tuning == "full" or not config.fold_lora:
        return policy.export_weights(0)
    zeros = {name: torch.zeros(shape) for name, shape in model_sizes(config.model).trained.items()}
    return make_snapshot(zeros, 0, "adapter", config.model.lora.scale)


def _filled(groups: Sequence[Any], config: Any) -> list[Any]:
    """Drawn groups again and again until they fill a micro-batch, with rewards that rise from sibling to sibling."""
    from dataclasses import replace

    from raylign.types import RewardBreakdown, RewardScore

    trained = [reward for reward in config.rewards if not reward.only_eval]
    weights = tuple(reward.weight for reward in trained)

    def rewarded(group: Any, place: int) -> Any:
        values = [
            RewardBreakdown(float(rank), tuple(RewardScore(one.name, float(rank)) for one in trained), weights=weights)
            for rank in range(group.group_size)
        ]
        return replace(group, sequence=place).with_rewards(values)

    filled: list[Any] = []
    while sum(group.group_size for group in filled) < config.micro_batch_size or not filled:
        filled.append(rewarded(groups[len(filled) % len(groups)], len(filled)))
    return filled


def _counted_calls(engine: Any, config: Any) -> tuple[Callable[[], int], Callable[[], None]]:
    """Calls of the network that rollouts compute with: the low-precision copy where there is one."""
    from services.precision_checks import low_precision_slots

    if "rollout" in low_precision_slots(config.rollout.precision, None):
        return (lambda: 0), (lambda: None)
    return _hooked(engine.policy.network)


def _hooked(network: Any) -> tuple[Callable[[], int], Callable[[], None]]:
    """A count of the network's calls from now on, and what ends it. A text network is read, and called inside."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = network.register_forward_hook(count)
    return (lambda: calls[0]), handle.remove


def _timed(work: Callable[[], Any], most: int = MOST_REPEATS) -> float:
    """Typical seconds of some work; what is slow is done once."""
    return _timed_each([work] * (most + 1 if most > 1 else 1))


def _timed_each(jobs: Sequence[Callable[[], Any]]) -> float:
    """Typical seconds of equal jobs. The first warms up, unless it is slow or the only one."""
    seconds: list[float] = []
    for job in jobs:
        started_s = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - started_s)
        if sum(seconds) > ENOUGH_S:
            break
    return _typical(seconds)


def _typical(seconds: Sequence[float]) -> float:
    """The median without the first, if there are others."""
    rest = sorted(seconds[1:] or seconds)
    return rest[(len(rest) - 1) // 2]


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda(torch: Any) -> Mapping[str, int] | None:
    """Most memory of the device that tensors held, and that the allocator reserved; None without one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


ROLES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "driver": play_driver,
    "rollout": play_rollout,
    "rewards": play_rewards,
    "learner": play_learner,
}

if __name__ == "__main__":
    from services.process import prepare_environment

    prepare_environment()  # before anything imports torch, Ray or a hub library
    main()
