"""Scoring by handle: in the driver of a run, and behind the HTTP face.

    samples × rewards ──▶ remembered? (services/reward_cache.py) ──▶ one call per reward to any of its replicas

Every way in which a call can end becomes scores: a dead replica is asked again, a full queue too or is `overloaded`,
and a call without an answer by its deadline is a `timeout` and is cancelled in the replica. A handle call carries a
list of samples, because a group is what training has in hand: one call costs a few milliseconds, a call per sample
would cost that per sample.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from raylign.types import RewardFailure, RewardSample, RewardScore
from rewards.base import FailureCode, RewardAsk, RewardConfig
from rewards.wire import RewardInfo
from services.reward_cache import Answer, Keys, RewardCache, RewardFacts
from services.reward_config import ServiceConfig
from services.reward_replica import Call, ReplicaState, canonical_params
from services.reward_store import make_store

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waits between attempts of a call whose replica died; a new one needs about 5 s."""
READY_TIMEOUT_S = 5.0
BUSY_S = 30.0
"""A reward that gave a value this lately is at work, even if it is too busy to say so."""
FACTS_TTL_S = 30.0
"""How long a reward's version is believed: a hit asks no replica, so a new version must be looked for."""
FACTS_RETRY_S = 5.0
BY_VALUE_BYTES = 2**21
"""Larger calls go through the object store, where a replica on this machine reads them without a copy. Serve's gRPC
messages end at 4 MiB."""
_HASH_IN_THREAD_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Question:
    """What a reward is asked of some samples, and until when an answer helps (monotonic)."""

    ask: RewardAsk
    group: bool
    limit_s: float
    until_s: float

    def left_s(self) -> float:
        """Time left."""
        return self.until_s - time.monotonic()


class HandleScorer:
    """Scores by handle. Used by one event loop at a time."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        handles: Mapping[str, DeploymentHandle],
        service: ServiceConfig,
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
        waits_when_full: bool = True,
    ) -> None:
        """`waits_when_full`: whether a full queue is tried again. A run has nothing better to do; an HTTP client
        that is told at once can turn to another service. Raises ConfigError for a bad address of the cache.
        """
        self._handles = dict(handles)
        # Calls with their samples in them go over gRPC, a third faster than actor calls with references to them.
        self._by_value = {name: handle.options(_by_reference=False) for name, handle in handles.items()}
        self._timeouts_s = {config.name: service.serving(config.name).timeout_s for config in configs}
        self._kinds = {config.name: _kind(config) for config in configs}
        self._retry_waits_s = retry_waits_s
        self._waits_when_full = waits_when_full
        store = make_store(service.cache)
        self._cache = None if store is None else RewardCache(store, service.cache.lock_ttl_s)
        self._states: dict[str, ReplicaState] = {}
        self._believed_until_s: dict[str, float] = {}
        self._valued_s: dict[str, float] = {}

    async def score(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        """Scores by reward, each in sample order; whatever goes wrong costs its reward, not the call.

        `deadline_s` from now bounds every reward, on top of its own `timeout_s`.
        """
        return await self._score(samples, asks, deadline_s, group=False)

    async def score_group(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        """As `score`, for one prompt's candidates: rewards that compare see them all, others score one by one."""
        return await self._score(samples, asks, deadline_s, group=True)

    async def describe(self) -> list[RewardInfo]:
        """The served rewards, as last heard of. Raises what Ray raises if one was never reached."""
        return list(await asyncio.gather(*(self._info(name) for name in self._handles)))

    async def ready(self) -> dict[str, str]:
        """By reward: why it should not be relied upon, or empty."""
        problems = await asyncio.gather(*(self._problem(name) for name in self._handles))
        return dict(zip(self._handles, problems, strict=True))

    async def close(self) -> None:
        """Let go of the cache's connections."""
        if self._cache is not None:
            await self._cache.close()

    async def _score(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None, group: bool
    ) -> dict[str, list[RewardScore]]:
        if not samples:
            return {ask.name: [] for ask in asks}
        now_s = time.monotonic()
        limits_s = [min(self._timeouts_s[ask.name], math.inf if deadline_s is None else deadline_s) for ask in asks]
        questions = [
            _Question(ask, group, limit_s, now_s + limit_s) for ask, limit_s in zip(asks, limits_s, strict=True)
        ]
        keys = None if self._cache is None else await _hashed(samples)
        answers = await asyncio.gather(*(self._score_one(question, samples, keys) for question in questions))
        return {ask.name: scores for ask, scores in zip(asks, answers, strict=True)}

    async def _score_one(
        self, question: _Question, samples: Sequence[RewardSample], keys: Keys | None
    ) -> list[RewardScore]:
        """One reward's scores, remembered or asked for."""
        name, params = question.ask.name, question.ask.params
        facts = None if keys is None else await self._facts(name, question.left_s())
        if facts is None or keys is None or self._cache is None or not facts.deterministic:
            return await self._ask(question, samples)
        whole = question.group and facts.compares

        async def compute(places: list[int]) -> list[Answer]:
            if whole:
                return [tuple(await self._ask(question, samples))]
            return [(score,) for score in await self._ask(question, [samples[place] for place in places])]

        kind = self._kinds[name]
        try:
            names = [keys.of_group(kind, facts, params)] if whole else keys.of(kind, facts, params)
        except TypeError:  # metadata of a run's own making that is no JSON
            return await self._ask(question, samples)
        answers = await self._cache.answers(names, compute, facts, max(0.0, question.left_s()))
        scores = [score for answer in answers for score in answer]
        if any(score.value is not None and not facts.made(score) for score in scores):
            self._believed_until_s.pop(name, None)
        return scores

    async def _ask(self, question: _Question, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """One reward's scores from a replica. Calls to a dead one are repeated until there is no time left."""
        name = question.ask.name
        call = Call(list(samples), canonical_params(question.ask.params), question.group)
        waits_s = iter(self._retry_waits_s)
        handle = self._by_value[name] if _num_bytes(samples) <= BY_VALUE_BYTES else self._handles[name]
        while True:
            try:
                scores: list[RewardScore] = await _answer(handle.score.remote(call), question.left_s())
            except TimeoutError:
                return _errors(name, samples, "timeout", f"no answer within {question.limit_s:g} s")
            except BackPressureError:
                code, message = "overloaded", "the reward's queue is full"
            except (RayActorError, RayServeException) as error:
                logger.warning("reward %r: a replica is gone (%s)", name, type(error).__name__)
                code, message = "model_error", "the reward's replica died"
            except Exception:  # errors of the replica and of the transport arrive under their own names
                logger.exception("reward %r: a replica failed", name)
                if handle is not self._handles[name]:  # the answer may have been too long for gRPC
                    handle = self._handles[name]
                    continue
                return _errors(name, samples, "model_error", "the reward's replica failed; see the log", False)
            else:
                if any(score.value is not None for score in scores):
                    self._valued_s[name] = time.monotonic()
                return scores
            wait_s = next(waits_s, math.inf)
            if wait_s >= question.left_s() or (code == "overloaded" and not self._waits_when_full):
                return _errors(name, samples, code, message)
            await asyncio.sleep(wait_s)

    async def _state(self, name: str, timeout_s: float) -> ReplicaState:
        """What a replica says of itself. Raises TimeoutError, or what Ray raises."""
        state: ReplicaState = await _answer(self._handles[name].state.remote(), timeout_s)
        self._states[name] = state
        self._believed_until_s[name] = time.monotonic() + FACTS_TTL_S
        return state

    async def _facts(self, name: str, left_s: float) -> RewardFacts | None:
        """What the cache must know of a reward; None while it cannot be reached."""
        if time.monotonic() >= self._believed_until_s.get(name, -math.inf):
            if name in self._states:  # one caller looks, the others go on with what is known
                self._believed_until_s[name] = time.monotonic() + FACTS_RETRY_S
            try:
                await self._state(name, min(left_s, READY_TIMEOUT_S))
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("reward %r cannot be asked for its version (%s)", name, type(error).__name__)
                self._believed_until_s[name] = time.monotonic() + FACTS_RETRY_S
        state = self._states.get(name)
        return None if state is None else _facts_of(state.info)

    async def _info(self, name: str) -> RewardInfo:
        try:
            return (await self._state(name, READY_TIMEOUT_S)).info
        except (RayError, RayServeException, TimeoutError):
            if name not in self._states:
                raise
            return self._states[name].info

    async def _problem(self, name: str) -> str:
        try:
            return (await self._state(name, READY_TIMEOUT_S)).problem
        except (TimeoutError, BackPressureError):
            known = self._states.get(name)
            if known is not None and time.monotonic() - self._valued_s.get(name, -math.inf) < BUSY_S:
                return known.problem
            return f"no answer within {READY_TIMEOUT_S:g} s"
        except (RayError, RayServeException):
            return "no replica answers"


async def _hashed(samples: Sequence[RewardSample]) -> Keys:
    """Keys of the samples; large pictures are hashed in a thread, so that other requests go on."""
    return await asyncio.to_thread(Keys, samples) if _num_bytes(samples) > _HASH_IN_THREAD_BYTES else Keys(samples)


def _num_bytes(samples: Sequence[RewardSample]) -> int:
    """Of pictures and texts."""
    images = (image for sample in samples for image in (sample.image_HWC, *sample.more_images_HWC) if image is not None)
    return sum(image.nbytes for image in images) + sum(len(sample.text or "") for sample in samples)


def _kind(config: RewardConfig) -> str:
    """The reward's type and settings. A version tells what rule and model score, not what a remote reward is asked."""
    return config.model_dump_json(exclude={"name", "weight", "required", "only_eval"})


def _facts_of(info: RewardInfo) -> RewardFacts:
    return RewardFacts(
        name=info.name,
        version=info.version,
        fingerprint=info.model_fingerprint,
        deterministic=info.deterministic,
        uses_seed=info.uses_seed,
        metadata_keys=tuple(sorted(info.metadata_keys)),
        compares=info.scores_groups,
    )


async def _answer(response: Any, timeout_s: float) -> Any:
    """A handle call's result. A call that is given up, for whatever reason, is cancelled in the replica too."""
    try:
        return await asyncio.wait_for(response, timeout_s)
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()
        raise


def _errors(
    name: str, samples: Sequence[RewardSample], code: FailureCode, message: str, retryable: bool = True
) -> list[RewardScore]:
    failure = RewardFailure(code, message, retryable)
    return [RewardScore(name=name, value=None, error=failure) for _ in samples]
