"""Which of a sampler's steps are stochastic in a learner step: a window that stays, slides or jumps.

MixGRPO (2507.21802) and Flow-GRPO-Fast train on a few steps only; the others follow the ODE. A window is a pure
function of configuration, run seed and learner step, so every worker knows it and a resumed run goes on in it.

Sliding follows MixGRPO's GRPOTrainingStates: the window rests for so many learner steps at each place, the same number
(progressive), linearly fewer towards the end (decay), or ceil(advance_every exp(-decay_rate max(0, start -
decay_from))) (exp_decay); then it moves on by `stride`. Its windows run out at the end, down to none; ours are whole:
the last place is the last where one fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from raylign.config import Config
from raylign.errors import ConfigError
from raylign.keys import generator


class WindowConfig(Config):
    """A window of consecutive stochastic steps, counted from 0."""

    strategy: Literal["fixed", "random", "progressive", "decay", "exp_decay"] = "progressive"
    """fixed: stays at `first`. random: anywhere, anew each learner step. The others slide, see the module."""
    size: int = Field(default=4, ge=1)
    """Steps in the window."""
    first: int = Field(default=0, ge=0)
    """First step that the window reaches."""
    last: int | None = Field(default=None, ge=0)
    """Last step that the window reaches; the one before the sampler's last when not given."""
    advance_every: int = Field(default=25, ge=1)
    """Learner steps in one place; with decay and exp_decay, in the first."""
    stride: int = Field(default=1, ge=1)
    """Steps that a sliding window moves on by."""
    roll_back: bool = True
    """Start over after the last place; else stay there."""
    min_advance: int | None = Field(default=None, ge=1)
    """decay: learner steps that the last place would have at the end; a quarter of `advance_every` when not given."""
    decay_from: int = Field(default=13, ge=0)
    """exp_decay: the start from which places are held for less time."""
    decay_rate: float = Field(default=0.1, ge=0)
    """exp_decay: the exponent's rate per step."""


def window_starts(config: WindowConfig, num_steps: int) -> Sequence[int]:
    """Where the window can start, in the order it slides.

    Raises ConfigError if it does not fit between `first` and `last` of so many steps.
    """
    last = _last(config, num_steps)
    final = last - config.size + 1
    if last >= num_steps or final < config.first:
        raise ConfigError(
            f"a window of {config.size} steps does not fit between steps {config.first} and {last} of {num_steps} "
            f"(counted from 0; the last step, {num_steps - 1}, is out of reach unless `window.last` says so); "
            "change window.size, window.first, window.last or num_steps"
        )
    if config.strategy == "fixed":
        return [config.first]
    if config.strategy == "random":
        return range(config.first, final + 1)
    places = list(range(config.first, final + 1, config.stride))
    return places if places[-1] == final else [*places, final]


def window_steps(config: WindowConfig, num_steps: int, run_seed: int, learner_step: int) -> range:
    """The stochastic steps of one learner step (from 1), inside [0, num_steps). Raises as `window_starts`."""
    starts = window_starts(config, num_steps)
    if config.strategy == "random":
        draw = torch.randint(len(starts), (1,), generator=generator(run_seed, "window", learner_step))
        start = starts[int(draw)]
    else:
        start = _place(
            starts, [_stay(config, start, num_steps) for start in starts], learner_step - 1, config.roll_back
        )
    return range(start, start + config.size)


def _last(config: WindowConfig, num_steps: int) -> int:
    return num_steps - 2 if config.last is None else config.last


def _stay(config: WindowConfig, start: int, num_steps: int) -> int:
    """Learner steps that the window spends at a start."""
    if config.strategy == "decay":
        least = max(1, config.advance_every // 4) if config.min_advance is None else config.min_advance
        progress = start / max(1, _last(config, num_steps))
        return max(least, int(config.advance_every * (1 - progress) + least * progress))
    if config.strategy == "exp_decay":
        return math.ceil(config.advance_every * math.exp(-config.decay_rate * max(0, start - config.decay_from)))
    return config.advance_every


def _place(starts: Sequence[int], stays: Sequence[int], elapsed: int, roll_back: bool) -> int:
    """The start that is held after so many learner steps."""
    if roll_back:
        elapsed %= sum(stays)
    for start, stay in zip(starts, stays, strict=True):
        if elapsed < stay:
            return start
        elapsed -= stay
    return starts[-1]
