"""One reward in a process of its own, under Ray Serve. Every call is answered, sample by sample.

    calls ──▶ @serve.batch ──▶ by parameters: one list per set ──▶ the reward's turn ──▶ scores, cut back into calls
                          └──▶ groups whose candidates it compares: one by one ───┘

Turns are what the reward scores at once: one, unless `max_concurrent_batches` says more. A health check looks at the
oldest call, and has an idle replica score its reward's probe in the background. A judge's canaries are scored after
the start; one that gets more than it deserves makes the reward not ready, but does not stop it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from ray import serve

from raylign.errors import ConfigError
from raylign.types import JsonValue, RewardSample, RewardScore
from rewards import RewardUnion, make_reward
from rewards.base import Canary, HasCanaries, Reward, ScoresGroups, TakesParams, failure, score_totally
from rewards.grouping import score_group_totally
from rewards.wire import RewardInfo, describe
from services.reward_config import ServingConfig

logger = logging.getLogger(__name__)

MAX_FAILED_PROBES = 3
MAX_ADJUSTED = 64
"""Parameter sets that a replica keeps the adjusted reward of."""
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a reward: samples, or the candidates of one prompt, under one set of parameters."""

    samples: Sequence[RewardSample]
    params: str = "{}"
    """Canonical JSON."""
    group: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself."""

    info: RewardInfo
    problem: str
    """Why it should not be relied upon, or empty."""


def canonical_params(params: Mapping[str, JsonValue]) -> str:
    """Equal texts for equal parameters."""
    return json.dumps(params, sort_keys=True, separators=(",", ":"))


class RewardReplica:
    """The deployment's class; Serve makes one per replica."""

    def __init__(self, config: RewardUnion, serving: ServingConfig, reward: Reward | None = None) -> None:
        """`reward` in place of the one that `config` describes, which must have its name, for tests."""
        self._config = config
        self._reward = reward = make_reward(config) if reward is None else reward
        self._reward.load()
        self._serving = serving
        self._adjusted: OrderedDict[str, Reward] = OrderedDict()
        self._turns = asyncio.Semaphore(serving.max_concurrent_batches)
        self._queued: dict[int, float] = {}
        self._ids = itertools.count()
        self._canaries_open = isinstance(reward, HasCanaries)
        self._problem = "its canaries have not been scored yet" if self._canaries_open else ""
        self._background: asyncio.Task[None] | None = None
        self._looked_s = -math.inf
        self._probe_began_s: float | None = None
        self._failed_probes = 0
        self._batched = serve.batch(
            max_batch_size=serving.max_batch_size,
            batch_wait_timeout_s=serving.batch_wait_ms / 1000,
            max_concurrent_batches=serving.max_concurrent_batches,
        )(self.score_calls)

    async def score(self, call: Call) -> list[RewardScore]:
        """One score per sample, in order."""
        number = next(self._ids)
        self._queued[number] = time.monotonic()
        try:
            return await self._batched(call)
        finally:
            del self._queued[number]

    async def score_calls(self, calls: list[Call]) -> list[list[RewardScore]]:
        """Answer several calls together. An exception here would fail all of them, so none leaves."""
        answers: list[list[RewardScore]] = [[] for _ in calls]
        compares = isinstance(self._reward, ScoresGroups)
        by_params: dict[str, list[int]] = {}
        jobs: list[Coroutine[Any, Any, None]] = []

        async def together(params: str, places: list[int]) -> None:
            samples = [sample for place in places for sample in calls[place].samples]
            scores = iter(await self._turn(params, samples, group=False))
            for place in places:
                answers[place] = list(itertools.islice(scores, len(calls[place].samples)))

        async def compared(place: int) -> None:
            answers[place] = await self._turn(calls[place].params, calls[place].samples, group=True)

        for place, call in enumerate(calls):
            if call.group and compares:
                jobs.append(compared(place))
            else:
                by_params.setdefault(call.params, []).append(place)
        await asyncio.gather(*jobs, *(together(params, places) for params, places in by_params.items()))
        return answers

    def state(self) -> ReplicaState:
        """What clients may know about this reward, and whether its canaries stayed low."""
        return ReplicaState(describe(self._config, self._reward), self._problem)

    async def check_health(self) -> None:
        """Have Serve replace a replica that hangs or whose reward fails. Raises RuntimeError."""
        now_s = time.monotonic()
        limit_s = self._serving.timeout_s
        oldest_s = now_s - min(self._queued.values(), default=now_s)
        if oldest_s > 2 * limit_s:  # callers give up earlier: batch queues have been seen to hang
            raise RuntimeError(f"a call has waited {oldest_s:.0f} s in reward {self._reward.name!r}")
        if self._probe_began_s is not None and now_s - self._probe_began_s > limit_s:
            raise RuntimeError(f"reward {self._reward.name!r} has not scored its probe within {limit_s:.0f} s")
        if self._failed_probes >= MAX_FAILED_PROBES:
            raise RuntimeError(f"reward {self._reward.name!r} failed {self._failed_probes} probes in a row")
        idle = self._background is None or self._background.done()
        if idle and now_s - self._looked_s > self._serving.probe_period_s:
            self._looked_s = now_s
            self._background = asyncio.create_task(self._look())

    async def _turn(self, params: str, samples: Sequence[RewardSample], group: bool) -> list[RewardScore]:
        """Scores under these parameters, when it is their turn."""
        adjusted = self._adjust(params)
        if isinstance(adjusted, str):
            return [failure(self._reward, "invalid_input", adjusted) for _ in samples]
        async with self._turns:
            scores = await (score_group_totally if group else score_totally)(adjusted, samples)
        if any(score.value is not None for score in scores):
            self._looked_s, self._failed_probes = time.monotonic(), 0
        return scores

    def _adjust(self, params: str) -> Reward | str:
        """The reward under these parameters, or what is wrong with them."""
        if params == "{}":
            return self._reward
        if params in self._adjusted:
            self._adjusted.move_to_end(params)
            return self._adjusted[params]
        if not isinstance(self._reward, TakesParams):
            return f"reward {self._reward.name!r} takes no params"
        try:
            adjusted = self._reward.with_params(self._reward.params_model.model_validate_json(params))
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False, include_context=False)[:_MAX_SHOWN]
            shown = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'params'}: {p['msg']}" for p in problems)
            return f"params of reward {self._reward.name!r}: {shown}"
        except ConfigError as error:  # values that are fine alone and not together
            return f"params of reward {self._reward.name!r}: {error}"
        self._adjusted[params] = adjusted
        if len(self._adjusted) > MAX_ADJUSTED:
            self._adjusted.popitem(last=False)
        return adjusted

    async def _look(self) -> None:
        """Score what tells whether this replica works: the probe, and the canaries until each has a value."""
        probe = self._reward.probe()
        if probe is not None:
            async with self._turns:  # calls that came first are not the probe's time
                self._probe_began_s = time.monotonic()
                (score,) = await score_totally(self._reward, [probe])
                self._probe_began_s = None
            self._failed_probes = 0 if score.value is not None else self._failed_probes + 1
        if self._canaries_open and isinstance(self._reward, HasCanaries):
            canaries = list(self._reward.canaries())
            async with self._turns:
                scores = await score_totally(self._reward, [canary.sample for canary in canaries])
            self._canaries_open = any(score.value is None for score in scores)
            self._problem = canary_problem(canaries, scores)
            if self._problem:
                logger.warning("reward %r is not ready: %s", self._reward.name, self._problem)


def canary_problem(canaries: Sequence[Canary], scores: Sequence[RewardScore]) -> str:
    """Which canaries got more than they deserve, or nothing at all; empty when none did."""
    problems: list[str] = []
    for canary, score in zip(canaries, scores, strict=True):
        if score.value is None:
            problems.append(f"canary {canary.name!r} could not be scored")
        elif score.value > canary.highest:
            problems.append(f"canary {canary.name!r} scored {score.value:g}, limit {canary.highest:g}")
    more = len(problems) - _MAX_SHOWN
    return "; ".join(problems[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
