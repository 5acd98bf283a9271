"""What an asynchronous run must hold together, checked when its configuration is read.

That policy-ratio methods name what they do about old samples is asked by the algorithm itself (`check_updates`).
"""

from __future__ import annotations

from raylign.errors import ConfigError
from services.staleness import AsyncGuardConfig


def check_async(guard: AsyncGuardConfig, max_staleness: int, algorithm: str, kl_weight: float) -> None:
    """Raise ConfigError, with the remedy, for a band that this run never measures or that has nothing to guard."""
    default = AsyncGuardConfig()
    if max_staleness == 0 and guard != default:
        raise ConfigError(
            "[async_guard] watches asynchronous runs, and max_staleness is 0; raise it, or remove the table"
        )
    if guard.max_kl is not None and kl_weight == 0:
        raise ConfigError(
            f"async_guard.max_kl = {guard.max_kl:g} watches the distance to the reference, which algorithm "
            f"{algorithm!r} does not measure with kl_weight = 0; set algorithm.kl_weight above 0, or remove max_kl"
        )
