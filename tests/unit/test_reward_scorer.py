"""Scoring by handle, with fake handles: every way a call can end becomes scores, and numbers only when answered."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raylign.errors import ClusterError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards import JpegConfig
from services.reward_app import HandleScorer, RewardReplica, RewardService
from services.reward_config import ServiceConfig

SAMPLES = [RewardSample(f"s{i}", Prompt("p", "x")) for i in range(2)]
Outcome = Exception | float | None


class FakeResponse:
    """Ends as told: a value for every sample, an exception, or (None) never."""

    def __init__(self, name: str, outcome: Outcome, num_samples: int) -> None:
        self.name, self.outcome, self.num_samples = name, outcome, num_samples
        self.cancelled = False

    def __await__(self):
        return self._result().__await__()

    async def _result(self) -> list[RewardScore]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.outcome is None:
            await asyncio.sleep(60)
        return [RewardScore(self.name, self.outcome)] * self.num_samples

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """A handle whose calls play outcomes, the last one for ever."""

    def __init__(self, name: str, *outcomes: Outcome) -> None:
        self.name, self.outcomes = name, list(outcomes)
        self.responses: list[FakeResponse] = []
        self.score = self.describe = self

    def remote(self, samples: list[RewardSample] | None = None) -> FakeResponse:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        self.responses.append(FakeResponse(self.name, outcome, len(samples or ())))
        return self.responses[-1]


def _scorer(*handles: FakeHandle, timeout_s: float = 5.0, optional: str = "") -> HandleScorer:
    configs = [JpegConfig(name=handle.name, required=handle.name != optional) for handle in handles]
    by_name = {handle.name: handle for handle in handles}
    return HandleScorer(configs, by_name, timeout_s, retry_waits_s=(0.0, 0.0))  # type: ignore[arg-type]


def test_lost_replicas_are_asked_again() -> None:
    handle = FakeHandle("a", ActorDiedError(), BackPressureError(9, 8), 0.5)
    breakdowns = asyncio.run(_scorer(handle).score(SAMPLES))
    assert [breakdown.total for breakdown in breakdowns] == [0.5, 0.5]
    assert len(handle.responses) == 3


@pytest.mark.parametrize(
    ("outcome", "code", "calls"),
    [
        (ActorDiedError(), "model_error", 3),
        (DeploymentUnavailableError("a"), "model_error", 3),  # type: ignore[arg-type]
        (BackPressureError(9, 8), "overloaded", 3),
        (RayTaskError("score", "secret detail", ValueError("secret detail")), "model_error", 1),
        (None, "timeout", 1),
    ],
)
def test_what_does_not_pass_is_an_error(outcome: Outcome, code: str, calls: int) -> None:
    handle = FakeHandle("a", outcome)
    breakdowns = asyncio.run(_scorer(handle, timeout_s=0.05).score(SAMPLES))
    assert [breakdown.total for breakdown in breakdowns] == [None, None]
    error = breakdowns[0].scores[0].error
    assert error is not None
    assert error.code == code
    assert "secret" not in error.message
    assert len(handle.responses) == calls
    assert handle.responses[-1].cancelled == (outcome is None)


def test_an_optional_reward_may_be_lost() -> None:
    scorer = _scorer(FakeHandle("a", 0.25), FakeHandle("b", ActorDiedError()), optional="b")
    assert [breakdown.total for breakdown in asyncio.run(scorer.score(SAMPLES))] == [0.5, 0.5]


def test_no_samples_make_no_call() -> None:
    handle = FakeHandle("a", 0.25)
    assert asyncio.run(_scorer(handle).score([])) == []
    assert not handle.responses


def test_cancelling_a_score_cancels_its_calls() -> None:
    handle = FakeHandle("a", None)

    async def main() -> None:
        task = asyncio.create_task(_scorer(handle).score(SAMPLES))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert handle.responses[0].cancelled


def test_readiness_is_told_per_reward() -> None:
    scorer = _scorer(FakeHandle("a", 0.5), FakeHandle("b", ActorDiedError()))
    assert asyncio.run(scorer.ready()) == {"a": True, "b": False}


def test_without_a_cluster_there_is_no_service() -> None:
    with pytest.raises(ClusterError, match=r"call ray\.init first"):
        RewardService.start((JpegConfig(),), ServiceConfig())


def test_a_call_that_waits_for_ever_makes_the_replica_unhealthy() -> None:
    replica = RewardReplica(JpegConfig(), ServiceConfig(timeout_s=0.01))
    replica.check_health()

    async def main() -> None:
        # Serve's batch queue needs a replica's context to run; the call stands for one that it lost.
        replica._started[0] = asyncio.get_running_loop().time() - 1.0
        with pytest.raises(RuntimeError, match="waited more than"):
            replica.check_health()

    asyncio.run(main())
