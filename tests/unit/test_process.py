"""The settings that the program makes: defaults that yield to the user, a private token, a short temp folder."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from services import process
from services.process import (
    ENVIRONMENT,
    prepare_environment,
    ray_settings,
    temp_root,
    worker_environment,
)


def test_the_defaults_are_exactly_these() -> None:
    environ: dict[str, str] = {}
    prepare_environment(environ)
    assert environ == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "GRPC_VERBOSITY": "ERROR",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_what_the_user_set_stands() -> None:
    environ = {"HF_HUB_OFFLINE": "0", "OMP_WAIT_POLICY": "ACTIVE"}
    prepare_environment(environ)
    assert environ["HF_HUB_OFFLINE"] == environ["TRANSFORMERS_OFFLINE"] == "0"
    assert environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert worker_environment(environ)["HF_HUB_OFFLINE"] == "0"
    assert set(worker_environment({})) == set(ENVIRONMENT)


def test_preparing_loads_no_library_that_reads_the_settings() -> None:
    code = (
        "import os, sys; from services.process import prepare_environment; prepare_environment()\n"
        "print(sorted({'torch', 'ray', 'transformers', 'huggingface_hub'} & set(sys.modules)), "
        "os.environ['RAY_USAGE_STATS_ENABLED'])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, check=True
    )
    assert done.stdout.strip() == "[] 0"


def test_a_token_is_private_to_the_user_and_the_run(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    path = ray_settings(tmp_path, environ)
    assert path == tmp_path / "ray_token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64
    assert environ["RAY_AUTH_TOKEN_PATH"] == str(path)


def test_a_token_left_by_a_killed_run_is_replaced_whatever_its_mode(tmp_path: Path) -> None:
    (tmp_path / "ray_token").write_text("old")
    path = ray_settings(tmp_path, {})
    assert path.read_text() != "old"
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_mode_is_set_only_where_ray_has_not_read_it_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    before: dict[str, str] = {}
    ray_settings(tmp_path, before)
    assert before["RAY_AUTH_MODE"] == "token"
    monkeypatch.setitem(sys.modules, "ray", process)
    after: dict[str, str] = {}
    ray_settings(tmp_path, after)
    assert "RAY_AUTH_MODE" not in after


@pytest.mark.parametrize(
    "theirs", [{"RAY_AUTH_TOKEN": "x"}, {"RAY_AUTH_TOKEN_PATH": "/some/where"}, {"RAY_AUTH_MODE": "disabled"}]
)
def test_the_users_own_token_or_choice_stands(tmp_path: Path, theirs: dict[str, str]) -> None:
    environ = dict(theirs)
    ray_settings(tmp_path, environ)
    assert environ == theirs
    assert not list(tmp_path.iterdir())


def test_settings_of_a_cluster_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with process._own_settings(tmp_path):
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray_token")
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert "RAY_AUTH_MODE" not in os.environ
    assert not list(tmp_path.iterdir())
    token = tmp_path / "theirs"
    token.write_text("x")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with process._own_settings(tmp_path):
        pass
    assert token.read_text() == "x", "a user's token file is not ours to remove"


def test_the_temp_folder_is_short_enough_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "deep/" * 20)
    assert temp_root() == Path("/tmp")
    longest = "session_2026-11-21_08-28-12_393324_4194304/sockets/plasma_store"
    assert len(f"{'x' * process._TEMP_PATH_BYTES}/{longest}") < 107
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert temp_root() == Path("/var/tmp")


def test_temp_folders_of_dead_runs_are_removed_and_those_of_live_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "temp_root", lambda: tmp_path)
    dead, alive, foreign = (tmp_path / name for name in ("rayl-dead", "rayl-alive", "rayl-foreign"))
    for folder in (dead, alive, foreign):
        folder.mkdir()
        (folder / "session").mkdir()
    (dead / "lock").touch()
    with (alive / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with process._temp_dir() as mine:
            assert mine.is_dir()
            assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["rayl-alive", "rayl-foreign", mine.name])
            with process._temp_dir() as other:
                assert mine.is_dir(), "a second run does not take the first one's folder"
            assert not other.exists()
        assert not mine.exists()
    assert alive.is_dir()
    assert foreign.is_dir(), "without a lock it may be somebody else's"


def test_only_what_was_written_is_kept_of_the_logs(tmp_path: Path) -> None:
    logs = tmp_path / "tmp" / "session_2026" / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "worker-1.err").write_text("Traceback ...")
    (logs / "worker-2.err").touch()
    (logs / "worker-1.out").write_text("hello")
    (logs / "raylet.out").write_text("raylet")
    (logs / "serve" / "replica.log").write_text("serve")
    error = RuntimeError("boom")
    process._keep_logs(error, tmp_path / "tmp", tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [
        "raylet.out",
        "replica.log",
        "worker-1.err",
    ]
    assert str(tmp_path / "run" / "logs") in error.__notes__[0]
    quiet = RuntimeError("boom")
    process._keep_logs(quiet, tmp_path / "none", tmp_path / "other")
    assert not hasattr(quiet, "__notes__")
    assert not (tmp_path / "other").exists()


def test_the_handler_of_sigterm_stays() -> None:
    def mine(number: int, frame: object) -> None:
        """Stands for the run's graceful stop."""

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with process._signals_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_line_of_a_long_message_is_what_the_reader_gets() -> None:
    assert process._first_line(RuntimeError("\n  it failed: because\nTraceback ...")) == "it failed: because"
    assert process._first_line(RuntimeError()) == "RuntimeError"
