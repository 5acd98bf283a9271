"""Published weights on a real cluster: the whole for a newcomer, what changed for whoever holds the version before."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

from raylign.errors import WeightError
from raylign.weight_delta import apply_delta, worthwhile_delta
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot
from services.process import local_cluster
from services.publication import Publication
from services.ray_learner import RayLearner
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


LOW = ["--algorithm.type", "nft", "--sampler.type", "euler_ode", "--rollout.precision", "nvfp4"]


@pytest.mark.parametrize(("publish", "options"), [("delta", ["--learner.lr", "1e-6"]), ("packed", LOW)])
def test_a_run_ends_with_the_same_weights_however_they_travel(publish: str, options: list[str], tmp_path: Path) -> None:
    hashes: list[str] = []
    for how, placement in (("whole", "in_process"), (publish, "separate")):
        folder = tmp_path / how
        folder.mkdir()
        config = cli.write_config(folder, 2)
        arguments = ["--learner.publish", how, "--placement", placement, *options]
        code, output = cli.run(["train", str(config), "--run-dir", str(folder / "run"), *arguments], folder)
        assert code == 0, output
        hashes.append(cli.summary(folder / "run")["weights_sha256"])
    assert hashes[0] == hashes[1]
