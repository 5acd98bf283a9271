"""What counts as the loss of a learner, how often it is made good, and how signals stop a run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import pytest

from raylign.errors import CheckpointError, ClusterError, NumericsError
from services.recovery import Recovery, RecoveryObserver, Restarts, causes, is_loss
from services.stopping import stop_on_signals


def test_deaths_without_progress_are_counted_and_progress_forgets_them() -> None:
    restarts = Restarts(2)
    restarts.count(7)  # went back to 4, and died on the way to where it had been
    restarts.count(5)
    restarts.count(8)  # step 8 was done: all forgotten
    restarts.count(8)
    with pytest.raises(ClusterError, match=r"died 3 times and step 9 was never done .*= 2.*raylign resume"):
        restarts.count(6)


def test_no_restarts_at_all_can_be_asked_for() -> None:
    with pytest.raises(ClusterError, match="died 1 times and step 1 was never done"):
        Restarts(0).count(0)


def test_the_causes_of_nested_groups_are_rayligns_own_first() -> None:
    own, other, late = NumericsError("nan"), ValueError("x"), CheckpointError("full")
    group = BaseExceptionGroup("", [other, ExceptionGroup("", [own]), late])
    assert causes(group) == [late, own, other]
    assert causes(other) == [other]


def _is_loss(error: BaseException, lost: int = 1) -> bool:
    async def num_lost() -> int:
        return lost

    return asyncio.run(is_loss(error, num_lost))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("connection closed by peer"), True),
        (ExceptionGroup("", [RuntimeError("x"), ClusterError("the weights are lost")]), True),
        (NumericsError("nan"), False),
        (ExceptionGroup("", [RuntimeError("x"), CheckpointError("no space")]), False),
        (KeyboardInterrupt(), False),
        (BaseExceptionGroup("", [asyncio.CancelledError(), RuntimeError("x")]), False),
    ],
)
def test_what_would_come_again_and_what_a_person_asked_for_are_no_losses(error: BaseException, expected: bool) -> None:
    assert _is_loss(error) is expected
    assert _is_loss(error, lost=0) is False, "all ranks live: the work itself failed"


class Seen:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Any) -> None:
        self.rows.append({"step": step, **metrics})

    def evaluated(self, step: int, groups: Any) -> None:
        self.rows.append({"evaluated": step})

    def swept(self, step: int, sweeps: Any) -> None:
        self.rows.append({"swept": step})


def test_the_first_step_after_a_recovery_says_how_long_it_took() -> None:
    seen, told = Seen(), list[float]()
    observer = RecoveryObserver(seen, lost_s=100.0, recovered=told.append, clock=lambda: 112.5)
    observer.evaluated(2, [])
    observer.swept(2, {})
    observer.stepped(3, {"time/step_s": 2.5}, [])
    observer.stepped(4, {"time/step_s": 2.5}, [])
    assert seen.rows == [
        {"evaluated": 2},
        {"swept": 2},
        {"step": 3, "time/step_s": 2.5, "time/recovery_s": 10.0},
        {"step": 4, "time/step_s": 2.5},
    ]
    assert told == [10.0]
    assert Recovery(4, 2, 10.0).as_json() == {"step": 4, "back_to": 2, "seconds": 10.0}


def test_the_first_signal_asks_and_the_second_interrupts_a_busy_loop() -> None:
    notes: list[str] = []
    before = signal.getsignal(signal.SIGTERM)

    async def work() -> bool:
        stop = asyncio.Event()
        with stop_on_signals(stop, notes.append):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.wait(), 5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)  # noqa: ASYNC251 - a step that is computed in this very process
        return False

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
    assert time.monotonic() - began_s < 50
    assert len(notes) == 1
    assert "Ctrl-C again" in notes[0]
    assert signal.getsignal(signal.SIGTERM) == before
