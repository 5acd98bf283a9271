"""A run from start to end: directory, cluster, roles, loop, checkpoints, and what is left when it stops."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from learner.checkpoint import (
    CheckpointManifest,
    Damage,
    later_checkpoints,
    list_checkpoints,
    newest_good,
    prune_checkpoints,
    set_aside,
    verify_checkpoint,
)
from raylign.config import with_overrides
from raylign.errors import CheckpointError, ConfigError, RaylignError, RunDirError
from raylign.metrics import MetricsRow, make_sinks, read_metrics
from raylign.types import JsonValue
from rollout.prompts import PromptStream
from services.config import RunConfig, read_resolved_config
from services.config_changes import (
    changes_since,
    check_allowed,
    note_changes,
    read_changes,
    read_made_with,
    refuse_fixed,
    refuse_new_policies,
    refuse_others,
)
from services.console import RunConsole
from services.controller import Controller
from services.live import answering, scaling
from services.observer import RunObserver
from services.record import GroupRecorder
from services.run_dir import RunDir, config_toml, free_space
from services.run_inputs import RunInputs, read_inputs, with_absolute_paths
from services.topology import Topology, build, check_cluster, local_cpus

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_SINKS = ("jsonl", "tensorboard")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class _Run:
    """What one run needs at hand while it goes."""

    config: RunConfig
    folder: RunDir
    console: RunConsole
    inputs: RunInputs
    resumed: CheckpointManifest | None
    status: str = "failed"


def train_run(config: RunConfig, config_name: str, run_dir: Path | None, address: str | None) -> int:
    """Run a configuration in a new directory; returns the exit code. Raises RaylignError for bad input."""
    config = with_absolute_paths(config)
    inputs = read_inputs(config)
    with RunDir.create(run_dir, config_name) as folder:
        folder.write_config(config)
        code = go(config, folder, inputs, None, address)
        if code == EXIT_FAILED and not folder.metrics.exists():
            # Nothing was trained, so the folder is no run: the same command may be given again.
            folder.config.unlink()
        return code


def resume_run(
    path: Path,
    address: str | None,
    step: int | None = None,
    overrides: Mapping[str, str] | None = None,
    allowed: Sequence[str] = (),
) -> int:
    """Go on from a run's newest good checkpoint, or from that of a step; returns the exit code.

    `overrides` are dotted keys to set, `allowed` the keys or tables that may differ from what the checkpoint was made
    with, beside those that change no result. A finished run is left as it is. Raises RaylignError, with nothing
    changed, for a directory that is no run or in use, for no good checkpoint, and for changes that are not allowed.
    """
    with RunDir.open(path) as folder:
        config = with_absolute_paths(with_overrides(read_resolved_config(folder.config), overrides or {}))
        manifest, damaged = choose_checkpoint(folder, step)
        if manifest.step >= config.num_steps:
            RunConsole().note(
                f"{path} is finished: step {manifest.step} of {config.num_steps}; nothing to do (--num_steps goes on)"
            )
            return EXIT_OK
        made_with, inputs = read_made_with(manifest), read_inputs(config)
        check_allowed(allowed, made_with, config)
        changes = changes_since(manifest, config, inputs.sha256s)
        refuse_fixed(changes, config)
        refuse_others(changes, allowed, manifest, folder)
        refuse_new_policies(made_with, config)
        _clear_the_way(folder, manifest, damaged)
        note_changes(folder, manifest.step, changes)
        if overrides or changes:
            folder.write_config(config)
        return go(config, folder, inputs, manifest, address)


def choose_checkpoint(folder: RunDir, step: int | None) -> tuple[CheckpointManifest, list[Damage]]:
    """A run's newest good checkpoint with the damaged ones above it, or that of a step. Changes nothing.

    Raises CheckpointError, with what there is, if there is none.
    """
    if step is not None:
        there = [int(one.name.removeprefix("step_")) for one in list_checkpoints(folder.checkpoints)]
        if step not in there:
            told = f"there are {', '.join(map(str, there))}" if there else "there is none"
            raise CheckpointError(f"{folder.path} has no checkpoint of step {step}; {told}")
        return verify_checkpoint(folder.checkpoints / f"step_{step}"), []
    manifest, damaged = newest_good(folder.checkpoints)
    if manifest is None and damaged:
        told = "\n".join(f"  {one.path.name}: {one.reason}" for one in damaged)
        raise CheckpointError(f"no checkpoint of {folder.path} can be read:\n{told}\nstart anew with `raylign train`")
    if manifest is None:
        raise CheckpointError(f"{folder.path} has no checkpoint to go on from; start anew with `raylign train`")
    return manifest, damaged


def _clear_the_way(folder: RunDir, manifest: CheckpointManifest, damaged: Sequence[Damage]) -> None:
    """Set aside what the run will write again: damaged checkpoints, and those beyond the step it goes on from."""
    console = RunConsole()
    for one in damaged:
        console.note(f"{one.reason}; set aside as {set_aside(one.path, 'damaged').name}")
    for path in later_checkpoints(folder.checkpoints, manifest.step):
        console.note(f"{path.name} is beyond step {manifest.step}; set aside as {set_aside(path, 'superseded').name}")


def config_sha256(config: RunConfig) -> str:
    """Identity of a configuration, for checkpoints."""
    return hashlib.sha256(config_toml(config).encode()).hexdigest()


def run_record(config: RunConfig, inputs: RunInputs, origin: JsonValue = None) -> dict[str, JsonValue]:
    """What every checkpoint of a run keeps beside its step. `origin` says where a fork came from."""
    record: dict[str, JsonValue] = {
        "config_sha256": config_sha256(config),
        "config": config.model_dump(mode="json", exclude_none=True),
        "inputs": inputs.sha256s,
    }
    return record if origin is None else {**record, "origin": origin}


def go(
    config: RunConfig, folder: RunDir, inputs: RunInputs, resumed: CheckpointManifest | None, address: str | None
) -> int:
    """Train in a locked directory from the start, or from a checkpoint in it; returns the exit code.

    Prints Raylign's own errors, and what stopped it on a full disk; raises any other.
    """
    started_s = time.monotonic()
    with RunConsole() as console:
        run = _Run(config, folder, console, inputs, resumed)
        try:
            with _cluster(config, folder.path, address, console):
                asyncio.run(_drive(run, started_s, own_cluster=address is None))
        except BaseExceptionGroup as group:
            error = _first_cause(group)
            told = error if isinstance(error, RaylignError) else disk_full(error, folder.path)
            console.failed(told or error, folder.path)
            if told is None:
                raise error from group
            return EXIT_FAILED
        except RaylignError as error:
            console.failed(error, folder.path)
            return EXIT_FAILED
        except OSError as error:
            told = disk_full(error, folder.path)
            if told is None:
                raise
            console.failed(told, folder.path)
            return EXIT_FAILED
        except KeyboardInterrupt:
            console.failed(KeyboardInterrupt("interrupted before the step was done"), folder.path)
            return EXIT_INTERRUPTED
        from services.report import write_report  # the report is built after the run, from its files alone

        write_report(folder.path)
        console.finish(folder.read_summary(), folder.path)
        return EXIT_OK if run.status == "finished" else EXIT_INTERRUPTED


@contextmanager
def _cluster(config: RunConfig, folder: Path, address: str | None, console: RunConsole) -> Generator[None]:
    """The Ray cluster of the run: none, a local one of its own, or one that is joined."""
    if config.placement == "in_process":
        if address is not None:
            raise ConfigError("--address was given, but placement = 'in_process' uses no cluster; choose 'separate'")
        yield
        return
    from services.process import join_cluster, local_cluster

    with ExitStack() as stack:
        if address is not None:
            with console.phase("joining the Ray cluster"):
                stack.enter_context(join_cluster(address))
        else:
            # Phases take turns at staleness 0, so a small machine may well hold more processes than cores.
            with console.phase("Ray cluster"):
                stack.enter_context(local_cluster(local_cpus(config), folder))
        check_cluster(config)
        yield


async def _drive(run: _Run, started_s: float, own_cluster: bool) -> None:
    topology = await build(run.config, run.console.phase, own_cluster)
    try:
        await _train(run, topology, started_s)
    finally:
        await topology.close()


async def _train(run: _Run, topology: Topology, started_s: float) -> None:
    config, folder, resumed = run.config, run.folder, run.resumed
    start_step = resumed.step if resumed is not None else 0
    if resumed is not None:
        with run.console.phase(f"checkpoint of step {start_step}"):
            await topology.learner.load(resumed.path.resolve())
    cut_at = start_step if resumed is not None else None
    sinks = make_sinks(_SINKS, folder.path, cut_at)
    recorder = sinks.closing(GroupRecorder(config.record, config.algorithm, folder.path, cut_at))
    earlier = read_metrics(folder.metrics)
    seconds_before = float(earlier[-1]["time/since_start_s"] or 0.0) if earlier else 0.0
    observer = RunObserver(folder, sinks, run.console, seconds_before, config.held_out_metrics, recorder)
    observer.first_eval = _first_eval(earlier)
    record = run_record(config, run.inputs, resumed.record.get("origin") if resumed is not None else None)

    async def save(step: int) -> None:
        path = (folder.checkpoints / f"step_{step}").resolve()
        if path.exists():
            return
        await topology.learner.save(path, {"step": step, **record, "guard": controller.guard.state()})
        if not path.exists():
            raise CheckpointError(
                f"the learner wrote its checkpoint, but {path} is not there for this process: the run directory must "
                "lie on a file system that the cluster shares; choose another --run-dir"
            )
        await asyncio.to_thread(prune_checkpoints, folder.checkpoints, config.checkpoint.keep)

    controller = Controller(
        config,
        PromptStream(run.inputs.prompts, config.seed, config.groups_per_step),
        run.inputs.heldout,
        topology.fleet,
        topology.scorer,
        topology.learner,
        scaling(config, topology, observer, run.console.note),
        save,
    )
    restore_guard(controller, resumed, config)
    for slot, computed in (await topology.fleet.precision_report()).items():
        run.console.note(f"{slot} network: {computed}")
    run.console.begin(config.num_steps, start_step, config.held_out_metrics)
    controller.step, train_started_s = start_step, time.monotonic()

    async def summarise() -> None:
        now = time.monotonic()
        seconds = {"train_s": now - train_started_s + seconds_before, "total_s": now - started_s + seconds_before}
        folder.write_summary(await _summary(run, topology, controller.step, observer, record, seconds))

    try:
        live = answering(config, topology, folder.path, lambda: controller.step)
        with _stop_on_signals(controller, run.console):
            if start_step and not earlier and run.inputs.heldout:
                await controller.evaluate(start_step)  # a fork's first numbers: before its own training
            async with live:
                await controller.run(start_step)
        run.status = "finished" if controller.step == config.num_steps else "stopped"
    except BaseException:  # whatever stopped the run is raised again, and a full disk must not hide it
        with suppress(OSError):
            sinks.close()
        with suppress(RunDirError):
            await summarise()
        raise
    sinks.close()
    await summarise()


async def _summary(
    run: _Run,
    topology: Topology,
    step: int,
    observer: RunObserver,
    record: Mapping[str, JsonValue],
    seconds: Mapping[str, float],
) -> dict[str, JsonValue]:
    """What `summary.json` says. Of a run that failed nobody is asked any more."""
    failed, origin, changes = run.status == "failed", record.get("origin"), read_changes(run.folder)
    return {
        "status": run.status,
        "num_steps": step,
        "weight_version": step,
        "weights_sha256": "" if failed else await topology.learner.weights_sha256(),
        "eval_initial": observer.first_eval,
        "eval_final": observer.last_eval,
        **seconds,
        "peak_memory_bytes": {} if failed else await topology.peak_memory_bytes(),
        **({"origin": origin} if origin else {}),
        **({"config_changes": changes} if changes else {}),
    }


def restore_guard(controller: Controller, resumed: CheckpointManifest | None, config: RunConfig) -> None:
    """Let the staleness guard go on where it was, unless what it guards was changed."""
    if resumed is None or read_made_with(resumed).max_staleness != config.max_staleness:
        return
    state = resumed.record.get("guard")
    if isinstance(state, Mapping):
        controller.guard.restore({name: int(str(value)) for name, value in state.items()})


def _first_eval(rows: Sequence[MetricsRow]) -> dict[str, float]:
    """The first evaluation among the rows of a run that is resumed; {} if there is none."""
    prefix = "eval/"
    for row in rows:
        means = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and v is not None}
        if means:
            return means
    return {}


@contextmanager
def _stop_on_signals(controller: Controller, console: RunConsole) -> Generator[None]:
    """First Ctrl-C (or SIGTERM): finish the step, checkpoint, stop. Second: give up at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    interrupted = False

    def stop() -> None:
        nonlocal interrupted
        if controller.stop.is_set():
            interrupted = True
            assert task is not None
            task.cancel()
            return
        controller.stop.set()
        console.note("stopping after this step, with a checkpoint (Ctrl-C again: at once, without one)")

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def disk_full(error: BaseException, folder: Path) -> RaylignError | None:
    """What to tell of a file that could not be written because there is no room; None for any other error.

    The room was missed before where it is missed again on the way out: the first to miss it tells.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
        return None
    before = error.__context__
    while before is not None:
        cause = _first_cause(before) if isinstance(before, BaseExceptionGroup) else before
        if isinstance(cause, RaylignError):
            return cause
        before = before.__context__
    return RunDirError(
        f"cannot write {error.filename or 'a file of the run'}: {error.strerror}; {free_space(folder)}. Earlier "
        "checkpoints are intact: free some space and `raylign resume`"
    )


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error of a group: Raylign's own before others."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, RaylignError)), leaves[0])
