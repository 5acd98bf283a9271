"""Scoring by handle, with fake handles: every way a call can end becomes scores, and numbers only when answered."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raylign.config import parse_config
from raylign.errors import ClusterError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards import JpegConfig, RemoteConfig, make_reward
from rewards.base import RewardAsk
from rewards.wire import RewardInfo, describe
from services.reward_app import RewardService
from services.reward_config import ServiceConfig
from services.reward_replica import Call, ReplicaState
from services.reward_scorer import HandleScorer

SAMPLES = [RewardSample(f"s{i}", Prompt("p", "x")) for i in range(2)]
Outcome = Exception | float | None


INFO = describe(JpegConfig(), make_reward(JpegConfig()))


class FakeResponse:
    """Ends as told: with a result, an exception, or (None) never."""

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome
        self.cancelled = False

    def __await__(self):
        return self._result().__await__()

    async def _result(self) -> object:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.outcome is None:
            await asyncio.sleep(60)
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class _Method:
    def __init__(self, remote: Callable[..., FakeResponse]) -> None:
        self.remote = remote


class FakeHandle:
    """A handle whose calls play outcomes (a value is every sample's), the last one for ever."""

    def __init__(self, name: str, *outcomes: Outcome, info: RewardInfo = INFO, problem: str = "") -> None:
        self.name, self.outcomes = name, list(outcomes)
        self.info = info.model_copy(update={"name": name})
        self.problem = problem
        self.calls: list[Call] = []
        self.transports: list[str] = []
        self.responses: list[FakeResponse] = []
        self.num_states = 0
        self.score, self.state = _Method(self._score), _Method(self._state)

    def options(self, _by_reference: bool) -> "_View":
        return _View("reference" if _by_reference else "value", self)

    def _score(self, call: Call, transport: str = "reference") -> FakeResponse:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        self.calls.append(call)
        self.transports.append(transport)
        if isinstance(outcome, float):
            score = RewardScore(self.name, outcome, version=self.info.version)
            self.responses.append(FakeResponse([score] * len(call.samples)))
        else:
            self.responses.append(FakeResponse(outcome))
        return self.responses[-1]

    def _state(self) -> FakeResponse:
        self.num_states += 1
        lost = self.outcomes[0] if isinstance(self.outcomes[0], ActorDiedError) else None
        return FakeResponse(lost or ReplicaState(self.info, self.problem))


class _View:
    """The same handle with another transport."""

    def __init__(self, transport: str, handle: FakeHandle) -> None:
        self.score = _Method(lambda call: handle._score(call, transport))


def _scorer(*handles: FakeHandle, timeout_s: float = 5.0, cache: str = "none", **options: bool) -> HandleScorer:
    configs = [JpegConfig(name=handle.name) for handle in handles]
    service = parse_config(ServiceConfig, {"timeout_s": timeout_s, "cache": {"type": cache}}, "test")
    by_name: Any = {handle.name: handle for handle in handles}
    return HandleScorer(configs, by_name, service, retry_waits_s=(0.0, 0.0), **options)


def _values(scorer: HandleScorer, *asks: RewardAsk, samples: Sequence[RewardSample] = SAMPLES) -> dict:
    by_name = asyncio.run(scorer.score(samples, asks or [RewardAsk("a")]))
    return {name: [score.value for score in scores] for name, scores in by_name.items()}


def test_lost_replicas_are_asked_again() -> None:
    handle = FakeHandle("a", ActorDiedError(), BackPressureError(9, 8), 0.5)
    assert _values(_scorer(handle)) == {"a": [0.5, 0.5]}
    assert len(handle.responses) == 3


@pytest.mark.parametrize(
    ("outcome", "code", "calls"),
    [
        (ActorDiedError(), "model_error", 3),
        (DeploymentUnavailableError("a"), "model_error", 3),  # type: ignore[arg-type]
        (BackPressureError(9, 8), "overloaded", 3),
        (RayTaskError("score", "secret detail", ValueError("secret detail")), "model_error", 2),
        (None, "timeout", 1),
    ],
)
def test_what_does_not_pass_is_an_error(outcome: Outcome, code: str, calls: int) -> None:
    handle = FakeHandle("a", outcome)
    scores = asyncio.run(_scorer(handle, timeout_s=0.05).score(SAMPLES, [RewardAsk("a")]))["a"]
    assert [score.value for score in scores] == [None, None]
    error = scores[0].error
    assert error is not None
    assert error.code == code
    assert "secret" not in error.message
    assert len(handle.responses) == calls
    assert handle.responses[-1].cancelled == (outcome is None)


def test_who_cannot_wait_is_told_at_once_that_a_queue_is_full() -> None:
    handle = FakeHandle("a", BackPressureError(9, 8))
    assert _values(_scorer(handle, waits_when_full=False)) == {"a": [None, None]}
    assert len(handle.responses) == 1


def test_a_deadline_costs_the_late_reward_only() -> None:
    late, quick = FakeHandle("late", None), FakeHandle("quick", 0.25)
    asks = [RewardAsk("late"), RewardAsk("quick")]
    began = time.perf_counter()
    by_name = asyncio.run(_scorer(late, quick).score(SAMPLES, asks, deadline_s=0.05))
    assert time.perf_counter() - began < 2
    assert [score.value for score in by_name["quick"]] == [0.25, 0.25]
    assert [score.error.code for score in by_name["late"] if score.error is not None] == ["timeout", "timeout"]
    assert late.responses[0].cancelled


def test_long_calls_and_answers_travel_by_reference() -> None:
    handle = FakeHandle("a", OverflowError("the answer is too long"), 0.5)
    assert _values(_scorer(handle)) == {"a": [0.5, 0.5]}
    assert handle.transports == ["value", "reference"]
    large = RewardSample("s", Prompt("p", "x"), np.zeros((1024, 1024, 3), np.uint8))
    assert _values(_scorer(handle), samples=[large]) == {"a": [0.5]}
    assert handle.transports[2:] == ["reference"]


def test_params_travel_as_canonical_json() -> None:
    handle = FakeHandle("a", 0.5)
    _values(_scorer(handle), RewardAsk("a", params={"b": 1, "a": [True]}))
    assert [call.params for call in handle.calls] == ['{"a":[true],"b":1}']


def test_what_is_remembered_is_not_asked_again() -> None:
    handle = FakeHandle("a", 0.5, 0.75)
    scorer = _scorer(handle, cache="memory")

    async def main() -> list[tuple[float | None, str]]:
        more = [*SAMPLES, RewardSample("s9", Prompt("p", "y"))]
        rounds = [await scorer.score(samples, [RewardAsk("a")]) for samples in (SAMPLES, more)]
        return [(score.value, score.cache) for by_name in rounds for score in by_name["a"]]

    # The first two samples differ in their id alone, so they are one question.
    assert asyncio.run(main()) == [(0.5, "miss"), (0.5, "hit"), (0.5, "hit"), (0.5, "hit"), (0.75, "miss")]
    assert [len(call.samples) for call in handle.calls] == [1, 1]
    assert handle.num_states == 1


def test_rewards_share_answers_only_if_they_are_set_alike() -> None:
    there = [
        RemoteConfig(name="short", url="http://scorers", reward="length", params={"limit": 10}),
        RemoteConfig(name="long", url="http://scorers", reward="length", params={"limit": 99}),
        RemoteConfig(name="again", weight=2.0, url="http://scorers", reward="length", params={"limit": 10}),
    ]
    handles: Any = {
        "short": FakeHandle("short", 0.1),
        "long": FakeHandle("long", 0.9),
        "again": FakeHandle("again", 0.5),
    }
    scorer = HandleScorer(there, handles, ServiceConfig())

    async def main() -> list[tuple[float | None, str]]:
        answers = [await scorer.score(SAMPLES[:1], [RewardAsk(config.name)]) for config in there]
        return [(score.value, score.cache) for by_name in answers for scores in by_name.values() for score in scores]

    # All three have the version that the service there tells.
    assert asyncio.run(main()) == [(0.1, "miss"), (0.9, "miss"), (0.1, "hit")]


def test_a_group_is_remembered_whole_if_its_candidates_are_compared() -> None:
    compares = FakeHandle("a", 0.5, info=INFO.model_copy(update={"scores_groups": True}))
    single = FakeHandle("b", 0.25)
    scorer = _scorer(compares, single, cache="memory")
    group = [RewardSample(f"s{i}", Prompt("p", f"{i}")) for i in range(3)]

    async def main() -> list[list[str]]:
        by_name = [
            await scorer.score_group(part, [RewardAsk("a"), RewardAsk("b")]) for part in (group, group, group[:2])
        ]
        return [[score.cache for score in scores] for answer in by_name for scores in answer.values()]

    miss, hit = ["miss"] * 3, ["hit"] * 3
    assert asyncio.run(main()) == [miss, miss, hit, hit, miss[:2], hit[:2]]
    assert [(len(call.samples), call.group) for call in compares.calls] == [(3, True), (2, True)]


def test_draws_are_not_remembered() -> None:
    handle = FakeHandle("a", 0.5, info=INFO.model_copy(update={"deterministic": False}))
    scorer = _scorer(handle, cache="memory")

    async def main() -> list[str]:
        rounds = [await scorer.score(SAMPLES, [RewardAsk("a")]) for _ in range(2)]
        return [score.cache for by_name in rounds for score in by_name["a"]]

    assert asyncio.run(main()) == ["bypass"] * 4
    assert [len(call.samples) for call in handle.calls] == [2, 2]


def test_a_new_version_is_noticed() -> None:
    handle = FakeHandle("a", 0.5)
    scorer = _scorer(handle, cache="memory")

    async def main() -> list[str]:
        caches: list[str] = []
        for text in ("x", "y", "x"):
            by_name = await scorer.score([RewardSample("s", Prompt("p", text))], [RewardAsk("a")])
            caches.append(by_name["a"][0].cache)
            handle.info = handle.info.model_copy(update={"version": "2"})
        return caches

    # The second score is by version 2, which the key did not know; the third is asked for under version 2.
    assert asyncio.run(main()) == ["miss", "bypass", "miss"]


def test_no_samples_make_no_call() -> None:
    handle = FakeHandle("a", 0.25)
    assert _values(_scorer(handle), samples=[]) == {"a": []}
    assert not handle.responses


def test_cancelling_a_score_cancels_its_calls() -> None:
    handle = FakeHandle("a", None)

    async def main() -> None:
        task = asyncio.create_task(_scorer(handle).score(SAMPLES, [RewardAsk("a")]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert handle.responses[0].cancelled


def test_readiness_is_told_per_reward() -> None:
    scorer = _scorer(FakeHandle("a", 0.5), FakeHandle("b", ActorDiedError()), FakeHandle("c", 0.5, problem="canary"))
    assert asyncio.run(scorer.ready()) == {"a": "", "b": "no replica answers", "c": "canary"}


def test_what_is_known_of_a_reward_outlives_its_replica() -> None:
    handle = FakeHandle("a", 0.5)
    scorer = _scorer(handle)
    assert [info.name for info in asyncio.run(scorer.describe())] == ["a"]
    handle.outcomes[0] = ActorDiedError()
    assert [info.name for info in asyncio.run(scorer.describe())] == ["a"]
    with pytest.raises(ActorDiedError):
        asyncio.run(_scorer(handle).describe())


def test_without_a_cluster_there_is_no_service() -> None:
    with pytest.raises(ClusterError, match=r"call ray\.init first"):
        RewardService.start((JpegConfig(),), ServiceConfig())
