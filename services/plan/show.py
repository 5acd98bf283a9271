"""A plan on the terminal: memory by role, a step's cut and seconds, and whether it fits."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.plan.build import Plan
from services.plan.memory import Role
from services.plan.verdict import Fit

_LOG_WIDTH = 140


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print everything a person wants to know before the run."""
    if console is None:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else _LOG_WIDTH
    model = plan.config.model
    source = "" if plan.sizes.from_files else ", from its config.json alone"
    console.print(
        Text.assemble(
            ("model    ", "bold"),
            f"{model.path} ({model.type}): {_count(plan.sizes.num_network)} parameters in the network{source}, "
            f"{_count(plan.sizes.num_trained)} trained ({model.tuning})",
        )
    )
    most = "at most " if plan.config.learner.publish == "delta" else ""
    console.print(
        Text.assemble(
            ("payload  ", "bold"),
            f"{most}{size(plan.payload_bytes)} per publication (learner.publish = {plan.config.learner.publish!r})",
        )
    )
    console.print()
    console.print(_memory(plan))
    console.print(Text(f"\nall processes together: {size(plan.total_host_bytes)} of host memory", "dim"))
    console.print()
    console.print(_batches(plan))
    if plan.time is not None:
        console.print()
        console.print(_time(plan))
    for note in plan.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if plan.gpu_gib is not None:
        console.print()
        _print_fit(plan, console)


def size(num_bytes: int | None) -> str:
    """Bytes for people."""
    if num_bytes is None:
        return "unknown"
    for unit, limit in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory by role", title_justify="left", box=None, padding=(0, 2), pad_edge=False)
    table.add_column("role")
    table.add_column("host", justify="right")
    table.add_column("GPU", justify="right")
    table.add_column("of which")
    for role in plan.roles:
        count = f" x {role.count}" if role.count > 1 else ""
        device = size(role.device_bytes) if role.num_gpus else "-"
        unknown = " + ?" if role.unknown else ""
        name, parts = Text(f"{role.name}{count}", "bold"), Text(_parts(role), "dim")
        table.add_row(name, size(role.host_bytes) + unknown, device + (unknown if role.num_gpus else ""), parts)
    return table


def _parts(role: Role) -> str:
    """The parts that matter, largest first; a part that comes and goes has a ~."""
    known = sorted((part for part in role.parts if part.num_bytes), key=lambda part: -(part.num_bytes or 0))
    shown = [part for part in known if (part.num_bytes or 0) > 0.005 * (known[0].num_bytes or 0)]
    told = [f"{'~' if part.passing else ''}{part.name} {size(part.num_bytes)}" for part in shown]
    return ", ".join(told + [f"{name} unknown" for name in role.unknown])


def _batches(plan: Plan) -> Table:
    b, config = plan.batches, plan.config
    most = "at most " if b.bounded else ""
    table = Table.grid(padding=(0, 2))
    amount = f"{b.pixels / 1e6:.3g} megapixels" if b.pixels else f"{b.tokens:,} tokens"
    table.add_row(
        Text("a step", "bold"),
        f"{config.groups_per_step} prompts x {config.group_size} = {b.samples} samples, {amount}",
    )
    drawn = f"{b.chunks} chunks of {b.chunk_size} over {config.rollout.num_actors} actor(s)"
    if b.drafts:
        drawn = f"{b.drafts} drafts in {b.draft_chunks} chunks of {config.draft_chunk_size}, then {drawn}"
    table.add_row("drawn in", drawn)
    table.add_row("network calls", f"{most}{b.calls_per_sample} per sample, {b.nfe:,} rows per step" + (
        f" ({b.draft_calls} per draft)" if b.drafts else ""
    ))  # fmt: skip
    if plan.measured is not None and plan.measured["rollout"]["nfe"] is not None:
        table.add_row("", f"{plan.measured['rollout']['nfe']:.1f} per text in the probe")
    least, largest = b.units_per_share
    share = f"{least}" if least == largest else f"{least} to {largest}"
    table.add_row(
        "trained in",
        f"{b.updates} update(s) x {b.ranks} rank(s), each {share} of {b.units} units (one {b.unit})",
    )
    table.add_row(
        "micro-batches",
        f"{b.blocks_per_share} of {b.micro_batch_size} per update and rank, {b.items_per_sample} item(s) per sample: "
        f"{b.backward_passes} backward passes per step",
    )
    if b.evaluations:
        table.add_row("evaluations", f"{b.evaluations} of {b.eval_samples} samples")
    return table


def _time(plan: Plan) -> Table:
    time = plan.time
    assert time is not None
    table = Table.grid(padding=(0, 2))
    table.add_row(
        Text("a step takes", "bold"), Text(f"{time.step_s:.2f} s ({time.samples_per_s:.1f} samples/s)", "bold")
    )
    phases = ("rollout", "credit", "train", "publish", "pull")
    table.add_row("by phase", ", ".join(f"{phase} {getattr(time, f'{phase}_s'):.3g} s" for phase in phases))
    if plan.config.max_staleness:
        table.add_row("bound by", time.bound_by)
    table.add_row("an evaluation", f"{time.evaluate_s:.1f} s")
    table.add_row("the run", f"{_clock(time.run_s)} for {plan.config.num_steps} steps, start and checkpoints apart")
    return table


def _print_fit(plan: Plan, console: Console) -> None:
    for one in plan.fit:
        console.print(_verdict(one, plan.gpu_gib or 0.0))
        for remedy in one.remedies:
            fits = one.mended_by(remedy)
            told = f"    {remedy.words}: {size(remedy.num_bytes + one.of_guests)}{', fits' if fits else ''}"
            console.print(Text(told, "green" if fits else "dim"))
        if not one.fits and not any(map(one.mended_by, one.remedies)):
            console.print(Text("    no key makes it fit; take larger GPUs or a smaller model", "red"))


def _verdict(one: Fit, gib: float) -> Text:
    who = " + ".join((one.role if one.processes == 1 else f"{one.processes} x {one.role}", *one.guests))
    unknown = f", and {', '.join(one.unknown)} of unknown size" if one.unknown else ""
    if one.fits:
        said = "fits as far as is known" if one.unknown else "fits"
        return Text(
            f"{who}: {size(one.num_bytes)}{unknown} {said} on a GPU of {gib:g} GiB",
            "yellow" if one.unknown else "green",
        )
    return Text(
        f"{who}: {size(one.num_bytes)}{unknown} does not fit on a GPU of {gib:g} GiB ({size(one.available)} of it "
        "can be filled); change",
        "bold red",
    )


def _count(number: int) -> str:
    for unit, limit in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"
