"""The service's configuration: typos, names, and when a token is needed."""

import os
import tomllib
from pathlib import Path

import pytest

from raylign.config import load_config, parse_config
from raylign.errors import ConfigError
from services.config import RunConfig
from services.reward_config import CacheConfig, RewardServerConfig, ServiceConfig, is_loopback
from services.run_dir import config_toml

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
        ({"rewards": [{"type": "ocr"}], "service": {"per_reward": {"orc": {}}}}, "per_reward.orc: .* mean 'ocr'"),
        (
            {"rewards": [{"type": "ocr"}], "service": {"per_reward": {"x9": {}}}},
            "no reward has this name; rewards: ocr",
        ),
        (
            {"rewards": [{"type": "ocr"}], "service": {"per_reward": {"ocr": {"num_replcas": 2}}}},
            "did you mean `num_replicas`",
        ),
        ({"rewards": [{"type": "ocr"}], "service": {"autoscaling": {"min_replicas": 5}}}, "below min_replicas 5"),
        ({"rewards": [{"type": "ocr"}], "service": {"autoscaling": {}, "num_replicas": 2}}, "keep one of them"),
        ({"rewards": [{"type": "ocr"}], "service": {"cache": {"type": "redsi"}}}, "service.cache.type"),
    ],
)
def test_mistakes_are_named(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RewardServerConfig, data, "test")


def test_a_reward_is_served_by_the_defaults_and_its_own_keys() -> None:
    service = parse_config(
        ServiceConfig,
        {
            "num_replicas": 3,
            "max_batch_size": 4,
            "per_reward": {
                "judge": {"num_gpus_per_replica": 0.25, "autoscaling": {"max_replicas": 6}},
                "ocr": {"timeout_s": 9},
            },
        },
        "test",
    )
    judge, ocr, jpeg = (service.serving(name) for name in ("judge", "ocr", "jpeg"))
    assert (judge.num_gpus_per_replica, judge.max_batch_size, judge.max_replicas) == (0.25, 4, 6)
    assert (ocr.timeout_s, ocr.max_batch_size, ocr.max_replicas) == (9, 4, 3)
    assert (jpeg.timeout_s, jpeg.max_batch_size, jpeg.max_replicas) == (120, 4, 3)


def test_a_count_of_its_own_ends_the_autoscaling_of_all() -> None:
    data = {"autoscaling": {"max_replicas": 6}, "per_reward": {"ocr": {"num_replicas": 2}}}
    service = parse_config(ServiceConfig, data, "test")
    assert service.serving("ocr").autoscaling is None
    assert (service.serving("ocr").max_replicas, service.serving("jpeg").max_replicas) == (2, 6)


def test_the_cache_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheConfig(type="redis", url_env="RAYLIGN_TEST_CACHE_URL")
    assert cache.address() == "redis://127.0.0.1:6379/0"
    monkeypatch.setenv("RAYLIGN_TEST_CACHE_URL", "redis://:s3cret@node7:6379/0")
    assert cache.address() == "redis://:s3cret@node7:6379/0"


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


@pytest.mark.parametrize(
    "service",
    [
        {"max_batch_size": 32, "per_reward": {"ocr": {"num_replicas": 2}}},
        {"autoscaling": {"max_replicas": 3}},
        {"max_batch_size": 32, "per_reward": {"ocr": {"autoscaling": {"max_replicas": 3}}}},
    ],
)
def test_what_a_run_writes_down_serves_its_rewards_in_the_same_way(service: dict[str, object]) -> None:
    config = parse_config(RunConfig, {"reward_service": service}, "")
    read = parse_config(RunConfig, tomllib.loads(config_toml(config)), "")
    assert read.reward_service.serving("ocr") == config.reward_service.serving("ocr")
