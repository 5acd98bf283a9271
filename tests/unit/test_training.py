"""A run whose learner is lost, without a cluster: it goes back, trains the same again, and tells of it; or ends."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from learner.parallel import RankGroup
from raylign.errors import ClusterError, NumericsError
from services.assembly import build_learner
from services.config import RunConfig, load_run_config
from services.console import RunConsole
from services.in_process import LocalLearner
from services.recovery import causes
from services.run_dir import RunDir
from services.run_inputs import read_inputs
from services.topology import Topology, build
from services.training import Training, train
from tests.service import command_line as cli

NUM_STEPS = 5
Calls = Mapping[str, Sequence[int]]
"""By method: which of the run's calls of it, counting from 1."""


class Mortal:
    """A learner whose process is gone at given calls: by method, and by how often that was called in the whole run."""

    def __init__(self, config: RunConfig, deaths: Calls, fails: Calls, calls: dict[str, int]) -> None:
        """`fails` are calls that raise an error of the work itself; the learner lives on."""
        self._learner = LocalLearner(build_learner(config, RankGroup.single()))
        self._deaths, self._fails = deaths, fails
        self._calls = calls
        self.is_dead = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._learner, name)

        async def call(*args: Any) -> Any:
            self._calls[name] = self._calls.get(name, 0) + 1
            self.is_dead = self.is_dead or self._calls[name] in self._deaths.get(name, ())
            if self.is_dead:
                raise RuntimeError("connection closed by peer")
            if self._calls[name] in self._fails.get(name, ()):
                raise NumericsError("a loss that is not finite")
            return await method(*args)

        return call


class OnePlace:
    """A Topology in this process, with a learner that may die and is made anew."""

    def __init__(self, config: RunConfig, inner: Topology, deaths: Calls, fails: Calls) -> None:
        calls: dict[str, int] = {}
        self._make = lambda: Mortal(config, deaths, fails, calls)
        self.fleet, self.scorer, self.pool = inner.fleet, inner.scorer, None
        self.learner = self._make()
        self.num_renewed = 0

    async def num_lost_ranks(self) -> int:
        return int(self.learner.is_dead)

    async def renew_learner(self, phase: Any) -> None:
        self.num_renewed += 1
        self.learner = self._make()

    async def peak_memory_bytes(self) -> dict[str, int]:
        return {}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = cli.write_config(tmp_path_factory.mktemp("config"), NUM_STEPS)
    return load_run_config(str(path), {"placement": "in_process", "max_learner_restarts": "2"})


Go = Callable[..., tuple[OnePlace, Path]]


@pytest.fixture(scope="module")
def go(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Trains with given deaths; returns the topology and the directory of the run."""
    inner = asyncio.run(build(config, RunConsole(Console(file=io.StringIO())).phase))

    def run(deaths: Calls | None = None, fails: Calls | None = None) -> tuple[OnePlace, Path]:
        path = tmp_path_factory.mktemp("run") / "run"
        topology = OnePlace(config, inner, deaths or {}, fails or {})
        console = RunConsole(Console(file=(path.parent / "screen").open("w"), width=200))
        with RunDir.create(path, "x") as folder, console:
            work = Training(config, folder, console, read_inputs(config), None, time.monotonic())
            try:
                asyncio.run(train(work, topology))  # type: ignore[arg-type]
            finally:
                console.console.file.close()
        return topology, path

    return run


@pytest.fixture(scope="module")
def reference(go: Go) -> Path:
    return go()[1]


def told(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]
    return timeless, json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize(
    ("deaths", "went"),
    [
        ({"forward_backward": [1]}, [(0, 0)]),  # before there was a checkpoint: from the beginning
        ({"end_step": [3]}, [(2, 2)]),  # the weights had moved, the step was not done
        ({"load": [1], "begin_step": [4]}, [(3, 2)]),  # again, while it is made anew
        ({"save": [2]}, [(4, 2)]),
        ({"weights_sha256": [1]}, []),  # all was done
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_run_that_loses_its_learner_ends_as_if_it_had_not(
    deaths: Calls, went: list[tuple[int, int]], go: Go, reference: Path
) -> None:
    topology, run_dir = go(deaths)
    (rows, summary), (expected_rows, expected) = told(run_dir), told(reference)
    assert topology.num_renewed == sum(len(calls) for calls in deaths.values())
    assert rows == expected_rows
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert (summary["status"], summary["eval_final"]) == ("finished", expected["eval_final"])
    assert [(one["step"], one["back_to"]) for one in summary.get("recoveries", [])] == went
    timed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timed if "time/recovery_s" in row] == [back_to + 1 for _, back_to in went]
    since = [row["time/since_start_s"] for row in timed]
    assert since == sorted(since), "the time that was lost counts"
    assert "the learner died in step" in (run_dir.parent / "screen").read_text()


def test_a_learner_that_dies_again_and_again_ends_the_run_with_its_checkpoints(go: Go) -> None:
    with pytest.raises(ClusterError, match="died 3 times and step 4 was never done"):
        go({"optimise": [4, 6, 8]})


def test_an_error_of_the_work_itself_ends_the_run(go: Go) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        go(fails={"optimise": [4]})
    assert isinstance(causes(raised.value)[0], NumericsError)
