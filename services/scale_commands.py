"""`raylign scale`, `pause`, `unpause` and `serve-runs`: control of live runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from services.run_control import RunState

app = typer.Typer()

RunArgument = Annotated[Path, typer.Argument(help="The folder of a live run, on the machine of its driver.")]
_POLL_S = 0.5


@app.command()
def scale(
    run_dir: RunArgument,
    rollout: Annotated[int | None, typer.Option(help="Rollout actors from now on; only shows them if absent.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the actors are as asked.")] = False,
) -> None:
    """Change how many rollout actors a live run has, or show it. Results stay the same, bit for bit.

    Example: `raylign scale runs/quickstart_image-20260101-120000 --rollout 4`

    New actors join when they hold the newest weights; those that leave finish what they have.
    """
    from services.run_control import ScaleAsk, StatusAsk, ask

    state = ask(run_dir, StatusAsk() if rollout is None else ScaleAsk(rollout=rollout))
    while wait and state.pool is not None and (state.pool.joining or state.pool.away or state.pool.leaving):
        time.sleep(_POLL_S)
        state = ask(run_dir, StatusAsk())
    typer.echo(describe(state))


@app.command()
def pause(run_dir: RunArgument) -> None:
    """Hold a live run: nothing more is drawn, what is drawn is trained on, then it waits. Its processes stay."""
    from services.run_control import PauseAsk, ask

    typer.echo(describe(ask(run_dir, PauseAsk())))


@app.command()
def unpause(run_dir: RunArgument) -> None:
    """Let a paused run go on."""
    from services.run_control import GoOnAsk, ask

    typer.echo(describe(ask(run_dir, GoOnAsk())))


@app.command("serve-runs")
def serve_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run directories.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8270,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that clients send; needed off loopback.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Ray cluster that resumed and forked runs join; one of their own if absent."),
    ] = None,
) -> None:
    """Serve runs over HTTP until Ctrl-C: their metrics and samples, control of those that are live here, and new ones
    from their checkpoints.

    Example: `raylign serve-runs runs --host 0.0.0.0 --token-file ~/.raylign_runs_token`
    """
    from services.run_api import serve_runs as serve

    serve(folder.resolve(), host, port, read_token(token_file), address)


def read_token(path: Path | None) -> str | None:
    """The token in a file; None for no file. Raises ConfigError for one that cannot be read or is empty."""
    from raylign.errors import ConfigError

    if path is None:
        return None
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path} cannot be read: {error.strerror}") from None
    if not token:
        raise ConfigError(f"--token-file {path} is empty; put a secret of your own into it")
    return token


def describe(state: RunState) -> str:
    """A live run in one line, and why the last actor that could not join did not."""
    line = f"step {state.step}/{state.num_steps}"
    pool = state.pool
    if pool is None:
        return f"{line}, rollout actors are fixed"
    parts = [f"{pool.in_service} of {pool.wanted} rollout actors at work"]
    parts += [f"{count} {what}" for what in ("joining", "away", "leaving") if (count := getattr(pool, what))]
    parts += ["paused"] if pool.paused else []
    told = f"\nthe last actor that could not join: {pool.problem}" if pool.problem else ""
    return f"{line}, {', '.join(parts)}{told}"
