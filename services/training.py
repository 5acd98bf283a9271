"""One run on its workers: from where it starts to its summary, going back to a checkpoint when the learner is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from learner.checkpoint import CheckpointManifest, prune_checkpoints, verify_checkpoint
from raylign.errors import CheckpointError, RunDirError
from raylign.metrics import MetricsRow, read_metrics
from raylign.types import JsonValue, Work
from rollout.drawn import WeightSlot
from rollout.prompts import PromptStream
from services.config import RunConfig
from services.config_changes import read_changes
from services.console import RunConsole
from services.controller import Controller, Observer
from services.guard_run import RewardGuard
from services.live import answering, scaling
from services.observer import RunObserver
from services.record import GroupRecorder
from services.recovery import Recovery, RecoveryObserver, Restarts, causes, is_loss
from services.run_checkpoints import go_back, restore_guards, run_record
from services.run_dir import RunDir
from services.run_inputs import RunInputs
from services.stopping import stop_on_signals
from services.topology import Topology
from services.tracking import PhaseListener, open_sinks

_SINKS = ("jsonl", "tensorboard")
_BEFORE_ALL_STEPS = -1


@dataclass(slots=True)
class Training:
    """What one run needs at hand while it goes, and what it has come to."""

    config: RunConfig
    folder: RunDir
    console: RunConsole
    inputs: RunInputs
    start: CheckpointManifest | None
    """The checkpoint to go on from; None is the beginning."""
    started_s: float
    status: str = "failed"
    controller: Controller | None = None
    observer: RunObserver | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    lost_s: float | None = None
    """When the loss of the learner was noticed that is not made good yet."""
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    train_started_s: float = 0.0
    seconds_before: float = 0.0
    """Wall time of the parts of a resumed run before this one."""
    at_end: dict[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """What the workers said of themselves when training was over."""

    @property
    def step(self) -> int:
        """Last completed step."""
        return 0 if self.controller is None else self.controller.step

    @property
    def origin(self) -> JsonValue:
        """Where a fork came from."""
        return self.start.record.get("origin") if self.start is not None else None


async def train(run: Training, topology: Topology) -> None:
    """Go to the last step, or until a stop is asked for; a lost learner is made anew. Leaves a summary in any case."""
    try:
        live = answering(run.config, topology, run.folder.path, lambda: run.step)
        with stop_on_signals(run.stop, run.console.note):
            async with live:
                await _until_done(run, topology)
    except BaseException:  # whatever stopped the run is raised again, and a full disk must not hide it
        if run.observer is not None:
            with suppress(RunDirError):
                _write_summary(run, run.observer)
        raise
    assert run.observer is not None
    _write_summary(run, run.observer)


async def _until_done(run: Training, topology: Topology) -> None:
    """Attempts, each from a checkpoint, until one is not cut short by the loss of a learner rank or by the guard, which
    goes back to earlier weights."""
    restarts = Restarts(run.config.max_learner_restarts)
    died_at = 0
    while True:
        try:
            if run.lost_s is not None:
                run.start = await asyncio.to_thread(go_back, run.folder, run.start, run.console.note)
                await topology.renew_learner(run.console.phase)
            await _attempt(run, topology, died_at)
            if run.controller is None or not run.controller.went_back:
                return
            at = run.folder.checkpoints / f"step_{run.step}"
            run.start = await asyncio.to_thread(verify_checkpoint, at)
        except Exception as error:  # whatever failed may have failed because a rank is gone; else it is raised again
            noticed_s = time.monotonic()
            if not await is_loss(error, topology.num_lost_ranks):
                raise
            run.lost_s = run.lost_s or noticed_s
            died_at = run.step
            restarts.count(died_at)
            cause = type(causes(error)[0]).__name__
            run.console.note(f"the learner died in step {died_at + 1} ({cause}); going back to the newest checkpoint")


async def _attempt(run: Training, topology: Topology, died_at: int) -> None:
    """Train from the run's checkpoint until all is done or a stop was asked for."""
    config, folder, start = run.config, run.folder, run.start
    start_step = start.step if start is not None else 0
    if start is not None:
        with run.console.phase(f"checkpoint of step {start_step}"):
            await topology.learner.load(start.path.resolve())
    again = run.observer is not None
    kept = start.step if start is not None else _BEFORE_ALL_STEPS if again else None
    sinks, heard = open_sinks(config, folder.path, kept, run.console.note)
    recorder = sinks.closing(GroupRecorder(config.record, config.algorithm, folder.path, kept))
    try:
        earlier = read_metrics(folder.metrics)
        if not again:
            run.train_started_s = time.monotonic()
            run.seconds_before = float(earlier[-1]["time/since_start_s"] or 0.0) if earlier else 0.0
        seconds = run.seconds_before + time.monotonic() - run.train_started_s
        run.observer = RunObserver(folder, sinks, run.console, seconds, config.held_out_metrics, recorder)
        run.observer.first_eval, run.observer.last_eval = _evaluations(earlier)
        hearing = [recorder.phase] if heard is None else [recorder.phase, heard]
        observer = _telling(run, died_at, start_step, run.observer)
        controller = _controller(run, topology, observer, hearing, recorder.pulled)
        controller.step, run.controller = start_step, controller
        if not again:
            for slot, computed in (await topology.fleet.precision_report()).items():
                run.console.note(f"{slot} network: {computed}")
        run.console.begin(config.num_steps, start_step, config.held_out_metrics)
        if start_step and run.inputs.heldout and (not earlier or (again and start_step == config.num_steps)):
            # A fork's first numbers, before its own training; the last ones of a run that went back at its last step.
            await controller.evaluate(start_step)
        await controller.run(start_step)
        run.at_end = {
            "weights_sha256": await topology.learner.weights_sha256(),
            "peak_memory_bytes": await topology.peak_memory_bytes(),
        }
        run.status = "finished" if controller.step == config.num_steps else "stopped"
    except BaseException:  # raised again, and a full disk must not hide it
        with suppress(OSError):
            sinks.close()
        raise
    sinks.close()


def _telling(run: Training, died_at: int, back_to: int, observer: RunObserver) -> Observer:
    """The observer, and after a loss one around it that says when the run was as before."""
    lost_s = run.lost_s
    if lost_s is None:
        return observer

    def recovered(seconds: float) -> None:
        run.lost_s = None
        run.recoveries.append(Recovery(died_at, back_to, seconds))
        run.console.note(f"training again from step {back_to + 1}, {seconds:.1f} s after the learner was missed")

    return RecoveryObserver(observer, lost_s, recovered)


def _controller(
    run: Training,
    topology: Topology,
    observer: Observer,
    hearing: Sequence[PhaseListener],
    pulled: Callable[[WeightSlot, Sequence[Work]], None],
) -> Controller:
    """The loop over the topology's roles, with the guard's state and the way to write checkpoints."""
    config, folder = run.config, run.folder
    record = run_record(config, run.inputs, run.origin)

    async def save(step: int) -> None:
        path = (folder.checkpoints / f"step_{step}").resolve()
        if path.exists():
            return
        states = {"guard": controller.guard.state(), "reward_guard": controller.watch.state()}
        await topology.learner.save(path, {"step": step, **record, **states})
        if not path.exists():
            raise CheckpointError(
                f"the learner wrote its checkpoint, but {path} is not there for this process: the run directory must "
                "lie on a file system that the cluster shares; choose another --run-dir"
            )
        await asyncio.to_thread(prune_checkpoints, folder.checkpoints, config.checkpoint.keep, controller.watch.spared)

    def heard(phase: str, seconds: float) -> None:
        for listener in hearing:
            listener(phase, seconds)

    controller = Controller(
        config,
        PromptStream(run.inputs.prompts, config.seed, config.groups_per_step),
        run.inputs.heldout,
        topology.fleet,
        topology.scorer,
        topology.learner,
        scaling(config, topology, observer, run.console.note),
        save,
        run.stop,
        RewardGuard(config, run.console.note, folder.checkpoints),
        heard=heard,
        pulled=pulled,
    )
    restore_guards(controller, run.start, config)
    return controller


def _write_summary(run: Training, observer: RunObserver) -> None:
    """`summary.json`. Of a run that failed nobody is asked any more."""
    now = time.monotonic()
    changes, origin = read_changes(run.folder), run.origin
    guarded = run.controller.watch.events if run.controller is not None else []
    recoveries: list[JsonValue] = [one.as_json() for one in run.recoveries]
    summary: Mapping[str, JsonValue] = {
        "status": run.status,
        "num_steps": run.step,
        "weight_version": run.step,
        "weights_sha256": "",
        "eval_initial": observer.first_eval,
        "eval_final": observer.last_eval,
        "train_s": now - run.train_started_s + run.seconds_before,
        "total_s": now - run.started_s + run.seconds_before,
        "peak_memory_bytes": {},
        **run.at_end,
        **({"recoveries": recoveries} if recoveries else {}),
        **({"guard": guarded} if guarded else {}),
        **({"origin": origin} if origin else {}),
        **({"config_changes": changes} if changes else {}),
    }
    run.folder.write_summary(summary)


def _evaluations(rows: Sequence[MetricsRow]) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation among the rows that a run goes on from; {} where there is none."""
    prefix = "eval/"
    found = [
        means
        for row in rows
        if (means := {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and v is not None})
    ]
    return (found[0], found[-1]) if found else ({}, {})
