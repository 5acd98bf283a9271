"""What a person sees while a run goes on: start-up phases, a live progress block, and where to look afterwards.

On a colour terminal this is one `rich` live block with notes scrolling above it. Anywhere else (a CI log, a pipe,
`nohup`) it is plain lines in ASCII without control codes, at most one every few seconds.
Neither torch nor Ray is imported, so `raylign --help` stays quick.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.style import Style
from rich.table import Table
from rich.text import Text

from services.headlines import direction, headline_label, headline_means, is_metric

if TYPE_CHECKING:
    import numpy as np

_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 32
_NAME_WIDTH = 34
_PHASE_WIDTH = 28
_PHASE_STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")
# Sums over the phases, which are shown one by one.
_TOTALS = ("time/step_s", "time/since_start_s")
_STYLES = {"better": "green", "worse": "red", "": ""}
# The words of plain output are ASCII, whatever the encoding of the log that they land in.
_PLAIN = str.maketrans(
    {"→": "->", "·": "|", "✓": "ok", "✗": "failed:", "…": "...", "–": "-", **dict.fromkeys(_BARS, "")}
)


@dataclass(slots=True)
class _State:
    """What the live block shows."""

    num_steps: int = 0
    start_step: int = 0
    held_out: Collection[str] = ()
    step: int = 0
    began: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    rewards: list[float] = field(default_factory=list[float])
    calls: list[float] = field(default_factory=list[float])
    eval_first: dict[str, float] = field(default_factory=dict[str, float])
    eval_last: dict[str, float] = field(default_factory=dict[str, float])
    failures: dict[str, float] = field(default_factory=dict[str, float])
    samples: Path | None = None


class RunConsole:
    """The face of one run. Use as a context manager, so that the terminal is restored however the run ends.

    Example:
        with RunConsole() as screen:
            with screen.phase("Ray cluster"):
                ...
            screen.begin(num_steps=60, start_step=0)
            screen.step(1, metrics)
            screen.finish(summary, run_dir)
    """

    def __init__(
        self,
        console: Console | None = None,
        plain_every_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else Console(highlight=False)
        utf8 = self.console.encoding.lower().startswith("utf")
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal and utf8
        self._plain_every_s = plain_every_s
        self._clock = clock
        self._phases: dict[str, Spinner] = {}
        self._state = _State()
        self._training = False
        self._printed = -math.inf
        self._block: Live | None = None

    def __enter__(self) -> Self:
        if self.live:
            # Four frames a second keep the spinner turning and cost the cores that train next to nothing.
            self._block = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
            self._block.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live block off the screen. Calling it twice is fine."""
        block, self._block = self._block, None
        if block is not None:
            block.stop()

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """One thing that start-up waits for; says how long it took. Phases may overlap."""
        began = self._clock()
        self._phases[name] = Spinner("dots", Text(f"{name} …", "dim"), style="cyan")
        try:
            yield
        except BaseException:  # also Ctrl-C: the person sees what was waited for
            self._say(Text.assemble(("✗ ", "red"), f"{name} after {duration(self._clock() - began)}"))
            raise
        else:
            took = duration(self._clock() - began)
            self._say(Text.assemble(("✓ ", "green"), name.ljust(_NAME_WIDTH), (took.rjust(8), "dim")))
        finally:
            self._phases.pop(name, None)

    def begin(self, num_steps: int, start_step: int = 0, held_out: Collection[str] = ()) -> None:
        """Training starts; `start_step` steps are done already (a resumed run).

        `held_out` are the names of the rewards that are held-out metrics.
        """
        again = max(0, self._state.step - start_step) if self._training else 0
        for series in (self._state.rewards, self._state.calls) if again else ():
            del series[-again:]  # steps that are done a second time
        self._state.num_steps, self._state.start_step = num_steps, start_step
        self._state.held_out = held_out
        self._state.step, self._state.began = start_step, self._clock()
        self._training = True
        if start_step:
            self.note(f"going on after step {start_step} of {num_steps}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; `metrics` as in metrics.jsonl."""
        state = self._state
        state.step, state.metrics = step, metrics
        for name, series in (("reward/mean", state.rewards), ("nfe/mean", state.calls)):
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                series.append(value)
        for name, count in metrics.items():
            if name.startswith("failed/") and count:
                kind = name.removeprefix("failed/")
                state.failures[kind] = state.failures.get(kind, 0) + count
        now = self._clock()
        due = now - self._printed >= self._plain_every_s or step in (state.start_step + 1, state.num_steps)
        if not self.live and due:
            self._printed = now
            parts = [self._step_text(), self._reward_text(), self._calls_text(), self._drafts_text()]
            parts += [self._speed_text(), self._trouble_text()]
            self._say(Text("  ").join(part for part in parts if part.plain))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out rewards of a step; names with or without the leading `eval/`."""
        means = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self._state.eval_last = means
        self._state.eval_first = {**means, **self._state.eval_first}
        text = Text.assemble(("held-out ", "bold"), (f"at step {step}: ", "dim"))
        self._say(text + self._eval_text())

    def pictures(self, path: Path, image_HWC: np.ndarray | None = None, caption: str = "") -> None:
        """A sample grid was saved. The first one is announced, with one of its pictures drawn in the terminal."""
        if not self._announce("first pictures: ", path, caption):
            return
        # Where colours are few a photograph in blocks is noise, so the path alone is shown.
        if self.live and image_HWC is not None and self.console.color_system in ("truecolor", "256"):
            width = min(image_HWC.shape[1], self.console.width - 4, 72)
            self._say(ascii_picture(image_HWC, width))

    def texts(self, path: Path, example: str = "") -> None:
        """Held-out texts were saved. The first are announced, with an example."""
        self._announce("first texts: ", path, example)

    def note(self, text: str) -> None:
        """One line for the reader that scrolls above the progress block."""
        self._say(Text.assemble(("· ", "dim"), text))

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """The run ended on its own or was interrupted: what changed and where to look. `summary` as summary.json."""
        self.close()
        done = summary.get("status", "finished") == "finished"
        lines = [
            *_outcome_lines(summary, self._state.rewards, self._state.held_out),
            Text(),
            *_where_lines(run_dir, done),
        ]
        title = f"{'finished' if done else summary['status']}: {run_dir}"
        if self.live:
            style = "green" if done else "yellow"
            self.console.print(Panel(Group(*lines), title=title, title_align="left", border_style=style, expand=False))
            return
        self._say(Text(title))
        for line in lines:
            if line.plain:
                self._say(line)

    def failed(self, error: BaseException, run_dir: Path | None = None) -> None:
        """The run ended with an error: the message, its notes and how to go on."""
        self.close()
        if self._training and self._state.step:
            self._say(Text.assemble("stopped ", self._step_text(), "  ", self._reward_text()))
        self._say(Text.assemble(("✗ ", "red"), (type(error).__name__, "bold red"), f": {error}"))
        for remark in getattr(error, "__notes__", ()):
            self._say(Text(str(remark)))
        if run_dir is not None and any((run_dir / "checkpoints").glob("step_*")):
            self._say(Text(f"go on from the last checkpoint: raylign resume {run_dir}"))

    def _announce(self, words: str, path: Path, more: str) -> bool:
        """Remember where the newest samples are, and say so if they are the first."""
        first = self._state.samples is None
        self._state.samples = path
        if first:
            self._say(Text.assemble(("✓ ", "green"), words, (str(path), "cyan"), f"  {more}".rstrip()))
        return first

    def _say(self, text: Text) -> None:
        if self.live:
            self.console.print(text)
        else:
            plain = text.plain.translate(_PLAIN).rstrip()
            self.console.out(plain.encode("ascii", "replace").decode(), highlight=False)

    def _render(self) -> RenderableType:
        """The live block: what is being started, then progress, reward, evaluation, time and trouble."""
        rows: list[RenderableType] = list(self._phases.values())
        if self._training:
            state = self._state
            bar = Table.grid(padding=(0, 1))
            progress = ProgressBar(total=max(1, state.num_steps), completed=state.step, width=28, complete_style="cyan")
            bar.add_row(Text("step", "bold"), progress, self._step_text(), Text(self._remaining(), "dim"))
            rows.append(Text())
            rows.append(bar)
            trailing = [self._reward_text(), self._calls_text(), self._drafts_text(), self._eval_text()]
            trailing += [self._phase_text(), self._trouble_text()]
            if state.samples is not None:
                trailing.append(Text.assemble(("samples ", "dim"), (str(state.samples), "cyan")))
            rows.extend(text for text in trailing if text.plain)
        return Group(*rows)

    def _step_text(self) -> Text:
        state = self._state
        prefix = "" if self.live else "step "
        return Text(f"{prefix}{state.step}/{state.num_steps}")

    def _remaining(self) -> str:
        state = self._state
        done, left = state.step - state.start_step, state.num_steps - state.step
        elapsed = self._clock() - state.began
        if done <= 0:
            return f"{duration(elapsed)} elapsed"
        return f"{duration(elapsed)} elapsed, {duration(elapsed / done * left)} left"

    def _reward_text(self) -> Text:
        rewards = self._state.rewards
        if not rewards:
            return Text()
        text = Text.assemble(("reward ", "bold"), f"{rewards[-1]:.3f}")
        if len(rewards) > 1:
            text.append_text(_delta(rewards[0], rewards[-1]))
        if self.live:
            text.append(f"  {sparkline(rewards)}", "cyan")
        return text

    def _calls_text(self) -> Text:
        """Calls of the network per text, and how that changed; fewer are better."""
        calls = self._state.calls
        if not calls:
            return Text()
        text = Text.assemble(("nfe ", "bold"), f"{calls[-1]:.2f}")
        if len(calls) > 1:
            text.append_text(_delta(calls[0], calls[-1], "nfe"))
        if self.live:
            text.append(f"  {sparkline(calls)}", "cyan")
        return text

    def _drafts_text(self) -> Text:
        """How well drafts foretold the rewards of what was drawn again."""
        names = ("kendall", "recall")
        values = [(name, self._state.metrics.get(f"explore/{name}")) for name in names]
        known = [f"{name} {value:.2f}" for name, value in values if value is not None]
        return Text.assemble(("drafts ", "bold"), " ".join(known)) if known else Text()

    def _eval_text(self) -> Text:
        """Each held-out mean against the first one seen; held-out metrics last, and called so."""
        pieces: list[Text] = []
        held_out, announced = self._state.held_out, False
        for name, value in headline_means(self._state.eval_last, held_out).items():
            first = self._state.eval_first.get(name, value)
            change = Text(f"{value:.3f}") if first == value else _change(first, value, name)
            kind = "held-out metrics: " if is_metric(name, held_out) and not announced else ""
            announced = announced or bool(kind)
            pieces.append(Text.assemble((kind, "bold"), (f"{name} ", "dim"), change))
        return Text.assemble(("  ·  ", "dim")).join(pieces)

    def _phase_text(self) -> Text:
        """Where the last step's time went: a bar of its phases, in the colours of their names."""
        phases = {
            name.removeprefix("time/").removesuffix("_s"): value
            for name, value in self._state.metrics.items()
            if name.startswith("time/") and name not in _TOTALS and value >= 0.05
        }
        pieces = [Text.assemble((name, style), f" {duration(phases[name])}") for name, style in _phase_styles(phases)]
        rate = self._state.metrics.get("throughput/samples_per_s")
        if rate is not None:
            pieces.append(Text(f"{rate:.1f} samples/s", "dim"))
        times = Text(" · ", "dim").join(pieces)
        return Text.assemble(("time ", "bold"), phase_bar(phases), "  ", times) if phases else times

    def _speed_text(self) -> Text:
        rate = self._state.metrics.get("throughput/samples_per_s")
        return Text(f"{rate:.1f} samples/s  " if rate is not None else "") + Text(self._remaining())

    def _trouble_text(self) -> Text:
        """Failures so far and staleness, only if there are any."""
        pieces = [f"{count:g} {kind.replace('_', ' ')}" for kind, count in self._state.failures.items()]
        staleness = self._state.metrics.get("staleness/max", 0)
        if staleness:
            pieces.append(f"staleness {staleness:g}")
        return Text(" · ".join(pieces), "yellow")


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """Finite values as a row of bars, from the lowest seen to the highest; long series are averaged to `width`."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def phase_bar(phases: Mapping[str, float], width: int = _PHASE_WIDTH) -> Text:
    """Seconds by phase as a bar of so many characters, each phase its share to the nearest character."""
    total, bar = sum(phases.values()), Text()
    if total <= 0:
        return bar
    done, drawn = 0.0, 0
    for name, style in _phase_styles(phases):
        done += phases[name]
        end = round(width * done / total)
        bar.append("█" * (end - drawn), style)
        drawn = end
    return bar


def _phase_styles(phases: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name, _PHASE_STYLES[place % len(_PHASE_STYLES)]) for place, name in enumerate(phases)]


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3m 05s", "2h 07m"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def ascii_picture(image_HWC: np.ndarray, columns: int) -> Text:
    """An RGB uint8 picture in half blocks: each character shows two pixels, one above the other."""
    from PIL import Image  # not at import: only a colour terminal draws pictures

    height, width, _ = image_HWC.shape
    columns = max(1, columns)
    rows = max(1, round(height * columns / width / 2))
    small = Image.fromarray(image_HWC).resize((columns, rows * 2), Image.Resampling.BOX)
    pixels = small.tobytes()
    text = Text(no_wrap=True)
    for row in range(rows):
        for column in range(columns):
            upper = (2 * row * columns + column) * 3
            lower = upper + columns * 3
            text.append("▀", Style(color=_hex(pixels[upper : upper + 3]), bgcolor=_hex(pixels[lower : lower + 3])))
        text.append("\n" if row < rows - 1 else "")
    return text


def _hex(rgb: bytes) -> str:
    return f"#{rgb.hex()}"


def _delta(first: float, last: float, name: str = "") -> Text:
    return Text(f" ({last - first:+.3f})", _STYLES[direction(name, first, last)] or "dim")


def _change(first: float | None, last: float | None, name: str = "") -> Text:
    """ "0.390 → 0.860", the last one coloured by whether that is better."""
    before, after = ("–" if value is None else f"{value:.3f}" for value in (first, last))
    style = _STYLES[direction(name, first, last)]
    return Text.assemble(f"{before} → ", (after, f"bold {style}" if style else ""))


def _outcome_lines(summary: Mapping[str, Any], rewards: Sequence[float], held_out: Collection[str]) -> list[Text]:
    """What changed: held-out means, then steps, time and the weights' identity."""
    lines: list[Text] = []
    initial, final = summary.get("eval_initial") or {}, summary.get("eval_final") or {}
    for name in headline_means({**initial, **final}, held_out):
        label = headline_label(name, held_out).ljust(_NAME_WIDTH - 4)
        lines.append(Text.assemble(label, " ", _change(initial.get(name), final.get(name), name)))
    if len(rewards) > 1:
        label = "training reward".ljust(_NAME_WIDTH - 4)
        lines.append(Text.assemble(label, " ", _change(rewards[0], rewards[-1]), (f"  {sparkline(rewards)}", "cyan")))
    facts = [f"{summary['num_steps']} steps"] if "num_steps" in summary else []
    facts += [
        f"{word} {duration(summary[key])}"
        for word, key in (("training", "train_s"), ("in all", "total_s"))
        if summary.get(key) is not None
    ]
    if summary.get("weights_sha256"):
        facts.append(f"weights {str(summary['weights_sha256'])[:12]} (version {summary.get('weight_version', '?')})")
    return [*lines, Text(" · ".join(facts), "dim")]


def _where_lines(run_dir: Path, done: bool) -> list[Text]:
    """Where to look and what to type next; only what exists."""
    lines: list[Text] = []
    for label, name in (
        ("before/after", "samples/before_after.png"),
        ("frontier", "samples/frontier.png"),
        ("report", "report.html"),
        ("samples", "samples"),
        ("checkpoints", "checkpoints"),
    ):
        if (run_dir / name).exists():
            lines.append(Text.assemble(label.ljust(14), (str(run_dir / name), "cyan")))
    if (run_dir / "tensorboard").exists():
        lines.append(Text.assemble("curves".ljust(14), (f"tensorboard --logdir {run_dir / 'tensorboard'}", "cyan")))
    lines.append(Text.assemble("use it".ljust(14), (f"raylign export {run_dir} DIR", "cyan")))
    if not done:
        lines.append(Text.assemble("go on".ljust(14), (f"raylign resume {run_dir}", "cyan")))
    return lines
