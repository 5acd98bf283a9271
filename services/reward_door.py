"""The reward service's own HTTP listener: uvicorn in the process that reads requests.

Ray Serve's proxy would put a process and two actor calls between a client and this one, 5 ms and half of the
throughput of small requests. Without it Serve still starts, checks, restarts and drains this process.
"""

from __future__ import annotations

import asyncio
import socket
import time

import uvicorn
from starlette.types import ASGIApp

from raylign.errors import ClusterError

BIND_TIMEOUT_S = 20.0
"""How long a predecessor may still hold the port."""
_BACKLOG = 1024
_KEEP_ALIVE_S = 75


class HttpDoor:
    """An application behind a port. Runs on the event loop that opened it."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None]) -> None:
        self._server = server
        self._task = task

    @classmethod
    async def open(
        cls,
        app: ASGIApp,
        host: str,
        port: int,
        drain_timeout_s: float,
        shared: bool = False,
        bind_timeout_s: float = BIND_TIMEOUT_S,
    ) -> HttpDoor:
        """Listen. `shared`: other processes of this service listen there too, and the kernel deals out connections.

        Raises ClusterError if somebody else has the port.
        """
        listening = await _bind(host, port, shared, bind_timeout_s)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
        )
        server = uvicorn.Server(config)
        return cls(server, asyncio.create_task(server.serve(sockets=[listening])))

    def check(self) -> None:
        """Raise RuntimeError if nobody listens any more."""
        if self._task.done():
            raise RuntimeError("the HTTP server has ended")

    async def close(self) -> None:
        """Take no more connections, answer what is inside, and let go of the port."""
        self._server.should_exit = True
        await asyncio.wait([self._task])


def check_free(host: str, port: int) -> None:
    """Raise ClusterError if somebody listens there, before minutes go into loading models."""
    _listen(host, port, shared=False).close()


async def _bind(host: str, port: int, shared: bool, timeout_s: float) -> socket.socket:
    """A listening socket; waits a while for the port."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _listen(host, port, shared)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


def _listen(host: str, port: int, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=shared)
    except OSError as error:
        raise ClusterError(
            f"cannot listen at {host}:{port}: {error.strerror}; is the port taken? Set another service.port"
        ) from None
