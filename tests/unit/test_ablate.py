"""The ablation's driver: which runs it makes, that it goes on where it stopped, and the page it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from raylign.errors import ConfigError, RunDirError
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from services.ablate import DEFAULT_GAMMAS, ablate, is_finished, plan
from services.config import RunConfig
from services.frontier import FrontierPoint, FrontierSeries, frontier_json

VARIANTS = ("one_token", "fixed", "sampled", "learned")
CONFIG = """
seed = 5
[model]
type = "tiny_text"
path = "somewhere"
[sampler]
type = "entropy_bounded"
gamma = 0.2
[algorithm]
type = "d1"
[[rewards]]
type = "exact_answer"
"""
GAIN = {"one_token": 0.0, "fixed": 0.3, "sampled": 0.25, "learned": 0.35}


class _Runs:
    """Stands in for training: writes what a finished run leaves, or stops at a given run."""

    def __init__(self, stop_at: str = "", code: int = 130) -> None:
        self.stop_at, self.code = stop_at, code
        self.made: list[str] = []

    def __call__(self, config: RunConfig, name: str, path: Path) -> int:
        if path.name == self.stop_at:
            path.mkdir(parents=True)
            (path / "summary.json").write_text(json.dumps({"status": "failed" if self.code else "stopped"}))
            return self.code
        self.made.append(path.name)
        variant = path.name.partition("-")[0]
        (path / "samples").mkdir(parents=True, exist_ok=True)

        def series(step: int, gain: float) -> FrontierSeries:
            points = [FrontierPoint(gamma, 0.2 + gain, 0.02, 1 + 4 / (1 + gamma), 100) for gamma in config.eval.gammas]
            level = FrontierPoint(0.3, 0.4 + gain, 0.02, 2.0, 50)
            own = FrontierPoint(0.3, 0.3 + gain, 0.02, 3.0, 100, {"length 3": level, "<b>": level})
            return FrontierSeries(step, tuple(points), own)

        curves = {"before": series(0, 0.0), "after": series(9, GAIN[variant])}
        (path / "samples" / "frontier.json").write_bytes(frontier_json("exact", curves))
        (path / "summary.json").write_text(json.dumps({"status": "finished"}))
        return 0


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "text.toml"
    path.write_text(CONFIG)
    return str(path)


def _ablate(
    config: str,
    out: Path,
    runs: _Runs,
    variants: Sequence[str] = VARIANTS,
    seeds: int = 1,
    overrides: Mapping[str, str] | None = None,
) -> tuple[int, list[str]]:
    said: list[str] = []
    return ablate(config, overrides or {}, out, variants, seeds, said.append, runs), said


def test_variants_differ_in_their_budgets_alone(config: str, tmp_path: Path) -> None:
    jobs = plan(config, {"num_steps": "7"}, tmp_path, VARIANTS, 1)
    samplers = [job.config.sampler for job in jobs]
    assert all(isinstance(sampler, EntropyBoundedConfig) for sampler in samplers)
    budgets = [(s.budget, s.gamma) for s in samplers if isinstance(s, EntropyBoundedConfig)]
    assert budgets == [("fixed", 0.0), ("fixed", 0.2), ("sampled", 0.2), ("learned", 0.2)]
    assert [getattr(job.config.model, "budget_head", None) for job in jobs] == [False, False, False, True]
    assert {job.config.num_steps for job in jobs} == {7}
    assert {job.config.eval.gammas for job in jobs} == {DEFAULT_GAMMAS}
    kept = {"model", "sampler"}
    assert len({job.config.model_dump_json(exclude=kept) for job in jobs}) == 1


def test_a_learned_configuration_is_unlearned_for_the_others(config: str, tmp_path: Path) -> None:
    given = {"sampler.budget": "learned", "model.budget_head": "true", "eval.gammas": "[0.1, 0.5]"}
    fixed, learned = plan(config, given, tmp_path, ["fixed", "learned"], 1)
    assert getattr(fixed.config.sampler, "budget", "") == "fixed"
    assert getattr(learned.config.sampler, "budget", "") == "learned"
    assert fixed.config.eval.gammas == (0.1, 0.5)


def test_an_evaluation_sampler_of_its_own_follows_the_variant(config: str, tmp_path: Path) -> None:
    given = {"eval.sampler": '{type = "entropy_bounded", temperature = 0.0, gamma = 0.2}'}
    one_token, learned = plan(config, given, tmp_path, ["one_token", "learned"], 1)
    assert getattr(one_token.config.eval.sampler, "gamma", None) == 0.0
    assert getattr(learned.config.eval.sampler, "budget", None) == "learned"
    assert getattr(learned.config.eval.sampler, "temperature", None) == 0.0


def test_seeds_count_up_from_the_configuration(config: str, tmp_path: Path) -> None:
    jobs = plan(config, {}, tmp_path, ["fixed", "learned", "fixed"], 2)
    assert [(job.path.name, job.config.seed) for job in jobs] == [
        ("fixed-seed5", 5),
        ("learned-seed5", 5),
        ("fixed-seed6", 6),
        ("learned-seed6", 6),
    ]


@pytest.mark.parametrize(
    ("changes", "variants", "seeds", "message"),
    [
        ({}, ["fixd"], 1, r"no ablation variant called 'fixd'; known: one_token, fixed"),
        ({}, [], 1, "no ablation variant"),
        ({}, ["fixed"], 0, "--seeds must be at least 1, got 0"),
        ({"sampler": '{type = "threshold"}'}, ["fixed"], 1, r"which sampler 'threshold' has not"),
        ({"eval.sampler": '{type = "threshold"}'}, ["fixed"], 1, r"which eval.sampler 'threshold' has not"),
    ],
)
def test_what_cannot_be_ablated_is_refused_before_anything_runs(
    config: str, tmp_path: Path, changes: dict[str, str], variants: list[str], seeds: int, message: str
) -> None:
    runs, out = _Runs(), tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        _ablate(config, out, runs, variants, seeds, changes)
    assert not runs.made
    assert not out.exists()


def test_a_whole_ablation_leaves_a_page_a_picture_and_every_point(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = _ablate(config, out, _Runs())
    assert code == 0
    assert said[0] == f"[1/4] one token per call, seed 5: {out}/one_token-seed5"
    assert said[-1] == f"Report: {out}/ablation.html"
    assert any("+5.0 +/- 2.8 points" in line for line in said), "learned 0.65 against fixed 0.6 at 3 calls"
    assert all(line.isascii() for line in said)
    page = (out / "ablation.html").read_text()
    assert "data:image/png;base64," in page
    assert "4 of 4 runs" in page
    assert "+5.0 ± 2.8 points" in page
    assert "length 3" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert 'src="http' not in page
    points = json.loads((out / "frontier.json").read_bytes())
    assert len(points["runs"]) == 4
    assert len(points["runs"][0]["after"]["points"]) == len(DEFAULT_GAMMAS)


@pytest.mark.parametrize("stopped_with", [130, 0], ids=["at once", "after its checkpoint"])
def test_given_again_it_goes_on_where_it_stopped(stopped_with: int, config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = _Runs(stop_at="sampled-seed5", code=stopped_with)
    code, said = _ablate(config, out, stopped)
    assert code == stopped_with
    assert "goes on from there" in said[-1]
    assert stopped.made == ["one_token-seed5", "fixed-seed5"]
    assert "2 of 4 runs" in (out / "ablation.html").read_text(), "what there is can be looked at"
    again = _Runs()
    code, said = _ablate(config, out, again)
    assert code == 0
    assert again.made == ["sampled-seed5", "learned-seed5"]
    assert "(finished before)" in said[0]


def test_a_folder_of_another_configuration_is_refused(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _ablate(config, out, _Runs(), ["fixed"])
    with pytest.raises(RunDirError, match=r"fixed-seed5 was made with another configuration"):
        _ablate(config, out, _Runs(), ["fixed"], overrides={"num_steps": "8"})
    (out / "plan.json").unlink()
    with pytest.raises(RunDirError, match="another configuration"):
        _ablate(config, out, _Runs(), ["fixed"])


def test_more_variants_and_seeds_join_those_that_are_there(config: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _ablate(config, out, _Runs(), ["fixed"])
    more = _Runs()
    _ablate(config, out, more, ["fixed", "learned"], 2)
    assert more.made == ["learned-seed5", "fixed-seed6", "learned-seed6"]


def test_a_run_is_finished_only_when_it_was_swept_at_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not is_finished(run)
    (run / "samples").mkdir(parents=True)
    (run / "summary.json").write_text('{"status": "finished"}')
    assert not is_finished(run)
    (run / "samples" / "frontier.json").write_bytes(frontier_json("exact", {"after": FrontierSeries(1, ())}))
    assert is_finished(run)
    (run / "summary.json").write_text('{"status": "stopped"}')
    assert not is_finished(run)
