"""The reward service under load and in trouble, on a real cluster: no wrong score, no hang, nothing half answered."""

import asyncio
import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import yaml
from ray import serve

from raylign.assets import find_config
from raylign.config import load_config, parse_config
from raylign.types import Prompt, RewardSample
from rewards import JpegConfig, make_mix
from rewards.images import encode_png
from services.process import StartedCluster, local_cluster
from services.reward_app import RewardService
from services.reward_config import RewardServerConfig, ServiceConfig
from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
TOKEN = "a token for the tests"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
JPEG = JpegConfig()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _samples(count: int, seed: int, side: int = 32) -> list[RewardSample]:
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", Prompt("p", "x"), image_HWC) for i, image_HWC in enumerate(images)]


def _expected(samples: list[RewardSample]) -> list[float | None]:
    return [breakdown.total for breakdown in asyncio.run(make_mix((JPEG,)).score(samples))]


def _body(samples: list[RewardSample]) -> dict[str, Any]:
    def one(sample: RewardSample) -> dict[str, Any]:
        assert sample.image_HWC is not None
        data = base64.b64encode(encode_png(sample.image_HWC)).decode()
        image = {"encoding": "base64", "mime": "image/png", "data": data}
        return {"id": sample.id, "prompt": sample.prompt.text, "image": image}

    return {"samples": [one(sample) for sample in samples]}


def _wait_for(what: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds} s")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedCluster]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAYLIGN_REWARD_TOKEN", TOKEN)  # the workers inherit it
        with local_cluster(num_cpus=16, run_dir=tmp_path_factory.mktemp("serving")) as started:
            yield started
            serve.shutdown()


@pytest.fixture
def start(cluster: StartedCluster) -> Iterator[Callable[..., RewardService]]:
    """Starts a service from the keys of its table; it ends with the test."""
    running: list[RewardService] = []

    def start_one(**keys: Any) -> RewardService:
        service = parse_config(ServiceConfig, {"num_cpus_per_replica": 0.1, "port": _free_port(), **keys}, "test")
        running.append(RewardService.start((JPEG,), service))
        return running[-1]

    yield start_one
    for service in running:
        service.shutdown()


def test_the_shipped_serve_file_is_the_same_service(cluster: StartedCluster, tmp_path: Path) -> None:
    port = _free_port()
    config = tmp_path / "rewards.toml"
    config.write_text(f"[[rewards]]\ntype = 'jpeg'\n[service]\nport = {port}\n", encoding="utf-8")
    table = yaml.safe_load((ROOT / "deploy" / "rewards_serve.yaml").read_text(encoding="utf-8"))
    table["applications"][0]["args"]["config"] = str(config)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(table), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "serve"), "run", "--non-blocking", "--address", cluster.address]
    # A process of its own reads the mode before it can see that this cluster has a token.
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [*command, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(lambda: serve.status().applications["rewards"].status == "RUNNING", 120)
        _wait_for(lambda: httpx2.get(f"{address}/v1/readyz", timeout=30).status_code == 200, 60)
        samples = _samples(1, seed=1)
        assert httpx2.post(f"{address}/v1/score", json=_body(samples), timeout=60).status_code == 401
        answer = httpx2.post(f"{address}/v1/score", json=_body(samples), headers=AUTHORIZED, timeout=60).json()
        assert [result["components"]["jpeg"]["raw"] for result in answer["results"]] == _expected(samples)
    finally:
        serve.shutdown()


def test_the_shipped_serve_file_names_what_exists() -> None:
    table = yaml.safe_load((ROOT / "deploy" / "rewards_serve.yaml").read_text(encoding="utf-8"))
    (application,) = table["applications"]
    names = {
        reward.name for reward in load_config(RewardServerConfig, find_config(application["args"]["config"])).rewards
    }
    assert {deployment["name"] for deployment in application["deployments"]} <= {*names, "http"}


def test_a_redis_that_dies_in_mid_run_costs_no_score(start: Callable[..., RewardService], tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    try:
        service = start(cache={"type": "redis", "url": redis.url, "timeout_s": 0.5})
        samples = _samples(8, seed=2)
        expected = _expected(samples)

        async def main() -> list[list[tuple[float | None, str]]]:
            rounds: list[list[tuple[float | None, str]]] = []
            for number in range(6):
                if number == 3:
                    redis.kill()
                scored = await asyncio.gather(*(service.score(samples) for _ in range(4)))
                rounds += [[(b.total, b.scores[0].cache) for b in breakdowns] for breakdowns in scored]
            await service.close()
            return rounds

        began = time.perf_counter()
        rounds = asyncio.run(main())
        assert time.perf_counter() - began < 20
        assert all([value for value, _ in one] == expected for one in rounds)
        assert {cache for one in rounds[4:12] for _, cache in one} == {"hit"}
        # Equal questions at one moment still share an answer, without any store.
        assert {cache for one in rounds[12:] for _, cache in one} == {"bypass", "hit"}
    finally:
        redis.kill()


def test_a_reward_grows_with_its_load(start: Callable[..., RewardService]) -> None:
    scaling = {"max_replicas": 2, "target_ongoing": 1, "upscale_delay_s": 0.5}
    service = start(per_reward={"jpeg": {"autoscaling": scaling}}, cache={"type": "none"})
    samples = _samples(8, seed=3, side=512)

    def num_running() -> int:
        states = serve.status().applications["rewards-jpeg"].deployments["jpeg"].replica_states
        return sum(number for state, number in states.items() if state == "RUNNING")

    assert num_running() == 1

    async def main() -> None:
        async def load() -> None:
            while num_running() < 2:
                assert (await service.score(samples))[0].total is not None

        async with asyncio.timeout(90):
            await asyncio.gather(*(load() for _ in range(6)))

    asyncio.run(main())
    assert num_running() == 2


class Client(threading.Thread):
    """Sends a request and keeps what came of it."""

    def __init__(self, address: str, samples: list[RewardSample]) -> None:
        super().__init__()
        self.url, self.samples, self.body = f"{address}/v1/score", samples, _body(samples)
        self.response: httpx2.Response | None = None

    def run(self) -> None:
        self.response = httpx2.post(self.url, json=self.body, headers=AUTHORIZED, timeout=90)

    def values(self) -> list[float | None]:
        """What was answered, once it was."""
        self.join(timeout=90)
        assert self.response is not None, "no answer: a hang or a lost connection"
        assert self.response.status_code == 200, self.response.text
        return [result["reward"] for result in self.response.json()["results"]]


def _clients(service: RewardService, count: int, seed: int, num_samples: int = 6) -> list[Client]:
    assert service.address is not None
    clients = [Client(service.address, _samples(num_samples, seed + i, side=640)) for i in range(count)]
    for client in clients:
        client.start()
    return clients


def test_a_replica_killed_under_http_load_gives_no_wrong_score(start: Callable[..., RewardService]) -> None:
    service = start(http=True, num_replicas=2)
    clients = _clients(service, 6, seed=10)
    time.sleep(0.2)
    title = "ray::ServeReplica:rewards-jpeg:jpeg"
    ours = psutil.Process().children(recursive=True)
    victim, *_ = [process for process in ours if title in " ".join(process.cmdline())]
    victim.kill()
    for client in clients:
        assert client.values() == _expected(client.samples)


def test_a_service_that_stops_answers_what_it_has(start: Callable[..., RewardService]) -> None:
    service = start(http=True)
    clients = _clients(service, 4, seed=20, num_samples=16)
    assert service.address is not None
    time.sleep(0.3)
    assert any(client.is_alive() for client in clients), "all were answered before the service was told to stop"
    service.shutdown()
    for client in clients:
        assert client.values() == _expected(client.samples)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{service.address}/v1/healthz", timeout=5)
