"""The reference page of the command line, read from the commands themselves."""

from __future__ import annotations

import inspect
from typing import Any

import typer

from docs.generator.text import cell, code, table
from services.cli import app

_INTRODUCTION = """Every command has `--help`. Raylign's own errors are one line on standard error and exit code 1;
Ctrl-C and SIGTERM end with 130, or with 0 after a run's checkpoint. Configuration keys come after
the rest, as `--learner.lr 1e-4`, for the commands whose synopsis says `[--KEY VALUE …]`."""


def _shown(default: Any) -> str:
    if default is None or default is False or callable(default):
        return "–"
    return code(f"{default}") if default != "" else "–"


def _word(argument: Any) -> str:
    """An argument as the synopsis shows it."""
    name = str(argument.metavar or argument.name).upper().strip("[]")
    return name if argument.required else f"[{name}]"


def command_section(name: str, command: Any) -> list[str]:
    """One command: synopsis, help, arguments and options."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    words = [_word(one) for one in arguments]
    extra = [" [--KEY VALUE …]"] if command.context_settings.get("allow_extra_args") else []
    synopsis = " ".join(["raylign", name, *words, *(["[OPTIONS]"] if options else [])]) + "".join(extra)
    lines = ["", f"## {name}", "", "```text", synopsis, "```", "", inspect.cleandoc(command.help or "")]
    rows = [(code(one.name), _shown(one.default), one.help or "") for one in arguments]
    rows += [
        (code(", ".join([*one.opts, *one.secondary_opts])), _shown(one.default), one.help or "") for one in options
    ]
    if rows:
        lines += ["", *table(("", "default", ""), [tuple(map(cell, row)) for row in rows])]
    return lines


def cli_page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", _INTRODUCTION, ""]
    lines += [f"- [`{name}`](#{name}): {_first_sentence(command.help)}" for name, command in group.commands.items()]
    for name, command in group.commands.items():
        lines += command_section(name, command)
    return "\n".join(lines) + "\n"


def _first_sentence(text: str | None) -> str:
    first = " ".join((text or "").strip().split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".") + "."
