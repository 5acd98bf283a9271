"""The reward service's configuration; reading it does not load Ray."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, model_validator

from raylign.config import Config
from raylign.errors import ConfigError
from rewards import RewardUnion, check_names


class ServiceConfig(Config):
    """How rewards are served: replicas, batching, and the HTTP door."""

    num_replicas: int = Field(default=1, ge=1)
    """Replicas of each reward."""
    num_cpus_per_replica: float = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside per replica; fractions share a core."""
    max_batch_size: int = Field(default=8, ge=1)
    """Calls (a training call brings a whole group) that a replica scores together."""
    batch_wait_ms: float = Field(default=2.0, ge=0)
    """How long a replica waits for more calls before it starts, milliseconds."""
    timeout_s: float = Field(default=120.0, gt=0)
    """A call without an answer after this time is an error."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for replicas to load their models."""
    http: bool = False
    """Also serve over HTTP; a run reaches its rewards by handle and needs none."""
    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a token."""
    port: int = Field(default=8000, ge=1, le=65535)
    token_file: Path | None = None
    """File with the bearer token that clients must send; the environment variable is read when not given."""
    token_env: str = "RAYLIGN_REWARD_TOKEN"
    """Environment variable with the token."""
    max_body_bytes: int = Field(default=64 * 2**20, ge=1)
    """Largest request body."""
    max_samples: int = Field(default=256, ge=1)
    """Most samples in a request."""
    max_image_pixels: int = Field(default=2**24, ge=1)
    """Largest picture, width times height."""

    def read_token(self) -> str | None:
        """The token, or None if none is set. Raises ConfigError for a bad file, or if the address needs a token."""
        token = os.environ.get(self.token_env, "").strip()
        if self.token_file is not None:
            try:
                token = self.token_file.expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read token_file {self.token_file}: {error}") from None
            if not token:
                raise ConfigError(f"token_file {self.token_file} is empty; write a long random text into it")
        if not token and not is_loopback(self.host):
            raise ConfigError(
                f"the reward service would be open to everyone at {self.host}; set token_file or the environment "
                f"variable {self.token_env}, or bind host = '127.0.0.1'"
            )
        return token or None


class RewardServerConfig(Config):
    """A reward service of its own: `raylign serve-rewards`."""

    rewards: tuple[RewardUnion, ...] = Field(min_length=1)
    service: ServiceConfig = ServiceConfig(http=True)

    @model_validator(mode="after")
    def _names_are_unique(self) -> RewardServerConfig:
        check_names(self.rewards)
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
