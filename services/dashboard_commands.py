"""`raylign dashboard`: the live page over runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

TOKEN_VARIABLE = "RAYLIGN_DASHBOARD_TOKEN"


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="A run, or the folder that holds runs.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8280,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with a secret that viewers give once; {TOKEN_VARIABLE} if absent.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in the browser until Ctrl-C, live: curves, groups, timing, failures. It reads their folders only.

    Example: `raylign dashboard runs --open`
    """
    from services.scale_commands import read_token

    token = read_token(token_file) or os.environ.get(TOKEN_VARIABLE) or None
    typer.echo("Starting the dashboard ...")
    from services.dashboard.app import serve_dashboard

    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    typer.echo(f"Dashboard of {runs}: {address}  Ctrl-C stops.")
    if open_page:
        import threading
        import webbrowser

        threading.Timer(1.0, webbrowser.open, (address,)).start()
    serve_dashboard(runs.expanduser(), host, port, token)
