"""A text run from outside: the same weights whoever draws the answers. test_resume.py kills it on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.service import command_line as cli

NUM_STEPS = 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted in-process run: its configuration and its directory."""
    folder = tmp_path_factory.mktemp("reference")
    config = cli.write_text_config(folder, NUM_STEPS)
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", "in_process"], folder)
    assert code == 0, output
    return config, folder / "run"


def test_a_text_run_leaves_what_it_promises(reference: tuple[Path, Path]) -> None:
    _, run_dir = reference
    summary = cli.summary(run_dir)
    assert summary["status"] == "finished"
    wanted = {"mean", "exact_answer", "exact_answer/exact", "nfe", "gamma", "diversity"}
    assert summary["eval_initial"].keys() == summary["eval_final"].keys() >= wanted
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    for name in ("reward/mean", "reward/exact_answer/exact", "nfe/mean", "gamma/mean", "loss/budget", "is/ess"):
        assert isinstance(rows[-1][name], (int, float)), name
    assert rows[-1]["parity/gap"] == 0.0
    for name in ("report.html", "samples/frontier.png", "samples/frontier.json", "samples/step_00000.txt"):
        assert (run_dir / name).stat().st_size > 0, name


@pytest.mark.parametrize(
    "placement", [["separate", "--rollout.num_actors", "3"], ["colocated", "--rollout.num_actors", "1"]]
)
def test_other_placements_end_with_the_same_weights(
    reference: tuple[Path, Path], tmp_path: Path, placement: list[str]
) -> None:
    config, expected = reference
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", *placement], tmp_path)
    assert code == 0, output
    assert cli.summary(tmp_path / "run")["weights_sha256"] == cli.summary(expected)["weights_sha256"]


def test_a_trained_text_model_is_exported_and_evaluated(reference: tuple[Path, Path], tmp_path: Path) -> None:
    _, run_dir = reference
    code, output = cli.run(["export", str(run_dir), "model"], tmp_path)
    assert code == 0, output
    # The run's budgets come from its head, which an exported model does not have; a fixed one draws the same answers.
    headless = [str(run_dir / "config.toml"), "--model.budget_head", "false", "--sampler.budget", "fixed"]
    results = []
    for arguments in ([str(run_dir)], ["model", *headless]):
        code, output = cli.run(["evaluate", *arguments, "--eval.gammas", "[0.2]"], tmp_path)
        assert code == 0, output
        results.append(json.loads(output.splitlines()[-1]))
    assert results[0]["gamma_0.2"] == results[1]["gamma_0.2"]
    assert results[0]["gamma_0.2"]["gamma"] == pytest.approx(0.2)
