"""The service's configuration: typos, names, and when a token is needed."""

import os
from pathlib import Path

import pytest

from raylign.config import load_config, parse_config
from raylign.errors import ConfigError
from services.reward_config import RewardServerConfig, ServiceConfig, is_loopback

SHIPPED = Path(__file__).parents[2] / "configs" / "rewards_cpu.toml"


def test_the_shipped_file_uses_every_reward() -> None:
    config = load_config(RewardServerConfig, SHIPPED, {"service.port": "9001", "rewards.0.mode": "flow_grpo"})
    assert [reward.type for reward in config.rewards] == ["ocr", "jpeg"]
    assert config.service.port == 9001
    assert config.service.http


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rewards": [{"type": "orc"}]}, "did you mean 'ocr'"),
        ({"rewards": [{"type": "ocr", "wieght": 1}]}, "did you mean `weight`"),
        ({"rewards": [{"type": "ocr"}, {"type": "ocr"}]}, "ocr occur more than once"),
        ({"rewards": []}, "at least 1"),
        ({"rewards": [{"type": "ocr", "weight": float("nan")}]}, "finite"),
    ],
)
def test_mistakes_are_named(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RewardServerConfig, data, "test")


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("node7", False),
    ],
)
def test_loopback(host: str, private: bool) -> None:
    assert is_loopback(host) is private


def test_a_token_is_needed_off_loopback(tmp_path: Path) -> None:
    unset = "RAYLIGN_TEST_TOKEN_THAT_IS_NOT_SET"
    assert unset not in os.environ
    assert ServiceConfig(token_env=unset).read_token() is None
    with pytest.raises(ConfigError, match=r"open to everyone at 0\.0\.0\.0; set token_file"):
        ServiceConfig(host="0.0.0.0", token_env=unset).read_token()
    file = tmp_path / "token"
    file.write_text("s3cret\n", encoding="utf-8")
    assert ServiceConfig(host="0.0.0.0", token_env=unset, token_file=file).read_token() == "s3cret"
    file.write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is empty"):
        ServiceConfig(token_file=file).read_token()
    with pytest.raises(ConfigError, match="cannot read token_file"):
        ServiceConfig(token_file=tmp_path / "missing").read_token()
