"""Runs as jobs: what is checked, packed and sent, and what a reader is told; the cluster is a fake at its seam."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import ray
import typer
from rich.console import Console

from raylign.config import load_config
from raylign.errors import ClusterError, ConfigError, PromptError
from services.config import RunConfig, load_run_config
from services.console import RunConsole
from services.job_checks import check_resources, check_versions
from services.job_commands import _follow, table
from services.job_package import PACKAGES, pack, shell_path
from services.job_server import RayJobServer, find_address, read_token
from services.jobs import ClusterFacts, Job, JobClient, Submission, last_step, slugify
from services.topology import most_actors

PYTHON = ".".join(str(part) for part in sys.version_info[:3])
OURS = {"raylign_config": "tiny", "raylign_num_steps": "30", "raylign_run_dir": "/runs/a"}


@dataclass
class FakeCluster:
    """A `JobServer` that keeps what it is sent and never runs it."""

    address: str = "http://head:8265"
    cluster: ClusterFacts = field(default_factory=lambda: ClusterFacts(ray.__version__, PYTHON, {"CPU": 8.0}))
    sent: list[tuple[Submission, list[str]]] = field(default_factory=list)
    known: dict[str, tuple[Job, dict[str, str]]] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    asked_to_stop: list[str] = field(default_factory=list)
    interrupted: bool = False

    def facts(self) -> ClusterFacts:
        return self.cluster

    def submit(self, submission: Submission) -> None:
        with zipfile.ZipFile(submission.package) as archive:
            self.sent.append((submission, archive.namelist()))

    def job(self, job_id: str) -> tuple[Job, Mapping[str, str]]:
        return self.known[job_id]

    def jobs(self) -> list[tuple[Job, Mapping[str, str]]]:
        return list(self.known.values())

    def logs(self, job_id: str) -> str:
        return "".join(self.log)

    def follow(self, job_id: str) -> Iterator[str]:
        yield from self.log
        if self.interrupted:
            raise KeyboardInterrupt

    def stop(self, job_id: str) -> bool:
        self.asked_to_stop.append(job_id)
        return True


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "my signs.txt"
    path.write_text('a sign that says "ONE"\na sign that says "TWO"\n')
    return path


def tiny(prompts: Path, **keys: str) -> RunConfig:
    return load_run_config("quickstart_image", {"prompts.train": str(prompts), "num_steps": "3", **keys})


# Addresses and tokens.


@pytest.mark.parametrize(
    ("given", "environ", "found"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("https://head/", {"RAYLIGN_ADDRESS": "http://other:1"}, "https://head"),
        (None, {"RAY_ADDRESS": "http://b:1", "RAYLIGN_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://b:1"}, "http://b:1"),
    ],
)
def test_an_address_is_found(given: str | None, environ: dict[str, str], found: str) -> None:
    assert find_address(given, environ) == found


@pytest.mark.parametrize(("given", "environ"), [("auto", {}), ("head:8265", {}), (None, {"RAYLIGN_ADDRESS": "head"})])
def test_an_address_that_is_no_url_is_refused(given: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(ClusterError, match=r"URL of the cluster's dashboard.*--address"):
        find_address(given, environ)


def test_a_token_comes_from_the_user_and_not_from_a_home_that_may_be_of_another_cluster(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    (tmp_path / "file").write_text("file\n")
    home = {"HOME": str(tmp_path)}
    assert read_token(home) is None
    assert read_token({**home, "RAY_AUTH_MODE": "token"}) == "home"
    assert read_token({**home, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}) == "file"
    assert read_token({"RAY_AUTH_TOKEN": "own", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}) == "own"
    with pytest.raises(ClusterError, match=r"RAY_AUTH_TOKEN_PATH names .*gone"):
        read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")})


class _Dashboard(BaseHTTPRequestHandler):
    """What a Ray dashboard with the token "right" answers to the questions that come first."""

    answers: Mapping[str, object] = {
        "/api/version": {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""},
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": "3.11.7"}},
        "/api/authentication_mode": {"authentication_mode": "token"},
        "/api/v0/nodes?detail=1": {
            "data": {
                "result": {
                    "result": [
                        {"state": "ALIVE", "resources_total": {"CPU": 2.0}},
                        {"state": "ALIVE", "resources_total": {"CPU": 4.0, "GPU": 1.0}},
                        {"state": "DEAD", "resources_total": {"CPU": 64.0}},
                    ]
                }
            }
        },
    }

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        code = 200 if token == "Bearer right" else 401 if token is None else 403
        content = json.dumps(self.answers[self.path]).encode() if code == 200 else b"no"
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_cluster_says_its_versions_and_its_living_nodes_resources(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # Ray's own client would go there
    facts = RayJobServer(dashboard, token="right").facts()
    assert facts == ClusterFacts("2.60.0", "3.11.7", {"CPU": 6.0, "GPU": 1.0}, asks_for_token=True)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("token", "said"), [("wrong", "refuses the token"), ("", "asks for a token and none was sent")]
)
def test_a_missing_or_wrong_token_says_what_to_set(dashboard: str, token: str, said: str) -> None:
    with pytest.raises(ClusterError, match=rf"{said}.*RAY_AUTH_TOKEN_PATH"):
        RayJobServer(dashboard, token=token)


def test_an_address_that_does_not_answer_is_an_error_and_no_wait() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"no Ray cluster answers at http://127.0.0.1:{free} .*refused"):
        RayJobServer(f"http://127.0.0.1:{free}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"no Ray cluster answers.*timed out"):
            RayJobServer(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        assert time.monotonic() - began < 2


def test_a_terminated_command_ends_as_on_ctrl_c() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "list", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}"],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()  # it is there, and waits for an answer
        process.terminate()
        with connection:
            assert process.communicate(timeout=60)[1] == ""  # no traceback
    assert process.returncode == 130


# Checks before anything is sent.


def test_versions_that_differ_are_named_on_both_sides() -> None:
    check_versions(ClusterFacts(ray.__version__, f"{sys.version_info[0]}.{sys.version_info[1]}.99", {}))
    with pytest.raises(
        ClusterError, match=rf"Ray {ray.__version__} here and 2\.1\.0 there, Python .* here and 3\.9 there"
    ):
        check_versions(ClusterFacts("2.1.0", "3.9.1", {}))


def test_a_cluster_that_is_too_small_says_what_is_missing(prompts: Path) -> None:
    config = tiny(prompts, **{"rollout.num_actors": "5", "rollout.num_gpus": "0.5"})
    total = {"CPU": 99.0, "GPU": 1.0}
    with pytest.raises(ClusterError, match=r"reserves 2\.5 GPUs and the Ray cluster at http://h has 1: 1\.5 missing"):
        check_resources(config, total, 0.0, "http://h")
    config = tiny(prompts, **{"rollout.num_actors": "5"})
    with pytest.raises(ClusterError) as without_driver:
        check_resources(config, {"CPU": 4.0}, 0.0, "http://h")
    with pytest.raises(ClusterError) as with_driver:
        check_resources(config, {"CPU": 4.0}, 2.0, "http://h")
    missing = [float(str(error.value).split(": ")[1].split()[0]) for error in (without_driver, with_driver)]
    assert missing[1] == missing[0] + 2
    check_resources(config, {}, 0.0, "http://h")  # a cluster that does not tell is not refused
    growing = config.model_copy(update={"wait_for_nodes": True})
    check_resources(growing, {"CPU": 4.0}, 0.0, "http://h")
    assert most_actors(growing) > 10_000, "nor is it asked what its nodes hold"


def test_a_run_that_would_not_use_the_cluster_is_refused(prompts: Path) -> None:
    with pytest.raises(ConfigError, match="uses no cluster"):
        check_resources(tiny(prompts, placement="in_process"), {"CPU": 99.0}, 0.0, "http://h")


@pytest.mark.parametrize("content", ["", 'a sign that says "ONE"\nno word to read here\n'])
def test_prompts_that_train_would_refuse_are_refused_before_anything_is_sent(prompts: Path, content: str) -> None:
    prompts.write_text(content)
    server = FakeCluster()
    with pytest.raises(PromptError):
        JobClient(server).submit(tiny(prompts), "tiny")
    assert server.sent == []


# The archive.


def test_an_archive_holds_the_program_the_configuration_and_the_prompts_only(prompts: Path, tmp_path: Path) -> None:
    package = pack(tiny(prompts), "tiny", "/runs/a", tmp_path)
    with zipfile.ZipFile(package.path) as archive:
        names = archive.namelist()
        (tmp_path / "sent.toml").write_bytes(archive.read("job/tiny.toml"))
        (inputs,) = [name for name in names if name.startswith("job/inputs/")]
        assert archive.read(inputs) == prompts.read_bytes()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, "job"}
    assert {"services/cli.py", "raylign/assets/glyphs/prompts_train.txt"} <= set(names)
    assert [name for name in names if "__pycache__" in name or "/." in name] == []
    sent = load_config(RunConfig, tmp_path / "sent.toml")
    assert sent.prompts.train == f"/runs/a/{inputs.removeprefix('job/')}"
    assert sent.model_copy(update={"prompts": None}) == tiny(prompts).model_copy(update={"prompts": None})
    assert Path(inputs).name == prompts.name  # ids of prompts, and so all draws, depend on it
    assert package.uploaded == (prompts,)
    assert package.left == ()
    assert package.size_bytes == package.path.stat().st_size
    assert package.entrypoint == (
        "mkdir -p /runs/a && cp -R job/inputs /runs/a/ && exec python -m services.cli train job/tiny.toml "
        "--run-dir /runs/a --address auto"
    )


def test_the_same_run_makes_the_same_archive_and_other_prompts_another(prompts: Path, tmp_path: Path) -> None:
    def packed() -> bytes:
        return pack(tiny(prompts), "tiny", "/runs/a", tmp_path).path.read_bytes()

    first = packed()
    os.utime(prompts, (1, 1))
    assert packed() == first
    prompts.write_text('a sign that says "TEN"\n')
    assert packed() != first


def test_models_stay_and_prompts_may(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = tiny(prompts, **{"model.path": "model"})
    package = pack(config, "tiny", "~/runs/a", tmp_path, upload=False)
    with zipfile.ZipFile(package.path) as archive:
        sent = tomllib.loads(archive.read("job/tiny.toml").decode())
        assert not [name for name in archive.namelist() if name.startswith("job/inputs")]
    assert sent["model"]["path"] == str(tmp_path / "model")
    assert sent["prompts"]["train"] == str(prompts)
    assert package.left == (prompts, tmp_path / "model")
    assert package.entrypoint.startswith("exec python")


def test_an_archive_beyond_what_ray_takes_names_its_largest_files(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Ray takes less than 1\.0 MB; the largest are \S+ \(\d.*--no-upload"):
        pack(tiny(prompts), "tiny", "/runs/a", tmp_path, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("path", "word"), [("/a/b", "/a/b"), ("/a b", "'/a b'"), ("~/a b", "\"$HOME\"'/a b'"), ("~", '"$HOME"')]
)
def test_a_path_is_one_word_of_a_shell_command(path: str, word: str) -> None:
    assert shell_path(path) == word


# The client.


def test_a_submission_has_a_readable_id_and_carries_no_secret(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "do-not-send-me")
    server, said = FakeCluster(cluster=ClusterFacts(ray.__version__, PYTHON, {}, asks_for_token=True)), list[str]()
    submitted = JobClient(server).submit(tiny(prompts), "Quickstart_Image", stop_wait_s=7, note=said.append)
    ((sent, names),) = server.sent
    assert sent.id == submitted.id
    assert sent.id.rpartition("-")[0] == "raylign-quickstart-image"
    assert submitted.run_dir == f"~/raylign_runs/{sent.id}"
    assert "job/quickstart-image.toml" in names
    assert dict(sent.metadata) == {
        "raylign_config": "Quickstart_Image",
        "raylign_num_steps": "3",
        "raylign_run_dir": submitted.run_dir,
    }
    assert sent.env_vars["RAY_JOB_STOP_WAIT_TIME_S"] == "7"
    assert sent.env_vars["RAY_AUTH_MODE"] == "token"
    assert "do-not-send-me" not in repr(sent)
    assert said[0].startswith("uploading ")
    assert said[0].endswith(f" MB: the program, the configuration, {prompts.name}")
    assert JobClient(server).submit(tiny(prompts), "quickstart_image").id != sent.id


def test_names_and_run_directories_that_mean_nothing_over_there_are_refused(prompts: Path) -> None:
    server = FakeCluster()
    with pytest.raises(ConfigError, match="no letter or digit"):
        slugify("___")
    with pytest.raises(ConfigError, match="a path on the cluster: give an absolute one"):
        JobClient(server).submit(tiny(prompts), "tiny", run_dir="runs/a")
    assert server.sent == []


def test_a_list_has_our_jobs_the_newest_first_with_their_steps() -> None:
    server = FakeCluster(log=("step 1/30  reward 0.1\n", "step 17/30  reward 0.2\nheld-out at step 17: ocr 0.3\n"))
    server.known = {
        "done": (Job("done", "SUCCEEDED", started_s=10.0, ended_s=75.0, exit_code=0), OURS),
        "going": (Job("going", "RUNNING", started_s=20.0), OURS),
        "waiting": (Job("waiting", "PENDING", started_s=30.0), OURS),
        "theirs": (Job("theirs", "RUNNING", started_s=40.0), {}),
    }
    jobs = JobClient(server).list()
    assert [(job.id, job.step) for job in jobs] == [("waiting", None), ("going", 17), ("done", 30)]
    heading, *lines = table(jobs)
    assert heading.split() == ["ID", "STATUS", "CONFIG", "STEP", "STARTED", "DURATION"]
    assert [line.split()[:4] for line in lines] == [
        ["waiting", "PENDING", "tiny", "-/30"],
        ["going", "RUNNING", "tiny", "17/30"],
        ["done", "SUCCEEDED", "tiny", "30/30"],
    ]
    assert lines[2].endswith("1m 05s")


def test_a_stopped_job_says_how_far_it_came_and_is_not_stopped_again() -> None:
    server = FakeCluster(log=("step 4/30\n",))
    job = Job("a", "RUNNING", started_s=1.0)
    server.known["a"] = (job, OURS)
    client = JobClient(server)
    assert client.stop("a")
    server.known["a"] = (replace(job, status="STOPPED"), OURS)
    assert client.status("a").step == 4
    assert client.status("a").run_dir == "/runs/a"
    assert not client.stop("a")
    assert server.asked_to_stop == ["a"]


def test_waiting_has_an_end() -> None:
    server = FakeCluster(known={"a": (Job("a", "RUNNING"), OURS)})
    with pytest.raises(ClusterError, match=r"a is not over after 0\.05 s"):
        JobClient(server).wait("a", timeout_s=0.05, every_s=0.01)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job("a", "SUCCEEDED", exit_code=0), 0),
        (Job("a", "FAILED", exit_code=3), 3),
        (Job("a", "FAILED"), 1),
        (Job("a", "STOPPED"), 130),
    ],
)
def test_following_shows_the_log_and_ends_with_the_jobs_code(
    job: Job, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeCluster(known={"a": (job, OURS)}, log=("step 1/30\n", "step 2/30\n"))
    assert _follow(JobClient(server), "a") == code
    assert capsys.readouterr().out.startswith("step 1/30\nstep 2/30\na: ")


def test_ctrl_c_while_following_leaves_the_job_alone(capsys: pytest.CaptureFixture[str]) -> None:
    server = FakeCluster(known={"a": (Job("a", "RUNNING"), OURS)}, log=("step 1/30\n",), interrupted=True)
    with pytest.raises(typer.Exit) as ended:
        _follow(JobClient(server), "a")
    assert ended.value.exit_code == 130
    assert "Stop: raylign stop a --address http://head:8265" in capsys.readouterr().err
    assert server.asked_to_stop == []


def test_the_step_is_read_from_what_a_run_prints() -> None:
    page = StringIO()
    screen = RunConsole(Console(file=page, width=100), plain_every_s=0.0)
    screen.begin(num_steps=12)
    assert last_step(page.getvalue()) is None
    for step in (1, 2, 11):
        screen.step(step, {"reward/mean": 0.5})
    screen.evaluated(11, {"eval/mean": 0.5})
    assert last_step(page.getvalue()) == 11
