"""The reward service on a real local cluster: by handle and by HTTP it scores as this process does, and it survives."""

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from ray import serve

from raylign.errors import ClusterError
from raylign.types import Prompt, RewardBreakdown, RewardSample
from rewards import JpegConfig, OcrConfig, make_mix
from rewards.images import encode_png
from rewards.remote import RewardClient
from services.process import local_cluster
from services.reward_app import RewardService
from services.reward_config import ServiceConfig

TOKEN = "a token for the tests"
REWARDS = (OcrConfig(), JpegConfig(weight=0.1, required=False))
ROOT = Path(__file__).parents[2]


def _samples(count: int, seed: int = 1) -> list[RewardSample]:
    images = np.random.default_rng(seed).integers(0, 256, (count, 24, 80, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", Prompt("p", 'a sign that says "COW"'), image) for i, image in enumerate(images)]


SAMPLES = _samples(6)
IMAGE_HWC = np.random.default_rng(2).integers(0, 256, (24, 80, 3), dtype=np.uint8)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _facts(breakdowns: list[RewardBreakdown]) -> list:
    """Everything about scores but the time they took."""
    return [(b.total, [(s.name, s.value, s.version, dict(s.details)) for s in b.scores]) for b in breakdowns]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardService]:
    folder = tmp_path_factory.mktemp("rewards")
    token_file = folder / "token"
    token_file.write_text(TOKEN, encoding="utf-8")
    config = ServiceConfig(
        num_cpus_per_replica=0.1, port=_free_port(), token_file=token_file, max_body_bytes=200_000, http=True
    )
    with local_cluster(num_cpus=2, run_dir=folder):

        async def start() -> RewardService:
            # A run starts its service with its event loop running.
            return RewardService.start(REWARDS, config)

        running = asyncio.run(start())
        yield running
        running.shutdown()
        serve.shutdown()  # whatever a test left there: this process would take its handle for the next cluster's


@pytest.fixture(scope="module")
def expected() -> list:
    return _facts(asyncio.run(make_mix(REWARDS).score(SAMPLES)))


def test_by_handle_it_scores_as_this_process_does(service: RewardService, expected: list) -> None:
    assert _facts(asyncio.run(service.score(SAMPLES))) == expected
    # A second event loop uses the same handles.
    assert _facts(asyncio.run(service.score(SAMPLES[:1]))) == expected[:1]


def test_calls_that_are_scored_together_do_not_mix(service: RewardService, expected: list) -> None:
    async def main() -> list[list[RewardBreakdown]]:
        return await asyncio.gather(*(service.score(SAMPLES[i : i + 1 + i % 2]) for i in range(5)))

    for i, breakdowns in enumerate(asyncio.run(main())):
        assert _facts(breakdowns) == expected[i : i + 1 + i % 2]


def test_bad_samples_fail_alone(service: RewardService, expected: list) -> None:
    bad = RewardSample("bad", Prompt("q", "no quotes"), SAMPLES[0].image_HWC)
    empty = RewardSample("empty", Prompt("q", 'a "x"'), None)
    breakdowns = asyncio.run(service.score([SAMPLES[0], bad, empty, SAMPLES[1]]))
    assert _facts([breakdowns[0], breakdowns[3]]) == expected[:2]
    assert [b.total for b in breakdowns[1:3]] == [None, None]


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_over_http_it_scores_as_this_process_does(service: RewardService, expected: list, form) -> None:
    async def main() -> list[RewardBreakdown]:
        assert service.address is not None
        async with RewardClient(service.address, TOKEN, form, max_samples=4) as client:
            return await client.score(SAMPLES)

    assert _facts(asyncio.run(main())) == expected


def _post(service: RewardService, body: dict, token: str = TOKEN) -> httpx2.Response:
    url = f"{service.address}/v1/score"
    return httpx2.post(url, json=body, headers={"Authorization": f"Bearer {token}"}, timeout=60)


def _body(*files: bytes) -> dict:
    def image(data: bytes) -> dict:
        return {"encoding": "base64", "mime": "image/png", "data": base64.b64encode(data).decode()}

    return {"samples": [{"id": f"s{i}", "prompt": 'a "COW"', "image": image(data)} for i, data in enumerate(files)]}


def test_refusals_over_http(service: RewardService) -> None:
    png = encode_png(IMAGE_HWC)
    partial = _post(service, _body(png, b"no picture", png))
    assert [result["status"] for result in partial.json()["results"]] == ["ok", "invalid_input", "ok"]
    assert partial.status_code == 200
    assert _post(service, _body(png), token="wrong").status_code == 401
    assert _post(service, {**_body(png), "surprise": 1}).status_code == 422
    assert _post(service, _body(*[png] * 60)).status_code == 413


def test_probes_over_http(service: RewardService) -> None:
    ready = httpx2.get(f"{service.address}/v1/readyz", timeout=60)
    assert ready.status_code == 200, ready.text
    assert ready.json()["rewards"] == {"ocr": True, "jpeg": True}
    listed = httpx2.get(f"{service.address}/v1/rewards", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert [reward["name"] for reward in listed.json()["rewards"]] == ["ocr", "jpeg"]


def test_a_service_that_does_not_fit_says_so_and_leaves_the_other_alone(service: RewardService, expected: list) -> None:
    too_big = ServiceConfig(num_cpus_per_replica=64, start_timeout_s=0.5)
    with pytest.raises(ClusterError, match=r"'second-jpeg' .* did not start: .*num_cpus_per_replica"):
        RewardService.start((JpegConfig(),), too_big, name="second")
    assert _facts(asyncio.run(service.score(SAMPLES))) == expected


def _replica(reward: str) -> psutil.Process:
    """The process of a reward's only replica, among our own; Ray writes an actor's name into its command line."""
    title = f"ray::ServeReplica:rewards-{reward}:{reward}"
    ours = psutil.Process().children(recursive=True)
    (found,) = [process for process in ours if title in " ".join(process.cmdline())]
    return found


def test_a_killed_replica_comes_back_and_no_score_is_lost(service: RewardService) -> None:
    rounds = [_samples(6, seed=100 + i) for i in range(8)]  # not remembered: each must reach a replica
    expected = [_facts(asyncio.run(make_mix(REWARDS).score(samples))) for samples in rounds]

    async def main() -> list[list[RewardBreakdown]]:
        calls = [asyncio.create_task(service.score(samples)) for samples in rounds]
        await asyncio.sleep(0.1)  # some calls are being scored, others wait
        _replica("ocr").kill()
        return await asyncio.gather(*calls)

    assert [_facts(breakdowns) for breakdowns in asyncio.run(main())] == expected


def test_the_server_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """`run_reward_server` in a process of its own: starts Ray, answers, and a SIGTERM leaves no process behind."""
    port = _free_port()
    code = f"""
        from rewards import JpegConfig
        from services.process import prepare_environment
        prepare_environment()
        from services.reward_app import run_reward_server
        from services.reward_config import RewardServerConfig, ServiceConfig
        service = ServiceConfig(port={port}, num_cpus_per_replica=0.1)
        config = RewardServerConfig(rewards=(JpegConfig(),), service=service)
        run_reward_server(config, lambda url: print(url, flush=True))
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    server = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    with server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline().strip() == f"http://127.0.0.1:{port}"
            family = psutil.Process(server.pid).children(recursive=True)
            assert httpx2.get(f"http://127.0.0.1:{port}/v1/healthz", timeout=30).status_code == 200
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0
    assert family
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
