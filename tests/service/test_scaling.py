"""Pools that change under a live run, and what runs leave on a cluster that they share."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from raylign.errors import ClusterError, ConfigError, RunDirError
from rewards.jpeg import JpegConfig
from rollout.prompts import PromptStream
from services.config import RunConfig, load_run_config
from services.controller import Controller
from services.live import answering, scaling
from services.process import StartedCluster, local_cluster
from services.reward_app import RewardService
from services.reward_config import ServiceConfig
from services.reward_deploy import reap
from services.run_control import CONTROL_FILE, GoOnAsk, PauseAsk, RunState, ScaleAsk, StatusAsk, ask
from services.run_inputs import read_inputs
from services.run_name import new_run_name
from services.topology import _living, build, check_cluster
from tests.service import command_line as cli

NUM_STEPS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedCluster]:
    with local_cluster(6, tmp_path_factory.mktemp("scaling")) as started:
        yield started
        serve.shutdown()


class Steps:
    """An observer that keeps what was logged, and may do something after a step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, step: int, metrics: Mapping[str, float], groups: Sequence[Any]) -> None:
        self.losses.append(metrics["loss"])

    def evaluated(self, step: int, groups: Sequence[Any]) -> None: ...

    def swept(self, step: int, sweeps: Mapping[Any, Sequence[Any]]) -> None: ...


async def _train(config: RunConfig, run_dir: Path, meanwhile: Callable[[Steps], Any] | None = None) -> tuple[str, Any]:
    """A run without its files: weights and losses at the end. `meanwhile` runs in a thread beside it."""
    inputs = read_inputs(config)
    topology = await build(config, lambda text: nullcontext(), own_cluster=False)
    steps = Steps()
    try:

        async def save(step: int) -> None: ...

        prompts = PromptStream(inputs.prompts, config.seed, config.groups_per_step)
        observer = scaling(config, topology, steps, lambda text: None)
        controller = Controller(
            config, prompts, inputs.heldout, topology.fleet, topology.scorer, topology.learner, observer, save
        )
        async with answering(config, topology, run_dir, lambda: controller.step):
            beside = asyncio.create_task(asyncio.to_thread(meanwhile, steps)) if meanwhile is not None else None
            await controller.run(0)
            if beside is not None:
                await beside
        return await topology.learner.weights_sha256(), steps.losses
    finally:
        await topology.close()


def _until(run_dir: Path, condition: Callable[[RunState], bool], timeout_s: float = 60) -> RunState:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = ask(run_dir, StatusAsk())
        if condition(state):
            return state
        time.sleep(0.05)
    raise AssertionError(f"did not happen within {timeout_s} s: {ask(run_dir, StatusAsk())}")


def test_a_run_that_is_scaled_up_and_down_ends_with_the_weights_of_a_fixed_pool(
    cluster: StartedCluster, tmp_path: Path
) -> None:
    path = cli.write_config(tmp_path, NUM_STEPS)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("seed = 0\n")
    seen: list[int] = []

    def raylign(*arguments: str) -> tuple[int, str]:
        (tmp_path / "output.txt").unlink(missing_ok=True)
        return cli.run(arguments, tmp_path)

    def change(steps: Steps) -> None:
        _until(run_dir, lambda state: state.step >= 1)
        # A step of this run takes less time than a command or an actor takes to start.
        ask(run_dir, PauseAsk())
        for number, message in (("0", "at least 1 rollout actor, got 0"), ("99", "the cluster can hold 4 beside")):
            code, output = raylign("scale", str(run_dir), "--rollout", number)
            assert (code, message in output, "Traceback" in output) == (1, True, False), output
        code, output = raylign("scale", str(run_dir), "--rollout", "3", "--wait")
        assert (code, "3 of 3 rollout actors at work, paused" in output) == (0, True), output
        before = ask(run_dir, GoOnAsk()).step
        _until(run_dir, lambda state: state.step >= before + 2)
        after = ask(run_dir, PauseAsk()).step
        code, output = raylign("scale", str(run_dir), "--rollout", "1", "--wait")
        assert (code, "1 of 1 rollout actors at work" in output) == (0, True), output
        ask(run_dir, GoOnAsk())
        seen.extend((before, after))

    def config(**changes: str) -> RunConfig:
        return load_run_config(str(path), changes)

    fixed, losses = asyncio.run(_train(config(placement="in_process"), run_dir))
    weights, scaled = asyncio.run(_train(config(**{"rollout.num_actors": "1"}), run_dir, change))
    assert 1 <= seen[0] < seen[1] < NUM_STEPS
    assert scaled == losses
    assert weights == fixed
    assert serve.status().applications == {}, "a run leaves nothing on a cluster that it shares"


def test_a_run_waits_for_the_node_that_it_lacks_and_works_on_both(cluster: StartedCluster, tmp_path: Path) -> None:
    """A second node, started by hand, has the label and the resource that rollout actors ask for."""
    path = cli.write_config(tmp_path, 2)
    asked = {
        "learner.num_ranks": "2",  # they get their places together
        "rollout.num_actors": "1",
        "nodes.rollout.num_cpus": "0.5",
        "nodes.rollout.resources": "{spot = 1}",
        "nodes.rollout.labels": '{"zone" = "!in(a, b)"}',
    }
    config = load_run_config(str(path), asked)
    with pytest.raises(ClusterError, match=r"reserves 1 spots and the Ray cluster has 0: 1 missing"):
        check_cluster(config)
    with pytest.raises(ClusterError, match=r"no node of the Ray cluster .* nodes.learner.labels .*\(zone = c\)"):
        check_cluster(load_run_config(str(path), {"nodes.learner.labels": '{"zone" = "c"}'}))
    config = config.model_copy(update={"wait_for_nodes": True})
    check_cluster(config)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.toml").write_text("seed = 0\n")
    command = [str(Path(sys.executable).with_name("ray")), "start", "--address", cluster.address, "--num-cpus", "1"]
    command += ["--resources", '{"spot": 1}', "--labels", "zone=c"]
    with (tmp_path / "node.txt").open("w") as output:
        node = subprocess.Popen([*command, "--block"], stdout=output, stderr=output, start_new_session=True, text=True)
    try:
        weights, _ = asyncio.run(_train(config, run_dir))
        alike = {"learner.num_ranks": "2", "rollout.num_actors": "2", "placement": "colocated"}
        assert weights == asyncio.run(_train(load_run_config(str(path), alike), run_dir))[0]
        assert len([one for one in ray.nodes() if one["Alive"]]) == 2
    finally:
        node.terminate()  # it takes its leave of the cluster, and its processes with it
        node.wait(60)


DRIVER = """
import sys, time
import ray
from rewards.jpeg import JpegConfig
from services.reward_app import RewardService
from services.reward_config import ServiceConfig
ray.init(address=sys.argv[1], log_to_driver=False)
class Rank:
    def ping(self): return 1
rank = ray.remote(Rank).options(name=sys.argv[2], num_cpus=0).remote()
RewardService.start((JpegConfig(),), ServiceConfig(num_cpus_per_replica=0.1), name=sys.argv[2])
print("up", flush=True)
time.sleep(600)
"""


def test_the_rewards_of_a_killed_driver_are_removed_by_the_next_run_and_nobody_elses(cluster: StartedCluster) -> None:
    killed, alive = new_run_name(), new_run_name()
    # The cluster's token is in the environment since it was started.
    environment = {**cli.ENVIRONMENT, **os.environ, "RAY_AUTH_MODE": "token"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster.address, killed],
        env=environment,
        cwd=cli.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    settings = ServiceConfig(num_cpus_per_replica=0.1)

    class Rank:
        def ping(self) -> int:
            return 1

    rank: Any = ray.remote(Rank).options(name=alive, num_cpus=0).remote()
    try:
        assert driver.stdout is not None
        # Ray may have told of other things before.
        assert "up\n" in iter(driver.stdout.readline, "")
        ours = RewardService.start((JpegConfig(),), settings, name=alive)
        others = RewardService.start((JpegConfig(),), settings, name="rewards")
        assert {killed, alive} <= _living()
        assert reap(_living()) == [], "its driver lives"
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(10)
        deadline = time.monotonic() + 30
        while killed in _living() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert f"{killed}-jpeg" in serve.status().applications, "Serve keeps it"
        assert reap(_living()) == [f"{killed}-jpeg"]
        while f"{killed}-jpeg" in serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.1)
        assert set(serve.status().applications) == {f"{alive}-jpeg", "rewards-jpeg"}
        others.shutdown()
        assert set(serve.status().applications) == {f"{alive}-jpeg"}
        # A run that ends leaves Serve to whoever is about to deploy on it.
        ours.shutdown()
        assert serve.status().applications == {}
        RewardService.start((JpegConfig(),), settings, name="rewards").shutdown()
    finally:
        cli.end(driver)
        if driver.stdout is not None:
            driver.stdout.close()
        ray.kill(rank)


def test_a_run_of_the_command_line_is_scaled_and_ends_with_the_weights_of_a_fixed_pool(tmp_path: Path) -> None:
    path = cli.write_config(tmp_path, 30)
    run_dir = tmp_path / "run"
    code, output = cli.run(["train", str(path), "--run-dir", "fixed", "--placement", "in_process"], tmp_path)
    assert code == 0, output
    bounds = ["--rollout.num_actors", "1", "--rollout.max_actors", "3"]
    process = cli.start(["train", str(path), "--run-dir", "run", *bounds], tmp_path)
    try:
        cli.wait_for(lambda: cli.num_logged(run_dir) >= 1, process)
        ask(run_dir, PauseAsk())
        assert stat.S_IMODE((run_dir / CONTROL_FILE).stat().st_mode) == 0o600
        with pytest.raises(ConfigError, match=r"outside rollout.min_actors 1 to max_actors 3"):
            ask(run_dir, ScaleAsk(rollout=4))
        ask(run_dir, ScaleAsk(rollout=3))
        _until(run_dir, lambda state: state.pool is not None and state.pool.in_service == 3)
        assert len(cli.workers(process, "RolloutWorker")) == 3
        ask(run_dir, GoOnAsk())
        assert process.wait(120) == 0, (tmp_path / "output.txt").read_text()
    finally:
        cli.end(process)
    assert not (run_dir / CONTROL_FILE).exists()
    assert cli.summary(run_dir)["weights_sha256"] == cli.summary(tmp_path / "fixed")["weights_sha256"]
    with pytest.raises(RunDirError, match="not live"):
        ask(run_dir, ScaleAsk(rollout=2))
