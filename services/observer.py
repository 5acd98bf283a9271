"""What a run leaves behind for people: metrics, sample grids, the before/after picture, the screen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from raylign.metrics import MetricsSink
from raylign.types import Rollout, RolloutGroup
from services.console import RunConsole, headline_means
from services.pictures import BeforeAfterRow, Caption, before_after, grid, save_png
from services.run_dir import RunDir
from services.step_metrics import eval_metrics

# Enough prompts to judge by, few enough to take in at a glance; the file's first ones, not chosen ones.
_SHOWN_PROMPTS = 8
_SHOWN_SAMPLES = 4


class RunObserver:
    """An Observer of the controller; see the module. Survives resumption: the first evaluation lies on disk."""

    def __init__(self, run: RunDir, sinks: MetricsSink, console: RunConsole, seconds_before: float = 0.0) -> None:
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
        self._sinks.log(step, everything)
        self._console.step(step, everything)

    def evaluated(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        metrics = eval_metrics(groups)
        self.last_eval = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self.first_eval = self.first_eval or self.last_eval
        self._sinks.log(step, {**metrics, "time/since_start_s": self.seconds})
        self._console.evaluated(step, metrics)
        self._show(step, groups[:_SHOWN_PROMPTS])

    def _show(self, step: int, groups: Sequence[RolloutGroup]) -> None:
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
                (f"held-out {name}", first, self.last_eval.get(name))
                for name, first in headline_means(self.first_eval).items()
            ]
            save_png(self._run.before_after, before_after(rows, means=means))

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
    return Caption(f"{seen} {rollout.reward.total:.2f}".strip(), rollout.reward.total > 0.99)
