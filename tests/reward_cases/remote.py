"""A reward of another service; the service is the real application, without the network between."""

import httpx2

from rewards import JpegConfig, RewardConfig
from rewards.base import Reward
from rewards.remote_reward import RemoteConfig, RemoteReward
from tests.reward_cases.case import Case
from tests.reward_cases.local_http import LocalBackend, app_of
from tests.reward_cases.pictures import BAD_PICTURES, noise

CONFIG = RemoteConfig(url="http://scorers", reward="size")


def _make(config: RewardConfig) -> Reward:
    assert isinstance(config, RemoteConfig)
    app = app_of(LocalBackend([JpegConfig(name="size")]))
    return RemoteReward(config, httpx2.ASGITransport(app))


CASES = [Case(CONFIG, noise, BAD_PICTURES, _make)]
