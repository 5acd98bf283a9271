"""The `[guard]` table: how far each signal of reward hacking may go, what is done then, and which pairs are refused.

`services.guard` decides, `services.guard_run` acts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import Field

from raylign.config import Config
from raylign.errors import ConfigError

Signal = Literal["divergence", "held_out", "disagreement", "diversity", "artefacts", "kl"]
SIGNALS: tuple[Signal, ...] = ("divergence", "held_out", "disagreement", "diversity", "artefacts", "kl")
Action = Literal["warn", "lower_lr", "raise_kl", "drop_reward", "roll_back", "stop"]
ACTIONS: tuple[Action, ...] = ("warn", "lower_lr", "raise_kl", "drop_reward", "roll_back", "stop")
STATISTICS = ("sharpness", "jpeg", "brightness")
"""Types of rewards that are neither good nor bad as held-out metrics: a change either way is an artefact."""


class GuardActions(Config):
    """What is done when a signal passes its limit; `warn` is in all of it, as everything done is told."""

    divergence: tuple[Action, ...] = ("warn",)
    """A held-out metric fell while the trained reward rose, or fell by less."""
    held_out: tuple[Action, ...] = ("warn",)
    """A held-out metric fell, whatever the trained reward did."""
    disagreement: tuple[Action, ...] = ("warn",)
    """Rewards that agreed on which sibling is better no longer do."""
    diversity: tuple[Action, ...] = ("warn",)
    """Samples of one prompt became alike, and no held-out metric says that they became right."""
    artefacts: tuple[Action, ...] = ("warn",)
    """A statistic of the pictures, such as their sharpness, left its band."""
    kl: tuple[Action, ...] = ("warn",)
    """The distance to the reference left its band."""


class GuardConfig(Config):
    """Watches a run for reward hacking. Limits are relative to the run's own first or best evaluation."""

    enabled: bool = True
    """Whether it watches at all."""
    held_out: tuple[str, ...] | None = None
    """Names of the `only_eval` rewards of which more is better, or of their details, such as glyph_pixels/colour_right;
    all of them but statistics when not given."""
    statistics: tuple[str, ...] | None = None
    """Names of those that should stay as they are; sharpness, jpeg and brightness when not given."""
    max_divergence: float = Field(default=0.04, gt=0, lt=1)
    """Share of its best that a held-out metric may lose beyond the share that the trained reward lost since then."""
    max_fall: float = Field(default=0.15, gt=0, lt=1)
    """Share of its best that a held-out metric may lose in any case."""
    max_disagreement: float = Field(default=0.5, gt=0, le=2)
    """How far the rank correlation of two rewards within groups may fall below that of the run's first steps."""
    min_diversity: float = Field(default=0.2, ge=0, lt=1)
    """Share of the first evaluation's diversity that must be left, unless a held-out metric rose meanwhile."""
    max_drift: float = Field(default=5.0, gt=1)
    """Factor by which a statistic may grow or shrink from the first evaluation on."""
    max_kl: float | None = Field(default=None, gt=0)
    """Largest distance to the reference (`loss/kl`), as a mean over five steps; not watched when not given."""
    act_again_after: int = Field(default=3, ge=1)
    """Further readings beyond the limit after which a signal's actions are taken once more."""
    lr_factor: float = Field(default=0.5, gt=0, lt=1)
    """What `lower_lr` multiplies the learning rate by."""
    kl_factor: float = Field(default=2.0, gt=1)
    """What `raise_kl` multiplies the weight of the KL by."""
    drop: str | None = None
    """The reward that `drop_reward` gives the weight 0; the one that rose most when not given."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Times that `roll_back` goes back to the best checkpoint; the run stops the next time."""
    actions: GuardActions = GuardActions()

    def takes(self, action: Action) -> list[Signal]:
        """The signals that have an action among theirs."""
        return [signal for signal in SIGNALS if action in getattr(self.actions, signal)]


class Rewarded(Protocol):
    """What is to know of a reward's configuration."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def only_eval(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Watched:
    """Names in a run's metrics, and what each trained reward weighs."""

    trained: Mapping[str, float]
    held_out: tuple[str, ...]
    statistics: tuple[str, ...]


def watched(config: GuardConfig, rewards: Sequence[Rewarded]) -> Watched:
    """What there is to watch in a run with these rewards."""
    metrics = {reward.name: reward.type for reward in rewards if reward.only_eval}
    statistics = config.statistics
    if statistics is None:
        statistics = tuple(name for name, kind in metrics.items() if kind in STATISTICS)
    held_out = config.held_out
    if held_out is None:
        held_out = tuple(name for name in metrics if name not in statistics)
    trained = {reward.name: reward.weight for reward in rewards if not reward.only_eval}
    return Watched(trained, held_out, statistics)


def check_guard(
    config: GuardConfig, rewards: Sequence[Rewarded], algorithm: str, kl_weight: float, explores: bool, evaluates: bool
) -> None:
    """Raise ConfigError, with the remedy, for what this run cannot watch or do.

    `explores`: whether drafts are chosen by their rewards; `evaluates`: whether there are held-out prompts.
    """
    if not config.enabled:
        return
    names = watched(config, rewards)
    metrics = [reward.name for reward in rewards if reward.only_eval]
    for key, asked in (("held_out", names.held_out), ("statistics", names.statistics)):
        for name in asked:
            if name.partition("/")[0] not in metrics:
                raise ConfigError(
                    f"guard.{key} names {name!r}, which is no [[rewards]] with only_eval = true{_near(name, metrics)}"
                )
    for signal in config.takes("raise_kl"):
        if kl_weight == 0:
            raise ConfigError(
                f"guard.actions.{signal} has raise_kl, and algorithm {algorithm!r} has no KL here (its kl_weight is "
                "0, or it has none); set algorithm.kl_weight above 0, or choose lower_lr"
            )
    if config.max_kl is not None and kl_weight == 0:
        raise ConfigError(
            f"guard.max_kl = {config.max_kl:g} watches the distance to the reference, which algorithm {algorithm!r} "
            "does not measure with kl_weight = 0; set algorithm.kl_weight above 0, or remove max_kl"
        )
    if config.max_kl is None and config.actions.kl != ("warn",):
        raise ConfigError("guard.actions.kl is given without a band to leave; set guard.max_kl")
    _check_drop(config, names.trained, explores)
    for signal in config.takes("roll_back"):
        if not names.held_out or not evaluates:
            raise ConfigError(
                f"guard.actions.{signal} has roll_back, and no held-out metric says which checkpoint is best; add a "
                "[[rewards]] table with only_eval = true, and held-out prompts"
            )


def _check_drop(config: GuardConfig, trained: Mapping[str, float], explores: bool) -> None:
    if config.drop is not None and config.drop not in trained:
        raise ConfigError(f"guard.drop names {config.drop!r}, which is not trained on{_near(config.drop, trained)}")
    for signal in config.takes("drop_reward"):
        if len(trained) < 2:
            raise ConfigError(
                f"guard.actions.{signal} has drop_reward, and there is one reward to train on, {next(iter(trained))!r}:"
                " nothing would be left; add another, or choose lower_lr or roll_back"
            )
        if explores:
            raise ConfigError(
                f"guard.actions.{signal} has drop_reward, and rollout.explore chooses drafts by all rewards before "
                "they are trained on; remove one of the two"
            )


def _near(name: str, known: Mapping[str, float] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(map(repr, known)) or 'none'}"
