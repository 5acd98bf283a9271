"""`raylign pretrain`: makes a base model from nothing, with a progress bar."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raylign.errors import ConfigError
from raylign.pretrain import PRETRAINERS


def pretrain_model(name: str, out: Path, seed: int) -> None:
    """Run the named pre-training into an empty folder. Raises ConfigError for an unknown name or a full folder."""
    if name not in PRETRAINERS:
        raise ConfigError(f"no pre-training called {name!r}; known: {', '.join(PRETRAINERS)}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is not empty; choose a new folder")
    module_name, function, config_class = PRETRAINERS[name]
    module = importlib.import_module(module_name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns) as progress:
        tasks: dict[str, int] = {}
        told: dict[str, int] = {}

        def show(stage: str, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=num_steps, metrics="")
            text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
            progress.update(tasks[stage], completed=step, metrics=text)  # type: ignore[arg-type]  # a TaskID is an int
            if not progress.console.is_terminal and step * 10 // num_steps > told.get(stage, -1):
                # Bars cannot move in a log; a line per tenth of a stage does.
                told[stage] = step * 10 // num_steps
                progress.console.print(f"{stage} {step}/{num_steps}  {text}")

        result = getattr(module, function)(out, getattr(module, config_class)(seed=seed), show)
    progress.console.print(f"model written to {out}")
    for key, value in dict(result).items():
        progress.console.print(f"  {key}: {value}")
