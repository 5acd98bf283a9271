"""`raylign plan`: what a run will need, before it is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a shipped one; more of them are laid over it.")
    ] = "quickstart_image",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Load the model and measure; otherwise nothing is loaded.")
    ] = True,
    gpu_gib: Annotated[
        float | None, typer.Option("--gpu-gib", min=0.1, help="Say whether it fits on GPUs of so many GiB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast a run: memory by role, weight payload, how batches divide, and the time of a step and of the run.

    Example: `raylign plan flux_flow_grpo --model.path FLUX.1-dev --no-probe --gpu-gib 80`

    Takes the configuration and keys that `train` takes. Exit code 1 when it does not fit on the GPUs asked about.
    """
    from services.cli import split_configs

    names, overrides = split_configs(config, "quickstart_image", context.args)
    from rollout.prompts import load_prompts
    from services.config import load_run_config
    from services.plan.build import as_json as jsonable
    from services.plan.build import make_plan
    from services.run_inputs import read_inputs, with_absolute_paths

    run = with_absolute_paths(load_run_config(names, overrides))
    num_heldout = run.eval.num_prompts or 0
    if probe:
        num_heldout = len(read_inputs(run).heldout)
    elif run.prompts.heldout is not None and not num_heldout:
        from raylign.assets import resolve

        path = resolve(run.prompts.heldout)
        num_heldout = len(load_prompts(path, run.prompts.fields)) if path.exists() else 0
    made = make_plan(run, num_heldout, probe, gpu_gib, lambda role: typer.echo(f"measuring: {role} ...", err=True))
    if as_json:
        typer.echo(json.dumps(jsonable(made), indent=2))
    else:
        from services.plan.show import print_plan

        print_plan(made)
    raise typer.Exit(0 if made.fits else 1)
