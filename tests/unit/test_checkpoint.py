"""Checkpoints: whole or not there, verified on reading, and exact."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from learner.algorithms.nft import NftConfig
from learner.checkpoint import (
    MANIFEST,
    TENSORS,
    later_checkpoints,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    prune_checkpoints,
    read_manifest,
    save_checkpoint,
    set_aside,
    verify_checkpoint,
    write_tensors,
)
from learner.learner import Learner, LearnerConfig
from learner.state import LearnerState
from raylign.errors import CheckpointError
from tests.tiny_models import RUN_SEED, ToyPolicy, draw_groups, euler, train_step

STATE = LearnerState(
    {"params/w": torch.randn(3, 2), "adam/step/w": torch.tensor(4.0), "half": torch.ones(2, dtype=torch.bfloat16)},
    {"num_optimiser_steps": 4},
)


def record(step: int) -> dict[str, object]:
    return {"step": step, "config_sha256": "abc", "prompt_cursor": {"epoch": 1, "place": 7}, "version": step}


def save(parent: Path, step: int, state: LearnerState = STATE) -> Path:
    folder = parent / f"step_{step}"
    save_checkpoint(folder, state, record(step))  # type: ignore[arg-type]
    return folder


def assert_intact(folder: Path, step: int) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.manifest.step == step
    for name, tensor in STATE.tensors.items():
        assert torch.equal(checkpoint.state.tensors[name], tensor)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 12)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.state.values == STATE.values
    assert checkpoint.state.tensors.keys() == STATE.tensors.keys()
    for name, tensor in STATE.tensors.items():
        assert checkpoint.state.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.state.tensors[name], tensor)
    manifest = read_manifest(folder)
    assert manifest == checkpoint.manifest
    assert (manifest.path, manifest.step, manifest.config_sha256) == (folder, 12, "abc")
    assert manifest.record == record(12)
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, MANIFEST]


def test_a_run_that_goes_on_from_disk_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    def learner() -> Learner:
        return Learner(LearnerConfig(lr=1e-2), NftConfig(), ToyPolicy(), euler(), 1.0, 4, RUN_SEED)

    groups = [draw_groups(ToyPolicy(), euler(), NftConfig().needs, first_sequence=step) for step in range(3)]
    uninterrupted = learner()
    for step in (1, 2):
        train_step(uninterrupted, groups[step - 1], step)
    folder = save(tmp_path, 2, uninterrupted.state_dict())
    last = train_step(uninterrupted, groups[2], 3)
    resumed = learner()
    resumed.load_state_dict(load_checkpoint(folder).state)
    assert train_step(resumed, groups[2], 3) == last
    for name, tensor in uninterrupted.state_dict().tensors.items():
        assert torch.equal(resumed.state_dict().tensors[name], tensor), name


@contextmanager
def full_disk(after_bytes: int) -> Generator[None]:
    """Files cannot grow beyond a size: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("after_bytes", [0, 100])
def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path: Path, after_bytes: int) -> None:
    save(tmp_path, 1)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in STATE.tensors.values())
    told = rf"it takes {needed} bytes and [\d,]+ are free\. Earlier checkpoints are intact"
    with full_disk(after_bytes), pytest.raises(CheckpointError, match=told):
        save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"
    assert_intact(tmp_path / "step_1", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"


def test_a_writer_that_fails_half_way_leaves_the_same_steps_checkpoint_intact(tmp_path: Path) -> None:
    def failing(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        write_tensors(path, tensors)
        raise OSError(28, "No space left on device")

    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(folder, LearnerState({"other": torch.zeros(1)}), {"step": 1, "config_sha256": ""}, failing)
    assert_intact(folder, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, LearnerState({"other": torch.zeros(1)}))
    save(tmp_path, 1)
    assert_intact(tmp_path / "step_1", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_the_remnant_of_a_killed_writer_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    remnant = tmp_path / "step_2.tmp-deadbeef"
    remnant.mkdir()
    write_tensors(remnant / TENSORS, STATE.tensors)
    (tmp_path / "step_9").mkdir()
    assert list_checkpoints(tmp_path) == [tmp_path / "step_1"]
    save(tmp_path, 3)
    assert not remnant.exists()


def test_the_highest_step_is_the_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"


@pytest.mark.parametrize(("keep", "left"), [(0, ["step_10"]), (1, ["step_10"]), (2, ["step_10", "step_9"])])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int, left: list[str]) -> None:
    for step in (2, 9, 10):
        save(tmp_path, step)
    gone = prune_checkpoints(tmp_path, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert len(gone) == 3 - len(left)


def test_pruning_leaves_the_spared_one_beside_the_newest(tmp_path: Path) -> None:
    for step in (0, 2, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in prune_checkpoints(tmp_path, 1, spared=2)] == ["step_0", "step_9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_2"]


def truncate(folder: Path) -> None:
    with (folder / TENSORS).open("r+b") as file:
        file.truncate(10)


def change_a_byte(folder: Path) -> None:
    damaged = bytearray((folder / TENSORS).read_bytes())
    damaged[-1] ^= 1
    (folder / TENSORS).write_bytes(damaged)


def lose_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100])


DAMAGES = [truncate, change_a_byte, lose_tensors, lose_manifest, cut_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_next_older_good_one(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for step in (2, 10, 12, 14):
        save(tmp_path, step)
    for step in (12, 14):
        damage(tmp_path / f"step_{step}")
    manifest, damaged = newest_good(tmp_path)
    assert manifest == verify_checkpoint(tmp_path / "step_10")
    assert [one.path.name for one in damaged] == ["step_14", "step_12"]
    assert all("raylign resume" not in one.reason and "step_1" in one.reason for one in damaged)
    assert len(list(tmp_path.iterdir())) == 4, "looking changes nothing"


def test_where_no_checkpoint_is_good_each_is_told(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "none") == (None, [])
    for step, damage in enumerate(DAMAGES):
        save(tmp_path, step)
        damage(tmp_path / f"step_{step}")
    manifest, damaged = newest_good(tmp_path)
    assert manifest is None
    assert len(damaged) == len(DAMAGES)


def test_what_is_set_aside_is_no_checkpoint_and_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert later_checkpoints(tmp_path, 1) == [tmp_path / "step_2", tmp_path / "step_3"]
    assert set_aside(tmp_path / "step_3", "damaged") == tmp_path / "step_3.damaged"
    save(tmp_path, 3)
    assert set_aside(tmp_path / "step_3", "damaged") == tmp_path / "step_3.damaged-2"
    assert list_checkpoints(tmp_path) == [tmp_path / "step_1", tmp_path / "step_2"]
    assert later_checkpoints(tmp_path, 1) == [tmp_path / "step_2"]
    save(tmp_path, 3)
    prune_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_3.damaged", "step_3.damaged-2"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_pruning_never_deletes_the_last_good_one(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    for step in (3, 4):
        damage(tmp_path / f"step_{step}")
    prune_checkpoints(tmp_path, 1)
    manifest, _ = newest_good(tmp_path)
    assert manifest is not None
    assert manifest.step == 2
    assert not (tmp_path / "step_1").exists()


def test_pruning_deletes_nothing_where_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
        truncate(tmp_path / f"step_{step}")
    assert prune_checkpoints(tmp_path, 1) == []
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_checkpoint_has_an_identity_of_its_own(tmp_path: Path) -> None:
    first, again = read_manifest(save(tmp_path / "a", 1)), read_manifest(save(tmp_path / "b", 1))
    other = read_manifest(save(tmp_path / "c", 1, LearnerState({"params/w": torch.zeros(3, 2)})))
    assert first.sha256 == again.sha256 != other.sha256


def test_one_changed_byte_of_tensors_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    change_a_byte(folder)
    with pytest.raises(CheckpointError, match=r"learner\.safetensors is damaged.*`raylign resume` sets it aside"):
        load_checkpoint(folder)


def test_a_missing_tensor_file_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"lacks learner\.safetensors"):
        load_checkpoint(folder)


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["record"]["step"] = 2
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "not of format 1"), ('{"format": 99}', "not of format 1")],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        load_checkpoint(tmp_path)
