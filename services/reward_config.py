"""The reward service's configuration; reading it does not load Ray."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_serializer, model_validator

from raylign.config import Config
from raylign.errors import ConfigError
from rewards import RewardUnion, check_names

HTTP_CPUS = 0.5
"""CPUs that Ray sets aside for each process of the HTTP face."""


class AutoscalingConfig(Config):
    """How many replicas a reward has when its load decides."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest replicas; at least one, because a reward without any answers its first caller late."""
    max_replicas: int = Field(default=4, ge=1)
    """Most replicas."""
    target_ongoing: float = Field(default=8.0, gt=0)
    """Calls that each replica should have in hand; more of them add replicas."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """How long the load must be high before replicas are added."""
    downscale_delay_s: float = Field(default=120.0, ge=0)
    """How long it must be low before they are taken away."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class ServingConfig(Config):
    """How one reward is served."""

    num_replicas: int = Field(default=1, ge=1)
    """Replicas of each reward."""
    autoscaling: AutoscalingConfig | None = None
    """In place of `num_replicas`: as many as the load asks for."""
    num_cpus_per_replica: float = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside per replica; fractions share a core."""
    num_gpus_per_replica: float = Field(default=0.0, ge=0)
    """GPUs that Ray sets aside per replica; fractions share a device."""
    max_batch_size: int = Field(default=8, ge=1)
    """Calls (a training call brings a whole group) that a replica scores together."""
    batch_wait_ms: float = Field(default=0.0, ge=0)
    """How long an idle replica waits for more calls before it starts, milliseconds; a busy one gathers them anyway."""
    max_concurrent_batches: int = Field(default=1, ge=1)
    """Batches that a replica has in hand at once; more than one suits a reward that waits for a server of its own."""
    max_queued_requests: int = Field(default=512, ge=1)
    """Calls that may wait, per caller, for a replica to be free; further ones are refused. Sized for a burst: calls
    that the replicas have not taken yet count."""
    timeout_s: float = Field(default=120.0, gt=0)
    """A call without an answer after this time is an error."""
    probe_period_s: float = Field(default=30.0, gt=0)
    """A replica that scored nothing for this long scores its reward's probe; three failures in a row replace it."""
    drain_timeout_s: float = Field(default=20.0, ge=0)
    """How long a replica that is being stopped may take to answer the calls it has."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> ServingConfig:
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling are both given; keep one of them")
        return self

    @model_serializer(mode="wrap")
    def _as_one_way_to_count(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written reads back: without the count that autoscaling stands in place of."""
        data = write(self)
        return data if self.autoscaling is None else {key: data[key] for key in data if key != "num_replicas"}

    @property
    def max_replicas(self) -> int:
        """Most replicas it may have."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def min_replicas(self) -> int:
        """Fewest replicas it may have."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    def overridden(self, by: ServingConfig) -> ServingConfig:
        """This with the keys that `by` was given."""
        given = by.model_fields_set
        base = {key: getattr(self, key) for key in self.model_fields_set & set(ServingConfig.model_fields)}
        if given & {"num_replicas", "autoscaling"}:  # one says it all, and replaces the other
            base = {key: value for key, value in base.items() if key not in ("num_replicas", "autoscaling")}
        return ServingConfig(**{**base, **{key: getattr(by, key) for key in given}})


class CacheConfig(Config):
    """Where scores are remembered. Only values of deterministic rewards are, by the content they depend on."""

    type: Literal["memory", "redis", "none"] = "memory"
    """memory: in the process that asks; redis: shared by all, and kept when they stop."""
    url: str = "redis://127.0.0.1:6379/0"
    """The Redis server's address; `rediss://` and `unix://` work too."""
    url_env: str = "RAYLIGN_REWARD_CACHE_URL"
    """Environment variable with the address, where it has a password in it; stands above `url`."""
    ttl_s: float = Field(default=7 * 86400.0, gt=0)
    """How long Redis keeps a score."""
    max_entries: int = Field(default=200_000, ge=1)
    """Most scores in memory; those not used for longest go first."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Most bytes in memory."""
    timeout_s: float = Field(default=0.1, gt=0)
    """Longest wait for Redis; a server that is slower, or away, is done without."""
    retry_after_s: float = Field(default=5.0, gt=0)
    """How long Redis is left alone after it did not answer."""
    lock_ttl_s: float = Field(default=10.0, gt=0)
    """How long one process may take to score what others wait for, before they score it themselves."""

    def address(self) -> str:
        """The Redis server's address."""
        return os.environ.get(self.url_env, "").strip() or self.url


class ServiceConfig(ServingConfig):
    """How rewards are served: each reward's replicas and batches, the cache, and the HTTP door."""

    per_reward: dict[str, ServingConfig] = Field(default_factory=dict[str, ServingConfig])
    """By a reward's name: what it has otherwise than the others, such as `[service.per_reward.ocr]`."""
    cache: CacheConfig = CacheConfig()
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for replicas to load their models."""
    http: bool = False
    """Also serve over HTTP; a run reaches its rewards by handle and needs none."""
    http_replicas: int = Field(default=1, ge=1)
    """Processes that read requests and pictures."""
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
    max_request_pixels: int = Field(default=2**26, ge=1)
    """Most pixels in all pictures of a request together."""
    body_timeout_s: float = Field(default=60.0, gt=0)
    """A request whose body has not arrived after this time is refused."""
    retry_after_s: float = Field(default=1.0, gt=0)
    """How long clients that are refused for load are told to wait."""
    max_requests: int = Field(default=64, ge=1)
    """Most requests for scores that each process of the HTTP face holds at a time; more are told to come back."""
    max_requests_per_s: float | None = Field(default=None, gt=0)
    """Most requests per second from one address, on average; bursts of a second's worth pass. No limit by default."""
    replay_s: float = Field(default=300.0, ge=0)
    """How long an answer is kept for a client that repeats its request under the same id; 0 keeps none."""

    @field_serializer("per_reward")
    def _as_given(self, tables: dict[str, ServingConfig]) -> dict[str, dict[str, Any]]:
        """Without the defaults: read back, they would stand above the keys that all rewards have."""
        return {name: table.model_dump(mode="json", exclude_unset=True) for name, table in tables.items()}

    def serving(self, reward: str) -> ServingConfig:
        """How the reward of this name is served."""
        override = self.per_reward.get(reward)
        return self if override is None else self.overridden(override)

    def check_per_reward(self, names: Collection[str]) -> None:
        """Raise ConfigError if `per_reward` speaks of a reward that is not there."""
        for unknown in sorted(set(self.per_reward) - set(names)):
            near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"rewards: {', '.join(names)}"
            raise ConfigError(f"per_reward.{unknown}: no reward has this name; {hint}")

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
    def _names_fit(self) -> RewardServerConfig:
        check_names(self.rewards)
        self.service.check_per_reward([reward.name for reward in self.rewards])
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
