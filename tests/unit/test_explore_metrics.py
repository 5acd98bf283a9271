"""What a step with drafts reports and shows: numbers by hand, the sheet, the line on the screen, the page."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from raylign.types import Exploration, Prompt, RolloutGroup
from rollout.prompts import GroupTask
from services.console import RunConsole
from services.explore_picture import explored_sheet
from services.observer import RunObserver
from services.pictures import BAD, GOOD
from services.report import write_report
from services.run_dir import RunDir
from services.step_metrics import draft_and_final, explore_metrics, step_metrics
from tests.fakes import breakdown, make_group


def _explored(
    drafts: Sequence[float | None],
    finals: dict[int, float | None],
    redrawn: bool = True,
    size: tuple[int, int] | None = None,
) -> RolloutGroup:
    """A group of the siblings that `finals` names, with their rewards, chosen among `drafts`."""
    group = make_group(GroupTask(Prompt("p", 'a sign that says "OWL"'), 0, 0), list(finals), 0)
    grey = None if size is None else np.full((len(drafts), *size, 3), 128, np.uint8)
    if grey is not None:
        group = replace(group, images_GHWC=grey[: len(finals)])
    seen = Exploration(tuple(range(len(drafts))), tuple(drafts), redrawn, images_NHWC=grey)
    return replace(group.with_rewards([breakdown(value) for value in finals.values()]), exploration=seen)


def test_rankings_are_of_the_chosen_and_means_over_groups() -> None:
    agrees = _explored([0.0, 1.0, 2.0, 3.0, 1.5, 1.5], {0: 0.1, 1: 0.2, 2: 0.6, 3: 0.7})
    # Finals in the drafts' order: 2 1 4 3: four of six pairs agree, two do not; the better half is found.
    mixed = _explored([0.0, 1.0, 2.0, 3.0, 1.5, 1.5], {0: 2.0, 1: 1.0, 2: 4.0, 3: 3.0})
    metrics = explore_metrics([agrees, mixed])
    assert metrics["explore/kendall"] == pytest.approx((1 + 2 / 6) / 2)
    assert metrics["explore/spearman"] == pytest.approx((1 + (1 - 6 * 4 / 60)) / 2)
    assert metrics["explore/recall"] == 1
    assert metrics["explore/reward_pool_mean"] == 1.5
    # Deviations: pool 0 1 2 3 1.5 1.5 has sqrt(5 / 6); finals sqrt(.065) and sqrt(1.25).
    assert metrics["explore/spread"] == pytest.approx((0.065**0.5 + 1.25**0.5) / 2 / (5 / 6) ** 0.5)
    assert metrics["failed/drafts"] == 0


def test_what_has_no_ranking_is_left_out_and_failures_are_counted() -> None:
    level = _explored([1.0, 1.0, 1.0, None], {0: 0.5, 1: 0.7})
    assert explore_metrics([level]) == {"explore/reward_pool_mean": 1.0, "failed/drafts": 1.0}
    nothing = _explored([None, None, None], {0: 0.5, 1: 0.7})
    assert explore_metrics([nothing]) == {"failed/drafts": 3.0}
    whole_pool = _explored([0.0, 1.0, 2.0], {0: 0.0, 2: 2.0}, redrawn=False)
    assert set(explore_metrics([whole_pool])) == {"explore/spread", "explore/reward_pool_mean", "failed/drafts"}


def test_siblings_without_either_reward_are_in_no_pair() -> None:
    group = _explored([None, 1.0, 2.0, 3.0], {0: 0.5, 1: None, 3: 0.9})
    assert group.exploration is not None
    assert draft_and_final(group, group.exploration) == [(3.0, 0.9)]
    assert "explore/kendall" not in explore_metrics([group])


def test_a_step_without_drafts_says_nothing_of_them() -> None:
    group = make_group(GroupTask(Prompt("p", "text"), 0, 0), (0, 1), 0).with_rewards([breakdown(1.0)] * 2)
    names = step_metrics([group], 1, {}, 1.0)
    assert not [name for name in names if "draft" in name or "explore" in name]


def _colours(sheet: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, sheet.reshape(-1, 3).tolist()))


def test_the_sheet_frames_the_chosen_and_shows_them_again() -> None:
    group = _explored([0.1, 0.9, None, 0.5], {0: 0.2, 1: 0.8}, size=(24, 80))
    sheet = explored_sheet(group)
    assert sheet.dtype == np.uint8
    assert {GOOD, BAD} <= _colours(sheet)
    pool_alone = explored_sheet(replace(group, images_GHWC=None))
    assert len(pool_alone) < len(sheet), "what was drawn again stands below"
    assert len(explored_sheet(_explored([0.1, 0.9], {0: 0.1, 1: 0.9}, redrawn=False, size=(24, 80)))) < len(sheet)


def test_large_pictures_are_made_smaller() -> None:
    group = _explored([float(n) for n in range(24)], {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}, size=(300, 400))
    height, width, _ = explored_sheet(group).shape
    assert width <= 1700
    assert height < 900


def test_a_group_without_pictures_of_drafts_has_no_sheet() -> None:
    with pytest.raises(ValueError, match="carries no drafts to show"):
        explored_sheet(_explored([0.0, 1.0], {0: 0.0, 1: 1.0}))


class _Sink:
    def __init__(self) -> None:
        self.pictures: list[tuple[int, str]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def images(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self.pictures.append((step, name))

    def values(self, step: int, name: str, values: Sequence[float]) -> None: ...

    def texts(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def test_a_run_leaves_the_sheet_and_says_how_well_drafts_foretold(tmp_path: Path) -> None:
    run, sink, screen = RunDir(tmp_path), _Sink(), io.StringIO()
    observer = RunObserver(run, sink, RunConsole(Console(file=screen, width=200)))  # type: ignore[arg-type]
    shown = _explored([0.0, 1.0, 2.0, 3.0], {0: 0.1, 3: 0.7}, size=(24, 80))
    other = _explored([0.0, 1.0], {0: 0.0, 1: 1.0})
    metrics = step_metrics([shown, other], 1, {}, 1.0)
    observer.stepped(1, metrics, [shown, other])
    assert sink.pictures == [(1, "explore")]
    with Image.open(run.samples / "explore_step_00001.png") as picture:
        assert picture.size[0] > 400
    assert "drafts kendall 1.00 recall 1.00" in screen.getvalue()
    rows = [{"step": step, **metrics} for step in (1, 2)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "Drafts, and those drawn again" in page
    assert "Drafts: agreement of their ranking with the final one" in page
    assert page.count("data:image/png") == 1


def test_the_page_shows_the_first_and_the_last_sheet(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.samples.mkdir(parents=True)
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    for step in (1, 20, 40):
        Image.new("RGB", (8, 8)).save(run.samples / f"explore_step_{step:05d}.png")
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png") == 2
    assert "step 1<" in page
    assert "step 40<" in page
    assert "step 20<" not in page
