"""What the reward service costs over calling the scorer: latency, throughput at 8 clients, cache hits.

    python benchmarks/reward_service.py --repeats 5 --json reward_service.json

Four ways to score the same 16 small PNG files: `direct` (decode and score in this process), `plain` (FastAPI and
uvicorn around the same scorer, in one process), `raylign` (`raylign serve-rewards`: Ray Serve, one deployment per
reward, cache off), `cached` (the same with its cache on, every sample remembered). The first three alternate in every
round, so that the machine's mood touches all alike; requests are encoded once, before the clock starts.

Prints one JSON object: per reward and way p50 and p95 of one client's requests, milliseconds, and samples per second
of 8 clients; then overhead (p50 of a way less p50 of `direct`, per round) and share of the direct throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI, Request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reward_server import pictures, plain_server, raylign_service, request_body, words

NUM_SAMPLES = 16
NUM_CLIENTS = 8
NUM_BODIES = 8
REWARDS = ("jpeg", "ocr")
Call = Callable[[int], Awaitable[None]]


def serve_plain(port: int, rewards: Sequence[str]) -> None:
    """The comparison server: what a person would write in an afternoon around the same scorer."""
    import uvicorn

    from raylign.types import Prompt, RewardSample
    from rewards.images import decode_image

    app = FastAPI()
    scorers = {name: loaded_mix((name,)) for name in rewards}

    @app.get("/v1/readyz")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/score")
    async def score(request: Request) -> list[float | None]:
        async with request.form(max_files=1000) as form:
            asked = json.loads(await form["request"].read())  # type: ignore[union-attr]
            samples: list[RewardSample] = []
            for sample in asked["samples"]:
                data: bytes = await form[sample["image"]["part"]].read()  # type: ignore[union-attr]
                image_HWC = decode_image(data, "image/png", 2**24)
                samples.append(RewardSample(sample["id"], Prompt(sample["id"], sample["prompt"]), image_HWC))  # type: ignore[arg-type]
        scored = await scorers[asked["rewards"][0]["name"]].score(samples)
        return [breakdown.total for breakdown in scored]

    # Warm before it says that it is ready, as the service is.
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def loaded_mix(names: Sequence[str]) -> Any:
    """The in-process scorer of the named rewards, loaded."""
    from pydantic import TypeAdapter

    from rewards import RewardUnion, make_mix

    scorer = make_mix([TypeAdapter[Any](RewardUnion).validate_python({"type": name}) for name in names])
    for _, reward in scorer.rewards:
        reward.load()
    return scorer


def direct_call(reward: str, texts: Sequence[Sequence[str]], files: Sequence[Sequence[bytes]]) -> Call:
    """Decoding and scoring in this process."""
    from raylign.types import Prompt, RewardSample
    from rewards.images import decode_image

    scorer = loaded_mix((reward,))

    async def call(place: int) -> None:
        body = place % NUM_BODIES
        samples = [
            RewardSample(f"s{i}", Prompt(f"s{i}", f'a sign that says "{text}"'), decode_image(data, "image/png", 2**24))  # type: ignore[arg-type]
            for i, (text, data) in enumerate(zip(texts[body], files[body], strict=True))
        ]
        scored = await scorer.score(samples)
        _expect(all(breakdown.total is not None for breakdown in scored))

    return call


def http_call(client: httpx2.AsyncClient, bodies: Sequence[tuple[bytes, dict[str, str]]], hit: bool) -> Call:
    """One request to a server; every sample must have a reward, and be remembered if `hit`."""

    async def call(place: int) -> None:
        content, headers = bodies[place % NUM_BODIES]
        response = await client.post("/v1/score", content=content, headers=headers)
        _expect(response.status_code == 200, response.text)
        answer = response.json()
        if isinstance(answer, dict):
            results = answer["results"]
            _expect(all(result["status"] == "ok" for result in results), response.text)
            states = {component["cache"] for result in results for component in result["components"].values()}
            _expect(not hit or states == {"hit"}, f"cache states {states}")
        else:
            _expect(all(value is not None for value in answer))

    return call


def _expect(condition: bool, message: str = "a sample has no reward") -> None:
    if not condition:
        raise SystemExit(message[:2000])


async def latency_ms(call: Call, count: int) -> list[float]:
    """One client, one request at a time."""
    taken: list[float] = []
    for place in range(count):
        started = time.perf_counter()
        await call(place)
        taken.append(1000 * (time.perf_counter() - started))
    return taken


async def throughput(call: Call, seconds: float) -> float:
    """Samples per second of 8 clients that ask without a pause."""
    done = 0
    started = time.perf_counter()

    async def client(first: int) -> None:
        nonlocal done
        place = first
        while time.perf_counter() - started < seconds:
            await call(place)
            done += 1
            place += NUM_CLIENTS

    await asyncio.gather(*(client(first) for first in range(NUM_CLIENTS)))
    return done * NUM_SAMPLES / (time.perf_counter() - started)


async def measure(urls: dict[str, str], reward: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways of scoring with one reward, round after round."""
    from rewards.images import encode_png

    texts = [words(NUM_BODIES * NUM_SAMPLES)[i * NUM_SAMPLES : (i + 1) * NUM_SAMPLES] for i in range(NUM_BODIES)]
    files = [[encode_png(image_HWC) for image_HWC in pictures(some)] for some in texts]
    bodies = [request_body(some, data, (reward,)) for some, data in zip(texts, files, strict=True)]
    limits = httpx2.Limits(max_connections=NUM_CLIENTS, max_keepalive_connections=NUM_CLIENTS)
    clients = {way: httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) for way, url in urls.items()}
    calls: dict[str, Call] = {"direct": direct_call(reward, texts, files)}
    for way, client in clients.items():
        fill = http_call(client, bodies, hit=False)
        for place in range(NUM_BODIES):
            await fill(place)
        calls[way] = http_call(client, bodies, hit=way == "cached")
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in calls}
    for _ in range(arguments.repeats):
        for way, call in calls.items():
            taken = await latency_ms(call, arguments.requests)
            rounds[way].append(
                {
                    "p50_ms": statistics.median(taken),
                    "p95_ms": statistics.quantiles(taken, n=20)[18],
                    "samples_per_s": await throughput(call, arguments.seconds),
                }
            )
    for client in clients.values():
        await client.aclose()
    return summarise(rounds)


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; overhead and share are taken within a round, against its own direct calls."""
    result: dict[str, Any] = {}
    for way, entries in rounds.items():
        paired = list(zip(entries, rounds["direct"], strict=True))
        result[way] = {key: round(statistics.median(entry[key] for entry in entries), 2) for key in entries[0]}
        if way != "direct":
            overhead = [entry["p50_ms"] - base["p50_ms"] for entry, base in paired]
            share = [entry["samples_per_s"] / base["samples_per_s"] for entry, base in paired]
            result[way]["overhead_p50_ms"] = round(statistics.median(overhead), 2)
            result[way]["overhead_p50_ms_by_round"] = [round(value, 2) for value in overhead]
            result[way]["share_of_direct_throughput"] = round(statistics.median(share), 3)
            result[way]["share_by_round"] = [round(value, 3) for value in share]
    return result


def main() -> None:
    """Run, print, and write what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--requests", type=int, default=60, help="requests of one client per way and round")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of the 8-client phase per way and round")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=REWARDS)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--plain-server", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain_server:
        serve_plain(arguments.plain_server, arguments.rewards)
        return
    result: dict[str, Any] = {"samples_per_request": NUM_SAMPLES, "clients": NUM_CLIENTS, "rounds": arguments.repeats}
    rewards: list[str] = arguments.rewards
    with plain_server(rewards) as (plain, _), raylign_service(rewards, {"cache": {"type": "none"}}) as (raylign, _):
        for reward in rewards:
            result[reward] = asyncio.run(measure({"plain": plain, "raylign": raylign}, reward, arguments))
    # On its own: an idle second cluster would take its share of the cores from the others.
    with raylign_service(rewards, {"cache": {"type": "memory"}}) as (cached, _):
        for reward in rewards:
            result[reward]["cached"] = asyncio.run(measure({"cached": cached}, reward, arguments))["cached"]
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
