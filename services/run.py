"""A run from start to end: directory, cluster, roles, loop, checkpoints, and what is left when it stops."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from learner.checkpoint import CheckpointManifest, latest_checkpoint, prune_checkpoints, read_manifest
from raylign.assets import PREFIX, resolve
from raylign.errors import CheckpointError, ConfigError, RaylignError
from raylign.metrics import MetricsRow, make_sinks, read_metrics
from raylign.models import check_model
from raylign.types import Prompt
from rewards import make_mix
from rollout.prompts import GroupTask, PromptStream, load_prompts, refuse_overlap
from services.config import RunConfig, read_resolved_config
from services.console import RunConsole
from services.controller import Controller
from services.observer import RunObserver
from services.run_dir import RunDir, config_toml
from services.topology import Topology, build, check_cluster, required_resources

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_SINKS = ("jsonl", "tensorboard")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Prompts to train on, and held-out prompts as evaluation tasks."""

    prompts: list[Prompt]
    heldout: list[GroupTask]
    sha256: str
    """Identity of what was read, for exact resumption."""


@dataclass(slots=True)
class _Run:
    """What one run needs at hand while it goes."""

    config: RunConfig
    folder: RunDir
    console: RunConsole
    inputs: _Inputs
    resumed: CheckpointManifest | None
    status: str = "failed"


def train_run(config: RunConfig, config_name: str, run_dir: Path | None, address: str | None) -> int:
    """Run a configuration in a new directory; returns the exit code. Raises RaylignError for bad input."""
    config = _with_absolute_paths(config)
    inputs = _read_inputs(config)
    with RunDir.create(run_dir, config_name) as folder:
        folder.write_config(config)
        code = _go(config, folder, inputs, None, address)
        if code == EXIT_FAILED and not folder.metrics.exists():
            # Nothing was trained, so the folder is no run: the same command may be given again.
            folder.config.unlink()
        return code


def resume_run(path: Path, address: str | None) -> int:
    """Go on from a run's newest checkpoint; returns the exit code. A finished run is left as it is."""
    with RunDir.open(path) as folder:
        config = read_resolved_config(folder.config)
        checkpoint = latest_checkpoint(folder.checkpoints)
        if checkpoint is None:
            raise CheckpointError(f"{path} has no checkpoint to go on from; start anew with `raylign train`")
        manifest = read_manifest(checkpoint)
        if manifest.config_sha256 != config_sha256(config):
            raise CheckpointError(
                f"{folder.config} is not the configuration that {checkpoint.name} was made with; put it back, or "
                "start a new run"
            )
        if manifest.step >= config.num_steps:
            RunConsole().note(f"{path} is finished: step {manifest.step} of {config.num_steps}; nothing to do")
            return EXIT_OK
        inputs = _read_inputs(config)
        if manifest.record.get("inputs_sha256") != inputs.sha256:
            raise CheckpointError(
                "the prompt files or the model directory changed since the run began, so it cannot go on exactly; put "
                "them back, or start a new run"
            )
        return _go(config, folder, inputs, manifest, address)


def config_sha256(config: RunConfig) -> str:
    """Identity of a configuration, for checkpoints."""
    return hashlib.sha256(config_toml(config).encode()).hexdigest()


def _go(
    config: RunConfig, folder: RunDir, inputs: _Inputs, resumed: CheckpointManifest | None, address: str | None
) -> int:
    started_s = time.monotonic()
    with RunConsole() as console:
        run = _Run(config, folder, console, inputs, resumed)
        try:
            with _cluster(config, folder.path, address, console):
                asyncio.run(_drive(run, started_s, own_cluster=address is None))
        except BaseExceptionGroup as group:
            error = _first_cause(group)
            console.failed(error, folder.path)
            if not isinstance(error, RaylignError):
                raise error from group
            return EXIT_FAILED
        except RaylignError as error:
            console.failed(error, folder.path)
            return EXIT_FAILED
        except KeyboardInterrupt:
            console.failed(KeyboardInterrupt("interrupted before the step was done"), folder.path)
            return EXIT_INTERRUPTED
        from services.report import write_report  # the report is built after the run, from its files alone

        write_report(folder.path)
        console.finish(folder.read_summary(), folder.path)
        return EXIT_OK if run.status == "finished" else EXIT_INTERRUPTED


def _read_inputs(config: RunConfig) -> _Inputs:
    """Check the model directory, read the prompts, and let every required reward check each, before anything starts."""
    prompts = load_prompts(resolve(config.prompts.train), config.prompts.fields)
    heldout: list[Prompt] = []
    if config.prompts.heldout is not None:
        heldout = load_prompts(resolve(config.prompts.heldout), config.prompts.fields)
        refuse_overlap(prompts, heldout)
        heldout = heldout[: config.eval.num_prompts]
    check_model(config.model, [prompt.text for prompt in (*prompts, *heldout)])
    rewards = make_mix(config.rewards)
    for prompt in (*prompts, *heldout):
        rewards.check(prompt)
    tasks = [GroupTask(prompt, -1, place) for place, prompt in enumerate(heldout)]
    return _Inputs(prompts, tasks, _inputs_sha256(config))


def _inputs_sha256(config: RunConfig) -> str:
    """Identity of the prompt files (contents) and of the model directory (names and sizes: contents are many GB)."""
    digest = hashlib.sha256()
    for name in (config.prompts.train, config.prompts.heldout):
        if name is not None:
            for path in _files(resolve(name)):
                digest.update(path.read_bytes())
    model = resolve(config.model.path)
    for path in _files(model):
        digest.update(f"{path.relative_to(model)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The files of a folder in a fixed order, or the file itself."""
    return [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The user's paths mean the same in workers and on resumption, whatever their working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or path.startswith(PREFIX) else str(Path(path).expanduser().resolve())

    prompts = {"train": absolute(config.prompts.train), "heldout": absolute(config.prompts.heldout)}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "prompts": config.prompts.model_copy(update=prompts),
        }
    )


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
            num_cpus = max(os.cpu_count() or 1, math.ceil(required_resources(config)["CPU"]))
            with console.phase("Ray cluster"):
                stack.enter_context(local_cluster(num_cpus, folder))
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
    sinks = make_sinks(_SINKS, folder.path, start_step if resumed is not None else None)
    earlier = read_metrics(folder.metrics)
    seconds_before = float(earlier[-1]["time/since_start_s"] or 0.0) if earlier else 0.0
    observer = RunObserver(folder, sinks, run.console, seconds_before, config.held_out_metrics)
    observer.first_eval = _first_eval(earlier)
    record = {"config_sha256": config_sha256(config), "inputs_sha256": run.inputs.sha256}

    async def save(step: int) -> None:
        path = (folder.checkpoints / f"step_{step}").resolve()
        if path.exists():
            return
        await topology.learner.save(path, {"step": step, **record})
        if not path.exists():
            raise CheckpointError(
                f"the learner wrote its checkpoint, but {path} is not there for this process: the run directory must "
                "lie on a file system that the cluster shares; choose another --run-dir"
            )
        prune_checkpoints(folder.checkpoints, config.checkpoint.keep)

    controller = Controller(
        config,
        PromptStream(run.inputs.prompts, config.seed, config.groups_per_step),
        run.inputs.heldout,
        topology.fleet,
        topology.scorer,
        topology.learner,
        observer,
        save,
    )
    for slot, computed in (await topology.fleet.precision_report()).items():
        run.console.note(f"{slot} network: {computed}")
    run.console.begin(config.num_steps, start_step, config.held_out_metrics)
    train_started_s = time.monotonic()
    try:
        with _stop_on_signals(controller, run.console):
            await controller.run(start_step)
        run.status = "finished" if controller.step == config.num_steps else "stopped"
    finally:
        sinks.close()
        folder.write_summary(
            {
                "status": run.status,
                "num_steps": controller.step,
                "weight_version": controller.step,
                "weights_sha256": await topology.learner.weights_sha256() if run.status != "failed" else "",
                "eval_initial": observer.first_eval,
                "eval_final": observer.last_eval,
                "train_s": time.monotonic() - train_started_s + seconds_before,
                "total_s": time.monotonic() - started_s + seconds_before,
                "peak_memory_bytes": await topology.peak_memory_bytes() if run.status != "failed" else {},
            }
        )


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
