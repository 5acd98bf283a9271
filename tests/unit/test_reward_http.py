"""The HTTP face without Ray: the application on an in-process backend, through httpx's ASGI transport."""

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from raylign.types import Prompt, RewardSample
from rewards import JpegConfig, RewardMix, make_mix
from rewards.images import encode_png
from rewards.remote import RewardClient
from rewards.wire import RewardInfo, ScoreResponse, describe
from services.reward_config import ServiceConfig
from services.reward_http import build_api, token_digest

REWARDS = (JpegConfig(), JpegConfig(name="large", direction="incompress", weight=0.5, required=False))
IMAGES_GHWC = np.random.default_rng(0).integers(0, 256, (3, 24, 80, 3), dtype=np.uint8)
SAMPLES = [RewardSample(f"s{i}", Prompt(f"s{i}", f"prompt {i}"), image_HWC) for i, image_HWC in enumerate(IMAGES_GHWC)]
PNG = encode_png(IMAGES_GHWC[0])


class LocalBackend:
    """Scores in this process; `broken` makes it raise instead."""

    def __init__(self, broken: bool = False, ready: bool = True) -> None:
        self.mix: RewardMix = make_mix(REWARDS)
        self.broken = broken
        self.is_ready = ready

    async def score(self, samples, only=None):
        if self.broken:
            raise RuntimeError("secret detail")
        return await self.mix.score(samples, only)

    async def describe(self) -> list[RewardInfo]:
        return [describe(config, reward) for config, reward in self.mix.rewards]

    async def ready(self) -> dict[str, bool]:
        return {"jpeg": self.is_ready, "large": True}


def _with_app(
    use: Callable[[httpx.AsyncClient], Awaitable[Any]], backend: LocalBackend | None = None, token=None, **limits
) -> Any:
    digest = None if token is None else token_digest(token)
    app = build_api(backend or LocalBackend(), REWARDS, ServiceConfig(**limits), digest)

    async def main() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(main())


def _post(**kwargs) -> Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]:
    return lambda client: client.post("/v1/score", **kwargs)


def _body(*samples: dict, **more) -> dict:
    return {"samples": list(samples), **more}


def _inline(name: str = "a", data: bytes = PNG, **more) -> dict:
    image = {"encoding": "base64", "mime": "image/png", "data": base64.b64encode(data).decode(), **more}
    return {"id": name, "prompt": "a sign", "image": image}


def _refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]["message"]


@pytest.mark.parametrize("form", ["json", "multipart"])
def test_the_client_gets_what_the_process_computes(form) -> None:
    app = build_api(LocalBackend(), REWARDS, ServiceConfig(), token_digest("s3cret"))

    async def remote():
        transport = httpx.ASGITransport(app)
        async with RewardClient("http://test", "s3cret", form, transport=transport, max_samples=2) as client:
            return await client.score(SAMPLES), await client.score(SAMPLES, only=["large"]), await client.rewards()

    everything, one, listed = asyncio.run(remote())
    local = asyncio.run(make_mix(REWARDS).score(SAMPLES))
    assert [b.total for b in everything] == [b.total for b in local]
    assert [[s.value for s in b.scores] for b in everything] == [[s.value for s in b.scores] for b in local]
    assert everything[0].scores[0].details == local[0].scores[0].details
    assert everything[0].scores[0].version == local[0].scores[0].version
    assert [[s.name for s in b.scores] for b in one] == [["large"]] * 3
    assert [reward.name for reward in listed.rewards] == ["jpeg", "large"]
    assert listed.rewards[1].required is False


def test_a_bad_picture_among_good_ones_is_a_result() -> None:
    body = _body(
        _inline("a"), _inline("b", b"no picture"), _inline("c", sha256="0" * 64), _inline("d"), request_id="r1"
    )
    response = _with_app(_post(json=body))
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


def test_a_text_sample_for_picture_rewards_is_a_result() -> None:
    response = _with_app(_post(json=_body({"id": "t", "prompt": "x", "text": "an answer"})))
    (result,) = response.json()["results"]
    assert (result["status"], result["reward"]) == ("invalid_input", None)
    assert result["components"]["jpeg"]["error"]["message"] == "the sample has no image"


def test_details_can_be_left_out() -> None:
    response = _with_app(_post(json=_body(_inline(), return_details=False)))
    assert response.json()["results"][0]["components"]["jpeg"]["details"] == {}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"samples": []}, "samples"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
        ({"samples": [_inline(), _inline()]}, "unique"),
        ({"samples": [{"id": "a", "prompt": "x"}]}, "either an image or a text"),
        ({"samples": [{**_inline(), "text": "both"}]}, "either an image or a text"),
        ({"samples": [{**_inline(), "image": {"encoding": "url", "data": "http://x"}}]}, "image"),
        ({"samples": [_inline(mime="image/gif")]}, "mime"),
        ({"rewards": [{"name": "ocr"}]}, "no reward named ocr; served: jpeg, large"),
        ({"rewards": []}, "rewards"),
        ({"samples": [_inline(str(i)) for i in range(5)]}, "at most 4 samples, got 5"),
    ],
)
def test_what_breaks_the_schema_is_a_422_that_says_where(change: dict, where: str) -> None:
    response = _with_app(_post(json={**_body(_inline()), **change}), max_samples=4)
    message = _refused(response, 422)
    assert where in message
    assert "iVBOR" not in message, "what was sent is not sent back"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"samples": NaN}', ""),
        (
            json.dumps(_body({**_inline(), "image": {"mime": "image/png", "encoding": "base64", "data": "%%%"}})),
            "base64",
        ),
        (
            json.dumps(_body({**_inline(), "image": {"mime": "image/png", "encoding": "base64", "data": "YQ"}})),
            "base64",
        ),
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
    response = _with_app(_post(content=body, headers=headers))
    assert reason in _refused(response, 422 if b"NaN" in (body if isinstance(body, bytes) else b"") else 400)


def _parts(*parts: tuple[str, str | bytes]) -> list:
    return [(name, (name, content, "application/octet-stream")) for name, content in parts]


def test_multipart_bodies_are_checked_part_by_part() -> None:
    image = {"encoding": "part", "mime": "image/png", "part": "x"}
    head = json.dumps(_body({"id": "a", "prompt": "p", "image": image}))
    good = _with_app(_post(files=_parts(("request", head), ("x", PNG))))
    assert good.json()["counts"] == {"ok": 1}
    as_field = _with_app(_post(data={"request": head}, files=_parts(("x", PNG))))
    assert as_field.json()["counts"] == {"ok": 1}
    assert "no part 'request'" in _refused(_with_app(_post(files=_parts(("x", PNG)))), 400)
    assert "not sent" in _refused(_with_app(_post(files=_parts(("request", head)))), 400)
    extra = _with_app(_post(files=_parts(("request", head), ("x", PNG), ("y", PNG))))
    assert "no sample names the part(s) y" in _refused(extra, 400)
    twice = _with_app(_post(files=_parts(("request", head), ("x", PNG), ("x", PNG))))
    assert "more than once" in _refused(twice, 400)
    headers = {"Content-Type": "multipart/form-data"}
    assert _refused(_with_app(_post(content=b"nonsense", headers=headers)), 400)


def test_other_media_types_are_a_415() -> None:
    assert "application/json" in _refused(_with_app(_post(content=b"x", headers={"Content-Type": "text/xml"})), 415)


async def _drip(data: bytes):
    for start in range(0, len(data), 100):
        yield data[start : start + 100]


@pytest.mark.parametrize("form", ["json", "multipart"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_cap_is_a_413(form: str, chunked: bool) -> None:
    request = httpx.Request("POST", "http://test", json=_body(_inline()))
    if form == "multipart":
        request = httpx.Request("POST", "http://test", files=_parts(("request", "{}"), ("x", PNG)))
    content, headers = request.read(), {"Content-Type": request.headers["Content-Type"]}
    response = _with_app(_post(content=_drip(content) if chunked else content, headers=headers), max_body_bytes=1000)
    assert "1000 bytes" in _refused(response, 413)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic s3cret", "s3cret"])
def test_a_token_is_needed_where_one_is_set(header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = _with_app(_post(json=_body(_inline()), headers=headers), token="s3cret")
    _refused(response, 401)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert _with_app(lambda client: client.get("/v1/rewards", headers=headers), token="s3cret").status_code == 401
    assert _with_app(lambda client: client.get("/v1/healthz"), token="s3cret").status_code == 200


def test_an_unexpected_error_names_a_log_entry_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        response = _with_app(_post(json=_body(_inline())), LocalBackend(broken=True))
    assert _refused(response, 500) == "the service failed"
    assert "secret" not in response.text
    assert response.json()["log_id"] in caplog.text
    assert "secret detail" in caplog.text


def test_probes() -> None:
    assert _with_app(lambda client: client.get("/v1/healthz")).json() == {"status": "ok"}
    ready = _with_app(lambda client: client.get("/v1/readyz"))
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "rewards": {"jpeg": True, "large": True}})
    waiting = _with_app(lambda client: client.get("/v1/readyz"), LocalBackend(ready=False))
    assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
    assert _refused(_with_app(lambda client: client.get("/v1/nowhere")), 404) == "Not Found"
    assert _refused(_with_app(lambda client: client.get("/v1/score")), 405) == "Method Not Allowed"


def test_the_openapi_document_knows_both_forms() -> None:
    document = _with_app(lambda client: client.get("/openapi.json")).json()
    content = document["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert content["application/json"]["schema"]["additionalProperties"] is False
