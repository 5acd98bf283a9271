"""The `raylign` command. Each command imports what it needs when it runs, so `--help` answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from raylign.pretrain import PRETRAINERS
from services import dashboard_commands, job_commands, plan_commands, resume_commands, scale_commands

app = typer.Typer(
    name="raylign",
    help="Post-train image and language diffusion models with reinforcement learning, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(resume_commands.app)
app.add_typer(job_commands.app)
app.add_typer(scale_commands.app)
app.add_typer(dashboard_commands.app)
app.add_typer(plan_commands.app)
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

RunDirOption = Annotated[Path | None, typer.Option("--run-dir", help="Where the run writes; a new folder in runs/.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join (`auto`, host:port). Starts a local one if absent.")
]


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a shipped one; more of them are laid over it.")
    ] = "quickstart_image",
    run_dir: RunDirOption = None,
    address: AddressOption = None,
) -> None:
    """Train a model. Any configuration key can be set after the files, by its dotted name.

    Example: `raylign train configs/quickstart_image.toml --learner.lr 1e-4 --rollout.num_actors 1`

    `raylign train quickstart_image crd` lays a preset over it: the quickstart's task, trained by CRD.

    Ctrl-C stops after the step in progress, with a checkpoint; again, at once.
    """
    names, overrides = split_configs(config, "quickstart_image", context.args)
    from services.config import load_run_config
    from services.run import train_run

    title = "-".join(Path(name).stem for name in names)
    raise typer.Exit(train_run(load_run_config(names, overrides), title, run_dir, address))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    adapter_only: Annotated[bool, typer.Option(help="Write only the LoRA adapter, not the whole pipeline.")] = False,
) -> None:
    """Write the trained model as a directory that the model's own library loads by itself."""
    from services.export import export_run

    export_run(run_dir, directory, adapter_only)


@app.command(context_settings=_OVERRIDES)
def evaluate(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="The folder of a run, or of a model.")],
    config: Annotated[str | None, typer.Argument(help="Configuration; a run's own if not given.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Also write grids of the pictures beside this PNG.")] = None,
    etas: Annotated[
        str | None, typer.Option(help="Stochasticities to draw pictures at, separated by commas; 0 is the ODE.")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Numbers of denoising steps, separated by commas.")] = None,
    rlg: Annotated[
        str | None, typer.Option(help="RLG weights, separated by commas: 0 the base model, 1 the trained one.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw rewards and the gap over stochasticity (PNG).")] = None,
) -> None:
    """Score the held-out prompts: pictures by the ODE and noisily, with the reward gap between; texts at each of
    `eval.gammas`. Any configuration key can be set after, as in `train`.

    Example: `raylign evaluate runs/RUN --etas 0.5,1,1.5 --steps 6,12 --rlg 1,1.5,2 --plot gap.png`
    """
    from services.evaluate import evaluate_target

    name, overrides = split_config(config or "", "", context.args)
    overrides |= {key: f"[{given}]" for key, given in (("eval.etas", etas), ("eval.eta_steps", steps)) if given}
    evaluate_target(target, name or None, overrides, pictures, parse_numbers("rlg", rlg or ""), plot)


@app.command(context_settings=_OVERRIDES)
def ablate(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped one.")] = "quickstart_text",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; runs/ablation-CONFIG if absent.")] = None,
    variants: Annotated[
        str, typer.Option(help="Ways of choosing entropy budgets, separated by commas.")
    ] = "one_token,fixed,sampled,learned",
    seeds: Annotated[int, typer.Option(help="How many seeds, counting up from the configuration's.")] = 1,
) -> None:
    """Train a text model once per way of choosing entropy budgets, and report what the controller adds.

    Example: `raylign ablate configs/quickstart_text.toml --seeds 3 --num_steps 40`

    Given again, it goes on where it stopped.
    """
    config, overrides = split_config(config, "quickstart_text", context.args)
    from services.ablate import ablate as run_ablation

    names = [name.strip() for name in variants.split(",") if name.strip()]
    raise typer.Exit(run_ablation(config, overrides, out, names, seeds, typer.echo))


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help=f"What to make: {', '.join(f'`{name}`' for name in PRETRAINERS)}.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(help="Seeds data, weights and training.")] = 0,
) -> None:
    """Make a small model from nothing: `glyphs` is the tiny SD3 of the picture quickstart, `shapes` the one that draws
    coloured shapes, `text-tiny` the diffusion language model of the text quickstart; the other `text-` ones do
    countdown, sudoku and addition.

    Example: `raylign pretrain text-tiny --out my_model`
    """
    from services.pretrain import pretrain_model

    pretrain_model(name, out, seed)


@app.command("serve-rewards", context_settings=_OVERRIDES)
def serve_rewards(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A TOML file with [[rewards]] and [service].")] = "rewards_cpu",
) -> None:
    """Serve reward models over HTTP until Ctrl-C. Any key can be set after the file, as in `train`.

    Example: `raylign serve-rewards rewards_cpu --service.port 8001 --rewards.0.engine rapidocr`
    """
    config, overrides = split_config(config, "rewards_cpu", context.args)
    from raylign.assets import find_config
    from raylign.config import load_config
    from services.reward_app import run_reward_server
    from services.reward_config import RewardServerConfig

    settings = load_config(RewardServerConfig, find_config(config), overrides)
    names = ", ".join(reward.name for reward in settings.rewards)
    typer.echo(f"Starting {names} on Ray Serve ...")
    run_reward_server(
        settings,
        lambda address: typer.echo(
            f"Rewards are served at {address}: GET /v1/rewards lists them, /openapi.json has every field. Ctrl-C stops."
        ),
    )


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write the run's report: one HTML page with curves, pictures and settings."""
    from services.report import write_report

    typer.echo(f"Report: {write_report(run_dir)}")


@app.command(context_settings=_OVERRIDES)
def doctor(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(help="A configuration, by path or shipped name: also check what it needs.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Address of a judge server's API, its /v1 included.")] = None,
    redis: Annotated[
        str | None, typer.Option(envvar="RAYLIGN_REWARD_CACHE_URL", help="Address of a Redis that keeps scores.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where runs are to be written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what it lacks for Raylign, and what to do. Exit code 1 if a run could not start.

    Example: `raylign doctor flux_flow_grpo --model.path /models/FLUX.1-dev --judge http://127.0.0.1:8000/v1`
    """
    names, overrides = split_configs(config or "", "", context.args) if config else ([], {})
    from services.doctor import checks_as_json, diagnose, print_checks

    checks = diagnose(run_dir=run_dir)
    if names or judge or redis:
        from services.doctor_config import check_judge, check_redis, diagnose_config, judge_at

        checks += diagnose_config(names, overrides) if names else []
        checks += [check_judge(judge_at(judge))] if judge else []
        checks += [check_redis(redis)] if redis else []
    if as_json:
        import json

        found = checks_as_json(checks)
        typer.echo(json.dumps(found, indent=2))
        raise typer.Exit(0 if found["ok"] else 1)
    raise typer.Exit(print_checks(checks))


def split_config(config: str, default: str, arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The configuration's name and the overrides, also where overrides follow the command with no name before."""
    if config.startswith("--"):
        return default, parse_overrides([config, *arguments])
    return config, parse_overrides(arguments)


def split_configs(config: str, default: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The same, for a command that takes several configurations."""
    rest = list(arguments)
    more: list[str] = []
    while not config.startswith("--") and rest and not rest[0].startswith("--"):
        more.append(rest.pop(0))
    name, overrides = split_config(config, default, rest)
    return [name, *more], overrides


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--learner.lr 1e-4 --seed=3` as {"learner.lr": "1e-4", "seed": "3"}; hyphens in keys become underscores.

    Raises ConfigError for an argument without a key, or a key without a value.
    """
    from raylign.errors import ConfigError

    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; configuration keys are given as --key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        overrides[key.replace("-", "_")] = value
    return overrides


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises ConfigError for anything else."""
    from raylign.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--{option} takes numbers separated by commas, such as 1,1.5, got {text!r}") from None


def main() -> None:
    """Entry point: Raylign's own errors are printed without a traceback, exit code 1; Ctrl-C and SIGTERM are 130
    where there was nothing to checkpoint, or no time to."""
    from services.process import prepare_environment

    prepare_environment()
    # A stop while workers start is a Ctrl-C too, so that a joined cluster is left as it was.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from raylign.errors import RaylignError

    try:
        app()
    except RaylignError as error:
        typer.echo(f"raylign: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("raylign: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
