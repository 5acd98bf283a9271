"""A Ray cluster's job server, over the address of its dashboard.

Ray's own client sends the requests that change or stream something. Before that this file asks by itself who is
there, because that client waits for an address without end, lets RAY_ADDRESS override the one it is given, and
compares no versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylign.errors import ClusterError
from services.jobs import ClusterFacts, Job, Submission

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAYLIGN_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TIMEOUT_S = 5.0
_SCHEMES = ("http://", "https://")
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_NOT_READY = "No available agent"
_SUBMIT_TRIES = 3
_HOME_TOKEN = Path(".ray/auth_token")
_TOKEN_HELP = (
    "set RAY_AUTH_TOKEN_PATH to the cluster's token file, or RAY_AUTH_TOKEN to the token (on the head node, "
    "`ray get-auth-token` prints it)"
)


def find_address(given: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The dashboard's URL: the one given, else the first variable that holds one, else Ray's default on this machine.

    Raises ClusterError for an address that is no URL. RAY_ADDRESS may hold a cluster's address of the other kind
    (host:6379, auto), which is passed over.
    """
    if given is None:
        for name in ADDRESS_VARIABLES:
            value = environ.get(name, "")
            if value.startswith(_SCHEMES) or (value and name != "RAY_ADDRESS"):
                given = value
                break
    address = (given or DEFAULT_ADDRESS).rstrip("/")
    if not address.startswith(_SCHEMES):
        raise ClusterError(
            f"jobs are sent to the URL of the cluster's dashboard, such as {DEFAULT_ADDRESS}, got {address!r}; give it "
            "as --address or in RAYLIGN_ADDRESS"
        )
    return address


def read_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """The token that the user set. One in the home directory may be another cluster's: it counts only in token mode."""
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    path = Path(environ["RAY_AUTH_TOKEN_PATH"]) if environ.get("RAY_AUTH_TOKEN_PATH") else None
    if path is None:
        home = Path(environ.get("HOME", "~")).expanduser() / _HOME_TOKEN
        if environ.get("RAY_AUTH_MODE") != "token" or not home.is_file():
            return None
        path = home
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read: {error.strerror}") from None


class RayJobServer:
    """`JobServer` of a Ray cluster. Making one asks the cluster whether it is there."""

    def __init__(self, address: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        """`token` is the environment's when None. Raises ClusterError if nothing answers, or the token is refused."""
        self.address = address
        token = token if token is not None else read_token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._ray_version = str(self._get("/api/version").get("ray_version", "unknown"))
        with _without(ADDRESS_VARIABLES), self._spoken():
            from ray.job_submission import JobSubmissionClient

            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = JobSubmissionClient(address, headers=dict(self._headers))

    def facts(self) -> ClusterFacts:
        metadata = self._get("/api/v0/cluster_metadata")["data"]
        nodes = self._get("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        total: dict[str, float] = {}
        for node in nodes:
            if node["state"] == "ALIVE":
                for kind, amount in node["resources_total"].items():
                    total[kind] = total.get(kind, 0.0) + amount
        mode = self._get("/api/authentication_mode").get("authentication_mode")
        return ClusterFacts(self._ray_version, str(metadata["pythonVersion"]), total, asks_for_token=mode == "token")

    def submit(self, submission: Submission) -> None:
        """A head node that has just started refuses for a while, each time after waiting for itself."""
        for tries_left in reversed(range(_SUBMIT_TRIES)):
            try:
                with self._spoken():
                    self._client.submit_job(
                        entrypoint=submission.entrypoint,
                        submission_id=submission.id,
                        runtime_env={"working_dir": str(submission.package), "env_vars": dict(submission.env_vars)},
                        metadata=dict(submission.metadata),
                        entrypoint_num_cpus=submission.num_cpus or None,
                    )
                return
            except ClusterError as error:
                if _NOT_READY not in str(error):
                    raise
                if not tries_left:
                    raise ClusterError(
                        f"the Ray cluster at {self.address} answers, but the agent of its head node does not start the "
                        "job. Wait and submit again; where two clusters share that machine, give each a port of its "
                        "own with `ray start --dashboard-agent-listen-port`"
                    ) from error

    def job(self, job_id: str) -> tuple[Job, Mapping[str, str]]:
        with self._spoken(job_id):
            return _read(self._client.get_job_info(job_id))

    def jobs(self) -> list[tuple[Job, Mapping[str, str]]]:
        with self._spoken():
            return [_read(details) for details in self._client.list_jobs() if details.submission_id]

    def logs(self, job_id: str) -> str:
        with self._spoken(job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """Ctrl-C ends it with KeyboardInterrupt; the job goes on."""
        stream = self._client.tail_job_logs(job_id)

        async def piece() -> str | None:
            return await anext(stream, None)

        with asyncio.Runner() as runner:
            while True:
                with self._spoken(job_id):
                    text = runner.run(piece())
                if text is None:
                    return
                yield text

    def stop(self, job_id: str) -> bool:
        with self._spoken(job_id):
            return self._client.stop_job(job_id)

    def _get(self, path: str) -> dict[str, Any]:
        """One JSON answer within the timeout. Raises ClusterError that says what to do."""
        request = urllib.request.Request(self.address + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise self._refused(error.code, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no Ray cluster answers at {self.address} ({reason}); check the address and that the head node runs "
                "its dashboard (`ray start --head --include-dashboard=true`)"
            ) from None
        except (ValueError, TypeError):
            raise ClusterError(f"{self.address} answers, but not as a Ray dashboard does; check the address") from None

    def _refused(self, code: int, reason: str) -> ClusterError:
        if code == 401:
            return ClusterError(f"the Ray cluster at {self.address} asks for a token and none was sent; {_TOKEN_HELP}")
        if code == 403:
            return ClusterError(f"the Ray cluster at {self.address} refuses the token that was sent; {_TOKEN_HELP}")
        return ClusterError(f"{self.address} answers {code} {reason}, not as a Ray dashboard does; check the address")

    @contextlib.contextmanager
    def _spoken(self, job_id: str | None = None) -> Generator[None]:
        """Ray's errors of many kinds as one that says what to do."""
        import aiohttp
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise ClusterError(f"the Ray cluster at {self.address} refuses the token; {_TOKEN_HELP}") from None
        # The client wraps a refusal's text; requests' errors are OSErrors.
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if job_id is not None and ("404" in str(error) or "does not exist" in str(error)):
                raise ClusterError(
                    f"the Ray cluster at {self.address} has no job {job_id!r}; `raylign list` shows those it has"
                ) from None
            what = f"job {job_id}: " if job_id is not None else ""
            raise ClusterError(
                f"{what}the Ray cluster at {self.address} failed to answer: {_last_line(error)}"
            ) from error


def _read(details: JobDetails) -> tuple[Job, Mapping[str, str]]:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    job = Job(
        id=details.submission_id or details.job_id or "",
        status=str(getattr(details.status, "value", details.status)),  # pyright: ignore[reportArgumentType]
        started_s=seconds(details.start_time),
        ended_s=seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )
    return job, details.metadata or {}


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Generator[None]:
    """Ray's client takes these variables over the address that it is given."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _last_line(error: BaseException) -> str:
    """Of a server's traceback the last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__
