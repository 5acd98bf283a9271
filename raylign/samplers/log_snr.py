"""Steps measured in half log-SNR, lambda(t) = log((1 - t) / t): the clock of exponential integrators.

A step t -> t' < t has length h = lambda(t') - lambda(t). All formulas here are written in e^-h, which is 0 where a
step starts at pure noise or ends at none, so that neither end is singular.
"""

from __future__ import annotations

import math

PURE_NOISE = 1 - 1e-6
"""A level from here on is 1, but for the rounding of fp32."""


def noise_ratio(sigma: float, following: float) -> float:
    """e^-h = t' (1 - t) / (t (1 - t')), in [0, 1)."""
    if sigma >= PURE_NOISE:
        return 0.0
    return following * (1 - sigma) / (sigma * (1 - following))


def length_ratio(before: float, sigma: float, following: float) -> float:
    """h / h0 of a step and the one before it: how far a line through the last two points is carried on.

    0 where the step before started at pure noise, infinitely far away. `following` must be above 0.
    """
    earlier = noise_ratio(before, sigma)
    return math.log(noise_ratio(sigma, following)) / math.log(earlier) if earlier > 0 else 0.0
