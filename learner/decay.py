"""How slowly a policy's relative follows it: the one schedule that the forward-process family's papers use.

    d(s) = min(start_value + max(0, s - start) slope, end),   relative <- d relative + (1 - d) policy

s counts the run's optimiser steps; the relative moves once per learner step, after them. A configuration gives a
table, a preset's number, or "start-start_value-slope-end", as the released code does.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from raylign.config import Config


class DecaySchedule(Config):
    """Decay d after s optimiser steps; the defaults are DiffusionNFT's for GenEval and multi-reward."""

    start: int = Field(default=0, ge=0)
    """Optimiser steps before d starts to rise; until then it is start_value."""
    start_value: float = Field(default=0.0, ge=0, le=1)
    """d at the start; 0 copies the policy, which is fully on-policy."""
    slope: float = Field(default=0.001, ge=0)
    """Rise of d per optimiser step."""
    end: float = Field(default=0.5, ge=0, le=1)
    """Highest d; 1 never moves."""

    def at(self, num_optimiser_steps: int) -> float:
        """d after so many optimiser steps."""
        return min(self.start_value + max(0, num_optimiser_steps - self.start) * self.slope, self.end)


def _schedule(start: int, start_value: float, slope: float, end: float) -> DecaySchedule:
    return DecaySchedule(start=start, start_value=start_value, slope=slope, end=end)


DECAY_PRESETS: dict[int, DecaySchedule] = {
    0: _schedule(0, 0.0, 0.0, 0.0),
    1: _schedule(0, 0.0, 0.001, 0.5),
    2: _schedule(75, 0.0, 0.0075, 0.999),
    3: _schedule(0, 1.0, 0.0, 1.0),
    4: _schedule(0, 0.0, 0.02, 0.99),
    5: _schedule(0, 0.0, 0.01, 0.5),
    6: _schedule(0, 0.0, 0.0075, 0.999),
}
"""CRD's numbered schedules. 0 always copies, 3 never moves; DiffusionNFT's GenEval runs use 1, its OCR runs 2."""


def read_decay(value: object) -> object:
    """A preset's number or "start-start_value-slope-end" as a schedule; all else as it is, for pydantic to judge."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value not in DECAY_PRESETS:
            raise ValueError(f"decay preset must be one of {sorted(DECAY_PRESETS)}, got {value}")
        return DECAY_PRESETS[value]
    if not isinstance(value, str):
        return value
    try:
        start, start_value, slope, end = (float(part) for part in value.split("-"))
    except ValueError:
        raise ValueError(f'a decay is a table, a preset or "start-start_value-slope-end", got {value!r}') from None
    return {"start": start, "start_value": start_value, "slope": slope, "end": end}


Decay = Annotated[DecaySchedule, BeforeValidator(read_decay)]
"""The type of a configuration's key."""
