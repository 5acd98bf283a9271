"""Control of a live run, from another process on the driver's machine: its state, its number of actors, a pause.

    raylign scale RUN ─▶ RUN/control.json (0600: port, token) ─▶ 127.0.0.1:port ─▶ ControlServer ─▶ RunControl ─▶ fleet

The driver listens on loopback only, and answers those who can read the file in the run's directory. One line of strict
JSON goes each way per connection; nothing in it is executed. Neither side imports torch or Ray for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from raylign.config import Config
from raylign.errors import ClusterError, ConfigError, RaylignError, RunDirError
from services.elastic import ActorBounds, PoolStatus
from services.run_dir import RunDir

CONTROL_FILE = "control.json"
_MAX_LINE_BYTES = 2**16
_READ_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
_ERRORS: Mapping[str, type[RaylignError]] = {"ConfigError": ConfigError, "ClusterError": ClusterError}


class StatusAsk(Config):
    """How is the run?"""

    verb: Literal["status"] = "status"


class ScaleAsk(Config):
    """Change the number of rollout actors."""

    verb: Literal["scale"] = "scale"
    rollout: int = Field(strict=True)
    """Rollout actors from now on."""


class PauseAsk(Config):
    """Draw nothing more."""

    verb: Literal["pause"] = "pause"


class GoOnAsk(Config):
    """End a pause."""

    verb: Literal["resume"] = "resume"


Ask = Annotated[StatusAsk | ScaleAsk | PauseAsk | GoOnAsk, Field(discriminator="verb")]
_ASK: TypeAdapter[StatusAsk | ScaleAsk | PauseAsk | GoOnAsk] = TypeAdapter(Ask)


class Envelope(Config):
    """A question with the proof that its sender may read the run's directory."""

    token: str
    ask: dict[str, Any]


class Contact(Config):
    """What `control.json` holds."""

    host: str
    """The machine that the driver runs on; the port is its loopback's."""
    pid: int
    port: int
    token: str


class RunState(Config):
    """A live run."""

    step: int
    """Last completed step."""
    num_steps: int
    pool: PoolStatus | None = None
    """None where the number of actors is fixed: in one process, or colocated with the learner."""


class Reply(Config):
    """An answer: the run's state after what was asked, or why that was refused."""

    state: RunState | None = None
    error: str = ""
    kind: str = ""


class Pool(Protocol):
    """What control needs of a fleet."""

    def resize(self, num_actors: int) -> None: ...
    def pause(self) -> None: ...
    def go_on(self) -> None: ...
    def status(self) -> PoolStatus: ...


class RunControl:
    """What may be asked of one live run. Must be used on the run's event loop."""

    def __init__(
        self,
        pool: Pool | None,
        bounds: ActorBounds,
        most: Callable[[], int],
        progress: Callable[[], tuple[int, int]],
    ) -> None:
        """most: how many actors the cluster can hold. progress: the last completed step, and how many there will be.

        pool: None for a run whose number of actors is fixed.
        """
        self._pool = pool
        self._bounds = bounds
        self._most = most
        self._progress = progress

    def answer(self, ask: StatusAsk | ScaleAsk | PauseAsk | GoOnAsk) -> RunState:
        """Do what is asked. Raises ConfigError or ClusterError, and then has done nothing."""
        if isinstance(ask, ScaleAsk):
            self._scale(ask.rollout)
        elif isinstance(ask, PauseAsk):
            self._elastic("pause").pause()
        elif isinstance(ask, GoOnAsk):
            self._elastic("resume").go_on()
        step, num_steps = self._progress()
        pool = None if self._pool is None else self._pool.status()
        return RunState(step=step, num_steps=num_steps, pool=pool)

    def _scale(self, wanted: int) -> None:
        pool = self._elastic("scale")
        if wanted < 1:
            raise ConfigError(
                f"a run needs at least 1 rollout actor, got {wanted}; `raylign pause` holds it without ending it"
            )
        if self._bounds.is_elastic and self._bounds.clip(wanted) != wanted:
            raise ConfigError(
                f"{wanted} rollout actors are outside rollout.min_actors {self._bounds.least} to max_actors "
                f"{self._bounds.most}, between which the run scales by itself; choose a number between them"
            )
        most = self._most()
        if wanted > most:
            raise ClusterError(
                f"{wanted} rollout actors were asked for and the cluster can hold {most} beside the run's learner and "
                f"rewards; it goes on with {pool.status().wanted}. Add nodes, or ask for at most {most}"
            )
        pool.resize(wanted)

    def _elastic(self, verb: str) -> Pool:
        if self._pool is None:
            raise ConfigError(
                f"cannot {verb} this run: its rollout actors are the learner's own processes. It would have to be "
                "started with placement = 'separate'"
            )
        return self._pool


@asynccontextmanager
async def control_server(control: RunControl, run_dir: Path) -> AsyncGenerator[None]:
    """Answer those who can read `control.json` in the run's directory, for as long as the body runs."""
    token = secrets.token_hex(32)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, ValueError):  # a caller that left, dawdled or babbles
            async with asyncio.timeout(_READ_TIMEOUT_S):
                line = await reader.readline()
                writer.write(reply_to(control, token, line).model_dump_json().encode() + b"\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_MAX_LINE_BYTES)
    port = server.sockets[0].getsockname()[1]
    path = run_dir / CONTROL_FILE
    _write_private(path, Contact(host=socket.gethostname(), pid=os.getpid(), port=port, token=token))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        server.close()
        await server.wait_closed()


def reply_to(control: RunControl, token: str, line: bytes) -> Reply:
    """The answer to one line, whatever it is."""
    try:
        envelope = Envelope.model_validate_json(line)
        if not hmac.compare_digest(envelope.token.encode(), token.encode()):
            return Reply(error="this is not the run's token; read it from control.json again", kind="ConfigError")
        return Reply(state=control.answer(_ASK.validate_python(envelope.ask)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return Reply(error=f"not a question to a run: {where}: {first['msg']}", kind="ConfigError")
    except (ConfigError, ClusterError) as error:
        return Reply(error=str(error), kind=type(error).__name__)


def ask(run_dir: Path, question: StatusAsk | ScaleAsk | PauseAsk | GoOnAsk) -> RunState:
    """Ask a live run, and wait for its answer.

    Raises RunDirError if the directory is no run's or its run is not live here, and what the run refuses with.
    """
    contact = read_contact(run_dir)
    line = json.dumps({"token": contact.token, "ask": question.model_dump()}).encode() + b"\n"
    gone = RunDirError(
        f"the run in {run_dir} does not answer: its driver (process {contact.pid}) is gone. `raylign resume {run_dir}` "
        "goes on with it"
    )
    try:
        with socket.create_connection(("127.0.0.1", contact.port), timeout=_ANSWER_TIMEOUT_S) as connection:
            connection.sendall(line)
            with connection.makefile("rb") as answers:
                reply = Reply.model_validate_json(answers.readline(_MAX_LINE_BYTES))
    except TimeoutError:
        raise RunDirError(
            f"the run in {run_dir} did not answer within {_ANSWER_TIMEOUT_S:g} s; is its driver (process "
            f"{contact.pid}) stopped?"
        ) from None
    except (OSError, ValidationError):
        raise gone from None
    if reply.state is None:
        raise _ERRORS.get(reply.kind, ConfigError)(reply.error)
    return reply.state


def read_contact(run_dir: Path) -> Contact:
    """How to reach the run's driver. Raises RunDirError, saying what to do, where there is none to reach."""
    RunDir(run_dir).check()
    path = run_dir / CONTROL_FILE
    try:
        contact = Contact.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RunDirError(
            f"the run in {run_dir} is not live; `raylign resume {run_dir}` goes on with one that was stopped"
        ) from None
    except PermissionError:
        raise RunDirError(f"{path} belongs to another user; ask whoever started the run") from None
    except ValidationError:
        raise RunDirError(f"{path} is not what a run writes; delete it if no run is live there") from None
    if contact.host != socket.gethostname():
        raise RunDirError(
            f"the run in {run_dir} is driven on {contact.host}, and listens on that machine alone; give the command "
            "there, or go through `raylign serve-runs` (docs/scaling.md)"
        )
    return contact


def _write_private(path: Path, contact: Contact) -> None:
    """Nobody else may read the token, not for a moment; readers see all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(contact.model_dump_json())
    partial.replace(path)
