"""The examples that need Ray: a sweep. Submission runs in test_jobs.py, the client in test_written_examples.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import command_line as cli


@pytest.mark.slow
def test_a_sweep_tries_keys_and_names_the_best(tmp_path: Path) -> None:
    config = cli.write_config(tmp_path, num_steps=1)
    command = [sys.executable, str(cli.ROOT / "examples" / "ray_tune_sweep.py"), str(config)]
    done = subprocess.run(
        [*command, "--trials", "2", "--out", str(tmp_path / "sweep"), "--sampler.num_steps", "2"],
        cwd=tmp_path,
        env=cli.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("-", "0", "1", "best"))]
    rates = [float(rate) for line in lines for rate in re.findall(r"'learner.lr': ([\d.e-]+)", line)]
    assert len(set(rates[:2])) == 2
    assert rates[2] in rates[:2]
    best = Path(lines[-1].rpartition(" in ")[2])
    assert cli.summary(best)["status"] == "finished"
    assert f"lr = {rates[2]}" in (best / "config.toml").read_text()
