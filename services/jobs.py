"""Runs as Ray jobs, from Python: submit, watch and stop them on a cluster, through its dashboard's address.

    JobClient.connect("http://head:8265")
        .submit(config, "quickstart_image")     checks everything that can be checked here, uploads, starts
        .status(id)  .logs(id, follow=True)  .stop(id)  .list()

`JobServer` is the seam: what a client needs of a cluster. `services/job_server.py` is the one that speaks to Ray.
Watching needs neither torch nor a model library, so only `submit` imports them.
"""

from __future__ import annotations

import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

from raylign.errors import ClusterError, ConfigError
from services.process import worker_environment

if TYPE_CHECKING:
    from services.config import RunConfig

JobStatus = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
"""Ray's words. STOPPED is a run that was asked to stop; it has a checkpoint if it had begun to train."""

DEFAULT_RUNS = "~/raylign_runs"
STOP_WAIT_S = 600
"""How long a run may take to finish its step and write its checkpoint before Ray kills it."""
EXIT_FAILED, EXIT_STOPPED = 1, 130

_CONFIG, _NUM_STEPS, _RUN_DIR = "raylign_config", "raylign_num_steps", "raylign_run_dir"
# The line that a run without a terminal prints, see services/console.py.
_STEP_LINE = re.compile(r"^(?:stopped )?step (\d+)/\d+\b", re.MULTILINE)
_NAME_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the cluster. What only Raylign's own jobs have is None for others."""

    id: str
    status: JobStatus
    config: str | None = None
    """Name of the configuration, or the one given at submission."""
    run_dir: str | None = None
    """Where it writes, on the cluster."""
    step: int | None = None
    """Last step that its log tells of."""
    num_steps: int | None = None
    started_s: float | None = None
    """Seconds since 1970."""
    ended_s: float | None = None
    exit_code: int | None = None
    message: str = ""
    """What Ray says of it; after a failure, the end of the log."""

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def result(self) -> int:
        """Exit code for a caller that waited: 0, the run's own, or 130 when it was stopped."""
        if self.status == "SUCCEEDED":
            return 0
        return EXIT_STOPPED if self.status == "STOPPED" else self.exit_code or EXIT_FAILED

    def duration_s(self, now_s: float) -> float | None:
        if self.started_s is None:
            return None
        return max(0.0, (self.ended_s if self.ended_s is not None else now_s) - self.started_s)


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What a client must know of a cluster before it sends anything."""

    ray_version: str
    python_version: str
    resources: Mapping[str, float]
    """Totals over living nodes; empty if the cluster does not tell."""
    asks_for_token: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """What is sent."""

    id: str
    entrypoint: str
    package: Path
    env_vars: Mapping[str, str]
    metadata: Mapping[str, str]
    num_cpus: float
    """CPUs that the driver reserves. With 0 it runs on the head node."""


class JobServer(Protocol):
    """A cluster that takes jobs. Every method raises ClusterError when it does not answer or knows no such job."""

    address: str

    def facts(self) -> ClusterFacts: ...
    def submit(self, submission: Submission) -> None: ...
    def job(self, job_id: str) -> tuple[Job, Mapping[str, str]]: ...
    def jobs(self) -> list[tuple[Job, Mapping[str, str]]]: ...
    def logs(self, job_id: str) -> str: ...
    def follow(self, job_id: str) -> Iterator[str]: ...
    def stop(self, job_id: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that the cluster has taken."""

    id: str
    run_dir: str
    size_bytes: int


class JobClient:
    """Submits and watches runs on one cluster."""

    def __init__(self, server: JobServer) -> None:
        self._server = server
        self.address = server.address

    @classmethod
    def connect(cls, address: str | None = None) -> Self:
        """A client of the cluster at a dashboard's URL; `None` is what the environment says (docs/jobs.md).

        Raises ClusterError within seconds if nothing answers there, or if the token is missing or wrong.
        """
        from services.job_server import RayJobServer, find_address

        return cls(RayJobServer(find_address(address)))

    def submit(
        self,
        config: RunConfig,
        name: str,
        run_dir: str | None = None,
        num_cpus: float = 0.0,
        stop_wait_s: int = STOP_WAIT_S,
        upload: bool = True,
        note: Callable[[str], None] = lambda text: None,
    ) -> Submitted:
        """Start a run on the cluster. `name` becomes part of the id; `run_dir` is a path there; `note` hears progress.

        Raises what `train` would raise for bad input, and ClusterError for a cluster that cannot run it.
        """
        from services.job_checks import check_inputs, check_resources, check_versions
        from services.job_package import megabytes, pack

        facts = self._server.facts()
        check_versions(facts)
        check_resources(config, facts.resources, num_cpus, self.address)
        check_inputs(config)
        slug = slugify(name)
        job_id = f"raylign-{slug}-{uuid.uuid4().hex[:6]}"
        folder = checked_run_dir(run_dir) if run_dir is not None else f"{DEFAULT_RUNS}/{job_id}"
        metadata = {_CONFIG: name, _NUM_STEPS: str(config.num_steps), _RUN_DIR: folder}
        env_vars = {**worker_environment(), "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s)}
        if facts.asks_for_token:
            # The driver has its node's token, and sends it if it is told to.
            env_vars["RAY_AUTH_MODE"] = "token"
        with tempfile.TemporaryDirectory(prefix="raylign-") as temporary:
            package = pack(config, slug, folder, Path(temporary), upload)
            travelling = "".join(f", {path.name}" for path in package.uploaded)
            note(f"uploading {megabytes(package.size_bytes)}: the program, the configuration{travelling}")
            for path in package.left:
                note(f"not uploaded, the cluster must have it: {path}")
            self._server.submit(Submission(job_id, package.entrypoint, package.path, env_vars, metadata, num_cpus))
        return Submitted(job_id, folder, package.size_bytes)

    def status(self, job_id: str) -> Job:
        """The job, with the last step that its log tells of. Raises ClusterError if there is none of that id."""
        job, metadata = self._server.job(job_id)
        return self._complete(job, metadata, read_log=True)

    def wait(self, job_id: str, timeout_s: float | None = None, every_s: float = 1.0) -> Job:
        """The job when it is over. Raises ClusterError when that takes longer than `timeout_s`."""
        began_s = time.monotonic()
        while not self._server.job(job_id)[0].is_over:
            if timeout_s is not None and time.monotonic() - began_s > timeout_s:
                raise ClusterError(f"{job_id} is not over after {timeout_s:g} s; `raylign status {job_id}` shows it")
            time.sleep(every_s)
        return self.status(job_id)

    def logs(self, job_id: str, follow: bool = False) -> Iterator[str]:
        """What the run printed, in pieces; `follow` goes on until the job is over."""
        if follow:
            yield from self._server.follow(job_id)
        else:
            yield self._server.logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask a run to finish its step, write a checkpoint and end; returns at once. False if it was over already."""
        job, _ = self._server.job(job_id)
        return not job.is_over and self._server.stop(job_id)

    def list(self) -> tuple[Job, ...]:
        """Raylign's jobs on the cluster, the newest first; others' are left out."""
        ours = [
            self._complete(job, told, job.status == "RUNNING") for job, told in self._server.jobs() if _CONFIG in told
        ]
        return tuple(sorted(ours, key=lambda job: job.started_s or 0.0, reverse=True))

    def _complete(self, job: Job, metadata: Mapping[str, str], read_log: bool) -> Job:
        """With what was said at submission, and the step: the log's, or all of them when the run succeeded."""
        if _CONFIG not in metadata:
            return job
        num_steps = int(metadata[_NUM_STEPS])
        if job.status == "SUCCEEDED":
            step = num_steps
        else:
            step = last_step(self._server.logs(job.id)) if read_log and job.status != "PENDING" else None
        return replace(job, config=metadata[_CONFIG], run_dir=metadata[_RUN_DIR], num_steps=num_steps, step=step)


def last_step(log: str) -> int | None:
    """The last training step that a run's output tells of."""
    found = _STEP_LINE.findall(log)
    return int(found[-1]) if found else None


def slugify(name: str) -> str:
    """A name as part of an id: lower case, hyphens for the rest. Raises ConfigError if nothing is left."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_NAME_LENGTH].strip("-")
    if not slug:
        raise ConfigError(f"--name {name!r} has no letter or digit to make an id of")
    return slug


def checked_run_dir(run_dir: str) -> str:
    """A run directory on the cluster. Raises ConfigError for a relative one: relative to what, over there?"""
    if not run_dir.startswith(("/", "~/")):
        raise ConfigError(
            f"--run-dir {run_dir!r} is a path on the cluster: give an absolute one, or one that starts with ~/, on a "
            "file system that its nodes share"
        )
    return run_dir
