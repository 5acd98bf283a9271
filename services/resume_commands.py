"""`raylign resume` and `fork`: going on from a checkpoint, in the same run or in a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join (`auto`, host:port). Starts a local one if absent.")
]
StepOption = Annotated[
    int | None, typer.Option("--step", min=0, help="The checkpoint of this step; the newest good one if absent.")
]


@app.command(context_settings=_OVERRIDES)
def resume(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")],
    step: StepOption = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-config-change",
            metavar="KEY",
            help="A key, or a table with its keys, that may differ from before; may be given several times.",
        ),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Go on with a run exactly where its last checkpoint was written. Configuration keys can be set, as in `train`.

    Example: `raylign resume runs/RUN --num_steps 120 --learner.lr 1e-4 --allow-config-change learner.lr`

    A checkpoint that was damaged is set aside, and the next older one taken.
    """
    from services.cli import parse_overrides
    from services.run import resume_run

    overrides = parse_overrides(context.args)
    raise typer.Exit(resume_run(run_dir, address, step, overrides, allow or ()))


@app.command(context_settings=_OVERRIDES)
def fork(
    context: typer.Context,
    parent: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, which may be going on.")],
    step: StepOption = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where the new run writes; a new folder in runs/.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Start a new run from a checkpoint of another: its weights, optimiser and slow copies, with keys changed.

    Example: `raylign fork runs/RUN --step 40 --run-dir runs/LOWER --learner.lr 1e-4`
    """
    from services.cli import parse_overrides
    from services.fork import fork_run

    raise typer.Exit(fork_run(parent, step, run_dir, parse_overrides(context.args), address))
