"""What a run leaves behind for people: metrics, samples, before beside after, sweeps, the screen."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from raylign.metrics import MetricsSink
from raylign.types import Rollout, RolloutGroup
from rollout.drawn import AS_CONFIGURED, EvalPoint
from services.confidence import interval_metrics
from services.console import RunConsole
from services.explore_picture import explored_sheet
from services.frontier import FrontierSeries, frontier_json, measure, quality_of, read_frontier
from services.frontier_picture import Curve, draw_frontier
from services.headlines import headline_means, is_metric
from services.pictures import BeforeAfterRow, Caption, before_after, grid, save_png
from services.record import GroupRecorder
from services.record_files import RecordKind
from services.reward_gap import gap_metrics, gap_points, gaps_json, read_gaps, say_gaps
from services.reward_gap_picture import draw_panels, run_panels
from services.run_dir import RunDir, write_atomic
from services.step_metrics import eval_metrics, valid_totals
from services.text_samples import GOOD_REWARD, as_text, before_after_json, example, shown_prompts, to_json

# Enough prompts to judge by, few enough to take in at a glance; the file's first ones, not chosen ones.
_SHOWN_PROMPTS = 8
_SHOWN_SAMPLES = 4


class RunObserver:
    """An Observer of the controller; see the module. Survives resumption: the first evaluation lies on disk."""

    def __init__(
        self,
        run: RunDir,
        sinks: MetricsSink,
        console: RunConsole,
        seconds_before: float = 0.0,
        held_out: Collection[str] = (),
        recorder: GroupRecorder | None = None,
    ) -> None:
        """`held_out` are the names of the rewards that are held-out metrics; `recorder` keeps groups to look at."""
        self._held_out = held_out
        self._recorder = recorder
        self._run = run
        self._sinks = sinks
        self._console = console
        self._started_s = time.monotonic() - seconds_before
        self.first_eval: dict[str, float] = {}
        self.last_eval: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier parts of a resumed one included."""
        return time.monotonic() - self._started_s

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        everything = {**metrics, "time/since_start_s": self.seconds}
        self._record("train", step, groups, metrics.get("time/step_s"))
        self._sinks.log(step, {**everything, **interval_metrics(groups, "reward")})
        self._sinks.values(step, "reward", [total for group in groups for total in valid_totals(group)])
        self._console.step(step, everything)
        for group in groups:
            if group.exploration is not None and group.exploration.images_NHWC is not None:
                self._show_drafts(step, group)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        metrics = eval_metrics(groups)
        self.last_eval = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self.first_eval = self.first_eval or self.last_eval
        self._record("eval", step, groups)
        self._sinks.log(step, {**metrics, **interval_metrics(groups, "eval"), "time/since_start_s": self.seconds})
        self._sinks.values(step, "eval", [total for group in groups for total in valid_totals(group)])
        self._console.evaluated(step, metrics)
        if any(group.texts is not None for group in groups):
            self._show_texts(step, groups[:_SHOWN_PROMPTS])
        else:
            self._show_pictures(step, groups[:_SHOWN_PROMPTS])

    def swept(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        """Held-out groups by point: texts become a curve of the frontier, pictures the reward gap."""
        if self._recorder is not None:
            others = [group for point, groups in sweeps.items() if point != AS_CONFIGURED for group in groups]
            self._recorder.note_evaluation(others)
        if any(group.texts is not None for groups in sweeps.values() for group in groups):
            self._show_frontier(step, sweeps)
        else:
            self._show_gaps(step, sweeps)

    def _record(self, kind: RecordKind, step: int, groups: Sequence[RolloutGroup], step_s: float | None = None) -> None:
        """Hand the groups to the recorder, if there is one."""
        if self._recorder is not None:
            self._recorder.take(kind, step, groups, step_s)

    def _show_frontier(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        """A curve over entropy budgets, and the run's own operating point beside it."""
        quality = quality_of([group for groups in sweeps.values() for group in groups])
        swept = sorted((point.gamma, groups) for point, groups in sweeps.items() if point.gamma is not None)
        points = [measure(groups, quality, gamma) for gamma, groups in swept]
        measured = tuple(point for point in points if point is not None)
        if not measured:
            return
        path = self._run.samples / "frontier.json"
        _, series = read_frontier(path)
        own = measure(sweeps.get(AS_CONFIGURED, ()), quality)
        series["after" if step else "before"] = FrontierSeries(step, measured, own)
        write_atomic(path, frontier_json(quality, series))
        names = {"before": "before training", "after": f"after step {step}"}
        curves = [Curve(names[name], one.points, one.own, base=name == "before") for name, one in series.items()]
        picture = draw_frontier(curves, quality)
        save_png(self._run.samples / "frontier.png", picture)
        self._sinks.images(step, "frontier", picture)

    def _show_gaps(self, step: int, sweeps: Mapping[EvalPoint, Sequence[RolloutGroup]]) -> None:
        """Noisy minus noiseless reward as metrics, and its series so far as a file and a picture."""
        measured = gap_points(step, sweeps)
        self._sinks.log(step, {**gap_metrics(sweeps, measured), "time/since_start_s": self.seconds})
        path = self._run.samples / "reward_gap.json"
        # A resumed run makes evaluations after its checkpoint again.
        points = [*(point for point in read_gaps(path) if point.step < step), *measured.values()]
        if measured:
            write_atomic(path, gaps_json(points))
            self._console.note(f"reward gap at step {step}: {say_gaps(measured)}")
            picture = draw_panels("Reward gap between noisy and noiseless samples", run_panels(points))
            save_png(self._run.samples / "reward_gap.png", picture)
            self._sinks.images(step, "reward_gap", picture)

    def _show_drafts(self, step: int, group: RolloutGroup) -> None:
        """The drafts of one prompt, which of them were chosen, and what became of those."""
        sheet = explored_sheet(group)
        save_png(self._run.samples / f"explore_step_{step:05d}.png", sheet)
        self._sinks.images(step, "explore", sheet)

    def _show_texts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """The step's answers as a file to read, and the first evaluation's beside them."""
        prompts = shown_prompts(groups, _SHOWN_SAMPLES)
        path = self._run.samples / f"step_{step:05d}.txt"
        told = as_text(step, prompts, headline_means(self.last_eval, self._held_out))
        write_atomic(path, told.encode())
        self._sinks.texts(step, "samples", told)
        self._console.texts(path, example(prompts))
        first = self._run.samples / "first.json"
        if not first.exists():
            write_atomic(first, to_json(step, prompts))
        if step:
            before = json.loads(first.read_bytes())
            write_atomic(self._run.samples / "before_after.json", before_after_json(before, step, prompts))

    def _show_pictures(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """The step's sample grid, and the before/after picture from the first evaluation's pictures."""
        images = [image for group in groups for image in _pictures(group)]
        captions = [_caption(rollout) for group in groups for rollout in group.rollouts[:_SHOWN_SAMPLES]]
        if not images:
            return
        sheet = grid(images, captions, columns=min(_SHOWN_SAMPLES, len(_pictures(groups[0]))) * 2)
        path = save_png(self._run.samples / f"step_{step:05d}.png", sheet)
        self._sinks.images(step, "samples", sheet)
        self._console.pictures(path, images[0])
        before = self._first_pictures(groups)
        rows = [
            BeforeAfterRow(
                group.prompt.text,
                before[group.prompt.id][0],
                _pictures(group),
                before[group.prompt.id][1],
                _captions(group),
            )
            for group in groups
            if group.prompt.id in before
        ]
        if step and rows:
            means = [
                (name, first, self.last_eval.get(name))
                for name, first in headline_means(self.first_eval, self._held_out).items()
            ]
            metrics = [mean for mean in means if is_metric(mean[0], self._held_out)]
            rewards = [mean for mean in means if mean not in metrics]
            save_png(self._run.before_after, before_after(rows, means=rewards, metrics=metrics))

    def _first_pictures(self, groups: Sequence[RolloutGroup]) -> dict[str, tuple[list[np.ndarray], list[Caption]]]:
        """Pictures and captions of the first evaluation by prompt id; written the first time, read afterwards."""
        path = self._run.samples / "first.npz"
        if not path.exists():
            arrays: dict[str, np.ndarray] = {}
            for group in groups:
                arrays[f"images|{group.prompt.id}"] = np.stack(_pictures(group))
                texts = [f"{int(bool(c.good))}{c.text}" for c in _captions(group)]
                arrays[f"captions|{group.prompt.id}"] = np.array(texts)
            np.savez(path, allow_pickle=False, **arrays)
        with np.load(path, allow_pickle=False) as stored:
            ids = [name.removeprefix("images|") for name in stored.files if name.startswith("images|")]
            return {
                prompt_id: (
                    list(stored[f"images|{prompt_id}"]),
                    [Caption(str(text)[1:], str(text)[0] == "1") for text in stored[f"captions|{prompt_id}"]],
                )
                for prompt_id in ids
            }


def _pictures(group: RolloutGroup) -> list[np.ndarray]:
    return [] if group.images_GHWC is None else list(group.images_GHWC[:_SHOWN_SAMPLES])


def _captions(group: RolloutGroup) -> list[Caption]:
    return [_caption(rollout) for rollout in group.rollouts[:_SHOWN_SAMPLES]]


def _caption(rollout: Rollout) -> Caption:
    """What the reward saw and gave: `KITE 1.00`."""
    if rollout.reward is None or rollout.reward.total is None:
        return Caption("no reward", False)
    seen = next((str(s.details["recognised"]) for s in rollout.reward.scores if "recognised" in s.details), "")
    return Caption(f"{seen} {rollout.reward.total:.2f}".strip(), rollout.reward.total > GOOD_REWARD)
