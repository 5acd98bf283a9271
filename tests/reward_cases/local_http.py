"""The reward service's application on an in-process backend, reached through httpx2's ASGI transport; no Ray."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI
from pydantic import Field

from raylign.types import Prompt, RewardSample, RewardScore
from rewards import JpegConfig, make_reward
from rewards.base import Modality, Params, Reward, RewardConfig, failure, score_totally, success
from rewards.images import encode_png
from rewards.wire import RewardInfo, describe
from services.reward_config import ServiceConfig
from services.reward_http import build_api, token_digest

IMAGES_GHWC = np.random.default_rng(0).integers(0, 256, (3, 24, 80, 3), dtype=np.uint8)
SAMPLES = [RewardSample(f"s{i}", Prompt(f"s{i}", f"prompt {i}"), image_HWC) for i, image_HWC in enumerate(IMAGES_GHWC)]
PNG = encode_png(IMAGES_GHWC[0])
JPEGS = (JpegConfig(), JpegConfig(name="large", direction="incompress", weight=0.5, required=False))


class LengthConfig(RewardConfig):
    """The number of letters, up to ten."""

    type: str = "length"


class LengthParams(Params):
    """What a request may set."""

    scale: float = Field(default=1.0, gt=0)


class LengthReward:
    """Scores a text by its length; an empty prompt is invalid input. Candidates of a group are ranked."""

    modality: Modality = "text"
    range: tuple[float, float] | None = (0.0, 10.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = "f1"
    version = "1"
    metadata_keys: Mapping[str, str] = {"language": "of the text"}
    params_model = LengthParams

    def __init__(self, config: RewardConfig, scale: float = 1.0) -> None:
        self.name = config.name
        self._config = config
        self._scale = scale

    def load(self) -> None: ...

    def probe(self) -> None: ...

    def check(self, prompt: Prompt) -> None: ...

    def with_params(self, params: Params) -> Reward:
        assert isinstance(params, LengthParams)
        return LengthReward(self._config, params.scale)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return [self._score_one(sample) for sample in samples]

    async def score_group(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        """Place among the candidates: 0 for the shortest."""
        lengths = sorted(len(sample.text or "") for sample in samples)
        return [success(self, float(lengths.index(len(sample.text or "")))) for sample in samples]

    def _score_one(self, sample: RewardSample) -> RewardScore:
        if sample.text is None or not sample.prompt.text:
            return failure(self, "invalid_input", "the sample needs a text and a prompt")
        return success(self, self._scale * min(10, len(sample.text)), details={"letters": (1, float("nan"))})


def make(config: Any) -> Reward:
    """Rewards of the table, and `LengthReward`."""
    return LengthReward(config) if isinstance(config, LengthConfig) else make_reward(config)


class LocalBackend:
    """Scores in this process. `before` is awaited first; it may wait, raise, or answer in the rewards' place."""

    def __init__(
        self,
        configs: Sequence[RewardConfig] = JPEGS,
        before: Callable[[Sequence[RewardSample]], Awaitable[Any]] | None = None,
        problem: str = "",
    ) -> None:
        self.configs = configs
        self.rewards = {config.name: make(config) for config in configs}
        self.problem = problem
        self.before = before
        self.calls: list[list[RewardSample]] = []

    async def score(self, samples, asks, deadline_s=None):
        return await self._score(samples, asks, grouped=False)

    async def score_group(self, samples, asks, deadline_s=None):
        return await self._score(samples, asks, grouped=True)

    async def _score(self, samples, asks, grouped: bool) -> dict[str, list[RewardScore]]:
        self.calls.append(list(samples))
        answered = await self.before(samples) if self.before is not None else None
        if answered is not None:
            return answered
        scores: dict[str, list[RewardScore]] = {}
        for ask in asks:
            reward = self.rewards[ask.name]
            if isinstance(reward, LengthReward):
                reward = reward.with_params(LengthParams(**dict(ask.params)))
            if grouped and isinstance(reward, LengthReward):
                scores[ask.name] = await reward.score_group(samples)
            else:
                scores[ask.name] = await score_totally(reward, samples)
        return scores

    async def describe(self) -> list[RewardInfo]:
        return [describe(config, self.rewards[config.name]) for config in self.configs]

    async def ready(self) -> dict[str, str]:
        return {name: self.problem if place == 0 else "" for place, name in enumerate(self.rewards)}


def app_of(backend: LocalBackend | None = None, token: str | None = None, **limits) -> FastAPI:
    """The application; `limits` are keys of the service's configuration."""
    backend = backend or LocalBackend()
    digest = None if token is None else token_digest(token)
    return build_api(backend, backend.configs, ServiceConfig(**limits), digest, "c0ffee", make)


def with_app(
    use: Callable[[httpx2.AsyncClient], Awaitable[Any]],
    backend: LocalBackend | None = None,
    token: str | None = None,
    **limits,
) -> Any:
    """What `use` makes of a client of the application."""
    app = app_of(backend, token, **limits)

    async def main() -> Any:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await use(client)

    return asyncio.run(main())


def post(path: str = "/v1/score", **kwargs) -> Callable[[httpx2.AsyncClient], Awaitable[httpx2.Response]]:
    """For `with_app`: one POST."""
    return lambda client: client.post(path, **kwargs)


def inline(name: str = "a", data: bytes = PNG, **more) -> dict:
    """A sample with its picture in the JSON."""
    image = {"encoding": "base64", "mime": "image/png", "data": base64.b64encode(data).decode(), **more}
    return {"id": name, "prompt": "a sign", "image": image}


def texts(*answers: str, prompt: str = "say", **more) -> list[dict]:
    """Samples with texts, named a, b, c and so on."""
    return [{"id": chr(97 + i), "prompt": prompt, "text": text, **more} for i, text in enumerate(answers)]


def refused(response: httpx2.Response, status: int) -> str:
    """The message of an answer that must have this status and an ErrorBody."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]["message"]
