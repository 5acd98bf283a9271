"""When a run with `max_staleness` above 0 stops being asynchronous, and when it is again. Pure: no Ray, no clock.

    asynchronous ──a band is left──▶ synchronous ──`return_after_steps` good steps──▶ asynchronous
      limit S                          limit 0

The limit is how old a group that is admitted now may become. When it falls, groups that were admitted before are still
trained on, within the old limit, and no others are admitted until then: the buffer runs empty, nothing is thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from raylign.config import Config

Band = Literal["parity", "deviation", "kl"]
BANDS: tuple[Band, ...] = ("parity", "deviation", "kl")
_METRICS: Mapping[Band, str] = {"deviation": "behaviour/deviation", "kl": "loss/kl"}
"""Which of a step's metrics each band is about."""


class AsyncGuardConfig(Config):
    """Bands that an asynchronous run must stay in; it goes on synchronously when it leaves one."""

    parity: bool = True
    """Whether a parity gap above the tolerance does that. It is measured again when the buffer is empty, and stops the
    run then; at once if this is false."""
    max_deviation: float = Field(default=0.05, gt=0)
    """Largest mean |ratio - 1| of the policy being trained to those that drew its samples (`behaviour/deviation`), for
    algorithms with a staleness_correction. The default catches runs that fall apart; a tighter one is some hundred clip
    ranges."""
    max_kl: float | None = Field(default=None, gt=0)
    """Largest distance to the reference (`loss/kl`), in the space of the algorithm's KL; not watched when not given."""
    return_after_steps: int | None = Field(default=None, ge=1)
    """Synchronous steps in a row within all bands after which the run is asynchronous again; never when not given."""


class StalenessGuard:
    """See the module. The controller tells it what it measured, and passes `limit` to the buffer."""

    def __init__(self, config: AsyncGuardConfig, max_staleness: int) -> None:
        self._config = config
        self._most = max_staleness
        self._num_good = 0
        self._recheck_at = 0
        self.limit = max_staleness
        """How old groups that are admitted now may become."""

    def after_step(self, metrics: Mapping[str, float]) -> Band | Literal["returned"] | None:
        """Judge a step by its metrics; what changed the limit, if something did.

        A number that is not finite is out of every band. Only steps without older samples count as good ones.
        """
        bands: Mapping[Band, float | None] = {"deviation": self._config.max_deviation, "kl": self._config.max_kl}
        for band, most in bands.items():
            value = metrics.get(_METRICS[band])
            if most is not None and value is not None and not value <= most:
                self._num_good = 0
                return self._fall(band)
        if self.limit == self._most:
            return None
        self._num_good = self._num_good + 1 if metrics["staleness/max"] == 0 else 0
        if self._num_good != self._config.return_after_steps:
            return None
        self.limit, self._num_good = self._most, 0
        return "returned"

    def forgives_gap(self, version: int, last_admitted_step: int) -> bool:
        """Whether a parity gap at a version may wait: there are groups of later steps to train on before anything else
        is drawn. If not, the run must stop."""
        return self._config.parity and self._most > 0 and last_admitted_step > version

    def gap(self, last_admitted_step: int) -> Band | None:
        """A parity gap was forgiven: it is measured again when those groups are trained on."""
        self._num_good, self._recheck_at = 0, last_admitted_step
        return self._fall("parity")

    def wants_parity(self, version: int) -> bool:
        """Whether this is the version at which a forgiven gap is measured again."""
        return version == self._recheck_at

    def metrics(self, events: Sequence[str]) -> dict[str, float]:
        """Of a step, with what changed since the last: the limit, and a count of each event; {} for a synchronous
        run."""
        if self._most == 0:
            return {}
        told = {f"failed/async_{band}": float(events.count(band)) for band in BANDS}
        return {"staleness/limit": float(self.limit), "async/returned": float(events.count("returned")), **told}

    def state(self) -> dict[str, int]:
        """What decides the next step, for a checkpoint."""
        return {"limit": self.limit, "num_good": self._num_good, "recheck_at": self._recheck_at}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a state."""
        self.limit = min(state["limit"], self._most)
        self._num_good, self._recheck_at = state["num_good"], state["recheck_at"]

    def _fall(self, band: Band) -> Band | None:
        if self.limit == 0:
            return None
        self.limit = 0
        return band
