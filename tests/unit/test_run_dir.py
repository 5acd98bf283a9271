"""The run directory: one writer at a time, atomic files, TOML that reads back."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raylign.config import Config, load_config
from raylign.errors import ConfigError, RunDirError
from services.run_dir import RunDir, config_toml, write_atomic

ROOT = Path(__file__).parents[2]


class _Inner(Config):
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    path: Path | None = None


class _Outer(Config):
    seed: int = 0
    name: str = 'quotes " and \\ and ünïcode'
    inner: _Inner = _Inner()
    many: tuple[_Inner, ...] = (_Inner(), _Inner(lr=3.0))


class _NoneMatters(Config):
    limit: int | None = 5


@contextmanager
def full_disk() -> Generator[None]:
    """No file can grow: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_run_gets_its_folders_and_a_name_with_the_time(tmp_path: Path) -> None:
    with RunDir.create(None, "configs/quickstart_image.toml", root=tmp_path / "runs") as run:
        assert run.path.parent == tmp_path / "runs"
        assert run.path.name.startswith("quickstart_image-20")
        assert run.samples.is_dir()
        assert run.checkpoints.is_dir()
        with RunDir.create(None, "quickstart_image", root=tmp_path / "runs") as other:
            assert other.path != run.path


def test_a_directory_in_use_is_refused_naming_the_process(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as run:
        run.write_config(_Outer())
        for again in (lambda: RunDir.open(run.path), lambda: RunDir.create(run.path, "x")):
            with pytest.raises(RunDirError, match=rf"in use by process {os.getpid()} on .*--run-dir"):
                again()
    RunDir.open(run.path).release()


def test_a_run_in_use_that_should_go_on_says_fork(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as run:
        run.write_config(_Outer())
        with pytest.raises(RunDirError, match="`raylign fork RUN_DIR --run-dir NEW`"):
            RunDir.open(run.path)


def test_a_full_disk_has_a_lock_without_a_note(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", "x")
    run.write_config(_Outer())
    run.release()
    with full_disk(), RunDir.open(run.path), pytest.raises(RunDirError, match="in use by another process"):
        RunDir.open(run.path)
    RunDir.open(run.path).release()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").mkdir()
    with pytest.raises(RunDirError, match=r"cannot write in .*: Is a directory"):
        RunDir.create(tmp_path / "run", "x")


def test_a_note_cut_short_still_says_in_use(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as run:
        run.lock.write_text('{"pid"')
        with pytest.raises(RunDirError, match="in use by another process"):
            RunDir.create(run.path, "x")


def test_the_lock_goes_with_the_process_and_is_not_inherited(tmp_path: Path) -> None:
    # The killed process leaves a child behind, as a run killed with -9 may leave workers for a moment.
    code = (
        "import subprocess, sys, time; from pathlib import Path; from services.run_dir import RunDir\n"
        f"run = RunDir.create(Path({str(tmp_path / 'run')!r}), 'x')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True); time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(RunDirError, match=f"process {process.pid} on"):
            RunDir.create(tmp_path / "run", "x")
        process.kill()
        process.wait()
        RunDir.create(tmp_path / "run", "x").release()
    finally:
        os.kill(child, 9)
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_directory_with_checkpoints_says_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_5").mkdir(parents=True)
    with pytest.raises(RunDirError, match=f"raylign resume {tmp_path}"):
        RunDir.create(tmp_path, "x")


def test_a_directory_with_a_run_that_never_saved_says_delete(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 1")
    with pytest.raises(RunDirError, match=r"config\.toml.*delete the folder"):
        RunDir.create(tmp_path, "x")
    assert (tmp_path / "config.toml").read_text() == "seed = 1"


def test_an_empty_or_unrelated_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "slurm.out").touch()
    with RunDir.create(tmp_path, "x") as run:
        run.write_config(_Outer())
    assert (tmp_path / "slurm.out").exists()


@pytest.mark.parametrize("make", [True, False])
def test_opening_what_is_no_run_is_refused(tmp_path: Path, make: bool) -> None:
    path = tmp_path / "nothing"
    if make:
        path.mkdir()
    with pytest.raises(RunDirError, match=r"no config\.toml" if make else "no run directory at"):
        RunDir.open(path)
    assert path.exists() == make


def test_a_path_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="cannot make"):
        RunDir.create(tmp_path / "file" / "run", "x")


def test_release_twice_and_after_an_error_is_fine(tmp_path: Path) -> None:
    def fail() -> None:
        with RunDir.create(tmp_path / "run", "x") as run:
            run.release()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    RunDir.create(tmp_path / "run", "x").release()


def test_a_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    config = _Outer(seed=7, inner=_Inner(lr=1e-7, path=Path("models/tiny")))
    with RunDir.create(tmp_path / "run", "x") as run:
        run.write_config(config)
    assert load_config(_Outer, run.config) == config
    assert "path" not in tomllib.loads(config_toml(_Outer()))["inner"], "TOML has no null"


def test_a_none_that_toml_would_lose_is_refused() -> None:
    assert config_toml(_NoneMatters()) == "limit = 5\n"
    with pytest.raises(ConfigError, match="does not survive TOML"):
        config_toml(_NoneMatters(limit=None))


def test_a_summary_is_replaced_in_one_step(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as run:
        assert run.read_summary() == {}
        run.write_summary({"status": "failed", "eval_final": {"ocr": 0.5}})
        run.write_summary({"status": "finished", "num_steps": 3})
        assert run.read_summary() == {"status": "finished", "num_steps": 3}
        with pytest.raises(ValueError, match="JSON"):
            run.write_summary({"status": "finished", "train_s": float("nan")})
        assert run.read_summary()["num_steps"] == 3
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "lock", "samples", "summary.json"]


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunDirError, match=r"summary\.json is not JSON"):
        RunDir(tmp_path).read_summary()


def test_a_full_disk_leaves_the_old_file_and_says_how_much_there_was_to_write(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"{}")
    told = r"cannot write .*summary\.json: File too large; it takes 5,000 bytes, and [\d,]+ bytes are free there"
    with full_disk(), pytest.raises(RunDirError, match=told):
        write_atomic(path, b"x" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert path.read_bytes() == b"{}"


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, json.dumps({"a": 1}).encode())
    with pytest.raises(TypeError):
        write_atomic(path, "text, not bytes")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text()) == {"a": 1}
