"""Published weights on a real cluster: the whole for a newcomer, what changed for whoever holds the version before."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from torch.distributed import TCPStore

from raylign.errors import WeightError
from raylign.weight_delta import apply_delta, worthwhile_delta
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot
from rollout.drawn import Pulled
from services.fleet import RayFleet
from services.process import local_cluster
from services.publication import Broadcasts, Publication
from services.ray_learner import RayLearner
from services.weight_stores import (
    CollectiveStore,
    CollectiveStoreConfig,
    DirectStore,
    DirectStoreConfig,
    DirectTicket,
    FilesystemStoreConfig,
    FileTicket,
    ObjectStoreConfig,
    Seat,
    WeightStore,
    WeightStoreConfig,
    make_weight_store,
    take,
)
from tests.service import command_line as cli

SIZE = 100_000


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with local_cluster(2, tmp_path_factory.mktemp("publication")):
        yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def weights(version: int) -> torch.Tensor:
    """Few numbers change from one version to the next, all of them at version 3."""
    generator = torch.Generator().manual_seed(int(version == 3))
    values = torch.randn(SIZE, generator=generator)
    values[:version] += 1
    return values


class Rank:
    """A learner rank that publishes versions of one tensor."""

    def __init__(self) -> None:
        self.published: WeightSnapshot | None = None

    def publish_changes(self, version: int, which: str) -> tuple[Any, WeightSnapshot, tuple[str, str]]:
        if which != "rollout":
            raise WeightError(f"changes of {which}")
        whole, base = make_snapshot({"w": weights(version)}, version, "full"), self.published
        self.published = whole
        delta = None if base is None else worthwhile_delta(base, whole)
        return delta, whole, ((delta or whole).kind, whole.sha256)


class Holder:
    """An actor that holds what it pulled, from where the object store maps it."""

    def __init__(self) -> None:
        self.held: WeightSnapshot | None = None

    def pull(self, snapshot: WeightSnapshot) -> tuple[str, int, bool, np.ndarray]:
        """(kind, bytes that came, whether they are read-only, the weights that came out)."""
        whole = apply_delta(self.held, snapshot) if snapshot.kind == "delta" else snapshot
        tensor = view_snapshot(whole, {"w": (SIZE,)})["w"].clone()
        self.held = whole
        read_only = not any(array.flags.writeable for array in snapshot.arrays.values())
        return snapshot.kind, snapshot.num_bytes, read_only, tensor.numpy()


def test_actors_follow_by_deltas_newcomers_by_the_whole_and_large_changes_travel_whole() -> None:
    remote: Any = ray.remote

    async def publish(learner: RayLearner, version: int) -> Publication:
        return await learner.publish(version, "rollout")

    async def work() -> None:
        learner = RayLearner([remote(Rank).options(num_cpus=0).remote()], deltas=True)
        early, late = (remote(Holder).options(num_cpus=0).remote() for _ in range(2))
        kinds: list[str] = []
        sizes: list[int] = []
        for version in range(4):
            published = await publish(learner, version)
            kind, size, read_only, tensor = await early.pull.remote(published.newest)
            assert read_only
            assert np.array_equal(tensor, weights(version).numpy())
            kinds.append(kind)
            sizes.append(size)
            if version == 1:
                with pytest.raises(WeightError, match=r"since 0 .*none is held; pull 1 whole"):
                    await late.pull.remote(published.newest)
                assert (await late.pull.remote(published.whole))[0] == "full"
            if version == 2:
                assert (await late.pull.remote(published.newest))[0] == "delta"
        assert kinds == ["full", "delta", "delta", "full"]
        assert sizes[0] == sizes[3] == SIZE * 4
        assert max(sizes[1:3]) < 1000

    asyncio.run(asyncio.wait_for(work(), 60))


class Publisher:
    """A learner rank that sends versions of one tensor the way it is told to, and may damage what it wrote."""

    def use(self, config: WeightStoreConfig) -> None:
        self.store: Any = make_weight_store(config, ray.get)
        self.damaging = 0

    def damage(self, times: int) -> None:
        self.damaging = times

    def publish(self, version: int, which: str) -> tuple[Any, tuple[str, str]]:
        snapshot = make_snapshot({"w": weights(version)}, version, "full")
        ticket = self.store.put(snapshot, which)
        if self.damaging:
            self.damaging -= 1
            with Path(ticket.folder, "weights.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        return ticket, (snapshot.kind, snapshot.sha256)

    def send(self, seat: Seat) -> str:
        return self.store.send(seat)


class Member:
    """A rollout actor that takes weights whichever way they come, and may die in the middle of a broadcast."""

    def __init__(self, config: WeightStoreConfig) -> None:
        files = make_weight_store(config, ray.get)
        self.others: dict[type, WeightStore] = {FileTicket: files, DirectTicket: DirectStore()}
        self.broadcasts = CollectiveStore(ray.get)
        self.dies = False
        self.held: torch.Tensor | None = None

    def ping(self) -> str:
        return "pong"

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def die_in_broadcast(self) -> None:
        self.dies = True

    def pull(self, snapshot: Any, slot: str) -> Pulled:
        if self.dies and isinstance(snapshot, Seat):
            host, _, port = snapshot.meeting.rpartition(":")
            meeting = TCPStore(host, int(port))
            meeting.set(snapshot.key(snapshot.rank), "here")
            meeting.wait([snapshot.key("verdict")])
            os.kill(os.getpid(), signal.SIGKILL)
        store = self.others.get(type(snapshot), self.broadcasts)
        self.held, fetched = take(store, snapshot, lambda got: view_snapshot(got, {"w": (SIZE,)})["w"].clone())
        return Pulled(fetched.snapshot.version, fetched.snapshot.num_bytes, 0.0, detour=fetched.detour)

    def probe(self, text: str, slot: str) -> np.ndarray:
        return self.held.numpy()  # type: ignore[union-attr]


def test_weights_arrive_whichever_way_they_go_and_whoever_comes_dies_or_gets_them_torn(tmp_path: Path) -> None:
    files = FilesystemStoreConfig(path=str(tmp_path), num_reads=2, first_wait_s=0.01)
    remote: Any = ray.remote
    with_nixl = find_spec("nixl") is not None
    options: dict[str, Any] = {"num_cpus": 0, "enable_tensor_transport": with_nixl}
    publisher = remote(Publisher).options(**options).remote()

    def member() -> Any:
        return remote(Member).options(**options, max_restarts=-1).remote(files)

    async def work() -> None:
        fleet = RayFleet([member(), member()], member)
        versions = itertools.count()

        async def learner(config: WeightStoreConfig) -> RayLearner:
            await publisher.use.remote(config)
            host = ray.util.get_node_ip_address()
            seated = isinstance(config, CollectiveStoreConfig)
            return RayLearner([publisher], broadcasts=Broadcasts(publisher, "gloo", 2.0, host) if seated else None)

        async def all_hold(version: int, count: int) -> None:
            while fleet.status().in_service < count:  # noqa: ASYNC110 - the fleet has no event for it
                await asyncio.sleep(0.05)
            held: list[Any] = await fleet.probe_all("", "rollout")
            assert len(held) == count
            assert all(np.array_equal(one, weights(version).numpy()) for one in held)

        async def arrive(learner: RayLearner, count: int) -> list[Pulled]:
            """The next version, pulled by all; each must hold it."""
            version = next(versions)
            pulled = await fleet.pull(await learner.publish(version, "rollout"), "rollout")
            assert {one.version for one in pulled} <= {version}
            await all_hold(version, count)
            return pulled

        direct = [DirectStoreConfig()] if with_nixl else []
        for config in (*direct, ObjectStoreConfig(), files):
            way = await learner(config)
            assert [one.detour for one in await arrive(way, 2)] == ["", ""]
            assert [one.detour for one in await arrive(way, 2)] == ["", ""]
        way = await learner(CollectiveStoreConfig())
        for _ in range(2):
            assert [one.detour for one in await arrive(way, 2)] == ["", ""]

        fleet.resize(3)
        await all_hold(5 + 2 * with_nixl, 3)  # the newcomer too, of a version that was broadcast before it came
        # It dies while the new group forms, which nobody else can finish.
        doomed: Any = fleet.handles()[0]
        await doomed.die_in_broadcast.remote()
        pulled = await arrive(way, 3)
        assert len(pulled) == 2
        assert all("broke" in one.detour for one in pulled)
        assert [one.detour for one in await arrive(way, 3)] == ["", "", ""]

        way = await learner(files)
        await publisher.damage.remote(2)
        assert await arrive(way, 3) == []  # torn for all, torn once more, and then published whole
        assert "w is torn" in fleet.status().problem
        assert fleet.status().in_service == 3
        await publisher.damage.remote(9)
        await fleet.pull(await way.publish(next(versions), "rollout"), "rollout")
        with pytest.raises(WeightError, match="w is torn"):
            await fleet.probe_all("", "rollout")
        await fleet.close()

    asyncio.run(asyncio.wait_for(work(), 120))


LOW = ["--algorithm.type", "nft", "--sampler.type", "euler_ode", "--rollout.precision", "nvfp4"]


@pytest.mark.parametrize(
    ("publish", "store", "options"),
    [("delta", "filesystem", ["--learner.lr", "1e-6"]), ("packed", "collective", LOW)],
)
def test_a_run_ends_with_the_same_weights_however_they_travel(
    publish: str, store: str, options: list[str], tmp_path: Path
) -> None:
    ways = {"filesystem": ["--weight_store.path", str(tmp_path / "weights")]}
    hashes: list[str] = []
    for how, placement in (("whole", "in_process"), (publish, "separate")):
        folder = tmp_path / how
        folder.mkdir()
        config = cli.write_config(folder, 2)
        arguments = ["--learner.publish", how, "--placement", placement, *options]
        if placement == "separate":
            arguments += ["--weight_store.type", store, *ways.get(store, [])]
        code, output = cli.run(["train", str(config), "--run-dir", str(folder / "run"), *arguments], folder)
        assert code == 0, output
        hashes.append(cli.summary(folder / "run")["weights_sha256"])
        assert "pull/detours" not in (folder / "run" / "metrics.jsonl").read_text()
    assert hashes[0] == hashes[1]
