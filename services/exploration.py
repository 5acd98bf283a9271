"""One prompt's way through explore and exploit (rollout/explore.py): two rounds of chunks, and what lies between them.

    draft chunks ──▶ any actors ──▶ rewards ──▶ select ──▶ rollout chunks of the chosen keys ──▶ any actors ──▶ rewards

Prompts go this way side by side and wait for none but themselves: a prompt's second round joins the queue as soon as
its own selection is known. Chunks are cut by the configuration, the selection is a function of the rewards and a key,
so neither the number of actors nor their deaths change what is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from raylign.types import Exploration, RolloutGroup
from rollout.drawn import Slot
from rollout.engine import ChunkRequest
from rollout.explore import DraftGroup, ExploreConfig, as_drafts
from rollout.prompts import GroupTask
from rollout.selection import select
from services.config import RunConfig
from services.step_metrics import failed_samples
from services.timeline import renamed

Draw = Callable[[Sequence[ChunkRequest]], Awaitable[RolloutGroup]]
"""Draws the chunks of one prompt and scores its group when it is whole."""


async def explored_group(config: RunConfig, explore: ExploreConfig, task: GroupTask, draw: Draw) -> RolloutGroup:
    """The prompt's group of `group_size` siblings, chosen among its drafts, with rewards of their own.

    Only where `regenerate` is off are the siblings, and their rewards, those of the pool.
    """
    slot: Slot = "draft" if explore.regenerate else "rollout"
    pool = await draw(requests_of(task, range(explore.pool_size), config.draft_chunk_size, slot))
    started_s = time.perf_counter()
    drafts, (_, cause) = as_drafts(pool), failed_samples([pool])
    key = (config.seed, task.prompt.id, task.visit, "explore")
    places = select(drafts.totals, config.group_size, explore.select, key)
    chosen = [drafts.keys[place].sample_index for place in places]
    seen = Exploration(
        indices=tuple(one.sample_index for one in drafts.keys),
        totals=drafts.totals,
        redrawn=explore.regenerate,
        cause=cause,
        images_NHWC=drafts.images_NHWC if is_shown(config, task) else None,
    )
    group = None if explore.regenerate else pool.siblings(places)
    del pool  # what could be trained on ends here, before the second round
    select_s = time.perf_counter() - started_s
    if group is None:
        group = await draw(requests_of(task, chosen, config.chunk_size, "rollout"))
        again, seconds = renamed(group.work, "regenerate"), _seconds(drafts, select_s, group.seconds)
    else:
        again, seconds = (), _seconds(drafts, select_s, {})
    return replace(group, exploration=seen, seconds=seconds, work=(*renamed(drafts.work, "draft"), *again))


def requests_of(task: GroupTask, indices: Sequence[int], chunk_size: int, slot: Slot) -> list[ChunkRequest]:
    """Batches of `chunk_size` of one prompt's samples, in the order of their indices."""
    starts = range(0, len(indices), chunk_size)
    return [ChunkRequest((task,), tuple(indices[start : start + chunk_size]), slot) for start in starts]


def is_shown(config: RunConfig, task: GroupTask) -> bool:
    """Whether people are shown this prompt's pool: the first of a step, at the first step and where evaluations are."""
    step = task.learner_step
    due = step in (1, config.num_steps) or step % config.eval.every_steps == 0
    return due and task.sequence % config.groups_per_step == 0


def _seconds(drafts: DraftGroup, select_s: float, redrawn: Mapping[str, float]) -> dict[str, float]:
    """Busy seconds of both rounds: by phase, as without exploration, and the same by stage.

    "sample" and "decode" are "draft" and "regenerate" together; "draft_reward" is a part of "reward".
    """
    first = drafts.seconds
    phases = {name: value + redrawn.get(name, 0.0) for name, value in first.items()}
    stages = {
        "draft": first.get("sample", 0.0) + first.get("decode", 0.0),
        "draft_reward": first.get("reward", 0.0),
        "select": select_s,
        "regenerate": redrawn.get("sample", 0.0) + redrawn.get("decode", 0.0),
    }
    return phases | stages
