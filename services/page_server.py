"""Serving an application with endless answers, such as event streams, until Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from raylign.errors import ConfigError

Stopping = Callable[[], bool]
"""Whether the server is asked to stop. An answer that never ends by itself looks at it, and ends."""
GRACE_S = 3


def never() -> bool:
    """Of an application that somebody else serves: the connection is cut when that stops."""
    return False


def serve_pages(make_app: Callable[[Stopping], Any], host: str, port: int) -> None:
    """Serve what `make_app` makes until Ctrl-C or SIGTERM. Raises ConfigError where the address cannot be had."""
    import uvicorn

    running: list[uvicorn.Server] = []
    app = make_app(lambda: bool(running) and running[0].should_exit)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    running.append(uvicorn.Server(config))
    try:
        with contextlib.suppress(KeyboardInterrupt):
            running[0].run()
    except SystemExit as error:
        raise ConfigError(f"{host}:{port} cannot be served, see above; give another --port, or --host") from error
