"""Checkpoints that several ranks write: one state whoever wrote it, all or nothing, and nothing of a torn attempt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from learner.checkpoint import (
    MANIFEST,
    Part,
    discard_parts,
    finish_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    save_checkpoint,
    save_part,
    verify_checkpoint,
)
from learner.state import LearnerState, Rows, part_of, shapes_in
from learner.stored import ROWS, StoredTensors
from raylign.errors import CheckpointError

RECORD = {"step": 4, "config_sha256": "abc"}
WHOLE = LearnerState(
    {
        "params/w": torch.randn(7, 3),
        "params/b": torch.randn(2),
        "params/head": torch.randn(1, 5),
        "adam/step/w": torch.tensor(4.0),
        "half": torch.ones(3, 2, dtype=torch.bfloat16),
    },
    {"num_optimiser_steps": 4},
)
CUT = ("params/w", "params/b", "half")


def rank_state(rank: int, num_ranks: int) -> LearnerState:
    """What a sharded rank has of WHOLE."""
    rows = {name: Rows.of_rank(rank, num_ranks, len(WHOLE.tensors[name])) for name in CUT}
    tensors = {name: part_of(WHOLE.tensors, name, rows.get(name)).contiguous() for name in WHOLE.tensors}
    return LearnerState(tensors, dict(WHOLE.values), rows)


def write(folder: Path, num_ranks: int, token: str = "one") -> list[Part]:
    return [save_part(folder, token, rank_state(rank, num_ranks), rank, num_ranks) for rank in range(num_ranks)]


def save(parent: Path, num_ranks: int, step: int = 4) -> Path:
    folder = parent / f"step_{step}"
    finish_checkpoint(folder, "one", write(folder, num_ranks), WHOLE.values, {**RECORD, "step": step})
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 9])
def test_rows_are_cut_as_torch_cuts_them(num_ranks: int, total: int) -> None:
    whole = torch.arange(total)
    chunks = [*torch.chunk(whole, num_ranks), *[whole[:0]] * num_ranks]
    for rank in range(num_ranks):
        start, stop, all_rows = Rows.of_rank(rank, num_ranks, total)
        assert whole[start:stop].tolist() == chunks[rank].tolist()
        assert all_rows == total


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_what_ranks_wrote_is_one_state(tmp_path: Path, num_ranks: int) -> None:
    folder = save(tmp_path, num_ranks)
    files = [f"learner-{rank:05d}-of-{num_ranks:05d}.safetensors" for rank in range(num_ranks)]
    assert sorted(path.name for path in folder.iterdir()) == [*files, MANIFEST]
    checkpoint = load_checkpoint(folder)
    assert sorted(checkpoint.manifest.files) == files
    assert checkpoint.state.values == WHOLE.values
    assert checkpoint.state.tensors.keys() == WHOLE.tensors.keys()
    for name, tensor in WHOLE.tensors.items():
        assert torch.equal(checkpoint.state.tensors[name], tensor), name
        assert checkpoint.state.tensors[name].dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["step_4"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_a_rank_reads_its_rows_whoever_wrote_them(tmp_path: Path, num_ranks: int) -> None:
    save_checkpoint(tmp_path / "whole" / "step_4", WHOLE, RECORD)
    for folder in (tmp_path / "whole" / "step_4", save(tmp_path, 3)):
        tensors = load_checkpoint(folder).state.tensors
        for rank in range(num_ranks):
            expected = rank_state(rank, num_ranks)
            for name, tensor in expected.tensors.items():
                assert torch.equal(part_of(tensors, name, expected.rows.get(name)), tensor), (rank, name)


def test_shapes_are_those_of_the_whole(tmp_path: Path) -> None:
    found = shapes_in(load_checkpoint(save(tmp_path, 2)).state.tensors, "params")
    assert {name: tuple(one.shape) for name, one in found.items()} == {"w": (7, 3), "b": (2,), "head": (1, 5)}
    assert all(one.is_meta for one in found.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_part_damages_the_checkpoint(tmp_path: Path, rank: int) -> None:
    good, bad = save(tmp_path, 2, step=2), save(tmp_path, 2, step=4)
    path = bad / f"learner-{rank:05d}-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"learner-0000{rank}-of-00002.safetensors is damaged"):
        load_checkpoint(bad)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks learner-0000{rank}-of-00002"):
        verify_checkpoint(bad)
    manifest, damaged = newest_good(tmp_path)
    assert manifest is not None
    assert manifest.path == good
    assert [one.path for one in damaged] == [bad]


def test_until_it_is_finished_it_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step_4"
    write(folder, 2)
    assert list_checkpoints(tmp_path) == []
    discard_parts(folder, "one")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_this_node_does_not_see_makes_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2, step=2)
    folder = tmp_path / "step_4"
    parts = write(folder, 2)
    (tmp_path / "step_4.tmp-one" / parts[1].name).unlink()
    with pytest.raises(CheckpointError, match=r"storage that all of them share: give --run-dir there"):
        finish_checkpoint(folder, "one", parts, WHOLE.values, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_new_attempt_deletes_torn_ones_and_leaves_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "step_4"
    torn = tmp_path / "step_2.tmp-dead"
    torn.mkdir()
    second = save_part(folder, "one", rank_state(1, 2), 1, 2)
    first = save_part(folder, "one", rank_state(0, 2), 0, 2)
    assert not torn.exists()
    finish_checkpoint(folder, "one", [first, second], WHOLE.values, RECORD)
    assert torch.equal(load_checkpoint(folder).state.tensors["params/w"], WHOLE.tensors["params/w"])


def test_a_rank_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*Earlier checkpoints are intact"):
        save_part(tmp_path / "checkpoints" / "step_4", "one", rank_state(1, 2), 1, 2)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, 2), (3, 5)], r"rows 2 to 3 are in no file"),
        ([(0, 3), (2, 5)], r"rows 3 to 2 are in no file of the checkpoint, or in two"),
        ([(0, 2), (2, 4)], r"rows from 4 on are in no file"),
        ([(1, 3), (3, 5)], r"rows 0 to 1 are in no file"),
    ],
)
def test_rows_that_are_missing_or_there_twice_are_refused(
    tmp_path: Path, rows: list[tuple[int, int]], told: str
) -> None:
    paths = [tmp_path / f"{place}.safetensors" for place in range(len(rows))]
    for path, (start, stop) in zip(paths, rows, strict=True):
        save_file({"w": torch.zeros(stop - start, 2)}, path, {ROWS: f'{{"w": [{start}, 5]}}'})
    with pytest.raises(CheckpointError, match=told):
        StoredTensors(paths)


def test_parts_of_different_tensors_under_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for place, path in enumerate(paths):
        save_file({"w": torch.zeros(1, 2 + place)}, path, {ROWS: f'{{"w": [{place}, 2]}}'})
    with pytest.raises(CheckpointError, match=r"w is \(2, 2\) in one file of the checkpoint, \(2, 3\) in another"):
        StoredTensors(paths)
