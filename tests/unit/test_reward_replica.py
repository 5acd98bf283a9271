"""A reward's replica without Serve: batches that cannot harm each other, parameters, groups, probes and canaries."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards import JpegConfig
from rewards.base import Canary, Params, Reward, failure, success
from rewards.jpeg import JpegReward
from services.reward_config import ServingConfig
from services.reward_replica import MAX_ADJUSTED, MAX_FAILED_PROBES, Call, RewardReplica, canonical_params


class LengthParams(Params):
    scale: float = 1.0


@dataclass
class Seen:
    """What happened to a LengthReward and to those made from it."""

    lists: list[list[str]]
    running: int = 0
    most_running: int = 0
    adjusted: int = 0
    gate: asyncio.Event | None = None


class LengthReward(JpegReward):
    """The length of a text times `scale`; "boom" raises and "" fails."""

    params_model = LengthParams

    def __init__(self, scale: float = 1.0, seen: Seen | None = None) -> None:
        super().__init__(JpegConfig())
        self.scale = scale
        self.seen = seen or Seen([])

    def probe(self) -> Any:
        return _sample("probe")

    def with_params(self, params: LengthParams) -> Reward:
        if params.scale == 0:
            raise ConfigError("scale must not be 0")
        self.seen.adjusted += 1
        return type(self)(params.scale, self.seen)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        self.seen.lists.append([sample.text or "" for sample in samples])
        self.seen.running += 1
        self.seen.most_running = max(self.seen.most_running, self.seen.running)
        try:
            await (asyncio.sleep(0.001) if self.seen.gate is None else self.seen.gate.wait())
        finally:
            self.seen.running -= 1
        if any(sample.text == "boom" for sample in samples):
            raise ValueError("secret detail")
        return [
            success(self, len(sample.text) * self.scale) if sample.text else failure(self, "invalid_input", "empty")
            for sample in samples
        ]


class ComparingReward(LengthReward):
    """In a group: the share of the total length."""

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        scores = await self.score(samples)
        total = sum(score.value or 0.0 for score in scores)
        return [score if score.value is None else success(self, score.value / total) for score in scores]


class FooledReward(LengthReward):
    """With canaries: texts that should score at most 3."""

    def canaries(self) -> list[Canary]:
        return [Canary(text, _sample(text), 3.0) for text in ("ok", "fine", "fooled")]


class DumbReward(FooledReward):
    """Its engine answers only from the third time on."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        if len(self.seen.lists) < 3:
            self.seen.lists.append([])
            return [failure(self, "model_error", "away") for _ in samples]
        return await super().score(samples)


def _sample(text: str) -> RewardSample:
    return RewardSample(text, Prompt("p", "x"), text=text)


def _call(*texts: str, group: bool = False, **params: Any) -> Call:
    return Call([_sample(text) for text in texts], canonical_params(params), group)


def _replica(reward: Reward, **serving: float) -> RewardReplica:
    return RewardReplica(JpegConfig(), parse_config(ServingConfig, serving, "test"), reward)


def _values(replica: RewardReplica, *calls: Call) -> list[list[float | None]]:
    answers = asyncio.run(replica.score_calls(list(calls)))
    return [[score.value for score in scores] for scores in answers]


def test_calls_are_scored_as_one_list_and_cut_back() -> None:
    reward = LengthReward()
    assert _values(_replica(reward), _call("a", "bb"), _call(), _call("ccc")) == [[1, 2], [], [3]]
    assert reward.seen.lists == [["a", "bb", "ccc"]]


def test_a_sample_that_raises_costs_itself_alone() -> None:
    assert _values(_replica(LengthReward()), _call("a", "boom"), _call("ccc", "")) == [[1, None], [3, None]]


def test_calls_are_scored_together_by_their_parameters() -> None:
    reward = LengthReward()
    replica = _replica(reward)
    calls = [_call("a", scale=2.0), _call("bb"), _call("cc", scale=2.0), _call("dd", scale=3)]
    assert _values(replica, *calls) == [[2], [2], [4], [6]]
    assert sorted(map(sorted, reward.seen.lists)) == [["a", "cc"], ["bb"], ["dd"]]
    assert _values(replica, calls[0]) == [[2]]
    assert reward.seen.adjusted == 2


def test_adjusted_rewards_are_kept_in_bounds() -> None:
    reward = LengthReward()
    replica = _replica(reward)
    _values(replica, *(_call("a", scale=scale) for scale in range(1, MAX_ADJUSTED + 2)))
    _values(replica, _call("a", scale=MAX_ADJUSTED + 1))
    assert reward.seen.adjusted == MAX_ADJUSTED + 1
    _values(replica, _call("a", scale=1))
    assert reward.seen.adjusted == MAX_ADJUSTED + 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale": "much"}, "params of reward 'jpeg': scale: Input should be a valid number"),
        ({"scal": 1}, "params of reward 'jpeg': scal: Extra inputs are not permitted"),
        ({"scale": 0}, "scale must not be 0"),
    ],
)
def test_bad_parameters_are_bad_input_of_their_call_only(params: dict[str, Any], message: str) -> None:
    bad, good = asyncio.run(_replica(LengthReward()).score_calls([_call("a", "b", **params), _call("a")]))
    assert [score.error.code for score in bad if score.error] == ["invalid_input"] * 2
    assert bad[0].error is not None
    assert message in bad[0].error.message
    assert [score.value for score in good] == [1]


def test_a_reward_without_parameters_takes_none() -> None:
    ((score,),) = asyncio.run(_replica(JpegReward(JpegConfig())).score_calls([_call("a", quality=3)]))
    assert score.error is not None
    assert "takes no params" in score.error.message


def test_groups_are_compared_one_by_one_or_scored_point_by_point() -> None:
    group = _call("a", "bbb", group=True)
    assert _values(_replica(ComparingReward()), group, group, _call("a", "bbb")) == [[0.25, 0.75]] * 2 + [[1, 3]]
    assert _values(_replica(LengthReward()), group) == [[1, 3]]
    assert _values(_replica(ComparingReward()), _call("a", "boom", group=True), group) == [[None] * 2, [0.25, 0.75]]


@pytest.mark.parametrize("turns", [1, 3])
def test_a_reward_scores_as_much_at_once_as_it_may(turns: int) -> None:
    reward = ComparingReward()
    groups = [_call("a", "b", group=True) for _ in range(5)]
    _values(_replica(reward, max_concurrent_batches=turns), *groups)
    assert reward.seen.most_running == turns


async def _checks(replica: RewardReplica, count: int) -> None:
    """Health checks, each with time for what it starts."""
    for _ in range(count):
        await replica.check_health()
        await asyncio.sleep(0.03)


def test_an_idle_replica_is_probed_and_a_busy_one_is_not() -> None:
    async def main() -> list[list[str]]:
        reward = LengthReward()
        replica = _replica(reward, probe_period_s=0.1)
        await _checks(replica, 2)
        for _ in range(6):
            await replica.score_calls([_call("work")])
            await _checks(replica, 1)
        return reward.seen.lists

    assert asyncio.run(main()) == [["probe"], *[["work"]] * 6]


def test_a_reward_that_fails_its_probes_in_a_row_is_unhealthy() -> None:
    class Broken(LengthReward):
        def probe(self) -> RewardSample:
            return _sample("boom")

    async def main() -> None:
        replica = _replica(Broken(), probe_period_s=0.001)
        await _checks(replica, MAX_FAILED_PROBES - 1)
        await replica.score_calls([_call("work")])  # a value shows that it works
        await asyncio.sleep(0.01)
        await _checks(replica, MAX_FAILED_PROBES)
        with pytest.raises(RuntimeError, match="failed 3 probes in a row"):
            await replica.check_health()

    asyncio.run(main())


def test_a_probe_that_hangs_is_unhealthy_but_not_one_that_waits_for_its_turn() -> None:
    async def main() -> None:
        reward = LengthReward()
        reward.seen.gate = asyncio.Event()
        replica = _replica(reward, timeout_s=0.05)
        long = asyncio.create_task(replica.score_calls([_call("long")]))
        await asyncio.sleep(0.01)
        await _checks(replica, 4)  # the engine is at work on the call, the probe waits
        assert reward.seen.lists == [["long"]]
        first, reward.seen.gate = reward.seen.gate, asyncio.Event()
        first.set()
        await long
        await asyncio.sleep(0.01)
        assert reward.seen.lists == [["long"], ["probe"]]
        await asyncio.sleep(0.06)
        with pytest.raises(RuntimeError, match="has not scored its probe"):
            await replica.check_health()
        reward.seen.gate.set()

    asyncio.run(main())


def test_a_call_that_waits_for_ever_makes_the_replica_unhealthy() -> None:
    async def main() -> None:
        replica = _replica(LengthReward(), timeout_s=0.01)
        await replica.check_health()
        # Serve's batch queue needs a replica's context to run; the call stands for one that it lost.
        replica._queued[0] = asyncio.get_running_loop().time() - 1.0
        with pytest.raises(RuntimeError, match="a call has waited"):
            await replica.check_health()

    asyncio.run(main())


def test_a_canary_that_scores_is_a_problem_and_the_reward_still_serves() -> None:
    async def main() -> None:
        reward = FooledReward()
        replica = _replica(reward, probe_period_s=0.001)
        assert replica.state().problem == "its canaries have not been scored yet"
        await _checks(replica, 3)
        assert replica.state().problem == "canary 'fine' scored 4, limit 3; canary 'fooled' scored 6, limit 3"
        assert reward.seen.lists.count(["ok", "fine", "fooled"]) == 1
        assert (await replica.score_calls([_call("abc")]))[0][0].value == 3

    asyncio.run(main())


def test_canaries_without_a_value_are_scored_again() -> None:
    async def main() -> None:
        replica = _replica(DumbReward(), probe_period_s=0.001)
        await _checks(replica, 1)
        assert "canary 'ok' could not be scored" in replica.state().problem
        await _checks(replica, 2)
        assert "canary 'ok'" not in replica.state().problem
        assert "canary 'fine' scored 4" in replica.state().problem

    asyncio.run(main())


def test_a_reward_without_canaries_is_ready() -> None:
    state = _replica(LengthReward()).state()
    assert (state.problem, state.info.name) == ("", "jpeg")
