"""`raylign submit`, `status`, `logs`, `stop` and `list`: runs as jobs of a Ray cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.jobs import Job, JobClient

app = typer.Typer()

_HELP = "URL of the cluster's dashboard, http://HOST:8265. RAYLIGN_ADDRESS, or this machine's, if absent."
AddressOption = Annotated[str | None, typer.Option("--address", help=_HELP)]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="What `raylign submit` printed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]
_FOLLOW_WAIT_S = 60.0
_MESSAGE_LINES = 15


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a shipped one; more of them are laid over it.")
    ] = "quickstart_image",
    address: AddressOption = None,
    run_dir: Annotated[
        str | None, typer.Option("--run-dir", help="Where the run writes, on the cluster; ~/raylign_runs/ID if absent.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Part of the id; the configuration's if absent.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its output, and end with its exit code.")] = False,
    entrypoint_num_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs reserved for the run's driver; with 0 it runs on the head node.")
    ] = 0.0,
    stop_wait_s: Annotated[
        int, typer.Option(min=1, help="Seconds to finish the step and write a checkpoint when stopped.")
    ] = 600,
    upload: Annotated[
        bool, typer.Option("--upload/--no-upload", help="Take prompt files along; no: the cluster shares their path.")
    ] = True,
) -> None:
    """Start a run on a Ray cluster and leave it there. Any configuration key can be set, as in `train`.

    Example: `raylign submit quickstart_image --address http://head:8265 --num_steps 60 --follow`

    Ctrl-C while following leaves the run alone; `raylign stop` ends it, with a checkpoint.
    """
    from services.cli import split_configs

    names, overrides = split_configs(config, "quickstart_image", context.args)
    from services.config import load_run_config

    settings = load_run_config(names, overrides)
    title = name if name is not None else "-".join(Path(one).stem for one in names)
    client = _connect(address)
    submitted = client.submit(settings, title, run_dir, entrypoint_num_cpus, stop_wait_s, upload, typer.echo)
    where = f"--address {client.address}"
    typer.echo(f"submitted {submitted.id}, which writes {submitted.run_dir} on the cluster")
    if follow:
        raise typer.Exit(_follow(client, submitted.id))
    for verb, more in (("status", ""), ("logs", "--follow "), ("stop", "")):
        typer.echo(f"  raylign {verb} {submitted.id} {more}{where}")


@app.command()
def status(job_id: JobArgument, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Say how far a job is."""
    job = _connect(address).status(job_id)
    if as_json:
        typer.echo(json.dumps(asdict(job)))
        return
    for label, value in (
        ("job", job.id),
        ("status", job.status),
        ("configuration", job.config),
        ("step", _step(job)),
        ("duration", _duration(job)),
        ("run directory", job.run_dir),
        ("exit code", job.exit_code),
        ("message", _ending(job.message) if job.status == "FAILED" else None),
    ):
        if value not in (None, "", "-"):
            typer.echo(f"{label.ljust(14)} {value}")


@app.command()
def logs(
    job_id: JobArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is over; end with its code.")] = False,
) -> None:
    """Show what a job printed."""
    client = _connect(address)
    if follow:
        raise typer.Exit(_follow(client, job_id))
    for text in client.logs(job_id):
        typer.echo(text, nl=False)


@app.command()
def stop(
    job_id: JobArgument,
    address: AddressOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job is over.")] = False,
) -> None:
    """Stop a job: the run finishes its step, writes a checkpoint and ends, as on Ctrl-C."""
    client = _connect(address)
    if not client.stop(job_id):
        typer.echo(f"{job_id} is over already")
        return
    typer.echo(f"{job_id} stops after the step in progress, with a checkpoint")
    if wait:
        job = client.wait(job_id)
        typer.echo(f"{job.status}, step {_step(job)}" + (f", in {job.run_dir}" if job.run_dir else ""))


@app.command("list")
def list_jobs(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List Raylign's jobs on a cluster, the newest first."""
    client = _connect(address)
    jobs = client.list()
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in jobs], indent=2))
        return
    if not jobs:
        typer.echo(f"no Raylign jobs at {client.address}; `raylign submit CONFIG` starts one")
        return
    for line in table(jobs):
        typer.echo(line)


def table(jobs: Sequence[Job]) -> Iterator[str]:
    """Jobs as lines of aligned columns, with a heading."""
    rows = [("ID", "STATUS", "CONFIG", "STEP", "STARTED", "DURATION")]
    for job in jobs:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started_s)) if job.started_s else "-"
        rows.append((job.id, job.status, job.config or "-", _step(job), started, _duration(job)))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _connect(address: str | None) -> JobClient:
    from services.jobs import JobClient

    return JobClient.connect(address)


def _follow(client: JobClient, job_id: str) -> int:
    """The job's output until it is over; returns its exit code, or 130 when the reader has left."""
    with _leaving(client, job_id):
        for text in client.logs(job_id, follow=True):
            typer.echo(text, nl=False)
        # The log ends a moment before Ray knows how the job did.
        job = client.wait(job_id, _FOLLOW_WAIT_S, every_s=0.2)
    typer.echo(f"{job_id}: {job.status}, step {_step(job)}, {_duration(job)}")
    return job.result


@contextmanager
def _leaving(client: JobClient, job_id: str) -> Generator[None]:
    """Ctrl-C leaves the job alone and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"{job_id} --address {client.address}"
        typer.echo(f"\n{job_id} goes on. Watch: raylign logs {where} --follow. Stop: raylign stop {where}", err=True)
        raise typer.Exit(130) from None


def _ending(message: str) -> str:
    """Ray puts up to 20,000 characters of log into it."""
    return "\n".join(message.strip().splitlines()[-_MESSAGE_LINES:])


def _step(job: Job) -> str:
    if job.num_steps is None:
        return "-"
    return f"{'-' if job.step is None else job.step}/{job.num_steps}"


def _duration(job: Job) -> str:
    from services.console import duration

    seconds = job.duration_s(time.time())
    return "-" if seconds is None else duration(seconds)
