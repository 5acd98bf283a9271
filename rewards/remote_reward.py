"""A reward that another Raylign reward service computes: `remote`.

For scorers whose packages clash with everybody else's, or that live on other machines. The service there describes
the reward; its values, versions and errors pass through unchanged.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from raylign.errors import ConfigError
from raylign.types import Prompt, RewardBreakdown, RewardFailure, RewardSample, RewardScore
from rewards.base import FailureCode, Modality, RewardConfig, failure
from rewards.wire import JsonObject, RewardChoice, RewardInfo

if TYPE_CHECKING:
    import httpx2

    from rewards.remote import RewardClient

logger = logging.getLogger(__name__)

_ASK_AGAIN_TIMEOUT_S = 5.0


class RemoteConfig(RewardConfig):
    """A reward that another reward service serves."""

    type: Literal["remote"] = "remote"
    url: str = Field(pattern=r"^https?://\S+$")
    """Address of the service, such as http://scorers:8000."""
    reward: str = Field(min_length=1)
    """The reward's name there."""
    params: JsonObject = Field(default={})
    """What to set for it there, in every request."""
    token_env: str = "RAYLIGN_REMOTE_TOKEN"
    """Environment variable with the service's token; no token is sent when it is not set."""
    timeout_s: float = Field(default=120.0, gt=0)
    """A call that has no answer after this time, retries and all, is an error."""
    max_samples: int = Field(default=64, ge=1)
    """Most samples in a request."""


class RemoteReward:
    """What it is like is known after `load`; until then it promises nothing."""

    def __init__(self, config: RemoteConfig, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        """`transport` replaces the network."""
        self.name = config.name
        self._config = config
        self._transport = transport
        self._info: RewardInfo | None = None
        self._client: tuple[asyncio.AbstractEventLoop, RewardClient] | None = None

    @property
    def version(self) -> str:
        return self._info.version if self._info else ""

    @property
    def fingerprint(self) -> str:
        return self._info.model_fingerprint if self._info else ""

    @property
    def modality(self) -> Modality:
        return self._info.modality if self._info else "image"

    @property
    def range(self) -> tuple[float, float] | None:
        low, high = (self._info.range if self._info else None) or (None, None)
        return None if low is None or high is None else (low, high)

    @property
    def higher_is_better(self) -> bool:
        return self._info.higher_is_better if self._info else True

    @property
    def deterministic(self) -> bool:
        return self._info is not None and self._info.deterministic

    @property
    def uses_seed(self) -> bool:
        return self._info.uses_seed if self._info else True

    @property
    def metadata_keys(self) -> Mapping[str, str]:
        return self._info.metadata_keys if self._info else {}

    def load(self) -> None:
        """Ask the service what the reward is. Raises ConfigError if it cannot be reached or does not serve it."""
        # A thread, because whoever calls may have an event loop running.
        with ThreadPoolExecutor(1) as thread:
            self._info = thread.submit(asyncio.run, self._ask()).result()

    def probe(self) -> None:
        """None: the service there looks after its own health."""

    def check(self, prompt: Prompt) -> None:
        """Any prompt will do; only the service there could tell."""

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        if not samples:
            return []
        if self._info is None:
            self._info = await self._ask()
        choice = RewardChoice(name=self._config.reward, weight=1.0, required=True, params=self._config.params)
        client = self._client_of_this_loop()
        answers = await client.score(samples, only=[choice], deadline_s=self._config.timeout_s)
        scores = [self._score_of(answer) for answer in answers]
        await self._keep_up(scores, self._info)
        return scores

    async def _ask(self) -> RewardInfo:
        async with self._connect() as client:
            return await client.reward(self._config.reward)

    def _connect(self) -> RewardClient:
        from rewards.remote import RewardClient

        return RewardClient(
            self._config.url,
            os.environ.get(self._config.token_env) or None,
            timeout_s=self._config.timeout_s,
            max_samples=self._config.max_samples,
            transport=self._transport,
        )

    def _client_of_this_loop(self) -> RewardClient:
        """Connections belong to the event loop that opened them."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._client[0] is not loop:
            self._client = (loop, self._connect())
        return self._client[1]

    def _score_of(self, answer: RewardBreakdown) -> RewardScore:
        if answer.scores:
            # Whether it was remembered there says nothing about remembering here.
            return replace(answer.scores[0], name=self.name, cache="bypass")
        problem = answer.failure or RewardFailure("model_error", "the reward service gave neither a score nor a reason")
        return failure(self, cast("FailureCode", problem.code), problem.message, problem.retryable)

    async def _keep_up(self, scores: Sequence[RewardScore], info: RewardInfo) -> None:
        """The service may have been upgraded; scores say by which version they were given.

        What else has changed, such as the metadata that the reward reads, it is asked for.
        """
        known = (info.version, info.model_fingerprint)
        if all((score.version, score.fingerprint) == known for score in scores if score.value is not None):
            return
        try:
            async with asyncio.timeout(_ASK_AGAIN_TIMEOUT_S):
                self._info = await self._ask()
        except (ConfigError, TimeoutError) as error:  # these scores are good all the same
            logger.warning("reward %r has changed and cannot be asked what it is: %r", self.name, error)
