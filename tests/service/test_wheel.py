"""An installed wheel works outside the repository: commands, shipped model, shipped configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, as pip would lay them out."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def _raylign(arguments: list[str], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "100"}
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_trains_the_shipped_model_by_name(installed: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [sys.executable, "-c", "import raylign; print(raylign.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(installed))
    overrides = ["--placement", "in_process", "--num_steps", "1", "--groups_per_step", "2", "--eval.num_prompts", "2"]
    done = _raylign(["train", "quickstart_image", "--run-dir", "run", *overrides], installed, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()


def test_errors_of_an_installed_command_have_no_traceback(installed: Path, tmp_path: Path) -> None:
    done = _raylign(["train", "quickstart_image", "--num_stesp", "3"], installed, tmp_path)
    assert done.returncode == 1
    assert "did you mean `num_steps`" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_carries_the_dashboard_page(installed: Path, tmp_path: Path) -> None:
    page = ROOT / "services" / "dashboard" / "static"
    there = installed / "services" / "dashboard" / "static"
    assert {path.name for path in there.iterdir()} == {path.name for path in page.iterdir()}
    done = _raylign(["dashboard", "no_such_folder"], installed, tmp_path)
    assert done.returncode == 1
    assert "no folder no_such_folder" in done.stderr
