"""An ablation from outside: real runs of two variants, one page about both, and nothing trained twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.service import command_line as cli


@pytest.mark.slow
def test_an_ablation_trains_each_variant_once_and_compares_them(tmp_path: Path) -> None:
    config = cli.write_text_config(tmp_path, num_steps=2)
    arguments = ["ablate", str(config), "--out", "out", "--variants", "fixed,learned", "--placement", "in_process"]
    code, output = cli.run(arguments, tmp_path)
    assert code == 0, output
    out = tmp_path / "out"
    assert "With learned budgets the model" in output
    runs = json.loads((out / "frontier.json").read_bytes())["runs"]
    assert [(run["variant"], len(run["after"]["points"])) for run in runs] == [("fixed", 2), ("learned", 2)]
    assert runs[0]["before"]["points"] == runs[1]["before"]["points"], "both start from the same model"
    own = runs[1]["after"]["own"]
    summary = cli.summary(out / "learned-seed0")
    assert own["accuracy"] == pytest.approx(summary["eval_final"]["exact_answer/exact"])
    assert own["nfe"] == pytest.approx(summary["eval_final"]["nfe"])
    page = (out / "ablation.html").read_text()
    assert "2 of 2 runs" in page
    assert len(re.findall("data:image/png;base64,", page)) == 1
    code, output = cli.run(arguments, tmp_path)
    assert code == 0, output
    assert output.count("(finished before)") == 2
