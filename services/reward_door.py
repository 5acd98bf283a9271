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
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raylign.errors import ClusterError

BIND_TIMEOUT_S = 20.0
"""How long a predecessor may still hold the port."""
MAX_HEAD_BYTES = 2**16
"""Longest request line and headers together. The parser itself would keep them all, before any token is looked at."""
_BACKLOG = 1024
_KEEP_ALIVE_S = 75


class BoundedHeads(HttpToolsProtocol):
    """uvicorn's protocol, which hangs up on whoever sends headers without end, or none."""

    head_timeout_s = 20.0
    """How long a new connection, and any request that has begun, may take to bring headers."""
    _num_head_bytes = 0
    _in_head = False
    _hang_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base class
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)  # a head that begins in these bytes counts from the next
        super().data_received(data)
        if self._in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._num_head_bytes = True, 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        if self._hang_up is None:
            self._hang_up = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _head_is_there(self) -> None:
        self._in_head = False
        if self._hang_up is not None:
            self._hang_up.cancel()
            self._hang_up = None


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
        protocol: type[BoundedHeads] = BoundedHeads,
    ) -> HttpDoor:
        """Listen. `shared`: other processes of this service listen there too, and the kernel deals out connections.

        Raises ClusterError if somebody else has the port.
        """
        listening = await _bind(host, port, shared, bind_timeout_s)
        config = uvicorn.Config(
            app,
            http=protocol,
            proxy_headers=False,  # whoever may name his own address has no rate
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
