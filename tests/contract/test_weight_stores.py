"""Every weight store: what is put is what is fetched, and nothing torn, foreign or missing is taken for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from raylign.config import parse_config
from raylign.errors import ClusterError, ConfigError, WeightError
from raylign.weight_delta import apply_delta, make_delta
from raylign.weights import TornSnapshotError, WeightSnapshot, make_snapshot, verify_snapshot
from rewards.jpeg import JpegConfig
from services.config import RunConfig
from services.config_changes import NEUTRAL
from services.weight_store_checks import broadcast_backend
from services.weight_stores import (
    CollectiveStore,
    CollectiveStoreConfig,
    Fetched,
    FilesystemStore,
    ObjectStore,
    Seat,
    WeightStore,
    WeightStoreConfig,
    make_weight_store,
    take,
)

TENSORS = {
    "a.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "b.half": torch.tensor([0.5, float("nan")], dtype=torch.float16),
    "c.brain": torch.arange(5).to(torch.bfloat16),
    "d.fp8": torch.tensor([0.5, 448.0, -0.0]).to(torch.float8_e4m3fn),
    "e.codes": torch.tensor([0, 7, 255], dtype=torch.uint8),
    "f.scalar": torch.tensor(3.0),
    "g.empty": torch.zeros(0, 3),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
TIMEOUT_S = 1.0

STORES: dict[str, Callable[[Path], WeightStore]] = {
    "object_store": lambda folder: ObjectStore(),
    "filesystem": lambda folder: FilesystemStore(str(folder), wait=no_wait),
    "filesystem by URL": lambda folder: FilesystemStore(folder.as_uri(), wait=no_wait),
    "bucket": lambda folder: FilesystemStore(f"memory:/{folder}", wait=no_wait),
    "collective, for those who come late": lambda folder: CollectiveStore(lambda whole: whole),
}


def no_wait(seconds: float) -> None:
    assert seconds > 0


def snapshot(version: int = 4) -> WeightSnapshot:
    return make_snapshot({**TENSORS, "f.scalar": torch.tensor(float(version))}, version, "full", lora_scale=0.5)


def same(found: WeightSnapshot, wanted: WeightSnapshot) -> bool:
    """All but the arrays' types, and these byte for byte."""
    if replace(found, arrays={}) != replace(wanted, arrays={}) or set(found.arrays) != set(wanted.arrays):
        return False
    return all(found.arrays[key].tobytes() == array.tobytes() for key, array in wanted.arrays.items())


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WeightStore:
    return STORES[request.param](tmp_path)


def test_what_is_put_is_what_is_fetched_whole_packed_or_as_a_delta(store: WeightStore) -> None:
    first, second = snapshot(1), snapshot(2)
    packed = make_snapshot({"w:fp8.codes": TENSORS["d.fp8"], "norm": TENSORS["a.weight"]}, 3, "packed")
    for sent in (first, second, make_delta(first, second), packed):
        ticket = store.put(sent, "rollout")
        fetched = store.fetch(ticket)
        assert same(fetched.snapshot, sent)
        assert fetched.detour == ""
        assert same(store.fetch(ticket, attempt=1).snapshot, sent)
    got = store.fetch(store.put(make_delta(first, second), "rollout")).snapshot
    whole = verify_snapshot(apply_delta(first, got), SHAPES)
    assert all(whole[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert whole["f.scalar"] == 2
    assert torch.equal(whole["d.fp8"].view(torch.uint8), TENSORS["d.fp8"].view(torch.uint8))


def test_what_was_put_does_not_change_with_the_learners_weights(store: WeightStore) -> None:
    weight = torch.zeros(4)
    ticket = store.put(make_snapshot({"w": weight}, 1, "full"), "rollout")
    weight += 1
    assert torch.equal(verify_snapshot(store.fetch(ticket).snapshot, {"w": (4,)})["w"], torch.zeros(4))


def test_take_fetches_again_what_turns_out_torn_and_gives_up_in_the_end(store: WeightStore) -> None:
    ticket, tries = store.put(snapshot(), "rollout"), itertools.count(1)

    def torn_once(fetched: WeightSnapshot) -> int:
        if (count := next(tries)) < store.num_fetches:
            raise TornSnapshotError("torn")
        return count

    assert take(store, ticket, torn_once)[0] == store.num_fetches
    calls: list[int] = []

    def always(error: Exception) -> Callable[[WeightSnapshot], None]:
        def load(fetched: WeightSnapshot) -> None:
            calls.append(fetched.version)
            raise error

        return load

    with pytest.raises(TornSnapshotError, match="still torn"):
        take(store, ticket, always(TornSnapshotError("still torn")))
    assert calls == [4] * store.num_fetches
    with pytest.raises(WeightError, match="foreign"):
        take(store, ticket, always(WeightError("foreign")))
    assert len(calls) == store.num_fetches + 1


# Files


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "numbers cut short": ("weights.safetensors", cut, r"weights\.safetensors has .* torn or foreign"),
    "numbers gone": ("weights.safetensors", Path.unlink, r"weights\.safetensors cannot be read"),
    "numbers of nobody": ("weights.safetensors", lambda path: path.write_bytes(b"x" * 4), "torn or foreign"),
    "no numbers at all": ("weights.safetensors", lambda path: path.write_bytes(b""), "torn or foreign"),
    "a bit of a number": ("weights.safetensors", lambda path: flip(path, -1), r"e\.codes is torn"),
    "the head's length": ("weights.safetensors", lambda path: flip(path, 7), "torn or foreign"),
    "manifest changed": ("manifest.json", lambda path: flip(path, 30), r"manifest\.json is not what the learner wrote"),
    "manifest cut short": ("manifest.json", cut, r"manifest\.json is not what the learner wrote"),
    "manifest gone": ("manifest.json", Path.unlink, r"manifest\.json cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused_by_name_after_so_many_reads(fault: str, tmp_path: Path) -> None:
    name, damage, message = FAULTS[fault]
    waits: list[float] = []
    store = FilesystemStore(str(tmp_path), num_reads=3, first_wait_s=0.1, wait=waits.append)
    ticket = store.put(snapshot(), "rollout")
    damage(files(tmp_path)[name])
    with pytest.raises(TornSnapshotError, match=message):
        take(store, ticket, lambda fetched: verify_snapshot(fetched, SHAPES))
    assert waits == [0.1, 0.2]


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    late: list[tuple[Path, bytes]] = []

    def appear(seconds: float) -> None:
        path, data = late.pop()
        path.write_bytes(data)

    store = FilesystemStore(str(tmp_path), wait=appear)
    ticket = store.put(snapshot(), "rollout")
    for path in files(tmp_path).values():
        late.append((path, path.read_bytes()))
        path.unlink()
    assert same(take(store, ticket, lambda fetched: fetched)[0], snapshot())
    assert late == []


def test_another_snapshots_files_under_the_name_are_refused(tmp_path: Path) -> None:
    store = FilesystemStore(str(tmp_path), num_reads=1)
    mine, other = store.put(snapshot(1), "rollout"), store.put(snapshot(2), "rollout")
    for name in ("weights.safetensors", "manifest.json"):
        Path(mine.folder, name).write_bytes(Path(other.folder, name).read_bytes())
        with pytest.raises(TornSnapshotError, match=r"torn|not what the learner wrote"):
            take(store, mine, lambda fetched: verify_snapshot(fetched, SHAPES))


def test_the_newest_are_kept_of_each_policy_and_nobody_elses_are_touched(tmp_path: Path) -> None:
    other = FilesystemStore(str(tmp_path))
    others = other.put(snapshot(0), "rollout")
    store = FilesystemStore(str(tmp_path), keep=2)
    evaluated = store.put(snapshot(0), "eval")
    tickets = [store.put(snapshot(version), "rollout") for version in range(5)]
    kept = [ticket for ticket in tickets if Path(ticket.folder).exists()]
    assert kept == tickets[-2:]
    for ticket, version in ((evaluated, 0), (others, 0), (tickets[3], 3), (tickets[4], 4)):
        assert same(store.fetch(ticket).snapshot, snapshot(version))
    assert sorted(files(tmp_path)) == ["manifest.json", "weights.safetensors"]  # nothing partial


def test_a_whole_snapshots_file_is_one_that_any_tool_reads(tmp_path: Path) -> None:
    FilesystemStore(str(tmp_path)).put(snapshot(), "rollout")
    found = load_file(files(tmp_path)["weights.safetensors"])
    wanted = verify_snapshot(snapshot(), SHAPES)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    manifest = json.loads(files(tmp_path)["manifest.json"].read_bytes())
    assert (manifest["version"], manifest["kind"], manifest["lora_scale"]) == (4, "full", 0.5)


def test_a_large_object_is_fetched_in_parts(tmp_path: Path) -> None:
    store = FilesystemStore(f"memory:/{tmp_path}", part_bytes=7)
    assert same(store.fetch(store.put(snapshot(), "rollout")).snapshot, snapshot())


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = FilesystemStore(str(tmp_path / "file"))
    with pytest.raises(ClusterError, match=r"cannot write .* bytes of weights to .*/file/.*weight_store\.path"):
        store.put(snapshot(), "rollout")


# Broadcasts, by gloo, between threads


class Room:
    """A learner and its members, each with a store of its own, and a place to meet."""

    def __init__(self, num_members: int) -> None:
        self.meeting = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.learner = CollectiveStore(no_detour)
        self.members = [CollectiveStore(lambda whole: whole) for _ in range(num_members)]

    def seats(self, sent: WeightSnapshot, group: str = "one", round_: int = 0, **changes: Any) -> list[Seat]:
        first = Seat(
            meeting=f"127.0.0.1:{self.meeting.port}",
            group=group,
            round=round_,
            rank=0,
            size=len(self.members) + 1,
            backend="gloo",
            timeout_s=TIMEOUT_S,
            which="rollout",
            sha256=sent.sha256,
            whole=replace(sent, lora_scale=99.0),
        )
        return [replace(first, rank=rank, **changes) for rank in range(first.size)]

    def broadcast(self, seats: list[Seat], absent: tuple[int, ...] = ()) -> tuple[str, list[Fetched]]:
        """What the learner says went wrong, and what each member got that is not absent (by rank)."""
        with ThreadPoolExecutor(len(seats)) as pool:
            sending = pool.submit(self.learner.send, seats[0])
            here = [
                (store, seat) for store, seat in zip(self.members, seats[1:], strict=True) if seat.rank not in absent
            ]
            fetching = [pool.submit(store.fetch, seat) for store, seat in here]
            return sending.result(30), [one.result(30) for one in fetching]


def no_detour(whole: Any) -> WeightSnapshot:
    raise AssertionError("the learner fetches nothing")


def test_all_members_get_what_was_put_round_after_round_whole_or_as_a_delta() -> None:
    room, base = Room(3), snapshot(0)
    for round_, sent in enumerate([base, snapshot(1), make_delta(snapshot(1), snapshot(2)), snapshot(3)]):
        room.learner.put(sent, "rollout")
        failed, fetched = room.broadcast(room.seats(sent, round_=round_))
        assert failed == ""
        assert [one.detour for one in fetched] == ["", "", ""]
        assert all(same(one.snapshot, sent) for one in fetched)
    keys = room.meeting.list_keys()
    assert not any("one/0/" in key or "one/2/" in key for key in keys)
    assert any("one/3/" in key for key in keys)


def missed(outcome: tuple[str, list[Fetched]]) -> str:
    """Everybody took the other way, which is the learner's reason; and what it was."""
    failed, fetched = outcome
    assert failed
    assert all(one.detour for one in fetched)
    assert all(one.snapshot.lora_scale == 99.0 for one in fetched)
    return failed


def test_whatever_goes_wrong_nobody_hangs_and_all_take_the_other_way() -> None:
    room, sent = Room(3), snapshot(1)

    def put_and_broadcast(group: str, round_: int, absent: tuple[int, ...] = (), **changes: Any) -> tuple[str, Any]:
        room.learner.put(sent, "rollout")
        return room.broadcast(room.seats(sent, group, round_, **changes), absent)

    assert put_and_broadcast("one", 0)[0] == ""
    # One that does not come.
    assert "did not come within 1 s" in missed(put_and_broadcast("one", 1, absent=(2,)))
    # One whose process was started anew is not of the group; in a new group it is.
    room.members[0] = CollectiveStore(lambda whole: whole)
    assert "[1] of 3 are gone" in missed(put_and_broadcast("one", 2))
    assert put_and_broadcast("two", 0)[0] == ""
    # One that the controller knows to be dead.
    seats = room.seats(sent, "two", 1)
    room.meeting.set(seats[3].key(3), "gone")
    room.learner.put(sent, "rollout")
    assert "[3] of 3 are gone" in missed(room.broadcast(seats, absent=(3,)))
    # One that says it is here and dies before it takes part: in a group that is formed, and while it is formed.
    for group, round_ in (("two", 2), ("three", 0)):
        seats = room.seats(sent, group, round_)
        room.meeting.set(seats[3].key(3), "here")
        room.learner.put(sent, "rollout")
        assert "broke" in missed(room.broadcast(seats, absent=(3,)))
    # A learner that has put another version since, or nothing.
    room.learner.put(snapshot(9), "rollout")
    assert "does not hold" in missed(room.broadcast(room.seats(sent, "four")))
    assert "does not hold" in missed(room.broadcast(room.seats(sent, "five")))
    # No place to meet.
    nowhere = room.seats(sent, "six", meeting="127.0.0.1:1")
    assert "cannot be reached" in missed(room.broadcast(nowhere))
    assert put_and_broadcast("seven", 0)[0] == ""


def test_what_is_broadcast_under_another_hash_or_turns_out_torn_is_taken_the_other_way() -> None:
    room, sent = Room(1), snapshot(1)
    room.learner.put(sent, "rollout")
    seats = room.seats(sent)
    loads = iter([TornSnapshotError("torn on the way")])

    def load(fetched: WeightSnapshot) -> float:
        for error in loads:
            raise error
        return fetched.lora_scale

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(room.learner.send, seats[0])
        scale, fetched = take(room.members[0], seats[1], load)
        assert sending.result(30) == ""
    assert scale == 99.0
    assert "torn" in fetched.detour


# Configuration


def run_config(**given: Any) -> RunConfig:
    return parse_config(RunConfig, {"rewards": [JpegConfig().model_dump()], **given}, "test")


def test_every_kind_of_store_can_be_made() -> None:
    union, *_ = get_args(WeightStoreConfig)
    given: dict[str, dict[str, Any]] = {"filesystem": {"path": "/shared/weights"}}
    for config in get_args(union):
        kind: str = config.model_fields["type"].default
        if kind == "direct":
            continue  # its package is not installed everywhere
        assert make_weight_store(config(**given.get(kind, {})), no_detour).num_fetches >= 1
    assert run_config().weight_store.type == "object_store"
    assert "weight_store" in NEUTRAL


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_store": {"type": "filesystem"}}, r"weight_store.*path"),
        ({"weight_store": {"type": "filesystem", "path": "weights"}}, "must be absolute or a URL"),
        ({"weight_store": {"type": "filesystem", "path": "memory://weights"}}, "one process's own memory"),
        (
            {"weight_store": {"type": "filesystem", "path": "nowhere://weights"}},
            "cannot be reached: Protocol not known",
        ),
        ({"weight_store": {"type": "filesystem", "path": "/w", "keep": 1}}, "keep"),
        ({"placement": "in_process", "weight_store": {"type": "collective"}}, "has nothing to send"),
        ({"placement": "in_process", "weight_store": {"type": "filesystem", "path": "/w"}}, "has nothing to send"),
        (
            {"placement": "colocated", "rollout": {"num_actors": 1}, "weight_store": {"type": "collective"}},
            "a colocated worker is both",
        ),
        ({"max_staleness": 2, "weight_store": {"type": "collective"}}, "some are still drawing"),
        ({"weight_store": {"type": "collective", "timeout_s": 30}}, "at most a third of rollout.hung_after_s 60"),
        ({"weight_store": {"type": "collective", "backend": "nccl"}}, "needs a whole GPU for each member"),
        ({"weight_store": {"type": "carrier_pigeon"}}, "weight_store"),
    ],
)
def test_a_store_that_the_run_cannot_use_is_refused_when_the_configuration_is_read(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(**given)


def test_broadcasts_go_over_nccl_where_every_member_has_a_gpu() -> None:
    auto = CollectiveStoreConfig()
    assert broadcast_backend(auto, 1, 1) == "nccl"
    assert broadcast_backend(auto, 0.5, 1) == broadcast_backend(auto, 1, 0) == "gloo"
    assert broadcast_backend(CollectiveStoreConfig(backend="gloo"), 1, 1) == "gloo"
    assert timedelta(seconds=auto.timeout_s) < timedelta(seconds=60) / 3


def test_arrays_come_in_memory_that_is_nobody_elses(tmp_path: Path) -> None:
    store = FilesystemStore(str(tmp_path))
    ticket = store.put(snapshot(), "rollout")
    fetched = store.fetch(ticket).snapshot
    for path in files(tmp_path).values():
        path.write_bytes(b"")
    assert same(fetched, snapshot())
    assert all(array.base is not None and not isinstance(array.base, np.memmap) for array in fetched.arrays.values())
