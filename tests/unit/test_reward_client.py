"""The client against scripted answers: what it repeats, how long it waits, and what it gives up on."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylign.errors import ConfigError, RewardError
from raylign.types import Prompt, RewardBreakdown, RewardFailure, RewardSample, RewardScore
from rewards import RemoteConfig, RemoteReward
from rewards.remote import OnFailure, RewardClient, settle
from rewards.remote_encode import body_of, split
from rewards.wire import (
    Component,
    ErrorBody,
    RewardChoice,
    SampleResult,
    ScoreRequest,
    ScoreResponse,
    ServiceInfo,
    WireError,
)
from services.reward_api.body import split_multipart
from tests.reward_cases.local_http import LengthConfig, LengthReward, LocalBackend, app_of

SAMPLES = [RewardSample(f"s{i}", Prompt("p", "a sign"), np.zeros((4, 4, 3), np.uint8)) for i in range(3)]


def _ok(request: httpx2.Request, value: float = 0.5, reverse: bool = False) -> httpx2.Response:
    wire = ScoreRequest.model_validate_json(request.content)
    component = Component(raw=value, value=value, weight=1.0, required=True, status="ok")
    results = [SampleResult(id=s.id, status="ok", reward=value, components={"x": component}) for s in wire.samples]
    answer = ScoreResponse(
        request_id=wire.request_id,
        service=ServiceInfo(version="1"),
        results=tuple(results[::-1] if reverse else results),
        counts={"ok": len(results)},
    )
    return httpx2.Response(200, text=answer.model_dump_json())


class Script:
    """Plays one answer after the other, then repeats the last; records requests and waits."""

    def __init__(self, *answers: int | Exception | Callable[[httpx2.Request], httpx2.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[ScoreRequest] = []
        self.waits: list[float] = []
        self.headers = httpx2.Headers()

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(ScoreRequest.model_validate_json(request.content))
        self.headers = request.headers
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx2.Response(answer, text="why", headers={"Retry-After": "7"} if answer == 429 else {})
        return answer(request)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def score(self, **options) -> list[RewardBreakdown]:
        async def main() -> list[RewardBreakdown]:
            transport = httpx2.MockTransport(self)
            async with RewardClient(
                "http://test", form="json", transport=transport, sleep=self.sleep, **options
            ) as client:
                return await client.score(SAMPLES)

        return asyncio.run(main())


def _only_failure(breakdowns: list[RewardBreakdown]) -> tuple[str, str, bool]:
    assert [breakdown.total for breakdown in breakdowns] == [None] * 3
    failures = {breakdown.failure for breakdown in breakdowns}
    (failure,) = failures
    assert failure is not None
    return failure.code, failure.message, failure.retryable


@pytest.mark.parametrize("trouble", [408, 429, 500, 503, httpx2.ConnectError("refused"), httpx2.ReadTimeout("slow")])
def test_what_may_pass_is_tried_again_under_the_same_id(trouble) -> None:
    script = Script(trouble, trouble, _ok)
    assert [breakdown.total for breakdown in script.score()] == [0.5] * 3
    assert len({request.request_id for request in script.requests}) == 1
    assert len(script.waits) == 2
    assert script.waits[0] <= 0.25 or trouble == 429


def test_retry_after_is_obeyed() -> None:
    script = Script(429, _ok)
    script.score()
    assert 7.0 <= script.waits[0] <= 7.25


def test_those_who_are_told_to_come_back_do_not_come_back_at_once() -> None:
    scripts = [Script(429, _ok) for _ in range(8)]
    for script in scripts:
        script.score()
    assert len({wait for script in scripts for wait in script.waits}) > 1


@pytest.mark.parametrize("answer", [{"Content-Encoding": "gzip"}, {"Retry-After": "\u00b2".encode("latin-1")}])
def test_answers_that_cannot_be_read_are_errors(answer: dict) -> None:
    def broken(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(503, stream=httpx2.ByteStream(b"no gzip"), headers=answer)

    script = Script(broken, _ok)
    assert [breakdown.total for breakdown in script.score()] == [0.5] * 3
    assert len(script.requests) == 2


@pytest.mark.parametrize(
    ("status", "code"), [(400, "invalid_input"), (401, "model_error"), (413, "invalid_input"), (422, "invalid_input")]
)
def test_what_cannot_pass_is_not_tried_again(status: int, code: str) -> None:
    script = Script(status)
    got, message, retryable = _only_failure(script.score())
    assert (got, retryable, len(script.requests)) == (code, False, 1)
    assert str(status) in message
    assert "why" in message


def test_a_refusal_is_told_in_the_services_words() -> None:
    error = WireError(code="internal", message="the service failed")
    body = ErrorBody(error=error, log_id="c0ffee").model_dump_json()
    _, message, _ = _only_failure(Script(lambda _: httpx2.Response(422, text=body)).score())
    assert message == "the reward service answered 422: the service failed (log id c0ffee)"


@pytest.mark.parametrize(
    ("trouble", "code"), [(503, "overloaded"), (500, "model_error"), (httpx2.ReadTimeout("slow"), "timeout")]
)
def test_attempts_are_bounded_and_end_in_errors(trouble, code: str) -> None:
    script = Script(trouble)
    got, _, retryable = _only_failure(script.score(max_attempts=3))
    assert (got, retryable, len(script.requests), len(script.waits)) == (code, True, 3, 2)


def test_an_answer_that_is_none_is_an_error() -> None:
    code, message, _ = _only_failure(Script(lambda _: httpx2.Response(200, text='{"results": [0.0]}')).score())
    assert code == "model_error"
    assert "breaks the schema" in message
    code, message, _ = _only_failure(Script(lambda request: _ok(request, reverse=True)).score())
    assert "other samples" in message


def test_batches_are_cut_and_joined_in_order() -> None:
    script = Script(_ok)
    assert len(script.score(max_samples=2)) == 3
    assert sorted(len(request.samples) for request in script.requests) == [1, 2]


def test_the_token_is_sent() -> None:
    script = Script(_ok)
    script.score(token="s3cret")
    assert script.headers["Authorization"] == "Bearer s3cret"


def test_a_component_is_a_value_or_an_error() -> None:
    error = WireError(code="timeout", message="late")
    for value, failure in ((None, None), (0.5, error)):
        with pytest.raises(ValueError, match="either a value or an error"):
            Component(raw=value, value=value, weight=1.0, required=True, status="ok", error=failure)


LENGTH = (LengthConfig(name="length"),)


def _through(use, configs=LENGTH, **options):
    """What `use` makes of a client of the real application."""

    async def main():
        transport = httpx2.ASGITransport(app_of(LocalBackend(configs)))
        async with RewardClient("http://test", transport=transport, **options) as client:
            return await use(client)

    return asyncio.run(main())


def _texts(*answers: str) -> list[RewardSample]:
    return [RewardSample(f"s{i}", Prompt("p", "say"), text=text) for i, text in enumerate(answers)]


@pytest.mark.parametrize("form", ["multipart", "json"])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_pictures_arrive_bit_for_bit(form, image_format) -> None:
    backend = LocalBackend()
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    samples = [RewardSample("a", Prompt("p", "x"), images[0], more_images_HWC=(images[1],), seed=3, group_id="g")]

    async def main():
        transport = httpx2.ASGITransport(app_of(backend))
        async with RewardClient("http://t", None, form, image_format=image_format, transport=transport) as client:
            await client.score(samples)

    asyncio.run(main())
    ((seen,),) = backend.calls
    np.testing.assert_array_equal(seen.image_HWC, images[0])
    np.testing.assert_array_equal(seen.more_images_HWC[0], images[1])
    assert (seen.seed, seen.group_id) == (3, "g")


def test_a_choice_carries_weight_and_parameters() -> None:
    choice = RewardChoice(name="length", weight=0.5, params={"scale": 3.0})
    (breakdown,) = _through(lambda client: client.score(_texts("ab"), only=[choice]))
    assert (breakdown.total, breakdown.weights, breakdown.scores[0].value) == (3.0, (0.5,), 6.0)
    (breakdown,) = _through(lambda client: client.score(_texts("ab"), normalise="affine"))
    assert (breakdown.total, breakdown.scores[0].value) == (0.2, 2.0)


def test_a_group_is_one_request_with_a_ranking() -> None:
    answer = _through(lambda client: client.score_group(_texts("a", "abc", "ab"), only=["length"]), max_samples=1)
    assert [breakdown.total for breakdown in answer.breakdowns] == [0.0, 2.0, 1.0]
    assert answer.ranking == ("s1", "s2", "s0")


def test_a_group_has_one_prompt_metadata_and_reference() -> None:
    (one,) = _texts("a")
    prompt = one.prompt
    others = [
        replace(one, id="x", prompt=replace(prompt, text="another")),
        replace(one, id="x", prompt=replace(prompt, metadata={"language": "de"})),
        replace(one, id="x", reference="42"),
    ]
    for other in others:
        with pytest.raises(ValueError, match="got 2 different ones"):
            _through(lambda client, other=other: client.score_group([one, other]))


def test_samples_that_cannot_be_sent_fail_alone() -> None:
    samples = [
        *_texts("abc"),
        RewardSample("nothing", Prompt("p", "say")),
        RewardSample("grey", Prompt("p", "say"), np.zeros((4, 4), np.uint8)),
        RewardSample("nan", Prompt("p", "say", {"x": [float("nan")]}), text="a"),
        RewardSample("surrogate", Prompt("p", "say"), text="a\ud800"),
        RewardSample("inside", Prompt("p", "say", {"x": ["\ud800"]}), text="a"),
        RewardSample("tuple", Prompt("p", "say", {"x": (1, 2)}), text="a"),
    ]
    breakdowns = _through(lambda client: client.score(samples))
    assert [breakdown.total for breakdown in breakdowns] == [3.0, None, None, None, None, None, 1.0]
    failures = [breakdown.failure for breakdown in breakdowns[1:6]]
    assert [failure.code for failure in failures if failure] == ["invalid_input"] * 5
    assert _through(lambda client: client.score([])) == []
    assert [b.total for b in _through(lambda client: client.score(samples[1:3]))] == [None, None]


def test_ids_that_repeat_or_are_too_long_are_no_problem() -> None:
    for sample_id in ("same", "x" * 300, ""):
        samples = [RewardSample(sample_id, Prompt("p", "say"), text=text) for text in ("a", "abc")]
        assert [b.total for b in _through(lambda client, s=samples: client.score(s))] == [1.0, 3.0]


def test_requests_are_cut_by_bytes_too() -> None:
    picture = np.zeros((10, 10, 3), np.uint8)
    samples = [RewardSample(f"s{i}", Prompt("p", "say"), picture) for i in range(5)]
    # 300 bytes of pixels and 3 of prompt each: two fit into 700, and a large one goes alone.
    large = RewardSample("large", Prompt("p", "say"), np.zeros((30, 30, 3), np.uint8))
    runs = split([*samples, large], max_samples=3, max_bytes=700)
    assert [[sample.id for sample in run] for run in runs] == [["s0", "s1"], ["s2", "s3"], ["s4"], ["large"]]
    assert [len(run) for run in split(samples, max_samples=2, max_bytes=10**9)] == [2, 2, 1]
    assert split([], 2, 2) == []


def test_a_deadline_ends_waiting_and_retrying() -> None:
    async def slow(_samples):
        await asyncio.sleep(30)

    async def main() -> list[RewardBreakdown]:
        backend = LocalBackend(LENGTH, before=slow)
        async with RewardClient("http://t", transport=httpx2.ASGITransport(app_of(backend))) as client:
            return await client.score(_texts("a", "b"), deadline_s=0.05)

    for breakdown in asyncio.run(main()):
        assert breakdown.failure is not None
        assert (breakdown.total, breakdown.failure.code, breakdown.failure.retryable) == (None, "timeout", True)


def _settled(on_failure: OnFailure) -> list[float | None]:
    failure = RewardFailure("model_error", "broken")
    samples = [RewardSample(f"s{i}", Prompt(p, "x"), group_id=g) for i, (p, g) in enumerate(["pg", "pg", "qh", "p "])]
    samples[3] = RewardSample("s3", Prompt("p", "x"))
    scores = [RewardBreakdown(1.0, ()), RewardBreakdown(None, (), failure), RewardBreakdown(2.0, ())]
    return [b.total for b in settle([*scores, RewardBreakdown(3.0, ())], samples, on_failure)]


def test_a_failure_can_mask_its_sample_drop_its_group_or_raise() -> None:
    assert _settled("mask_sample") == [1.0, None, 2.0, 3.0]
    # s1 takes its sibling s0 with it; s3 has the same prompt and no group.
    assert _settled("drop_group") == [None, None, 2.0, 3.0]
    with pytest.raises(RewardError, match=r"1 of 4 samples have no reward; the first, 's1': model_error: broken"):
        _settled("raise")


def test_a_client_can_be_made_to_raise() -> None:
    broken = RewardSample("broken", Prompt("p", ""), text="a")
    with pytest.raises(RewardError, match=r"1 of 2 samples .* 'broken': reward 'length': invalid_input: "):
        _through(lambda client: client.score([*_texts("a"), broken]), on_failure="raise")


def test_readiness_is_an_answer_also_when_it_is_no() -> None:
    async def main(problem: str):
        backend = LocalBackend(LENGTH, problem=problem)
        async with RewardClient("http://t", transport=httpx2.ASGITransport(app_of(backend))) as client:
            return await client.ready()

    assert asyncio.run(main("")).ready
    assert asyncio.run(main("fooled")).problems == {"length": "fooled"}


def _remote(backend: LocalBackend, **keys) -> RemoteReward:
    config = RemoteConfig(url="http://scorers", reward="length", name="far", **keys)
    return RemoteReward(config, httpx2.ASGITransport(app_of(backend), raise_app_exceptions=False))


def test_a_remote_reward_is_what_the_service_says_it_is() -> None:
    reward = _remote(LocalBackend((LengthConfig(name="length", weight=9.0),)), params={"scale": 2})
    assert (reward.version, reward.deterministic, reward.range) == ("", False, None)
    reward.load()
    assert (reward.version, reward.fingerprint, reward.range) == ("1", "f1", (0.0, 10.0))
    assert (reward.modality, reward.deterministic, reward.uses_seed) == ("text", True, False)
    (score,) = asyncio.run(reward.score(_texts("abc")))
    # The operator's weight over there does not matter here.
    assert (score.name, score.value, score.version, score.fingerprint) == ("far", 6.0, "1", "f1")


def test_a_remote_reward_follows_an_upgrade() -> None:
    backend = LocalBackend(LENGTH)
    reward = _remote(backend)
    reward.load()
    newer = LengthReward(LENGTH[0])
    newer.version, newer.fingerprint, newer.deterministic = "2", "f2", False
    newer.metadata_keys = {"language": "of the text", "tone": "of the text"}

    async def upgraded(_samples):
        backend.rewards["length"] = newer
        return {"length": [RewardScore("length", 4.0, version="2", fingerprint="f2")]}

    backend.before = upgraded
    (score,) = asyncio.run(reward.score(_texts("abc")))
    assert (score.value, score.version, reward.version, reward.fingerprint) == (4.0, "2", "2", "f2")
    # What the new version reads, and whether it draws, decide what may be remembered of it.
    assert (set(reward.metadata_keys), reward.deterministic) == ({"language", "tone"}, False)


def test_a_remote_reward_that_is_not_there_says_so() -> None:
    with pytest.raises(ConfigError, match=r"has no reward 'length'; did you mean 'lengths'\? served: lengths"):
        _remote(LocalBackend((LengthConfig(name="lengths"),))).load()
    nowhere = RemoteReward(RemoteConfig(url="http://127.0.0.1:9", reward="x", timeout_s=1))
    with pytest.raises(ConfigError, match="no reward service that can be reached"):
        nowhere.load()
    locked = RemoteConfig(url="http://t", reward="x", token_env="RAYLIGN_TEST_TOKEN_THAT_IS_NOT_SET")
    app = app_of(LocalBackend(), token="s3cret")
    with pytest.raises(ConfigError, match="answered 401"):
        RemoteReward(locked, httpx2.ASGITransport(app)).load()


def test_a_remote_reward_that_goes_away_leaves_errors() -> None:
    async def gone(_samples):
        raise ConnectionError("gone")

    backend = LocalBackend(LENGTH)
    reward = _remote(backend, timeout_s=0.5)
    reward.load()
    backend.before = gone
    (score,) = asyncio.run(reward.score(_texts("abc")))
    assert score.error is not None
    assert score.error.code in ("timeout", "model_error")


@settings(max_examples=100, deadline=None)
@given(files=st.lists(st.one_of(st.binary(max_size=200), st.from_regex(rb"(\r?\n?-{0,3}(raylign)?)*", fullmatch=True))))
def test_any_bytes_survive_multipart(files: list[bytes]) -> None:
    request = ScoreRequest(samples=({"id": "a", "prompt": "é\r\n--", "text": "x"},))  # type: ignore[arg-type]  # a dict
    content, content_type = body_of(
        request, [(f"p{i}", "image/png", data) for i, data in enumerate(files)], "multipart"
    )
    parts = split_multipart(content, content_type, len(files) + 1)
    assert ScoreRequest.model_validate_json(parts.pop("request")) == request
    assert list(parts.values()) == files
