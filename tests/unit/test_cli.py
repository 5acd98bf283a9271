"""Bad input on the command line: exit code 1, one clear message, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylign.errors import RaylignError
from raylign.pretrain import PRETRAINERS
from services.cli import app

ROOT = Path(__file__).parents[2]


def _raylign(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _refused(arguments: list[str], folder: Path) -> str:
    done = _raylign(arguments, folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def _raised(arguments: list[str]) -> str:
    """What `_refused` would read, without a process: Raylign's own error, which the command prints."""
    with pytest.raises(RaylignError) as caught:
        app(arguments, standalone_mode=False)
    return str(caught.value)


def test_help_names_every_command(tmp_path: Path) -> None:
    done = _raylign(["--help"], tmp_path)
    assert done.returncode == 0
    runs = (
        "train",
        "resume",
        "fork",
        "scale",
        "pause",
        "unpause",
        "serve-runs",
        "export",
        "evaluate",
        "ablate",
        "report",
    )
    jobs = ("submit", "status", "logs", "stop", "list")
    for command in (*runs, *jobs, "pretrain", "serve-rewards", "doctor"):
        assert f" {command} " in done.stdout


def test_an_ablation_of_pictures_is_refused(tmp_path: Path) -> None:
    output = _raised(["ablate", "quickstart_image", "--out", str(tmp_path / "here"), "--seed", "3"])
    assert "compares entropy budgets, which sampler 'euler_ode' has not" in output
    assert not (tmp_path / "here").exists()


def test_a_prompt_without_a_quoted_target_is_named_before_anything_starts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "ONE"\na sign that says nothing\n')
    output = _refused(["train", "quickstart_image", "--prompts.train", str(prompts), "--run-dir", "run"], tmp_path)
    assert "prompts:2" in output
    assert "quot" in output


def test_an_unreadable_prompt_line_is_named(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a sign that says \\"ONE\\""}\n{"prompt": " "}\n')
    output = _raised(["train", "quickstart_image", "--prompts.train", str(prompts), "--run-dir", str(tmp_path / "run")])
    assert "prompts.jsonl, line 2" in output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "is no directory"),
        ("no index", "model_index.json"),
        ("other pipeline", "is a FluxPipeline"),
        ("no vae", "lacks its component folder vae/"),
    ],
)
def test_a_wrong_model_directory_is_refused_with_the_component(tmp_path: Path, damage: str, message: str) -> None:
    model = tmp_path / "model"
    if damage != "no folder":
        model.mkdir()
        names = ("transformer", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        for name in names:
            (model / name).mkdir()
        if damage != "no index":
            kind = "FluxPipeline" if damage == "other pipeline" else "StableDiffusion3Pipeline"
            index = {"_class_name": kind, **{name: ["diffusers", "X"] for name in (*names, "vae")}}
            (model / "model_index.json").write_text(json.dumps(index))
    arguments = [
        "train",
        "quickstart_image",
        "--model.path",
        str(model),
        "--placement",
        "in_process",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert message in _raised(arguments)


def test_resume_export_and_report_refuse_what_is_no_run(tmp_path: Path) -> None:
    here, out = str(tmp_path), str(tmp_path / "out")
    for arguments in (["resume", here], ["export", here, out], ["report", here], ["resume", str(tmp_path / "nowhere")]):
        assert "no run" in _raised(arguments)


def test_pretrain_lists_the_models_there_are(tmp_path: Path) -> None:
    done = _raylign(["pretrain", "--help"], tmp_path)
    assert done.returncode == 0
    assert [name for name in PRETRAINERS if name not in done.stdout] == []


def test_pretrain_refuses_unknown_names_and_full_folders(tmp_path: Path) -> None:
    assert "known: glyphs" in _raised(["pretrain", "glyfs", "--out", str(tmp_path / "new")])
    (tmp_path / "file").touch()
    assert "is not empty" in _raised(["pretrain", "glyphs", "--out", str(tmp_path)])
