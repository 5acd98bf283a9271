"""Remembered scores: equal content is scored once, by whoever asks first.

    keys of the samples ──▶ asked by somebody here this moment? ──▶ wait for that answer
                        ──▶ in the store?                       ──▶ hit
                        ──▶ claimed in another process?         ──▶ wait for its answer, a bounded time
                        ──▶ score, remember, tell those who wait

A key is the SHA-256 of everything that a score depends on: the reward's type and settings, version and model
fingerprint, the request's parameters, the prompt (NFC), the decoded pixels or the text, the reference, the metadata
that the reward declares, and the seed if it draws. Only values of deterministic rewards are remembered, never failures.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raylign.types import JsonValue, RewardSample, RewardScore
from services.reward_store import Store

KEY_VERSION = 2
"""Changes whenever the meaning of a key or the form of a value does."""
Answer = tuple[RewardScore, ...]
"""What one key stands for: one sample's score, or those of a group whose candidates were compared."""
Compute = Callable[[list[int]], Awaitable[list[Answer]]]
"""Works out the answers of these places of the list of keys."""


@dataclass(frozen=True, slots=True)
class RewardFacts:
    """What the cache has to know of a served reward; told by its replica."""

    name: str
    version: str
    fingerprint: str
    deterministic: bool
    uses_seed: bool
    metadata_keys: tuple[str, ...]
    compares: bool
    """Whether it scores a group's candidates together."""

    def made(self, score: RewardScore) -> bool:
        """Whether a score is a value by just this version of the reward."""
        return score.value is not None and (score.version, score.fingerprint) == (self.version, self.fingerprint)


class Keys:
    """The keys of one list of samples under any reward; pictures are hashed once."""

    def __init__(self, samples: Sequence[RewardSample]) -> None:
        self._samples = samples
        self._pixels = [_pixels(sample) for sample in samples]

    def of(self, kind: str, facts: RewardFacts, params: Mapping[str, JsonValue]) -> list[str]:
        """One key per sample; `kind` is the reward's type and settings. Raises TypeError for metadata not JSON."""
        reward = _sha256([KEY_VERSION, kind, facts.version, facts.fingerprint, params])
        return [
            _sha256([reward, pixels, *_content(sample, facts)])
            for sample, pixels in zip(self._samples, self._pixels, strict=True)
        ]

    def of_group(self, kind: str, facts: RewardFacts, params: Mapping[str, JsonValue]) -> str:
        """One key for all samples as candidates of one prompt, in this order: judges see positions."""
        return _sha256(["group", *self.of(kind, facts, params)])


def _content(sample: RewardSample, facts: RewardFacts) -> list[object]:
    """What a score depends on beside the pictures."""
    metadata = sample.prompt.metadata
    return [
        unicodedata.normalize("NFC", sample.prompt.text),
        sample.text,
        sample.reference,
        {key: metadata[key] for key in facts.metadata_keys if key in metadata},
        sample.seed if facts.uses_seed else None,
    ]


def _pixels(sample: RewardSample) -> str:
    """The pictures' hash: number, type and shape of each, and their bytes; copied only if not contiguous."""
    if sample.image_HWC is None:
        return ""
    digest = hashlib.sha256()
    for image_HWC in (sample.image_HWC, *sample.more_images_HWC):
        digest.update(f"{image_HWC.dtype.str}{image_HWC.shape}".encode())
        digest.update(np.ascontiguousarray(image_HWC).data)
    return digest.hexdigest()


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class RewardCache:
    """A store, and the questions that are being answered in this process."""

    def __init__(self, store: Store, lock_ttl_s: float) -> None:
        self._store = store
        self._lock_ttl_s = lock_ttl_s
        self._flights: dict[str, asyncio.Future[Answer | None]] = {}

    async def answers(self, keys: Sequence[str], compute: Compute, facts: RewardFacts, seconds: float) -> list[Answer]:
        """One answer per key, in order: remembered, or by `compute`, which must answer everything it is asked.

        `seconds` bounds the waiting for others; `compute` keeps its own time.
        """
        until_s = asyncio.get_running_loop().time() + seconds
        lead: dict[str, int] = {}
        follow: dict[int, asyncio.Future[Answer | None]] = {}
        for place, key in enumerate(keys):
            flight = self._flights.get(key)
            if flight is not None:
                follow[place] = flight
            else:
                self._flights[key] = asyncio.get_running_loop().create_future()
                lead[key] = place
        found: dict[int, Answer] = {}
        try:
            found |= await self._lead(lead, compute, facts, seconds)
        finally:
            for key in lead:
                flight = self._flights.pop(key)
                if not flight.done():
                    flight.set_result(None)
        if follow:
            await asyncio.wait(set(follow.values()), timeout=max(0.0, until_s - asyncio.get_running_loop().time()))
            followed = {place: flight.result() for place, flight in follow.items() if flight.done()}
            found |= {place: _hit(answer, facts.name) for place, answer in followed.items() if answer is not None}
        alone = [place for place in follow if place not in found]
        if alone:
            found |= dict(zip(alone, await compute(alone), strict=True))
        return [found[place] for place in range(len(keys))]

    async def close(self) -> None:
        """Let go of the store's connections."""
        await self._store.close()

    async def _lead(
        self, places: Mapping[str, int], compute: Compute, facts: RewardFacts, seconds: float
    ) -> dict[int, Answer]:
        """Answer keys that nobody here was working out."""
        keys = list(places)
        stored = await self._store.get_many(keys)
        found = self._recall(facts.name, places, dict(zip(keys, stored or [], strict=False)))
        missing = [key for key in keys if places[key] not in found]
        if not missing:
            return found
        if stored is None:  # away: no claims either, and one wait was enough
            return found | await self._score(missing, places, compute, facts, remember=False)
        claims = await self._store.claim(missing)
        mine = [key for key, claimed in zip(missing, claims, strict=True) if claimed]
        others = [key for key, claimed in zip(missing, claims, strict=True) if not claimed]
        try:
            found |= await self._score(mine, places, compute, facts)
        finally:
            await self._store.release(mine)
        if others:
            # Half of the time that is left stays for scoring what the others do not answer.
            waited = await self._store.await_others(others, min(self._lock_ttl_s, seconds / 2))
            found |= self._recall(facts.name, places, dict(zip(others, waited, strict=True)))
            found |= await self._score([key for key in others if places[key] not in found], places, compute, facts)
        return found

    def _recall(self, name: str, places: Mapping[str, int], stored: Mapping[str, bytes | None]) -> dict[int, Answer]:
        """Stored answers by place; what cannot be read was never stored."""
        answers: dict[int, Answer] = {}
        for key, value in stored.items():
            answer = None if value is None else _decode(value, name)
            if answer is not None:
                self._flights[key].set_result(answer)
                answers[places[key]] = answer
        return answers

    async def _score(
        self,
        keys: Sequence[str],
        places: Mapping[str, int],
        compute: Compute,
        facts: RewardFacts,
        remember: bool = True,
    ) -> dict[int, Answer]:
        """Work out answers, tell those who wait, and remember the values."""
        if not keys:
            return {}
        computed = dict(zip(keys, await compute([places[key] for key in keys]), strict=True))
        for key, answer in computed.items():
            # Whoever waits for an answer that may differ the next time, such as a timeout, asks for himself.
            passing = any(score.error is not None and score.error.retryable for score in answer)
            self._flights[key].set_result(None if passing else answer)
        values = {
            key: value
            for key, answer in computed.items()
            if all(map(facts.made, answer)) and (value := _encode(answer)) is not None
        }
        if remember and values and await self._store.put_many(values):
            computed |= {key: tuple(replace(s, cache="miss") for s in computed[key]) for key in values}
        return {places[key]: answer for key, answer in computed.items()}


def _hit(answer: Answer, name: str) -> Answer:
    """An answer to somebody else's question; equal rewards under two names share answers."""
    return tuple(replace(score, name=name, cache="hit" if score.error is None else "bypass") for score in answer)


def _encode(answer: Answer) -> bytes | None:
    """An answer as it is stored; None when its details cannot be."""
    rows = [[score.value, score.version, score.fingerprint, score.seconds, dict(score.details)] for score in answer]
    try:
        return json.dumps(rows, separators=(",", ":")).encode()
    except (TypeError, ValueError):
        return None


def _decode(data: bytes, name: str) -> Answer | None:
    """A stored answer, or None if the bytes are not one."""
    try:
        return tuple(
            RewardScore(name, float(value), None, version, seconds, details, fingerprint, cache="hit")
            for value, version, fingerprint, seconds, details in json.loads(data)
        )
    except (TypeError, ValueError):
        return None
