"""`raylign resume` and `fork` before anything starts: which checkpoint they take, and what they refuse."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithms.crd import CrdConfig
from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.checkpoint import TENSORS, CheckpointManifest, save_checkpoint
from learner.learner import Learner, LearnerConfig
from learner.state import LearnerState
from raylign.config import with_overrides
from raylign.errors import CheckpointError, ConfigError, RunDirError, WeightError
from services.cli import app
from services.config import RunConfig
from services.config_changes import kept_policies
from services.controller import Controller
from services.fork import start_missing
from services.run import EXIT_OK, disk_full
from services.run_checkpoints import choose_checkpoint, go_back, restore_guards, run_record
from services.run_dir import RunDir
from services.run_inputs import read_inputs, with_absolute_paths
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, flow_sde, train_step

CONFIG = with_overrides(RunConfig(), {"num_steps": "6", "placement": "in_process", "eval.num_prompts": "2"})
STATE = LearnerState({"params/w": torch.ones(2, 2)}, {"num_optimiser_steps": 0})


@pytest.fixture(scope="module")
def record() -> dict[str, object]:
    return dict(run_record(CONFIG, read_inputs(CONFIG)))


@pytest.fixture
def run_dir(tmp_path: Path, record: dict[str, object]) -> Path:
    """A run that was stopped, with checkpoints of steps 2 and 4."""
    with RunDir.create(tmp_path / "run", "x") as folder:
        folder.write_config(CONFIG)
        for step in (2, 4):
            save_checkpoint(folder.checkpoints / f"step_{step}", STATE, {"step": step, **record})  # type: ignore[dict-item]
    return tmp_path / "run"


def raylign(*arguments: str) -> int:
    """The exit code of a command in this process; Raylign's own errors are raised."""
    return int(app(list(arguments), standalone_mode=False) or 0)


def everything(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "lock"}


def truncate(run_dir: Path, step: int) -> None:
    with (run_dir / "checkpoints" / f"step_{step}" / TENSORS).open("r+b") as file:
        file.truncate(3)


def test_the_newest_good_checkpoint_is_chosen_or_that_of_a_step(run_dir: Path) -> None:
    folder = RunDir(run_dir)
    assert choose_checkpoint(folder, None)[0].step == 4
    assert choose_checkpoint(folder, 2)[0].step == 2
    truncate(run_dir, 4)
    manifest, damaged = choose_checkpoint(folder, None)
    assert manifest.step == 2
    assert [one.path.name for one in damaged] == ["step_4"]
    with pytest.raises(CheckpointError, match=r"step_4/learner\.safetensors is damaged"):
        choose_checkpoint(folder, 4)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; there are 2, 4"):
        choose_checkpoint(folder, 3)


def test_no_good_checkpoint_is_an_error_that_tells_of_each(run_dir: Path) -> None:
    for step in (2, 4):
        truncate(run_dir, step)
    before = everything(run_dir)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint of .* can be read:.*step_4: .*step_2: .*start anew"):
        raylign("resume", str(run_dir))
    assert everything(run_dir) == before


def test_a_run_that_loses_its_learner_goes_back_to_its_newest_good_checkpoint_or_the_beginning(run_dir: Path) -> None:
    folder, notes = RunDir(run_dir), list[str]()
    newest = go_back(folder, None, notes.append)
    assert newest is not None
    assert (newest.step, notes) == (4, [])
    truncate(run_dir, 4)
    older = go_back(folder, newest, notes.append)
    assert older is not None
    assert older.step == 2
    assert "damaged" in notes[0]
    assert (folder.checkpoints / "step_4.damaged").is_dir()
    truncate(run_dir, 2)
    with pytest.raises(CheckpointError, match="can be read"):
        go_back(folder, None, notes.append)
    shutil.rmtree(folder.checkpoints / "step_2")
    assert go_back(folder, None, notes.append) is None, "it made none yet: from the beginning"
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        go_back(folder, older, notes.append)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run", "x") as folder:
        folder.write_config(CONFIG)
    for command in ("resume", "fork"):
        with pytest.raises(CheckpointError, match="has no checkpoint to go on from; start anew"):
            raylign(command, str(tmp_path / "run"))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for command in ("resume", "fork"):
        with pytest.raises(RunDirError, match="no run directory at"):
            raylign(command, str(tmp_path / "nowhere"))
        with pytest.raises(RunDirError, match=r"it has no config\.toml"):
            raylign(command, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_use_is_refused_and_says_what_else_there_is(run_dir: Path) -> None:
    with RunDir.open(run_dir), pytest.raises(RunDirError, match=r"in use by process .*raylign fork"):
        raylign("resume", str(run_dir))


@pytest.mark.parametrize("way", ["edited", "given"])
def test_a_changed_key_is_refused_with_the_difference_and_nothing_is_touched(run_dir: Path, way: str) -> None:
    given: list[str] = []
    if way == "edited":
        RunDir(run_dir).write_config(with_overrides(CONFIG, {"learner.lr": "0.5"}))
    else:
        given = ["--learner.lr", "0.5"]
    truncate(run_dir, 4)
    before = everything(run_dir)
    with pytest.raises(CheckpointError, match=r"(?s)not what step_2 was made with.*learner\.lr: was 0\.0003, is 0\.5"):
        raylign("resume", str(run_dir), *given)
    assert everything(run_dir) == before


def test_a_misspelt_key_to_allow_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `learner\.lr`"):
        raylign("resume", str(run_dir), "--learner.lr", "0.5", "--allow-config-change", "learner.rl")


def test_keys_that_no_weights_survive_are_refused_even_if_allowed(run_dir: Path) -> None:
    changed = ("--model.lora.rank", "4", "--allow-config-change", "model")
    with pytest.raises(ConfigError, match="adapters of another rank have other shapes"):
        raylign("resume", str(run_dir), *changed)


def test_an_algorithm_that_keeps_other_policies_is_for_a_fork(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="'sampling', which this run never had; `raylign fork`"):
        raylign("resume", str(run_dir), "--algorithm.type", "crd", "--allow-config-change", "algorithm")


def test_a_finished_run_is_left_as_it_is(run_dir: Path) -> None:
    before = everything(run_dir)
    assert raylign("resume", str(run_dir), "--num_steps", "4") == EXIT_OK
    assert everything(run_dir) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.lora.rank", "4"], r"model\.lora\.rank: was 32, is 4: adapters of another rank have other shapes"),
        (["--model.tuning", "full"], r"model\.tuning: was \"lora\", is \"full\": an adapter and the whole network"),
        (["--num_steps", "4"], "is of step 4 and num_steps is 4, so there is nothing to do"),
        (["--learner.lrr", "4"], "did you mean `lr`"),
    ],
)
def test_a_fork_that_cannot_be_is_refused_before_it_has_a_directory(
    run_dir: Path, arguments: list[str], told: str
) -> None:
    new, before = run_dir.with_name("new"), everything(run_dir)
    with pytest.raises(ConfigError, match=told):
        raylign("fork", str(run_dir), "--run-dir", str(new), *arguments)
    assert not new.exists()
    assert everything(run_dir) == before


def test_a_fork_into_a_run_is_refused(run_dir: Path) -> None:
    before = everything(run_dir)
    with pytest.raises(RunDirError, match="already holds a run with checkpoints"):
        raylign("fork", str(run_dir), "--run-dir", str(run_dir))
    assert everything(run_dir) == before


def test_a_policy_that_was_not_kept_starts_as_a_copy_of_the_trained_one() -> None:
    def learner(algorithm: FlowGrpoConfig | CrdConfig, ema_decay: float | None = None) -> Learner:
        settings = LearnerConfig(lr=1e-2, ema_decay=ema_decay)
        return Learner(settings, algorithm, ToyPolicy(), flow_sde(), 1.0, 4, RUN_SEED)

    parent = learner(FlowGrpoConfig(kl_weight=0.01), ema_decay=0.5)
    groups = draw_groups(ToyPolicy(), flow_sde(), FlowGrpoConfig(kl_weight=0.01).needs, first_sequence=0)
    train_step(parent, groups, 1)
    state = parent.state_dict()
    new = learner(CrdConfig())
    with pytest.raises(WeightError):
        new.load_state_dict(state)
    config = with_overrides(CONFIG, {"algorithm.type": "crd"})
    new.load_state_dict(start_missing(state, kept_policies(config)))
    tensors = new.state_dict().tensors
    assert {name.partition("/")[0] for name in tensors} == {"params", "adam", "old", "sampling", "reference"}
    for name, tensor in tensors.items():
        section, _, rest = name.partition("/")
        source = f"params/{rest}" if section in ("old", "sampling") else name
        assert torch.equal(tensor, state.tensors[source]), name
    assert new.num_optimiser_steps == 1


@pytest.mark.parametrize(("max_staleness", "limit"), [("2", 0), ("3", 3)])
def test_a_guard_that_fell_goes_on_so_unless_its_bound_was_changed(
    record: dict[str, object], max_staleness: str, limit: int
) -> None:
    made_with = with_overrides(CONFIG, {"placement": "separate", "max_staleness": "2"})
    fell = {"limit": 0, "num_good": 1, "recheck_at": 0}
    whole: dict[str, Any] = {**record, "config": run_record(made_with, read_inputs(CONFIG))["config"], "guard": fell}
    manifest = CheckpointManifest(Path("step_4"), 4, "", whole, {}, {}, "")
    config = with_overrides(made_with, {"max_staleness": max_staleness})
    nobody: Any = None
    controller = Controller(config, nobody, [], nobody, nobody, nobody, nobody, nobody)
    restore_guards(controller, manifest, config)
    assert controller.guard.limit == limit
    restore_guards(controller, None, config)
    assert controller.guard.limit == limit


def test_on_a_full_disk_the_first_to_miss_the_room_tells(tmp_path: Path) -> None:
    def leave(first: Exception) -> BaseException:
        try:
            try:
                raise first
            finally:
                raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        except OSError as error:
            return error

    first = CheckpointError("it takes 10 bytes")
    assert disk_full(leave(first), tmp_path) is first
    assert disk_full(leave(ExceptionGroup("", [ValueError("x"), first])), tmp_path) is first
    told = disk_full(leave(ValueError("x")), tmp_path)
    assert isinstance(told, RunDirError)
    assert "cannot write metrics.jsonl: No space left on device" in str(told)
    assert disk_full(OSError(errno.EIO, "Input/output error"), tmp_path) is None
    assert disk_full(ValueError("x"), tmp_path) is None


def test_paths_are_made_absolute_and_inputs_have_an_identity(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text('a sign that says "ONE"\n')
    with contextlib.chdir(tmp_path):
        config = with_absolute_paths(with_overrides(CONFIG, {"prompts.train": "mine.txt"}))
        adapted = with_absolute_paths(with_overrides(CONFIG, {"model.lora.start": "a/b"}))
    assert config.prompts.train == str(tmp_path / "mine.txt")
    assert adapted.model.lora.start == str(tmp_path / "a" / "b")
    assert config.model.path == CONFIG.model.path, "assets stay what they are"
    first = read_inputs(config).sha256s
    assert first.keys() == {"prompts.train", "prompts.heldout", "model.path"}
    (tmp_path / "mine.txt").write_text('a sign that says "TWO"\n')
    second = read_inputs(config).sha256s
    assert {key for key in first if first[key] != second[key]} == {"prompts.train"}


def test_what_a_checkpoint_keeps_of_its_run_is_json(record: dict[str, object]) -> None:
    assert json.loads(json.dumps(record)) == record
    assert "origin" not in record
