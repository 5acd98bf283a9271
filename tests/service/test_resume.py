"""Runs that are killed, damaged, starved of disk, changed and forked, and that go on exactly.

Everything but a fork onto a cluster runs in one process per command, without Ray. The processes come from a fork server
that has loaded the libraries, so that a command costs what it does and not what it imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from learner.checkpoint import TENSORS, latest_checkpoint, list_checkpoints, load_checkpoint
from services.cli import main
from tests.service import command_line as cli

NUM_STEPS = 6
KINDS: Mapping[str, Sequence[str]] = {
    "flow_grpo": (),
    # Every policy that a learner may keep: old, sampling, reference, and the running mean.
    "crd": ("--algorithm.type", "crd", "--algorithm.num_train_times", "2", "--learner.ema_decay", "0.9"),
    "text": (),
}
_SECONDS = "_s"
"""How names of metrics end that are measurements of the machine, `throughput/samples_per_s` among them."""

_LIBRARIES = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_sd3",
    "tensorboard.summary.writer.record_writer",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
"""What the small models of these runs load."""
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["services.fork", "services.report", *_LIBRARIES])


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    config: Path
    options: Sequence[str]
    run_dir: Path

    @property
    def step_s(self) -> float:
        """How long a step takes."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return statistics.median(json.loads(line)["time/step_s"] for line in lines[1:])


def raylign(arguments: Sequence[str], folder: Path) -> Any:
    """A started process of the command, output in `folder/output.txt`."""
    process = _SERVER.Process(target=_command, args=(list(arguments), str(folder)))
    process.start()
    return process


def finish(process: Any, folder: Path, timeout_s: float = 90) -> tuple[int, str]:
    """Exit code and all output so far."""
    process.join(timeout_s)
    process.kill()
    process.join()
    return int(process.exitcode), (folder / "output.txt").read_text()


def run(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    return finish(raylign(arguments, folder), folder)


def _command(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["raylign", *arguments]
    main()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.endswith(_SECONDS)} for line in lines]


def assert_same_end(run_dir: Path, reference: Reference) -> None:
    summary, expected = cli.summary(run_dir), cli.summary(reference.run_dir)
    assert rows(run_dir) == rows(reference.run_dir)
    assert summary["status"] == "finished"
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert (summary["eval_initial"], summary["eval_final"]) == (expected["eval_initial"], expected["eval_final"])
    last = [load_checkpoint(folder / "checkpoints" / f"step_{NUM_STEPS}") for folder in (run_dir, reference.run_dir)]
    assert last[0].manifest.files == last[1].manifest.files, "weights, optimiser and every policy that is kept"
    assert last[0].manifest.values == last[1].manifest.values


def truncate(run_dir: Path, step: int) -> None:
    with (run_dir / "checkpoints" / f"step_{step}" / TENSORS).open("r+b") as file:
        file.truncate(100)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Uninterrupted runs by kind, each made when it is first asked for."""
    made: dict[str, Reference] = {}

    def reference(kind: str) -> Reference:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            write = cli.write_text_config if kind == "text" else cli.write_config
            config, options = write(folder, NUM_STEPS), ("--placement", "in_process", *KINDS[kind])
            code, output = run(["train", str(config), "--run-dir", "run", *options], folder)
            assert code == 0, output
            made[kind] = Reference(config, options, folder / "run")
        return made[kind]

    return reference


@pytest.fixture
def stopped(references: Callable[[str], Reference], tmp_path: Path) -> Path:
    """A Flow-GRPO run that was killed once it had checkpoints of steps 2 and 4."""
    reference = references("flow_grpo")
    process = raylign(["train", str(reference.config), "--run-dir", "run", *reference.options], tmp_path)
    killed(process, (tmp_path / "run" / "checkpoints" / "step_4" / "manifest.json").exists)
    return tmp_path / "run"


def killed(process: Any, condition: Callable[[], bool], then_s: float = 0.0) -> bool:
    """SIGKILL a process a while after a condition came true; whether it was still there."""
    deadline = time.monotonic() + 90
    while not condition() and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(then_s)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
@given(
    every=st.integers(1, 3),
    kills=st.lists(st.integers(1, NUM_STEPS - 1), min_size=1, max_size=2, unique=True),
    moment=st.floats(0, 1),
)
def test_a_run_that_is_killed_anywhere_ends_as_the_uninterrupted_one(
    references: Callable[[str], Reference],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    every: int,
    kills: list[int],
    moment: float,
) -> None:
    """Once or twice, at any moment after the first checkpoint; `moment` is the part of a step that was done then."""
    reference, folder = references(kind), tmp_path_factory.mktemp("killed")
    run_dir = folder / "run"
    train = ["train", str(reference.config), "--run-dir", "run", *reference.options]
    process = raylign([*train, "--checkpoint.every_steps", str(every)], folder)
    num_killed = 0
    for step in sorted(kills):

        def reached(step: int = step) -> bool:
            return bool(list_checkpoints(run_dir / "checkpoints")) and cli.num_logged(run_dir) >= step

        num_killed += killed(process, reached, moment * reference.step_s)
        process = raylign(["resume", "run"], folder)
    code, output = finish(process, folder)
    assert code == 0, output
    assert num_killed > 0, "too late: the run was over"
    assert_same_end(run_dir, reference)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_older_one_gone_on_from(
    references: Callable[[str], Reference], stopped: Path
) -> None:
    truncate(stopped, 4)
    code, output = run(["resume", "run"], stopped.parent)
    assert code == 0, output
    words = " ".join(output.split())
    assert "step_4/learner.safetensors is damaged: its hash differs; set aside as step_4.damaged" in words
    assert_same_end(stopped, references("flow_grpo"))
    assert (stopped / "checkpoints" / "step_4.damaged").is_dir()


def test_an_older_checkpoint_can_be_gone_on_from_by_its_step(
    references: Callable[[str], Reference], stopped: Path
) -> None:
    code, output = run(["resume", "run", "--step", "2"], stopped.parent)
    assert code == 0, output
    assert "set aside as step_4.superseded" in " ".join(output.split())
    assert_same_end(stopped, references("flow_grpo"))


def test_keys_change_only_where_they_are_neutral_or_allowed_and_are_recorded(
    references: Callable[[str], Reference], stopped: Path
) -> None:
    code, output = run(["resume", "run", "--learner.lr", "0.001"], stopped.parent)
    assert code == 1
    assert "learner.lr: was 0.0003, is 0.001" in output
    assert "Traceback" not in output
    allowed = ["--learner.lr", "0.001", "--allow-config-change", "learner"]
    process = raylign(
        ["resume", "run", *allowed, "--num_steps", "8", "--checkpoint.every_steps", "100"], stopped.parent
    )
    assert killed(process, lambda: cli.num_logged(stopped) >= 5)
    assert latest_checkpoint(stopped / "checkpoints") == stopped / "checkpoints" / "step_4"
    code, output = run(["resume", "run"], stopped.parent)
    assert code == 0, "what was allowed needs no second word\n" + output
    summary = cli.summary(stopped)
    assert summary["num_steps"] == 8
    changed = {"learner.lr": [0.0003, 0.001], "num_steps": [6, 8], "checkpoint.every_steps": [2, 100]}
    assert summary["config_changes"] == [{"step": 4, "changed": changed}]
    assert [row["learner/lr"] for row in rows(stopped)[1:]] == [0.0003] * 4 + [0.001] * 4
    assert rows(stopped)[:5] == rows(references("flow_grpo").run_dir)[:5]
    code, output = run(["resume", "run"], stopped.parent)
    assert code == 0
    assert "is finished: step 8 of 8" in " ".join(output.split())


def test_a_fork_that_changes_nothing_ends_as_its_parent(references: Callable[[str], Reference], stopped: Path) -> None:
    code, output = run(["fork", "run", "--step", "2", "--run-dir", "new"], stopped.parent)
    assert code == 0, output
    new, reference = stopped.with_name("new"), references("flow_grpo")
    summary, expected = cli.summary(new), cli.summary(reference.run_dir)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    own = rows(new)
    assert [row["step"] for row in own] == [2, 3, 4, 5, 6]
    assert own[1:] == rows(reference.run_dir)[3:]
    assert set(own[0]) - {"step"} == {name for name in rows(reference.run_dir)[0] if name != "step"}
    assert summary["eval_final"] == expected["eval_final"]
    assert summary["origin"]["run"] == str(stopped.resolve())
    assert (summary["origin"]["step"], summary["origin"]["changed"]) == (2, {})
    parent = load_checkpoint(stopped / "checkpoints" / "step_2").manifest
    assert summary["origin"]["checkpoint_sha256"] == parent.sha256
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_a_fork_on_a_cluster_of_a_run_without_one_ends_with_its_weights(
    references: Callable[[str], Reference], stopped: Path
) -> None:
    options = ["--placement", "separate", "--rollout.num_actors", "1"]
    code, output = cli.run(["fork", "run", "--step", "2", "--run-dir", "new", *options], stopped.parent)
    assert code == 0, output
    summary, expected = cli.summary(stopped.with_name("new")), cli.summary(references("flow_grpo").run_dir)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["eval_final"] == expected["eval_final"]
    assert set(summary["origin"]["changed"]) == {"placement", "rollout.num_actors"}


def test_a_fork_of_a_living_run_changes_its_algorithm_and_is_itself_resumed(
    references: Callable[[str], Reference], tmp_path: Path
) -> None:
    reference = references("flow_grpo")
    run_dir, new = tmp_path / "run", tmp_path / "new"
    parent = raylign(
        ["train", str(reference.config), "--run-dir", "run", *reference.options, "--num_steps", "400"], tmp_path
    )
    try:
        while not (run_dir / "checkpoints" / "step_2").exists() and parent.exitcode is None:
            time.sleep(0.01)
        assert run(["resume", "run"], tmp_path)[0] == 1
        assert f"in use by process {parent.pid}" in (tmp_path / "output.txt").read_text()
        changed = [*KINDS["crd"], "--learner.lr", "0.001", "--checkpoint.every_steps", "1"]
        fork = raylign(["fork", "run", "--run-dir", "new", *changed], tmp_path)
        assert killed(fork, lambda: cli.num_logged(new) >= 2)
        assert parent.exitcode is None, "the parent goes on"
    finally:
        parent.kill()
        parent.join()
    record: Any = load_checkpoint(latest_checkpoint(new / "checkpoints") or new).manifest.record
    origin = record["origin"]
    last = origin["step"] + 4
    code, output = run(["resume", "new", "--num_steps", str(last)], tmp_path)
    assert code == 0, output
    summary = cli.summary(new)
    assert summary["origin"] == origin
    assert origin["changed"]["algorithm.type"] == ["flow_grpo", "crd"]
    assert [row["step"] for row in rows(new)] == list(range(origin["step"], last + 1))
    assert {"learner/old_decay", "learner/sampling_decay"} <= set(rows(new)[-1])


def test_a_fork_whose_weights_do_not_load_leaves_no_run(stopped: Path) -> None:
    code, output = run(["fork", "run", "--run-dir", "new", "--model.path", "asset:glyphs"], stopped.parent)
    assert code == 1, output
    new = stopped.with_name("new")
    assert not (new / "config.toml").exists()
    assert latest_checkpoint(new / "checkpoints") is None


@pytest.mark.parametrize(
    ("limited", "told"),
    [
        # Half of a checkpoint, and a little more than the metrics so far.
        (f"checkpoints/step_2/{TENSORS}", r"CheckpointError: cannot write checkpoint .*; it takes [\d,]+ bytes and "),
        ("metrics.jsonl", "RunDirError: cannot write a file of the run: File too large; and "),
    ],
    ids=["checkpoint", "metrics"],
)
def test_a_full_disk_stops_the_run_and_loses_nothing(
    references: Callable[[str], Reference], tmp_path: Path, limited: str, told: str
) -> None:
    reference = references("flow_grpo")
    run_dir = tmp_path / "run"
    process = raylign(["train", str(reference.config), "--run-dir", "run", *reference.options], tmp_path)
    while not (run_dir / "checkpoints" / "step_2").exists() and process.exitcode is None:
        time.sleep(0.002)
    # No file of the process can grow beyond it: what a quota does.
    size = (run_dir / limited).stat().st_size
    limit = size // 2 if limited.startswith("checkpoints") else size + 1000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    code, output = finish(process, tmp_path)
    words = " ".join(output.split())
    assert code == 1, output
    assert re.search(told + r"[\d,]+ (bytes )?are free", words), output
    assert "arlier checkpoints are intact" in words
    assert "Traceback" not in output
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_2"]
    code, output = run(["resume", "run"], tmp_path)
    assert code == 0, output
    assert_same_end(run_dir, reference)


_ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size={small} tmpfs disk
set +e
{raylign} train {config} --run-dir disk/run {options}; echo "train ended with $?"
echo "left: $(ls disk/run/checkpoints | tr '\\n' ' ')"
mount -o remount,size=256m disk
{raylign} resume disk/run; echo "resume ended with $?"
cp -r disk/run run
"""


def test_a_disk_that_is_really_full_stops_the_run_and_loses_nothing(
    references: Callable[[str], Reference], tmp_path: Path
) -> None:
    reference = references("flow_grpo")
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = [*alone, "mount", "-t", "tmpfs", "tmpfs", "disk"]
    if subprocess.run(mount, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of its own")
    # Room for all that the run writes, and for one and a half checkpoints.
    parts = reference.run_dir / "checkpoints" / f"step_{NUM_STEPS}" / TENSORS
    whole = sum(path.stat().st_size for path in reference.run_dir.rglob("*") if path.is_file())
    kept = len(list_checkpoints(reference.run_dir / "checkpoints"))
    small = whole - kept * parts.stat().st_size + parts.stat().st_size * 3 // 2
    script = _ON_A_SMALL_DISK.format(
        small=small,
        raylign=f"{sys.executable} -m services.cli",
        config=reference.config,
        options=" ".join(reference.options),
    )
    done = subprocess.run(
        [*alone, "sh", "-c", script],
        cwd=tmp_path,
        env=cli.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    words = " ".join((done.stdout + done.stderr).split())
    assert "train ended with 1" in words, words
    assert "No space left on device" in words
    assert "bytes and" in words
    assert "left: step_2 " in words
    assert "Traceback" not in words
    assert "resume ended with 0" in words, words
    assert_same_end(tmp_path / "run", reference)
