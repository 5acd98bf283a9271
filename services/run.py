"""A run from start to end: directory, cluster, roles, loop, checkpoints, and what is left when it stops."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from learner.checkpoint import CheckpointManifest
from raylign.config import with_overrides
from raylign.errors import ConfigError, RaylignError, RunDirError
from services.config import RunConfig, read_resolved_config
from services.config_changes import (
    changes_since,
    check_allowed,
    note_changes,
    read_made_with,
    refuse_fixed,
    refuse_new_policies,
    refuse_others,
)
from services.console import RunConsole
from services.environment import write_environment
from services.nodes import local_cpus
from services.recovery import causes
from services.report import report_failure, write_report
from services.run_checkpoints import choose_checkpoint, clear_the_way
from services.run_dir import RunDir, free_space
from services.run_inputs import RunInputs, read_inputs, with_absolute_paths
from services.topology import build, check_cluster
from services.training import Training, train

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        clear_the_way(folder, manifest, damaged, RunConsole().note)
        note_changes(folder, manifest.step, changes)
        if overrides or changes:
            folder.write_config(config)
        return go(config, folder, inputs, manifest, address)


def go(
    config: RunConfig, folder: RunDir, inputs: RunInputs, start: CheckpointManifest | None, address: str | None
) -> int:
    """Train in a locked directory from the beginning, or from a checkpoint in it; returns the exit code.

    That is EXIT_OK too for a run that was asked to stop and wrote its checkpoint; its summary's status tells them
    apart. Prints Raylign's own errors, and what stopped it on a full disk; raises any other.
    """
    started_s = time.monotonic()
    with RunConsole() as console:
        run = Training(config, folder, console, inputs, start, started_s)
        try:
            with _cluster(config, folder.path, address, console):
                asyncio.run(_drive(run, own_cluster=address is None))
        except BaseExceptionGroup as group:
            error = causes(group)[0]
            told = error if isinstance(error, RaylignError) else disk_full(error, folder.path)
            console.failed(told or error, folder.path)
            report_failure(folder.path, told or error)
            if told is None:
                raise error from group
            return EXIT_FAILED
        except RaylignError as error:
            console.failed(error, folder.path)
            report_failure(folder.path, error)
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
        write_report(folder.path)
        console.finish(folder.read_summary(), folder.path)
        return EXIT_OK


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


async def _drive(run: Training, own_cluster: bool) -> None:
    topology = await build(run.config, run.console.phase, own_cluster)
    write_environment(run.folder.path)
    try:
        await train(run, topology)
    finally:
        await topology.close()


def disk_full(error: BaseException, folder: Path) -> RaylignError | None:
    """What to tell of a file that could not be written because there is no room; None for any other error.

    The room was missed before where it is missed again on the way out: the first to miss it tells.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
        return None
    before = error.__context__
    while before is not None:
        cause = causes(before)[0]
        if isinstance(cause, RaylignError):
            return cause
        before = before.__context__
    return RunDirError(
        f"cannot write {error.filename or 'a file of the run'}: {error.strerror}; {free_space(folder)}. Earlier "
        "checkpoints are intact: free some space and `raylign resume`"
    )
