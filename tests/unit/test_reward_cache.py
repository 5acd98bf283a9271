"""The score cache: what a key depends on, one scoring for many askers, and a Redis that may die. Redis is real."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylign.types import Prompt, RewardFailure, RewardSample, RewardScore
from services.reward_cache import Answer, Keys, RewardCache, RewardFacts
from services.reward_config import CacheConfig
from services.reward_store import MemoryStore, RedisStore, make_store
from tests.redis_server import RedisServer

FACTS = RewardFacts("judge", "v1", "abc", deterministic=True, uses_seed=True, metadata_keys=("target",), compares=False)
IMAGE_HWC = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SAMPLE = RewardSample("s", Prompt("p", "caf\u00e9", {"target": "A", "note": "x"}), IMAGE_HWC, seed=3, reference="r")
OTHER_IMAGE_HWC = IMAGE_HWC.copy()
OTHER_IMAGE_HWC[3, 5, 2] += 1


def _key(sample: RewardSample = SAMPLE, facts: RewardFacts = FACTS, kind: str = "judge", **params: Any) -> str:
    return Keys([sample]).of(kind, facts, params)[0]


@pytest.mark.parametrize(
    "same",
    [
        replace(SAMPLE, id="another"),
        replace(SAMPLE, prompt=Prompt("q", "cafe\u0301", {"target": "A", "note": "y"})),
        replace(SAMPLE, image_HWC=np.asfortranarray(IMAGE_HWC)),
        replace(SAMPLE, image_HWC=np.repeat(IMAGE_HWC, 2, axis=1)[:, ::2]),
    ],
)
def test_what_no_score_depends_on_leaves_the_key(same: RewardSample) -> None:
    assert _key(same) == _key()


def test_everything_a_score_depends_on_changes_the_key() -> None:
    variants = [
        _key(),
        _key(replace(SAMPLE, prompt=Prompt("p", "cafe", SAMPLE.prompt.metadata))),
        _key(replace(SAMPLE, prompt=Prompt("p", "caf\u00e9", {"target": "B", "note": "x"}))),
        _key(replace(SAMPLE, prompt=Prompt("p", "caf\u00e9", {"note": "x"}))),
        _key(replace(SAMPLE, image_HWC=OTHER_IMAGE_HWC)),
        _key(replace(SAMPLE, image_HWC=IMAGE_HWC.reshape(6, 4, 3))),
        _key(replace(SAMPLE, more_images_HWC=(IMAGE_HWC,))),
        _key(replace(SAMPLE, image_HWC=None, text="")),
        _key(replace(SAMPLE, image_HWC=None, text="A")),
        _key(replace(SAMPLE, seed=4)),
        _key(replace(SAMPLE, reference=None)),
        _key(facts=replace(FACTS, version="v2")),
        _key(facts=replace(FACTS, fingerprint="abd")),
        _key(kind="ocr"),
        _key(samples=2),
        _key(samples=3),
    ]
    assert len(set(variants)) == len(variants)


def test_a_seed_counts_only_where_a_reward_draws() -> None:
    still = replace(FACTS, uses_seed=False)
    assert _key(facts=still) == _key(replace(SAMPLE, seed=4), still)


def test_a_group_is_its_candidates_in_their_order() -> None:
    first, second = SAMPLE, replace(SAMPLE, image_HWC=OTHER_IMAGE_HWC)
    keys = {
        Keys(list(group)).of_group("judge", FACTS, {}) for group in [(first, second), (second, first), (first,), ()]
    }
    assert len(keys) == 4


def _score(value: float | None, version: str = "v1", error: RewardFailure | None = None) -> RewardScore:
    return RewardScore("judge", value, error, version, 0.25, {"read": "A\u00e9"}, "abc")


class Scorer:
    """Answers place i with i / 8, counting; `gate` holds it back, `failure` makes it fail."""

    def __init__(self, failure: RewardFailure | None = None, gate: asyncio.Event | None = None) -> None:
        self.asked: list[list[int]] = []
        self.failure, self.gate = failure, gate

    async def __call__(self, places: list[int]) -> list[Answer]:
        self.asked.append(places)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            return [(_score(None, error=self.failure),) for _ in places]
        return [(_score(place / 8),) for place in places]


def _memory(**limits: Any) -> RewardCache:
    return RewardCache(MemoryStore(CacheConfig.model_validate(limits)), lock_ttl_s=1.0)


async def _ask(cache: RewardCache, keys: list[str], scorer: Scorer) -> list[Answer]:
    return await cache.answers(keys, scorer, FACTS, seconds=10.0)


def _facts(answers: list[Answer]) -> list[tuple[float | None, str]]:
    return [(score.value, score.cache) for (score,) in answers]


def test_scores_come_back_whole() -> None:
    async def main() -> None:
        cache, scorer = _memory(), Scorer()
        first = await _ask(cache, ["a", "b"], scorer)
        again = await cache.answers(["b", "c", "a"], scorer, replace(FACTS, name="twin"), seconds=10.0)
        assert _facts(first) == [(0.0, "miss"), (0.125, "miss")]
        assert again[0] == (replace(first[1][0], cache="hit", name="twin"),)
        assert _facts(again) == [(0.125, "hit"), (0.125, "miss"), (0.0, "hit")]
        assert scorer.asked == [[0, 1], [1]]

    asyncio.run(main())


def test_equal_questions_at_once_are_one() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        cache, scorer = _memory(), Scorer(gate=gate)
        asks = [asyncio.create_task(_ask(cache, ["a", "b", "a"], scorer)) for _ in range(5)]
        await asyncio.sleep(0.01)
        gate.set()
        answers = await asyncio.gather(*asks)
        assert scorer.asked == [[0, 1]]
        assert _facts(answers[0]) == [(0.0, "miss"), (0.125, "miss"), (0.0, "hit")]
        assert all(_facts(more) == [(0.0, "hit"), (0.125, "hit"), (0.0, "hit")] for more in answers[1:])

    asyncio.run(main())


def test_who_waits_for_one_that_gives_up_asks_for_himself() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        cache, slow, quick = _memory(), Scorer(gate=gate), Scorer()
        leader = asyncio.create_task(_ask(cache, ["a"], slow))
        await asyncio.sleep(0.01)
        follower = asyncio.create_task(_ask(cache, ["a"], quick))
        await asyncio.sleep(0.01)
        leader.cancel()
        assert _facts(await follower) == [(0.0, "bypass")]
        with pytest.raises(asyncio.CancelledError):
            await leader

    asyncio.run(main())


@pytest.mark.parametrize(("retryable", "asked"), [(True, 2), (False, 1)])
def test_failures_are_not_remembered_and_shared_only_if_final(retryable: bool, asked: int) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        cache, scorer = _memory(), Scorer(RewardFailure("timeout", "no", retryable), gate)
        asks = [asyncio.create_task(_ask(cache, ["a"], scorer)) for _ in range(2)]
        await asyncio.sleep(0.01)
        gate.set()
        assert [_facts(answers) for answers in await asyncio.gather(*asks)] == [[(None, "bypass")]] * 2
        assert len(scorer.asked) == asked
        await _ask(cache, ["a"], scorer)
        assert len(scorer.asked) == asked + 1

    asyncio.run(main())


def test_scores_of_another_version_are_not_remembered_under_this_one() -> None:
    async def compute(places: list[int]) -> list[Answer]:
        return [(_score(0.5, version="v2"),) for _ in places]

    async def main() -> None:
        cache, scorer = _memory(), Scorer()
        assert _facts(await cache.answers(["a"], compute, FACTS, seconds=10.0)) == [(0.5, "bypass")]
        assert _facts(await _ask(cache, ["a"], scorer)) == [(0.0, "miss")]

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{"max_entries": 2}, {"max_bytes": 20}])
def test_memory_is_bounded_and_forgets_the_longest_unused(limits: dict[str, int]) -> None:
    async def main() -> list[bytes | None] | None:
        store = MemoryStore(CacheConfig.model_validate(limits))
        await store.put_many({"a": b"0123456789", "b": b"0123456789"})
        await store.get_many(["a"])
        await store.put_many({"c": b"0123456789"})
        return await store.get_many(["a", "b", "c"])

    assert asyncio.run(main()) == [b"0123456789", None, b"0123456789"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    yield running
    running.kill()


def _with_redis(
    server: RedisServer, main: Callable[[RewardCache, RewardCache], Awaitable[None]], **config: Any
) -> None:
    """Run with the caches of two processes that share the server."""

    async def run() -> None:
        url = server.url
        settings = CacheConfig.model_validate({"type": "redis", "url": url, "timeout_s": 0.5, **config})
        caches = [RewardCache(RedisStore(settings), settings.lock_ttl_s) for _ in range(2)]
        try:
            await main(*caches)
        finally:
            for cache in caches:
                await cache.close()

    asyncio.run(run())


def test_redis_is_shared(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        scorer = Scorer()
        first = await _ask(mine, ["a", "b"], scorer)
        again = await _ask(theirs, ["b", "a"], scorer)
        assert again == [(replace(answer[0], cache="hit"),) for answer in first[::-1]]
        assert len(scorer.asked) == 1

    _with_redis(server, main)


def test_processes_that_ask_at_once_score_once(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        gate = asyncio.Event()
        scorer = Scorer(gate=gate)
        leader = asyncio.create_task(_ask(mine, ["a"], scorer))
        await asyncio.sleep(0.1)
        waiter = asyncio.create_task(_ask(theirs, ["a"], scorer))
        await asyncio.sleep(0.1)
        gate.set()
        assert _facts(await leader) == [(0.0, "miss")]
        assert _facts(await waiter) == [(0.0, "hit")]
        assert len(scorer.asked) == 1

    _with_redis(server, main)


def test_a_claim_whose_owner_died_is_taken_over(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        await theirs._store.claim(["a"])
        began = time.perf_counter()
        assert _facts(await _ask(mine, ["a"], Scorer())) == [(0.0, "miss")]
        assert 0.2 < time.perf_counter() - began < 5

    _with_redis(server, main, lock_ttl_s=0.3)


def test_nobody_gives_back_what_another_claimed(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        assert await mine._store.claim(["a"]) == [True]
        await theirs._store.release(["a"])
        assert await theirs._store.claim(["a"]) == [False]
        await mine._store.release(["a"])
        assert await theirs._store.claim(["a"]) == [True]

    _with_redis(server, main)


def test_a_redis_that_dies_is_done_without_and_taken_up_again(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        scorer = Scorer()
        assert _facts(await _ask(mine, ["a"], scorer)) == [(0.0, "miss")]
        server.kill()
        for _ in range(3):
            assert _facts(await _ask(mine, ["a"], scorer)) == [(0.0, "bypass")]
        server.start()
        await asyncio.sleep(0.25)
        assert _facts(await _ask(mine, ["a"], scorer)) == [(0.0, "miss")]
        assert _facts(await _ask(mine, ["a"], scorer)) == [(0.0, "hit")]

    _with_redis(server, main, retry_after_s=0.2)


def test_a_redis_that_hangs_costs_one_short_wait(server: RedisServer) -> None:
    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        scorer = Scorer()
        await _ask(mine, ["a"], scorer)
        server.process.send_signal(signal.SIGSTOP)
        try:
            began = time.perf_counter()
            for _ in range(50):
                assert _facts(await _ask(mine, ["a"], scorer)) == [(0.0, "bypass")]
            assert 0.1 <= time.perf_counter() - began < 0.6
        finally:
            server.process.send_signal(signal.SIGCONT)

    _with_redis(server, main, timeout_s=0.1, retry_after_s=60.0)


def test_a_redis_that_never_was_is_done_without(tmp_path: Path) -> None:
    gone = RedisServer(tmp_path)
    gone.kill()

    async def main(mine: RewardCache, theirs: RewardCache) -> None:
        assert _facts(await _ask(mine, ["a"], Scorer())) == [(0.0, "bypass")]

    _with_redis(gone, main)


@pytest.mark.parametrize("junk", [b"", b"\xff", b"[1]", b'[["x","v1","abc",0,{}]]', b'[[NaN,"v1","abc",0,{}]]'])
def test_what_is_no_score_is_a_miss(junk: bytes) -> None:
    async def main() -> None:
        store = MemoryStore(CacheConfig())
        await store.put_many({"a": junk})
        assert _facts(await _ask(RewardCache(store, 1.0), ["a"], Scorer())) == [(0.0, "miss")]

    asyncio.run(main())


def test_no_store_is_no_store() -> None:
    assert make_store(CacheConfig(type="none")) is None
