"""The HTTP face without Ray: what is accepted, what is refused, and what the answers say."""

import asyncio
import json
import logging

import httpx2
import pytest

from raylign.types import RewardScore
from rewards import make_mix
from rewards.remote import RewardClient
from rewards.wire import ScoreResponse
from tests.reward_cases.local_http import JPEGS, PNG, SAMPLES, LocalBackend, app_of, inline, post, refused, with_app


def _body(*samples: dict, **more) -> dict:
    return {"samples": list(samples), **more}


@pytest.mark.parametrize("form", ["json", "multipart"])
def test_the_client_gets_what_the_process_computes(form) -> None:
    app = app_of(token="s3cret")

    async def remote():
        transport = httpx2.ASGITransport(app)
        async with RewardClient("http://test", "s3cret", form, transport=transport, max_samples=2) as client:
            return await client.score(SAMPLES), await client.score(SAMPLES, only=["large"]), await client.rewards()

    everything, one, listed = asyncio.run(remote())
    local = asyncio.run(make_mix(JPEGS).score(SAMPLES))
    assert [b.total for b in everything] == [b.total for b in local]
    assert [[s.value for s in b.scores] for b in everything] == [[s.value for s in b.scores] for b in local]
    assert everything[0].scores[0].details == local[0].scores[0].details
    assert everything[0].scores[0].version == local[0].scores[0].version
    assert [[s.name for s in b.scores] for b in one] == [["large"]] * 3
    assert [reward.name for reward in listed.rewards] == ["jpeg", "large"]
    assert listed.rewards[1].required is False


def test_a_bad_picture_among_good_ones_is_a_result() -> None:
    body = _body(inline("a"), inline("b", b"no picture"), inline("c", sha256="0" * 64), inline("d"), request_id="r1")
    response = with_app(post(json=body))
    assert response.status_code == 200
    answer = ScoreResponse.model_validate_json(response.content)
    assert [result.id for result in answer.results] == ["a", "b", "c", "d"]
    assert [result.status for result in answer.results] == ["ok", "invalid_input", "invalid_input", "ok"]
    assert [result.reward is None for result in answer.results] == [False, True, True, False]
    assert answer.counts == {"ok": 2, "invalid_input": 2}
    assert answer.request_id == "r1"
    error = answer.results[1].error
    assert error is not None
    assert "not a readable PNG" in error.message


@pytest.mark.parametrize("data", ["%%%", "YQ", "YQ==\n", "Y Q=="])
def test_base64_is_strict_and_costs_its_sample_only(data: str) -> None:
    image = {"mime": "image/png", "encoding": "base64", "data": data}
    answer = with_app(post(json=_body({**inline("a"), "image": image}, inline("b")))).json()
    assert [result["status"] for result in answer["results"]] == ["invalid_input", "ok"]
    assert "not valid base64" in answer["results"][0]["error"]["message"]


def test_a_text_sample_for_picture_rewards_is_a_result() -> None:
    response = with_app(post(json=_body({"id": "t", "prompt": "x", "text": "an answer"})))
    (result,) = response.json()["results"]
    assert (result["status"], result["reward"]) == ("invalid_input", None)
    assert result["components"]["jpeg"]["error"]["message"] == "the sample has no image"


def test_details_that_are_no_unicode_cost_nobody_his_score() -> None:
    async def quotes(_samples):
        return {"jpeg": [RewardScore("jpeg", 0.5, details={"said": "half \ud83d", "\ud83d": ["\u00e9"]})]}

    response = with_app(post(json=_body(inline(), rewards=[{"name": "jpeg"}])), LocalBackend(before=quotes))
    assert response.status_code == 200
    (result,) = response.json()["results"]
    assert result["components"]["jpeg"]["details"] == {"said": "half ?", "?": ["\u00e9"]}


def test_details_can_be_left_out() -> None:
    response = with_app(post(json=_body(inline(), return_details=False)))
    assert response.json()["results"][0]["components"]["jpeg"]["details"] == {}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"samples": []}, "samples"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
        ({"samples": [inline(), inline()]}, "unique"),
        ({"samples": [{"id": "a", "prompt": "x"}]}, "either an image or a text"),
        ({"samples": [{**inline(), "text": "both"}]}, "either an image or a text"),
        ({"samples": [{**inline(), "image": {"encoding": "url", "data": "http://x"}}]}, "image"),
        ({"samples": [inline(mime="image/gif")]}, "mime"),
        ({"rewards": [{"name": "jpg"}]}, "no reward named 'jpg'; did you mean 'jpeg'? served: jpeg, large"),
        ({"rewards": [{"name": "ocr"}]}, "no reward named 'ocr'; served: jpeg, large"),
        ({"rewards": [{"name": "jpeg"}] * 2}, "rewards must be unique"),
        ({"rewards": [{"name": "jpeg", "params": {"q": 1}}]}, "takes no params, got q"),
        ({"samples": [{**inline(), "image": {"url": "http://x", "mime": "image/png"}}]}, "image"),
        ({"samples": [{**inline(), "url": "http://x"}]}, "url"),
        ({"rewards": []}, "rewards"),
        ({"samples": [inline(str(i)) for i in range(5)]}, "at most 4 samples, got 5"),
    ],
)
def test_what_breaks_the_schema_is_a_422_that_says_where(change: dict, where: str) -> None:
    response = with_app(post(json={**_body(inline()), **change}), max_samples=4)
    message = refused(response, 422)
    assert where in message
    assert "iVBOR" not in message, "what was sent is not sent back"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"samples": NaN}', ""),
        (b'{"samples": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"samples": [{"metadata": ' + b"[" * 250 + b"]" * 250 + b"}]}", "nests too deeply"),
        (b'{"samples": "\xff"}', "not valid JSON"),
        (
            json.dumps(
                _body({"id": "a", "prompt": "", "image": {"mime": "image/png", "encoding": "part", "part": "x"}})
            ),
            "part 'x', which is not sent",
        ),
    ],
)
def test_what_is_malformed_is_a_400(body, reason: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = with_app(post(content=body, headers=headers))
    assert reason in refused(response, 422 if b"NaN" in (body if isinstance(body, bytes) else b"") else 400)


def _parts(*parts: tuple[str, str | bytes]) -> list:
    return [(name, (name, content, "application/octet-stream")) for name, content in parts]


def test_multipart_bodies_are_checked_part_by_part() -> None:
    image = {"encoding": "part", "mime": "image/png", "part": "x"}
    head = json.dumps(_body({"id": "a", "prompt": "p", "image": image}))
    good = with_app(post(files=_parts(("request", head), ("x", PNG))))
    assert good.json()["counts"] == {"ok": 1}
    as_field = with_app(post(data={"request": head}, files=_parts(("x", PNG))))
    assert as_field.json()["counts"] == {"ok": 1}
    assert "no part 'request'" in refused(with_app(post(files=_parts(("x", PNG)))), 400)
    assert "not sent" in refused(with_app(post(files=_parts(("request", head)))), 400)
    extra = with_app(post(files=_parts(("request", head), ("x", PNG), ("y", PNG))))
    assert "no sample names the part(s) y" in refused(extra, 400)
    twice = with_app(post(files=_parts(("request", head), ("x", PNG), ("x", PNG))))
    assert "more than once" in refused(twice, 400)
    headers = {"Content-Type": "multipart/form-data"}
    assert refused(with_app(post(content=b"nonsense", headers=headers)), 400)


def test_other_media_types_are_a_415() -> None:
    assert "application/json" in refused(with_app(post(content=b"x", headers={"Content-Type": "text/xml"})), 415)


async def _drip(data: bytes):
    for start in range(0, len(data), 100):
        yield data[start : start + 100]


@pytest.mark.parametrize("form", ["json", "multipart"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_cap_is_a_413(form: str, chunked: bool) -> None:
    request = httpx2.Request("POST", "http://test", json=_body(inline()))
    if form == "multipart":
        request = httpx2.Request("POST", "http://test", files=_parts(("request", "{}"), ("x", PNG)))
    content, headers = request.read(), {"Content-Type": request.headers["Content-Type"]}
    response = with_app(post(content=_drip(content) if chunked else content, headers=headers), max_body_bytes=1000)
    assert "1000 bytes" in refused(response, 413)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic s3cret", "s3cret"])
def test_a_token_is_needed_where_one_is_set(header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = with_app(post(json=_body(inline()), headers=headers), token="s3cret")
    refused(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert with_app(lambda client: client.get("/v1/rewards", headers=headers), token="s3cret").status_code == 401
    assert with_app(lambda client: client.get("/v1/healthz"), token="s3cret").status_code == 200


async def _break(_samples) -> None:
    raise RuntimeError("secret detail")


def test_an_unexpected_error_names_a_log_entry_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        response = with_app(post(json=_body(inline())), LocalBackend(before=_break))
    assert refused(response, 500) == "the service failed"
    assert "secret" not in response.text
    assert response.json()["log_id"] in caplog.text
    assert "secret detail" in caplog.text


def test_probes() -> None:
    assert with_app(lambda client: client.get("/v1/healthz")).json() == {"status": "ok"}
    ready = with_app(lambda client: client.get("/v1/readyz"))
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "rewards": {"jpeg": True, "large": True}, "problems": {}}
    waiting = with_app(lambda client: client.get("/v1/readyz"), LocalBackend(problem="a canary passed"))
    assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
    assert waiting.json()["problems"] == {"jpeg": "a canary passed"}
    assert refused(with_app(lambda client: client.get("/v1/nowhere")), 404) == "Not Found"
    assert refused(with_app(lambda client: client.get("/v1/score")), 405) == "Method Not Allowed"


def test_the_answer_says_who_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLIGN_GIT_SHA", "abc")
    service = with_app(post(json=_body(inline()))).json()["service"]
    assert (service["name"], service["git_sha"], service["config_hash"]) == ("raylign", "abc", "c0ffee")
