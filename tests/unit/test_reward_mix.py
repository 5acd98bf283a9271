"""The mix, by hand: weights, failures, and what survives a misbehaving reward."""

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest

from raylign.errors import ConfigError, PromptError
from raylign.types import Prompt, RewardFailure, RewardSample, RewardScore
from rewards import JpegConfig, RewardMix, check_names, make_mix, mix
from rewards.base import Modality, score_totally, success
from rewards.grouping import score_group_totally
from rewards.mix import affine, group_normalised, weighted_sums

FAILED = RewardFailure("model_error", "broken")


def _scores(name: str, *values: float | None) -> list[RewardScore]:
    return [RewardScore(name, value, FAILED if value is None else None) for value in values]


def _config(name: str, weight: float = 1.0, required: bool = True) -> JpegConfig:
    return JpegConfig(name=name, weight=weight, required=required)


def _samples(*names: str) -> list[RewardSample]:
    return [RewardSample(name, Prompt("p", "a sign")) for name in names]


def test_the_total_is_the_weighted_sum() -> None:
    first, second = mix(
        {"a": _scores("a", 1.0, 0.5), "b": _scores("b", 2.0, -4.0)}, [_config("a", 2.0), _config("b", 0.25)]
    )
    assert (first.total, second.total) == (2.5, 0.0)
    assert [score.name for score in first.scores] == ["a", "b"]


def test_a_failed_required_reward_leaves_no_total() -> None:
    (breakdown,) = mix({"a": _scores("a", None), "b": _scores("b", 2.0)}, [_config("a"), _config("b", required=False)])
    assert breakdown.total is None
    assert breakdown.scores[1].value == 2.0


def test_a_failed_optional_reward_hands_its_weight_on() -> None:
    configs = [_config("a", 3.0), _config("b", 1.0, required=False)]
    full, partial = mix({"a": _scores("a", 0.5, 0.5), "b": _scores("b", 0.5, None)}, configs)
    # Equal values give equal totals, with or without the failure: 4/3 of 3 x 0.5.
    assert full.total == partial.total == pytest.approx(2.0)


def test_a_negative_weight_counts_by_its_size() -> None:
    configs = [_config("a", 1.0), _config("b", -1.0, required=False)]
    (breakdown,) = mix({"a": _scores("a", 0.5), "b": _scores("b", None)}, configs)
    assert breakdown.total == pytest.approx(1.0)


def test_nothing_left_is_no_total() -> None:
    configs = [_config("a", 0.0), _config("b", 1.0, required=False)]
    (breakdown,) = mix({"a": _scores("a", 0.5), "b": _scores("b", None)}, configs)
    assert breakdown.total is None


def test_an_overflow_is_no_total() -> None:
    (breakdown,) = mix({"a": _scores("a", 1e300)}, [_config("a", 1e300)])
    assert breakdown.total is None


def test_lists_of_different_lengths_are_a_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mix({"a": _scores("a", 1.0, 1.0), "b": _scores("b", 1.0)}, [_config("a"), _config("b")])


def test_names_must_be_there_once() -> None:
    with pytest.raises(ConfigError, match=r"a occur more than once"):
        check_names([_config("a"), _config("b"), _config("a")])
    with pytest.raises(ConfigError, match="no reward"):
        check_names([])


class Fussy:
    """Raises for samples named "bad", and for any list that holds one; optionally answers too few."""

    name = "fussy"
    version = "1"
    modality: Modality = "text"
    range = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {}

    def __init__(self, short: bool = False) -> None:
        self.short = short

    def load(self) -> None: ...

    def probe(self) -> None: ...

    def check(self, prompt: Prompt) -> None:
        raise PromptError(f"prompt {prompt.id!r} is not to my taste")

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        if any(sample.id == "bad" for sample in samples):
            raise RuntimeError("secret detail")
        return [success(self, float(len(sample.id))) for sample in samples][self.short :]


def test_a_reward_that_raises_costs_only_the_sample_that_makes_it(caplog: pytest.LogCaptureFixture) -> None:
    scores = asyncio.run(score_totally(Fussy(), _samples("a", "bad", "ccc")))
    assert [score.value for score in scores] == [1.0, None, 3.0]
    error = scores[1].error
    assert error is not None
    assert error.code == "model_error"
    assert "secret" not in error.message
    assert "secret detail" in caplog.text
    log_id = error.message.split()[-1]
    assert log_id in caplog.text


def test_an_answer_of_the_wrong_length_is_an_error() -> None:
    scores = asyncio.run(score_totally(Fussy(short=True), _samples("a", "b")))
    assert [score.error and score.error.code for score in scores] == ["model_error", "model_error"]


def test_no_samples_ask_nobody() -> None:
    assert asyncio.run(score_totally(Fussy(short=True), [])) == []


def test_the_mix_scores_in_process_and_can_be_restricted() -> None:
    rewards = RewardMix([(_config("fussy", 2.0), Fussy()), (_config("size", required=False), Fussy())])
    both = asyncio.run(rewards.score(_samples("a", "bad", "ccc")))
    assert [breakdown.total for breakdown in both] == [3.0, None, 9.0]
    one = asyncio.run(rewards.score(_samples("ccc"), only=["fussy"]))
    assert [(breakdown.total, len(breakdown.scores)) for breakdown in one] == [(6.0, 1)]


def test_prompts_are_checked_by_required_rewards_only() -> None:
    RewardMix([(_config("fussy", required=False), Fussy())]).check(Prompt("p1", "x"))
    with pytest.raises(PromptError, match="'p1' is not to my taste"):
        RewardMix([(_config("fussy"), Fussy())]).check(Prompt("p1", "x"))


def test_a_configuration_names_itself_after_its_type() -> None:
    assert JpegConfig().name == "jpeg"
    assert make_mix([JpegConfig(), JpegConfig(name="large", direction="incompress")]).rewards[1][1].name == "large"
    with pytest.raises(ValueError, match="pattern"):
        JpegConfig(name="a/b")


def test_a_missing_optional_value_is_flagged() -> None:
    asks = [_config("a", 3.0), _config("b", 1.0, required=False)]
    totals = weighted_sums({"a": [0.5, 0.5, None], "b": [0.5, None, 1.0]}, asks)
    assert [(total.value, total.renormalised) for total in totals] == [(2.0, False), (2.0, True), (None, False)]


def test_the_breakdown_knows_its_weights() -> None:
    (breakdown,) = mix({"a": _scores("a", 1.0), "b": _scores("b", 1.0)}, [_config("a", 2.0), _config("b", -1.0)])
    assert breakdown.weights == (2.0, -1.0)


def test_affine_puts_the_better_end_on_one() -> None:
    # [-2, 6]: 0 is a quarter of the way up; with lower better, -2 is best and 0 is three quarters.
    assert affine([-2.0, 0.0, 6.0, None], (-2.0, 6.0), True) == [0.0, 0.25, 1.0, None]
    assert affine([-2.0, 0.0, 6.0, None], (-2.0, 6.0), False) == [1.0, 0.75, 0.0, None]


def test_each_reward_is_normalised_in_its_own_group() -> None:
    # Group g: a = 0, 2 has mean 1 and population std 1, so ±1/(1 + 1e-4); b = 5, 5 says nothing.
    # Group h: a = 0, 30, 30 has mean 20, squares 400 + 100 + 100 over 3 = 200, std sqrt(200).
    values = {"a": [0.0, 0.0, 2.0, 30.0, 30.0], "b": [5.0, 1.0, 5.0, 1.0, 1.0]}
    normalised = group_normalised(values, [_config("a"), _config("b")], ["g", "h", "g", "h", "h"])
    one, std = 1 / 1.0001, math.sqrt(200) + 1e-4
    assert normalised["a"] == pytest.approx([-one, -20 / std, one, 10 / std, 10 / std], rel=1e-12)
    assert normalised["b"] == [0.0] * 5
    assert sum(value or 0.0 for value in normalised["a"]) == pytest.approx(0.0, abs=1e-12)


def test_failed_samples_enter_no_group_mean() -> None:
    asks = [_config("a"), _config("b", required=False)]
    values = {"a": [0.0, None, 2.0, 1e6], "b": [1.0, 7.0, None, 3.0]}
    normalised = group_normalised(values, asks, ["g", "g", "g", "other"])
    one = pytest.approx(1 / 1.0001, rel=1e-12)
    # Sample 1 has no required value, so its b counts nowhere; sample 2 lacks b, so b's group is sample 0 alone.
    assert normalised == {"a": [-one.expected, None, one, 0.0], "b": [0.0, None, None, 0.0]}


def test_huge_values_are_normalised_like_others() -> None:
    small = group_normalised({"a": [-2.0, 2.0]}, [_config("a")], ["g", "g"])["a"]
    huge = group_normalised({"a": [-1e308, 1e308]}, [_config("a")], ["g", "g"])["a"]
    assert small == pytest.approx([-2 / 2.0001, 2 / 2.0001])
    assert huge == [-1.0, 1.0]


class Ranker(Fussy):
    """Compares: each candidate is worth its place among the group's ids, 0 the least."""

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        order = sorted(sample.id for sample in samples)
        return [success(self, float(order.index(sample.id))) for sample in samples]


def test_a_reward_that_compares_sees_each_group_by_itself() -> None:
    samples = [
        RewardSample(name, Prompt(group, "x"), text="x", group_id=group)
        for name, group in [("b", "one"), ("z", "two"), ("a", "one"), ("y", "two"), ("c", "one")]
    ]
    rewards = RewardMix([(_config("fussy"), Ranker()), (_config("length", 10.0), Fussy())])
    scored = asyncio.run(rewards.score(samples))
    assert [breakdown.total for breakdown in scored] == [11.0, 11.0, 10.0, 10.0, 12.0]


def test_a_comparison_that_raises_is_an_error_for_each_candidate(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Fussy):
        async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
            raise RuntimeError("secret detail")

    scores = asyncio.run(score_group_totally(Broken(), _samples("a", "b")))
    assert [score.error and score.error.code for score in scores] == ["model_error"] * 2
    assert "secret detail" in caplog.text
    assert "secret" not in str(scores)
