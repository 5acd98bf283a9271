"""When a run hacks its reward, and what is done. Pure: a state and a step's metrics in, a state and a verdict out.

    every step        rank correlation of the rewards within groups, distance to the reference    (means of 5 steps)
    each evaluation   held-out metrics, statistics of the pictures, diversity

Each signal becomes a level, `guard/<signal>` in the metrics: 0 is where the run began or was at its best, 1 is the
limit. At 1 it trips and its actions are taken; it must come back below 1/2 before it can trip anew, and after
`act_again_after` further readings beyond the limit its actions are taken once more.

Nothing here depends on time, on chance or on what is not in the state, so a resumed run decides as it would have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field

from raylign.config import Config
from services.guard_config import SIGNALS, Action, GuardConfig, Signal, Watched

AGREEMENT = "guard/agreement"
"""Mean rank correlation of the trained rewards within groups, of the pair that agrees least."""
_KL = "loss/kl"
_WINDOW = 5
_REARMED = 0.5
_ROSE = 0.05
"""A held-out metric that rose by this share since the first evaluation explains why samples became alike."""
_NOISE = 0.5
"""Share of its 95 % interval's half-width that a change must pass: prompts and noise are the same every time, so their
spread, which the interval holds, mostly cancels."""
_TINY = 1e-6

Row = Mapping[str, float]


class Tripped(Config):
    """A signal beyond its limit."""

    readings: int = 0
    """Those beyond the limit since the actions were taken."""


class Peak(Config):
    """A held-out metric at its best."""

    value: float
    rewards: dict[str, float]
    """The trained rewards at that evaluation."""


class GuardEvent(Config):
    """Something that was done."""

    step: int
    signal: Signal
    actions: tuple[Action, ...]
    told: str


class GuardState(Config):
    """All that decides what comes next; it belongs into checkpoints."""

    step: int = -1
    """The last step that was judged."""
    tripped: dict[Signal, Tripped] = Field(default_factory=dict)
    first: dict[str, float] = Field(default_factory=dict)
    """The first evaluation's held-out metrics, statistics and diversity."""
    peaks: dict[str, Peak] = Field(default_factory=dict)
    best_step: int | None = None
    """The evaluation to go back to: the one of the greatest first held-out metric at which no signal was beyond its
    limit."""
    best_value: float | None = None
    first_agreement: tuple[float, ...] = ()
    agreement: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    lr_scale: float = 1.0
    kl_scale: float = 1.0
    dropped: tuple[str, ...] = ()
    num_rollbacks: int = 0
    events: tuple[GuardEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do after a step."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    events: tuple[GuardEvent, ...] = ()
    adjust: bool = False
    """Whether the learner's rates changed; they are in the state."""
    roll_back_to: int | None = None
    stop: bool = False
    is_best: bool = False
    """Whether this evaluation is the one to go back to from now on."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a signal stands: its level, and the numbers behind it for a person."""

    level: float
    told: str


def judge(config: GuardConfig, names: Watched, state: GuardState, step: int, row: Row) -> tuple[GuardState, Verdict]:
    """Judge a step by its metrics, those of an evaluation included if one was made. A step is judged once."""
    if not config.enabled or step <= state.step:
        return state, Verdict()
    state = _remember(state.model_copy(update={"step": step}), names, row)
    readings = _readings(config, names, state, row)
    tripped, acting = _trip(config, state.tripped, readings)
    state = state.model_copy(update={"tripped": tripped})
    metrics = {f"guard/{signal}": reading.level for signal, reading in readings.items()}
    evaluated = _trained_in(names, row) is not None
    state, is_best = _new_best(names, state, row) if evaluated and not tripped else (state, False)
    state, verdict = _act(config, names, state, row, {one: readings[one] for one in acting})
    metrics |= verdict.metrics
    metrics |= {"guard/tripped": float(len(tripped))}
    metrics |= {"guard/lr_scale": state.lr_scale} if config.takes("lower_lr") else {}
    metrics |= {"guard/kl_scale": state.kl_scale} if config.takes("raise_kl") else {}
    return state, Verdict(metrics, verdict.events, verdict.adjust, verdict.roll_back_to, verdict.stop, is_best)


def _remember(state: GuardState, names: Watched, row: Row) -> GuardState:
    """First values, peaks and windows."""
    changes: dict[str, object] = {}
    agreement, kl = _number(row, AGREEMENT), _number(row, _KL)
    if agreement is not None:
        if len(state.first_agreement) < _WINDOW:
            changes["first_agreement"] = (*state.first_agreement, agreement)
        changes["agreement"] = (*state.agreement, agreement)[-_WINDOW:]
    if kl is not None:
        changes["kl"] = (*state.kl, kl)[-_WINDOW:]
    rewards = _trained_in(names, row)
    if rewards is not None:
        held = {name: value for name in names.held_out if (value := _number(row, f"eval/{name}")) is not None}
        others = {
            name: value
            for name in (*names.statistics, "diversity")
            if (value := _number(row, f"eval/{name}")) is not None
        }
        changes["first"] = {**held, **others, **state.first}
        peaks = dict(state.peaks)
        for name, value in held.items():
            if name not in peaks or value > peaks[name].value:
                peaks[name] = Peak(value=value, rewards=rewards)
        changes["peaks"] = peaks
    return state.model_copy(update=changes)


def _readings(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> dict[Signal, Reading]:
    """The signals that have something to say at this step."""
    found = _of_steps(config, state, row)
    rewards = _trained_in(names, row)
    if rewards is None:
        return found
    falls = [_fall(state, name, row) for name in names.held_out if _number(row, f"eval/{name}") is not None]
    if falls:
        worst = max(falls, key=lambda fall: fall.share)
        found["held_out"] = Reading(worst.share / config.max_fall, worst.told)
        found["divergence"] = _divergence(config, names, state, falls, rewards)
        if _both("diversity", state, row) and state.first["diversity"] > 0:
            found["diversity"] = _diversity(config, state, falls, row)
    drifts = [_drift(name, state, row) for name in names.statistics if _both(name, state, row)]
    if drifts:
        moved, told = max(drifts)
        found["artefacts"] = Reading(moved / math.log(config.max_drift), told)
    return found


def _of_steps(config: GuardConfig, state: GuardState, row: Row) -> dict[Signal, Reading]:
    """The signals that every step is read for."""
    found: dict[Signal, Reading] = {}
    if AGREEMENT in row and len(state.agreement) == len(state.first_agreement) == _WINDOW:
        first, now = statistics.fmean(state.first_agreement), statistics.fmean(state.agreement)
        told = f"rewards agree on the order of siblings with {now:+.2f}, after {first:+.2f} in the first steps"
        found["disagreement"] = Reading(max(0.0, first - now) / config.max_disagreement, told)
    if config.max_kl is not None and _KL in row and len(state.kl) == _WINDOW:
        kl = statistics.fmean(state.kl)
        found["kl"] = Reading(kl / config.max_kl, f"the distance to the reference is {kl:.3g} over the last steps")
    return found


def _divergence(
    config: GuardConfig, names: Watched, state: GuardState, falls: Sequence[Fall], rewards: Mapping[str, float]
) -> Reading:
    """How much more a held-out metric lost since its best than the trained reward did; of the one that lost most so."""
    now = _mix(names, state, rewards)

    def beyond(fall: Fall) -> tuple[float, str]:
        then = _mix(names, state, state.peaks[fall.name].rewards)
        reward_lost = max(0.0, then - now) / max(abs(then), _TINY)
        told = f"{fall.told}, while the trained reward went from {then:.3f} to {now:.3f}"
        return max(0.0, fall.share - reward_lost), told

    share, told = max(map(beyond, falls))
    return Reading(share / config.max_divergence, told)


def _diversity(config: GuardConfig, state: GuardState, falls: Sequence[Fall], row: Row) -> Reading:
    """How alike samples became, unless they became right."""
    left = row["eval/diversity"] / state.first["diversity"]
    if any(fall.rose for fall in falls):
        return Reading(0.0, "a held-out metric rose as well")
    told = f"diversity is {left:.0%} of what it was, and no held-out metric rose"
    return Reading(max(0.0, 1 - left) / (1 - config.min_diversity), told)


def _trip(
    config: GuardConfig, before: Mapping[Signal, Tripped], readings: Mapping[Signal, Reading]
) -> tuple[dict[Signal, Tripped], list[Signal]]:
    """Which signals are tripped now, and which of them act."""
    tripped, acting = dict(before), []
    for signal in SIGNALS:
        reading = readings.get(signal)
        if reading is None:
            continue
        if signal not in tripped:
            if reading.level >= 1:
                tripped[signal] = Tripped()
                acting.append(signal)
        elif reading.level < _REARMED:
            del tripped[signal]
        elif reading.level >= 1:
            again = tripped[signal].readings + 1 >= config.act_again_after
            tripped[signal] = Tripped(readings=0 if again else tripped[signal].readings + 1)
            if again:
                acting.append(signal)
    return tripped, acting


def _new_best(names: Watched, state: GuardState, row: Row) -> tuple[GuardState, bool]:
    """Whether the first held-out metric was never as good."""
    value = _number(row, f"eval/{names.held_out[0]}") if names.held_out else None
    if value is None or (state.best_value is not None and value <= state.best_value):
        return state, False
    return state.model_copy(update={"best_step": state.step, "best_value": value}), True


def _act(
    config: GuardConfig, names: Watched, state: GuardState, row: Row, acting: Mapping[Signal, Reading]
) -> tuple[GuardState, Verdict]:
    """Take the actions of these signals, each action once."""
    events: list[GuardEvent] = []
    done: set[Action] = set()
    back_to = state.best_step
    for signal, reading in acting.items():
        wanted = [one for one in dict.fromkeys(getattr(config.actions, signal)) if one != "warn" and one not in done]
        taken: list[Action] = ["warn"]
        told = [reading.told]
        for action in wanted:
            outcome = _OUTCOMES[action](config, names, state, row)
            state = state.model_copy(update=outcome.changes)
            told.append(outcome.told)
            if outcome.did is not None:
                taken.append(outcome.did)
        done.update(taken)
        events.append(GuardEvent(step=state.step, signal=signal, actions=tuple(taken), told="; ".join(told)))
    state = state.model_copy(update={"events": (*state.events, *events)})
    return state, Verdict(
        metrics={f"guard/did_{action}": 1.0 for action in sorted(done)},
        events=tuple(events),
        adjust=not done.isdisjoint(("lower_lr", "raise_kl")),
        roll_back_to=back_to if "roll_back" in done else None,
        stop="stop" in done,
    )


class Outcome(NamedTuple):
    """What an action changed in the state, that in words, and what was done after all."""

    changes: dict[str, object]
    told: str
    did: Action | None


def _lower_lr(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> Outcome:
    scale = state.lr_scale * config.lr_factor
    return Outcome({"lr_scale": scale}, f"the learning rate is {scale:g} of what was configured", "lower_lr")


def _raise_kl(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> Outcome:
    scale = state.kl_scale * config.kl_factor
    return Outcome({"kl_scale": scale}, f"the KL's weight is {scale:g} times what was configured", "raise_kl")


def _drop_reward(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> Outcome:
    name = _to_drop(config, names, state, row)
    if name is None:
        return Outcome({}, "no reward is left to drop", None)
    changes: dict[str, object] = {"dropped": (*state.dropped, name), "first_agreement": (), "agreement": ()}
    # How the others agree is another question.
    changes["tripped"] = {signal: one for signal, one in state.tripped.items() if signal != "disagreement"}
    return Outcome(changes, f"reward {name!r} weighs nothing from here on", "drop_reward")


def _roll_back(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> Outcome:
    if state.best_step is None:
        return Outcome({}, "there is nothing to go back to, so the run stops", "stop")
    if state.num_rollbacks >= config.max_rollbacks:
        return Outcome({}, f"it has gone back {state.num_rollbacks} times, so the run stops", "stop")
    # What is beyond its limit is so because of weights that are gone.
    changes: dict[str, object] = {"num_rollbacks": state.num_rollbacks + 1, "tripped": {}, "agreement": (), "kl": ()}
    return Outcome(changes, f"going on with the weights of step {state.best_step}", "roll_back")


def _stop(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> Outcome:
    return Outcome({}, "the run stops", "stop")


_OUTCOMES: Mapping[Action, Callable[[GuardConfig, Watched, GuardState, Row], Outcome]] = {
    "lower_lr": _lower_lr,
    "raise_kl": _raise_kl,
    "drop_reward": _drop_reward,
    "roll_back": _roll_back,
    "stop": _stop,
}


def _to_drop(config: GuardConfig, names: Watched, state: GuardState, row: Row) -> str | None:
    """The configured reward, or the one that rose most since the held-out metrics were at their best; None when it
    would leave nothing."""
    left = [name for name in names.trained if name not in state.dropped]
    if len(left) < 2 or (config.drop is not None and config.drop not in left):
        return None
    if config.drop is not None:
        return config.drop
    then = next(iter(state.peaks.values())).rewards if state.peaks else {}
    prefix = "eval" if all(f"eval/{name}" in row for name in left) else "reward"

    def gain(name: str) -> float:
        before = then.get(name, state.first.get(name, 0.0))
        sign = math.copysign(1.0, names.trained[name])
        return sign * (row.get(f"{prefix}/{name}", before) - before) / max(abs(before), _TINY)

    return max(left, key=gain)


class Fall(NamedTuple):
    """Where a held-out metric stands: the share of its best that it lost, 0 if that may be noise."""

    name: str
    share: float
    rose: bool
    """Whether it is well above the first evaluation's."""
    told: str


def _fall(state: GuardState, name: str, row: Row) -> Fall:
    best, now, first = state.peaks[name].value, row[f"eval/{name}"], state.first[name]
    lost, noise = best - now, _NOISE * (_number(row, f"ci95/eval/{name}") or 0.0)
    share = lost / max(abs(best), _TINY) if lost > noise else 0.0
    rose = now - first > _ROSE * max(abs(first), _TINY)
    return Fall(name, share, rose, f"held-out {name} fell from {best:.3f} to {now:.3f}")


def _drift(name: str, state: GuardState, row: Row) -> tuple[float, str]:
    """How far a statistic moved, as a logarithm, and that in words."""
    first, now = state.first[name], row[f"eval/{name}"]
    moved = abs(math.log(max(abs(now), _TINY) / max(abs(first), _TINY)))
    return moved, f"{name} went from {first:.3g} to {now:.3g}"


def _mix(names: Watched, state: GuardState, rewards: Mapping[str, float]) -> float:
    """The weighted sum of the rewards that still count."""
    return sum(weight * rewards[name] for name, weight in names.trained.items() if name not in state.dropped)


def _trained_in(names: Watched, row: Row) -> dict[str, float] | None:
    """The trained rewards over held-out prompts; None if no evaluation was made, or one of them has no value there."""
    values = {name: _number(row, f"eval/{name}") for name in names.trained}
    known = {name: value for name, value in values.items() if value is not None}
    return known if len(known) == len(values) else None


def _both(name: str, state: GuardState, row: Row) -> bool:
    return name in state.first and _number(row, f"eval/{name}") is not None


def _number(row: Row, name: str) -> float | None:
    """A metric that is there and finite."""
    value = row.get(name)
    return value if value is not None and math.isfinite(value) else None


def replay(config: GuardConfig, names: Watched, rows: Sequence[Row]) -> tuple[GuardState, list[Verdict]]:
    """Judge a run that is over by its metrics: what the guard would have seen, had it done nothing."""
    state, verdicts = GuardState(), list[Verdict]()
    for row in rows:
        state, verdict = judge(config, names, state, int(row["step"]), row)
        verdicts.append(verdict)
    return state, verdicts
