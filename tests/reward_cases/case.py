"""How the contract tests make one row of the REWARDS table, and samples that it can and cannot score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylign.types import Prompt, RewardSample
from rewards import RewardConfig, make_reward
from rewards.base import Reward

SIGN = Prompt("p", 'a sign that says "HELLO"')


@dataclass(frozen=True)
class Case:
    """One row under test. `make` builds the reward on a tiny model or a scripted engine; nothing is downloaded."""

    config: RewardConfig
    good: Callable[[int], list[RewardSample]]
    """That many different samples that score."""
    bad: Sequence[RewardSample]
    """Samples that must be `invalid_input`."""
    make: Callable[[RewardConfig], Reward] = make_reward  # type: ignore[assignment]  # each case has its own config
    prompt: Prompt = SIGN
    """One that passes the reward's `check`."""
