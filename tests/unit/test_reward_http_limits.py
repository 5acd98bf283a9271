"""What hostile, slow, absent and impatient clients get: a documented status, and nobody else pays."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import numpy as np
import pytest
import uvicorn

from raylign.types import RewardFailure, RewardScore
from rewards.images import encode_png
from services.reward_api.body import THREAD_BYTES
from services.reward_api.door import Replay
from services.reward_api.refusals import ApiError
from tests.reward_cases.local_http import (
    IMAGES_GHWC,
    LengthConfig,
    LocalBackend,
    app_of,
    inline,
    post,
    refused,
    texts,
    with_app,
)

LENGTH = (LengthConfig(name="length"), LengthConfig(name="other"))


def _errors(*codes: str) -> dict[str, list[RewardScore]]:
    """One sample's answer from each reward; "" is a score."""
    names = [config.name for config in LENGTH]
    return {
        name: [RewardScore(name, None, RewardFailure(code, "why", True)) if code else RewardScore(name, 1.0)]
        for name, code in zip(names, codes, strict=True)
    }


def _answering(*codes: str) -> LocalBackend:
    async def answer(_samples):
        return _errors(*codes)

    return LocalBackend(LENGTH, before=answer)


def test_nothing_but_full_queues_is_a_429() -> None:
    response = with_app(post(json={"samples": texts("a")}), _answering("overloaded", "overloaded"), retry_after_s=2.5)
    assert "queue is full" in refused(response, 429)
    assert response.headers["Retry-After"] == "3"
    assert response.json()["error"]["retryable"] is True
    partly = with_app(post(json={"samples": texts("a")}), _answering("overloaded", ""))
    assert (partly.status_code, partly.json()["counts"]) == (200, {"overloaded": 1})


def test_a_full_house_is_a_503_and_empties_again() -> None:
    gate, inside = asyncio.Event(), asyncio.Semaphore(0)

    async def wait(_samples) -> None:
        inside.release()
        await gate.wait()

    async def crowd(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        body = {"samples": texts("a")}
        first = [asyncio.create_task(client.post("/v1/score", json=body)) for _ in range(2)]
        for _ in first:
            await inside.acquire()
        turned_away = await client.post("/v1/score", json=body)
        gate.set()
        return [*await asyncio.gather(*first), turned_away, await client.post("/v1/score", json=body)]

    answers = with_app(crowd, LocalBackend(LENGTH, before=wait), max_requests=2, retry_after_s=7)
    assert [answer.status_code for answer in answers] == [200, 200, 503, 200]
    assert answers[2].headers["Retry-After"] == "7"
    assert "full" in refused(answers[2], 503)


def test_many_who_ask_for_readiness_are_one_question() -> None:
    class Counting(LocalBackend):
        asked, gate = 0, asyncio.Event()

        async def ready(self) -> dict[str, str]:
            self.asked += 1
            await self.gate.wait()
            return await super().ready()

    backend = Counting()

    async def crowd(client: httpx2.AsyncClient) -> list[int]:
        asking = [asyncio.create_task(client.get("/v1/readyz")) for _ in range(20)]
        await asyncio.sleep(0.05)
        asking.pop(0).cancel()
        await asyncio.sleep(0)
        backend.gate.set()
        statuses = [(await one).status_code for one in asking]
        return [*statuses, (await client.get("/v1/readyz")).status_code]

    assert with_app(crowd, backend) == [200] * 20
    assert backend.asked == 2


async def _never(_samples) -> None:
    await asyncio.sleep(60)


def test_a_deadline_without_an_answer_is_a_504() -> None:
    late = with_app(post(json={"samples": texts("a"), "deadline_ms": 30}), LocalBackend(LENGTH, before=_never))
    assert "deadline" in refused(late, 504)

    async def waits(_samples):
        await asyncio.sleep(0.05)
        return _errors("timeout", "timeout")

    late = with_app(post(json={"samples": texts("a"), "deadline_ms": 30}), LocalBackend(LENGTH, before=waits))
    assert "deadline" in refused(late, 504)


def test_a_timeout_of_one_reward_is_a_status() -> None:
    partly = with_app(post(json={"samples": texts("a"), "deadline_ms": 30_000}), _answering("timeout", ""))
    assert (partly.status_code, partly.json()["counts"]) == (200, {"timeout": 1})
    # A program that runs too long is a timeout as well, and no deadline has passed.
    scored = with_app(post(json={"samples": texts("a")}), _answering("timeout", "timeout"))
    assert (scored.status_code, scored.json()["counts"]) == (200, {"timeout": 1})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    body = json.dumps({"samples": texts("y", metadata={"deep": [{"n": "here"}]})}).replace('"here"', number)
    response = with_app(post(content=body, headers={"Content-Type": "application/json"}))
    assert "finite" in refused(response, 422)


def test_too_many_pixels_in_all_are_a_413() -> None:
    samples = [inline(str(i)) for i in range(3)]
    assert with_app(post(json={"samples": samples}), max_request_pixels=3 * 24 * 80).status_code == 200
    assert "send fewer" in refused(with_app(post(json={"samples": samples}), max_request_pixels=3 * 24 * 80 - 1), 413)


def test_a_picture_that_is_too_large_costs_its_sample_only() -> None:
    samples = [inline("a"), inline("b", encode_png(IMAGES_GHWC[0][:8]))]
    answer = with_app(post(json={"samples": samples}), max_image_pixels=8 * 80).json()
    assert [result["status"] for result in answer["results"]] == ["invalid_input", "ok"]


def test_compressed_bodies_are_a_415() -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert "Content-Encoding" in refused(with_app(post(content=b"x", headers=headers)), 415)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}'),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Type: text/plain\r\n\r\n{}\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A" * 100_000 + b"\r\n--x--\r\n"),
    ],
)
def test_broken_multipart_is_a_400(content_type: str, body: bytes) -> None:
    assert refused(with_app(post(content=body, headers={"Content-Type": content_type})), 400)


def test_multipart_has_no_more_parts_than_samples_can_name() -> None:
    parts = [(f"p{i}", (f"p{i}", b"x", "image/png")) for i in range(18)]
    assert "more than 17 parts" in refused(with_app(post(files=parts), max_samples=1), 400)


def test_one_address_can_be_slowed_down() -> None:
    async def three(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        return [await client.get("/v1/rewards") for _ in range(3)]

    answers = with_app(three, max_requests_per_s=2.0)
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Retry-After"] == "1"
    assert "too many" in refused(answers[2], 429)


def test_a_repeated_request_repeats_the_answer() -> None:
    backend = LocalBackend(LENGTH)
    body = {"samples": texts("abc"), "request_id": "r1"}

    async def several(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        other = {**body, "samples": texts("abcd")}
        return [
            await client.post("/v1/score", json=body),
            await client.post("/v1/score", json=body),
            await client.post("/v1/score", json=other),
            await client.post("/v1/score", json={**body, "request_id": "r2"}),
        ]

    first, again, other, second_id = with_app(several, backend)
    assert again.content == first.content
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (False, "true")
    assert "different request" in refused(other, 409)
    assert second_id.json()["request_id"] == "r2"
    assert len(backend.calls) == 2


def test_multipart_requests_are_the_same_under_another_boundary() -> None:
    backend = LocalBackend()
    image = {"encoding": "part", "mime": "image/png", "part": "x"}
    head = json.dumps({"request_id": "r", "samples": [{"id": "a", "prompt": "p", "image": image}]})

    async def twice(client: httpx2.AsyncClient) -> list[httpx2.Response]:
        files = {"request": ("r", head, "application/json"), "x": ("x", encode_png(IMAGES_GHWC[0]), "image/png")}
        return [await client.post("/v1/score", files=files) for _ in range(2)]

    first, again = with_app(twice, backend)
    assert first.request.headers["content-type"] != again.request.headers["content-type"]
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")


def test_refusals_are_not_remembered() -> None:
    body = {"samples": texts("abc"), "request_id": "r1", "rewards": [{"name": "nobody"}]}

    async def twice(client: httpx2.AsyncClient) -> list[int]:
        good = {**body, "rewards": [{"name": "length"}]}
        return [(await client.post("/v1/score", json=each)).status_code for each in (body, good)]

    assert with_app(twice, LocalBackend(LENGTH)) == [422, 200]


def test_answers_are_kept_for_a_while_and_within_bounds() -> None:
    now = [0.0]
    replay = Replay(keep_s=10.0, max_bytes=25, clock=lambda: now[0])
    for name in ("a", "b", "c"):
        replay.keep(name, b"digest", b"x" * 10)
    assert [replay.find(name, b"digest") is not None for name in ("a", "b", "c")] == [False, True, True]
    with pytest.raises(ApiError, match="different request"):
        replay.find("b", b"another")
    now[0] = 11.0
    assert replay.find("b", b"digest") is None
    replay.keep("", b"digest", b"x")
    assert replay.find("", b"digest") is None


class Server:
    """The application under uvicorn on a free port."""

    def __init__(self, backend: LocalBackend, **limits) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(app_of(backend, **limits), log_level="critical", access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[self._socket]))

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()


class Waiting:
    """Keeps a request until it is cancelled."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, samples) -> None:
        if samples[0].text != "wait":
            return
        self.entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture(scope="module")
def waiting() -> Waiting:
    return Waiting()


@pytest.fixture(scope="module")
def server(waiting: Waiting) -> Iterator[Server]:
    running = Server(LocalBackend(LENGTH, before=waiting), body_timeout_s=0.3)
    running.start()
    yield running
    running.stop()


def _send(server: Server, head: str, body: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(head.replace("\n", "\r\n").encode() + body)
    return client


def _post_head(length: int) -> str:
    return f"POST /v1/score HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {length}\n\n"


def test_a_body_that_does_not_arrive_is_a_408(server: Server) -> None:
    with _send(server, _post_head(1000), b'{"samples"') as client:
        answer = client.recv(65536)
    assert b" 408 " in answer.splitlines()[0]
    assert b"did not arrive within 0.3 s" in answer


def test_a_client_that_hangs_up_stops_its_work(server: Server, waiting: Waiting) -> None:
    body = json.dumps({"samples": texts("wait")}).encode()
    with _send(server, _post_head(len(body)), body):
        assert waiting.entered.wait(10)
    assert waiting.cancelled.wait(10)
    # The next one is served as if nothing had happened.
    after = httpx2.post(f"http://127.0.0.1:{server.port}/v1/score", json={"samples": texts("abc")})
    assert after.json()["counts"] == {"ok": 1}


def test_a_client_that_hangs_up_in_its_body_is_forgotten(server: Server) -> None:
    with _send(server, _post_head(1000), b'{"samples"'):
        pass
    after = httpx2.post(f"http://127.0.0.1:{server.port}/v1/score", json={"samples": texts("abc")})
    assert after.json()["counts"] == {"ok": 1}


def test_large_bodies_are_read_like_small_ones() -> None:
    """Beyond THREAD_BYTES the work moves to a thread; the answer is the same, and so is its replay."""
    texts_ = texts("abc", metadata={"filler": "x" * 2 * THREAD_BYTES})
    body = {"samples": texts_, "request_id": "r"}
    image = {"encoding": "part", "mime": "image/png", "part": "p"}
    head = json.dumps({"samples": [{"id": "a", "prompt": "p", "image": image}], "request_id": "r"})
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    files = {"request": ("r", head, "application/json"), "p": ("p", encode_png(noise), "image/png")}

    async def twice(client: httpx2.AsyncClient, **kwargs) -> list[httpx2.Response]:
        return [await client.post("/v1/score", **kwargs) for _ in range(2)]

    assert len(encode_png(noise)) > THREAD_BYTES
    for backend, kwargs in ((LocalBackend(LENGTH), {"json": body}), (LocalBackend(), {"files": files})):
        first, again = with_app(lambda client, k=kwargs: twice(client, **k), backend)
        assert first.json()["counts"] == {"ok": 1}
        assert again.content == first.content
        assert len(backend.calls) == 1
