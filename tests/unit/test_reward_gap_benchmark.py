"""What the reward-gap benchmark makes of its runs: narrowing, slopes, the page, and that finished runs are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.reward_gap import (
    CONFIG,
    OVERRIDES,
    Finished,
    Job,
    arms,
    markdown,
    narrowing_by_seed,
    ode_slopes,
    panels,
    run,
)
from services.cli import parse_overrides
from services.config import load_run_config
from services.reward_gap import GapPoint, Interval, gaps_json
from services.reward_gap_picture import draw_panels


def _one(value: float) -> Interval:
    return Interval(value, 0.1, 64)


def _finished(
    eta: float, seed: int, gap: tuple[float, float], ode: tuple[float, float], name: str = "ddpo"
) -> Finished:
    points = [
        GapPoint(step, at, 6, _one(ode[place] + gap[place]), _one(ode[place]), _one(gap[place] if at == eta else 9.0))
        for place, step in enumerate((0, 20))
        for at in (0.5, 1.5)
    ]
    return Finished(Job(name, eta, seed), points, 60.0 + seed)


RUNS = [
    _finished(0.5, 0, (0.2, 0.1), (0.4, 0.5)),
    _finished(0.5, 1, (0.2, 0.2), (0.4, 0.6)),
    _finished(1.5, 0, (-0.3, -0.1), (0.4, 0.7)),
    _finished(1.5, 1, (-0.3, -0.2), (0.4, 0.7)),
]


def test_narrowing_is_towards_zero_from_either_side() -> None:
    low, high = arms(RUNS)
    assert (low.algorithm, low.eta, high.eta) == ("ddpo", 0.5, 1.5)
    assert low.narrowing.mean == pytest.approx((0.1 + 0.0) / 2)
    assert high.narrowing.mean == pytest.approx((0.2 + 0.1) / 2)
    assert high.gap_after.mean == pytest.approx(-0.15)
    assert low.ode_gain.mean == pytest.approx((0.1 + 0.2) / 2)
    # Seed 0 narrows by (0.1 + 0.2) / 2, seed 1 by (0 + 0.1) / 2: 0.1 apart, a deviation of 0.0707 over the root of 2.
    whole = narrowing_by_seed(RUNS)
    assert whole.mean == pytest.approx(0.1)
    assert whole.half_width == pytest.approx(12.7062 * 0.05)


def test_slopes_are_per_seed() -> None:
    slope = ode_slopes(RUNS)["ddpo"]
    assert slope.mean == pytest.approx(((0.7 - 0.5) + (0.7 - 0.6)) / 2)
    assert slope.count == 2
    assert ode_slopes(RUNS[:2]) == {}, "one stochasticity has no slope"


def test_the_page_claims_only_what_the_intervals_show() -> None:
    settings = {"steps": 20, "hardware": "two cores", "commit": "abc", "date": "today", "command": "python x"}
    page = markdown(RUNS, settings, "gap.png")
    assert (
        "**Does the gap narrow during training?** No clear difference from 0: on average over all runs by +0.1000 ±"
        in page
    )
    assert "| ddpo | 1.5 | 0.4000 ± 0.0000 | 0.7000 ± 0.0000 | +0.3000 ± 0.0000 | -0.3000 ± 0.0000 |" in page
    assert "4 runs of 20 steps, 60 s each (median) on two cores." in page
    twins = [_finished(eta, seed, (0.2, 0.1), (0.4, 0.4 + eta / 10)) for eta in (0.5, 1.5) for seed in (0, 1)]
    sure = markdown(twins, settings, "gap.png")
    assert "training?** It narrows" in sure
    assert "under ddpo?** It does: +0.1000" in sure
    assert "One seed cannot tell" in markdown(RUNS[::2], settings, "gap.png")


def test_the_picture_has_a_panel_per_algorithm_and_one_of_the_ode() -> None:
    mixed = [*RUNS, *(_finished(eta, 0, (0.1, 0.1), (0.4, 0.4), "mix_grpo") for eta in (0.5, 1.5))]
    titles = [panel.title for panel in panels(mixed)]
    assert titles == [
        "ddpo: gap at the trained eta",
        "mix_grpo: gap at the trained eta",
        "held-out reward by the ODE",
    ]
    assert [line.name for line in panels(mixed)[-1].lines] == ["ddpo", "mix_grpo", "before training"]
    assert draw_panels("gap", panels(mixed)).shape[1] == 3 * 640


@pytest.mark.parametrize("algorithm", OVERRIDES)
def test_each_arm_is_a_run_that_fits_together(algorithm: str) -> None:
    config = load_run_config(str(CONFIG), parse_overrides([*OVERRIDES[algorithm], "--sampler.eta", "1.5"]))
    assert (config.algorithm.type, config.sampler.type) == (algorithm, "gddim")
    assert config.eval.etas == (0.5, 1.0, 1.5)


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path) -> None:
    job = Job("ddpo", 0.5, 0)
    folder = tmp_path / job.name
    (folder / "samples").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "train_s": 12.5}))
    (folder / "samples" / "reward_gap.json").write_bytes(gaps_json(RUNS[0].points))
    again = run(job, 20, tmp_path, ["--nonsense", "would fail"])
    assert again == Finished(job, list(RUNS[0].points), 12.5)
    assert [point.eta for point in again.own] == [0.5, 0.5]
