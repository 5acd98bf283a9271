"""`raylign dashboard`: the live page over runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

TOKEN_VARIABLE = "RAYLIGN_DASHBOARD_TOKEN"
ANSWER_TIMEOUT_S = 5.0


@app.command()
def dashboard(
    runs: Annotated[
        str,
        typer.Argument(help="A run, the folder that holds runs, or the address of `raylign serve-runs` elsewhere."),
    ] = "runs",
    host: Annotated[str, typer.Option(help="Address to listen at; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8280,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with a secret that viewers give once; {TOKEN_VARIABLE} if absent.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show runs in the browser until Ctrl-C, live: curves, groups, timing, failures. It reads their folders only.

    A cluster's own `raylign serve-runs` has the page already: its address is looked for, told and, with --open, opened.

    Examples: `raylign dashboard runs --open`, `raylign dashboard http://head:8270 --open`
    """
    import webbrowser

    if runs.startswith(("http://", "https://")):
        page = served_page(runs)
        typer.echo(f"Dashboard of the runs of {runs}: {page}")
        if open_page:
            webbrowser.open(page)
        return
    from services.scale_commands import read_token

    token = read_token(token_file) or os.environ.get(TOKEN_VARIABLE) or None
    typer.echo("Starting the dashboard ...")
    from services.dashboard.app import serve_dashboard

    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    typer.echo(f"Dashboard of {runs}: {address}  Ctrl-C stops.")
    if open_page:
        import threading

        threading.Timer(1.0, webbrowser.open, (address,)).start()
    serve_dashboard(Path(runs).expanduser(), host, port, token)


def served_page(address: str) -> str:
    """Where a `raylign serve-runs` shows its page. Raises ConfigError if there is none at the address."""
    import urllib.error
    import urllib.request

    from raylign.errors import ConfigError

    page = f"{address.rstrip('/')}/dashboard/"
    try:
        with urllib.request.urlopen(page, timeout=ANSWER_TIMEOUT_S) as answer:  # http(s), as was checked
            # Where a token is needed it answers with its form, which is a page as well.
            if "Raylign" in answer.read(10_000).decode("utf-8", "replace"):
                return page
            told = "is no dashboard"
    except urllib.error.HTTPError as error:
        told = f"answers {error.code}"
    except (OSError, ValueError) as error:
        told = f"does not answer: {error}"
    raise ConfigError(
        f"{page} {told}. Start `raylign serve-runs RUNS` where the cluster's drivers write, forward its port (`ssh -L "
        "8270:127.0.0.1:8270 HEAD`), or give the folder itself"
    )
