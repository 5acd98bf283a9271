"""The examples run, on one tiny trained picture run, one tiny text run, and a checkout with one more reward."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raylign.metrics import read_metrics
from raylign.models import load_policy
from raylign.models.dream import DreamConfig
from raylign.types import Prompt, RewardSample
from rewards.base import score_totally
from services.cli import app
from services.config import load_run_config
from services.export import export_run
from services.run import train_run
from tests.contract.test_docs_blocks import SERVED, commands
from tests.contract.test_docs_truth import documented
from tests.documents import BLOCKS
from tests.service.command_line import write_config
from tests.tiny_text_models import CANVAS_LENGTH, MAX_PROMPT_LENGTH, dream_folder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "read_run.ipynb"
ON_RAY = {"ray_tune_sweep.py", "submit_to_cluster.py", "reward_client.py"}
"""Run by the service tests, where there is a cluster or a service."""
ANSWERED_BY_A_RUN = {"report", "export", "evaluate"}
TEXT_RUN = f"""
num_steps = 1
placement = "in_process"
group_size = 2
groups_per_step = 2
[model]
type = "dream"
path = "{{model}}"
tuning = "full"
canvas_length = {CANVAS_LENGTH}
max_prompt_length = {MAX_PROMPT_LENGTH}
[prompts]
train = "{{train}}"
heldout = "{{heldout}}"
[sampler]
type = "low_confidence"
num_steps = 4
[algorithm]
type = "d1"
[[rewards]]
type = "exact_answer"
mode = "share"
"""


def load_example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pydantic looks for what annotations name
    spec.loader.exec_module(module)
    return module


def documented_commands() -> list[list[str]]:
    """Commands of the pages' blocks that a finished run of seconds can answer."""
    found: dict[str, list[str]] = {}
    for block in BLOCKS:
        here = block.kind == "bash" and not block.needs and (block.page, block.section) not in SERVED
        for words in commands(block.text) if here else ():
            if Path(words[0]).name == "raylign" and words[1] in ANSWERED_BY_A_RUN:
                found[" ".join(words[1:]).replace("<run>", "RUN")] = words[1:]
    return list(found.values())


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    config = load_run_config(str(write_config(folder, num_steps=2)), {"placement": "in_process"})
    assert train_run(config, "tiny", folder / "run", None) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("train", ("ab", "cd")), ("heldout", ("ef", "gh"))):
        rows = [{"id": f"{name}{word}", "prompt": word, "metadata": {"answer": word}} for word in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "text.toml"
    files = {name: folder / f"{name}.jsonl" for name in ("train", "heldout")}
    config.write_text(TEXT_RUN.format(model=dream_folder(), **files))
    assert train_run(load_run_config(str(config)), "text", folder / "run", None) == 0
    return folder / "run"


def test_every_example_is_run_somewhere() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"}}
    assert {name for name in names - ON_RAY if name.split(".")[0] not in here} == set()
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {name for name in names if f"({name})" not in listed} == set()


def test_an_exported_picture_model_draws_by_diffusers_alone(
    picture_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(picture_run, tmp_path / "model", adapter_only=False)
    example = load_example("sample_with_diffusers")
    size = ["--height", "8", "--width", "16", "--steps", "2"]
    example.main([str(tmp_path / "model"), 'a sign that says "OWL"', *size, "--out", str(tmp_path / "picture.png")])
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (16, 8)
    assert "16 x 8" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers meets a model type that it does not know
def test_an_exported_text_model_answers_by_transformers_alone(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(text_run, tmp_path / "model", adapter_only=False)
    capsys.readouterr()
    example = load_example("answer_with_transformers")
    example.main([str(tmp_path / "model"), "abc", "--canvas", "4"])
    assert set(capsys.readouterr().out.strip()) <= set("abcdefghij")

    settings: dict[str, Any] = {"canvas_length": 4, "max_prompt_length": 3, "tuning": "full", "chat_template": False}
    ours = load_policy(DreamConfig(path=str(tmp_path / "model"), **settings), "rollout")
    theirs = example.Qwen2ForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = torch.tensor([0, 1, 2, *[12] * 4])
    with torch.no_grad():
        expected = ours.predict(tokens[None, 3:], ours.encode("abc")).logits_BLV
        logits = example.canvas_logits(theirs, tokens, 4)
    logits[:, 12] = -torch.inf  # the mask is no answer
    torch.testing.assert_close(logits, expected[0], atol=1e-4, rtol=1e-4)


def test_the_notebook_reads_a_run(
    picture_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLIGN_RUN", str(picture_run))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "read_run.ipynb", "exec"), names)  # noqa: S102 - our own notebook
    printed = capsys.readouterr().out
    assert "finished after 2 steps" in printed
    assert "flow_grpo flow_sde" in printed
    assert names["Chart"]("reward/mean").svg.startswith("<svg")


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_a_documented_command_works_on_a_run(
    words: list[str], picture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("RUN", "<run>"):
        (tmp_path / "runs" / name).symlink_to(picture_run)
    monkeypatch.chdir(tmp_path)
    assert not app(words, standalone_mode=False)
    if words[0] == "export":
        assert (tmp_path / words[-1] / "model_index.json").exists()
    for option in ("--plot", "--pictures"):
        if option in words:
            named = tmp_path / words[words.index(option) + 1]
            assert list(tmp_path.glob(f"{named.stem}*.png"))


@pytest.mark.parametrize("run", ["picture_run", "text_run"])
def test_every_metric_of_a_run_is_documented(run: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(run)
    names = {name for row in read_metrics(folder / "metrics.jsonl") for name in row}
    assert len(names) > 25
    assert {name for name in names if not documented().fullmatch(name)} == set()


def test_the_custom_reward_scores_and_takes_twenty_lines() -> None:
    example = load_example("custom_reward")
    lines = (EXAMPLES / "custom_reward.py").read_text(encoding="utf-8").split("# ---")[0].split('"""\n', 1)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 20
    reward = example.BlueReward(example.BlueConfig())
    blue, red = np.zeros((2, 4, 4, 3), np.uint8)
    blue[..., 2], red[..., 0] = 255, 255
    samples = [RewardSample(name, Prompt("p", ""), image) for name, image in (("blue", blue), ("red", red))]
    scores = [score.value for score in asyncio.run(score_totally(reward, samples))]
    assert scores == pytest.approx([256 / 258, 1 / 258])


def test_a_custom_reward_is_trained_on_after_one_file_and_one_row(tmp_path: Path) -> None:
    """As docs/own_reward.md says: a checkout with the file, the import, the union and the row."""
    for name in ("raylign", "learner", "rollout", "services", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "rewards", tmp_path / "rewards", ignore=shutil.ignore_patterns("__pycache__"))
    reward = (EXAMPLES / "custom_reward.py").read_text(encoding="utf-8").split("# ---")[0]
    (tmp_path / "rewards" / "blue.py").write_text(reward)
    table = tmp_path / "rewards" / "__init__.py"
    text = table.read_text(encoding="utf-8")
    for old, new in (
        ("from rewards.clip_score", "from rewards.blue import BlueConfig, BlueReward\nfrom rewards.clip_score"),
        ("    | JpegConfig\n", "    | JpegConfig\n    | BlueConfig\n"),
        ("    JpegConfig: JpegReward,\n", "    JpegConfig: JpegReward,\n    BlueConfig: BlueReward,\n"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    table.write_text(text)
    config = write_config(tmp_path, num_steps=1)
    keys = ["--placement", "in_process", "--rewards.0.type", "blue", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "train", str(config), *keys],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward/blue" in row]
    assert 0 < (row["reward/blue"] or 0) < 1
