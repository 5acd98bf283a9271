"""The client against scripted answers: what it repeats, how long it waits, and what it gives up on."""

import asyncio
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from raylign.types import Prompt, RewardBreakdown, RewardSample
from rewards.remote import RewardClient
from rewards.wire import Component, SampleResult, ScoreRequest, ScoreResponse, ServiceInfo, WireError

SAMPLES = [RewardSample(f"s{i}", Prompt("p", "a sign"), np.zeros((4, 4, 3), np.uint8)) for i in range(3)]


def _ok(request: httpx.Request, value: float = 0.5, reverse: bool = False) -> httpx.Response:
    wire = ScoreRequest.model_validate_json(request.content)
    component = Component(raw=value, value=value, weight=1.0, required=True, status="ok")
    results = [SampleResult(id=s.id, status="ok", reward=value, components={"x": component}) for s in wire.samples]
    answer = ScoreResponse(
        request_id=wire.request_id,
        service=ServiceInfo(version="1"),
        results=tuple(results[::-1] if reverse else results),
        counts={"ok": len(results)},
    )
    return httpx.Response(200, text=answer.model_dump_json())


class Script:
    """Plays one answer after the other, then repeats the last; records requests and waits."""

    def __init__(self, *answers: int | Exception | Callable[[httpx.Request], httpx.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[ScoreRequest] = []
        self.waits: list[float] = []
        self.headers = httpx.Headers()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(ScoreRequest.model_validate_json(request.content))
        self.headers = request.headers
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, text="why", headers={"Retry-After": "7"} if answer == 429 else {})
        return answer(request)

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def score(self, **options) -> list[RewardBreakdown]:
        async def main() -> list[RewardBreakdown]:
            transport = httpx.MockTransport(self)
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


@pytest.mark.parametrize("trouble", [408, 429, 500, 503, httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_what_may_pass_is_tried_again_under_the_same_id(trouble) -> None:
    script = Script(trouble, trouble, _ok)
    assert [breakdown.total for breakdown in script.score()] == [0.5] * 3
    assert len({request.request_id for request in script.requests}) == 1
    assert len(script.waits) == 2
    assert script.waits[0] <= 0.25 or trouble == 429


def test_retry_after_is_obeyed() -> None:
    script = Script(429, _ok)
    script.score()
    assert script.waits == [7.0]


@pytest.mark.parametrize(
    ("status", "code"), [(400, "invalid_input"), (401, "model_error"), (413, "invalid_input"), (422, "invalid_input")]
)
def test_what_cannot_pass_is_not_tried_again(status: int, code: str) -> None:
    script = Script(status)
    got, message, retryable = _only_failure(script.score())
    assert (got, retryable, len(script.requests)) == (code, False, 1)
    assert str(status) in message
    assert "why" in message


@pytest.mark.parametrize(
    ("trouble", "code"), [(503, "overloaded"), (500, "model_error"), (httpx.ReadTimeout("slow"), "timeout")]
)
def test_attempts_are_bounded_and_end_in_errors(trouble, code: str) -> None:
    script = Script(trouble)
    got, _, retryable = _only_failure(script.score(max_attempts=3))
    assert (got, retryable, len(script.requests), len(script.waits)) == (code, True, 3, 2)


def test_an_answer_that_is_none_is_an_error() -> None:
    code, message, _ = _only_failure(Script(lambda _: httpx.Response(200, text='{"results": [0.0]}')).score())
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
    for value, given in ((None, None), (0.5, error)):
        with pytest.raises(ValueError, match="either a value or an error"):
            Component(raw=value, value=value, weight=1.0, required=True, status="ok", error=given)
