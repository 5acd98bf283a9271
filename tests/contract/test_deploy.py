"""What deploy/ and docker/ name exists: fields, commands, flags, ports, images, configurations, volumes and secrets.

And the pods can hold the runs that they are for.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, DEFAULT_DASHBOARD_PORT
from ray.scripts.scripts import start as ray_start
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

import raylign
from raylign.config import parse_config
from raylign.errors import ConfigError
from services.cli import app, split_configs
from services.config import RunConfig, load_run_config
from services.nodes import ROLE_LABEL, required_resources, role_selector
from services.reward_app import DeployArgs, build_application
from services.reward_config import HTTP_CPUS, RewardServerConfig, ServiceConfig
from services.run_metrics import FAMILIES, names
from tests.kuberay import PodSpec, RayClusterSpec, WorkerGroup, cluster_of

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
OURS = {f"raylign-{path.stem}:{raylign.__version__}" for path in DOCKERFILES}
PINNED = re.compile(r"^[\w./-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$")
RAY = tuple(path for path in MANIFESTS if "ray.io/v1" in path.read_text(encoding="utf-8"))
RUNS = tuple(path for path in RAY if path.name.startswith("train_"))


@functools.cache
def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader))


def ray_cluster(path: Path) -> RayClusterSpec:
    (found,) = (document for document in documents(path) if document.get("apiVersion") == "ray.io/v1")
    return cluster_of(found)


def nodes_of(value: Any, key: str) -> Iterator[Any]:
    """Every value under this key, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from nodes_of(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes_of(inner, key)


def run_of(path: Path) -> RunConfig:
    """The configuration of a job, read from its command as the program reads it."""
    (job,) = documents(path)
    program, folder, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "train-or-resume"
    assert folder.startswith("/runs/")
    command = get_command(app).commands["train"]  # type: ignore[attr-defined]  # typer's groups are click's
    context = command.make_context("train", [*arguments, "--run-dir", folder, "--address", "auto"])
    assert (context.params["run_dir"], context.params["address"]) == (Path(folder), "auto")
    return load_run_config(*split_configs(context.params["config"], "", context.args))


def gpus(group: WorkerGroup) -> float:
    return float(group.template.spec.containers[0].resources.limits.get("nvidia.com/gpu", "0"))


def cpus(group: WorkerGroup) -> float:
    return float(group.template.spec.containers[0].resources.limits["cpu"])


def test_every_kind_of_manifest_is_there() -> None:
    kinds = [document.get("kind") for path in MANIFESTS for document in documents(path)]
    assert {"RayCluster", "RayJob", "RayService", "PodMonitor", "PersistentVolumeClaim", "StatefulSet"} <= set(kinds)
    assert [path.name for path in RUNS] == ["train_1x1.yaml", "train_1x8.yaml", "train_4x8.yaml"]
    assert sorted(path.stem for path in DOCKERFILES) == ["judge", "learner", "rewards", "rollout"]


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.name)
def test_kuberay_takes_it(path: Path) -> None:
    cluster = ray_cluster(path)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={cluster.rayVersion}\n" in constraints
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        container = group.template.spec.containers[0]
        for probe in (container.readinessProbe, container.livenessProbe):
            assert probe is not None
            assert probe.httpGet is not None
            assert (probe.httpGet.path, probe.httpGet.port) == ("/api/healthz", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT)
        (memory,) = (volume for volume in group.template.spec.volumes if volume.name == "shared-memory")
        assert memory.emptyDir is not None
        assert memory.emptyDir.medium == "Memory"
        assert "/dev/shm" in {mount.mountPath for mount in container.volumeMounts}
        assert {port.name: port.containerPort for port in container.ports}["metrics"] == 8080
    ports = {port.name: port.containerPort for port in cluster.headGroupSpec.template.spec.containers[0].ports}
    assert (ports["gcs-server"], ports["dashboard"]) == (6379, DEFAULT_DASHBOARD_PORT)


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.name)
def test_a_group_is_labelled_with_its_role_and_has_its_image(path: Path) -> None:
    images = {"learner": "learner", "rollout": "rollout", "rewards": "rewards", "judge": "learner"}
    for group in ray_cluster(path).workerGroupSpecs:
        assert group.labels == {ROLE_LABEL: group.groupName}
        assert group.template.spec.containers[0].image.startswith(f"raylign-{images[group.groupName]}:")
        needs_gpu = group.groupName != "rewards"
        assert (gpus(group) > 0) == needs_gpu


def test_all_four_roles_have_groups_of_their_own_on_many_nodes() -> None:
    for name in ("train_4x8.yaml", "cluster.yaml"):
        groups = [group.groupName for group in ray_cluster(ROOT / "deploy" / name).workerGroupSpecs]
        assert groups == ["learner", "rollout", "rewards", "judge"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_nothing_runs_as_root_or_may_become_it(path: Path) -> None:
    for spec in nodes_of(documents(path), "spec"):
        if "containers" not in spec:
            continue
        pod = PodSpec.model_validate(spec)  # refuses root, a foreign seccomp profile and privilege escalation
        assert all(container.securityContext.capabilities.drop == ["ALL"] for container in pod.containers)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_images_are_ours_or_pinned(path: Path) -> None:
    for image in nodes_of(documents(path), "image"):
        assert image in OURS or PINNED.match(image), image


def test_a_secret_is_never_written_down_and_docs_say_how_to_make_it() -> None:
    page = (ROOT / "docs" / "deploy_cluster.md").read_text(encoding="utf-8")
    for path in MANIFESTS:
        for reference in nodes_of(documents(path), "secretKeyRef"):
            pattern = rf"secret generic {reference['name']} --from-literal=['\"]?{reference['key']}="
            assert re.search(pattern, page), reference
        for entry in (entry for env in nodes_of(documents(path), "env") for entry in env):
            assert not re.search(r"TOKEN|PASSWORD|API_KEY", entry["name"]) or "valueFrom" in entry, entry
    assert "Secret" not in {document.get("kind") for path in MANIFESTS for document in documents(path)}


def test_volumes_that_are_claimed_are_made() -> None:
    made = {document["metadata"]["name"] for document in documents(ROOT / "deploy" / "storage.yaml")}
    claimed = {claim["claimName"] for path in RAY for claim in nodes_of(documents(path), "persistentVolumeClaim")}
    assert claimed == made == {"raylign-models", "raylign-runs"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_job_reads_and_writes_what_its_pods_mount(path: Path) -> None:
    config, cluster = run_of(path), ray_cluster(path)
    read = [config.model.path, config.prompts.train, config.prompts.heldout]
    read += [path for reward in config.rewards for key, path in reward if key.endswith("path")]
    assert all(str(name).startswith("/models/") for name in read), read
    learners = [group for group in cluster.workerGroupSpecs if group.groupName == "learner"]
    for group in (cluster.headGroupSpec, *learners):  # who writes metrics, who writes checkpoints
        mounts = {m.mountPath: m.readOnly for m in group.template.spec.containers[0].volumeMounts}
        assert not mounts["/runs"]
    for worker in cluster.workerGroupSpecs:
        assert {m.mountPath: m.readOnly for m in worker.template.spec.containers[0].volumeMounts}["/models"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_the_pods_of_a_job_hold_its_run(path: Path) -> None:
    config, groups = run_of(path), ray_cluster(path).workerGroupSpecs
    needed = required_resources(config)
    assert sum(group.minReplicas * gpus(group) for group in groups) >= needed["GPU"]
    assert sum(group.minReplicas * cpus(group) for group in groups) >= needed["CPU"]
    sizes = {"train_1x1.yaml": 1, "train_1x8.yaml": 8, "train_4x8.yaml": 32}
    assert sum(group.maxReplicas * gpus(group) for group in groups) == sizes[path.name]
    # Ranks and actors go to the pods of their role, where each needs a core and its GPUs.
    of_role = {group.groupName: group for group in groups}
    learner, per_rank = of_role["learner"], max(1.0, config.learner.num_gpus_per_rank)
    assert learner.minReplicas * (gpus(learner) // per_rank) >= config.learner.num_ranks
    assert learner.minReplicas * cpus(learner) >= config.learner.num_ranks
    if config.placement == "separate":
        rollout = of_role["rollout"]
        assert rollout.minReplicas * (gpus(rollout) // 1) >= config.rollout.num_actors * min(1, config.rollout.num_gpus)
        assert rollout.minReplicas == config.rollout.num_actors


def test_the_shared_cluster_holds_the_run_that_it_says_it_holds() -> None:
    cluster, needed = ray_cluster(ROOT / "deploy" / "cluster.yaml"), None
    assert "run of train_1x8.yaml at once" in (ROOT / "deploy" / "cluster.yaml").read_text(encoding="utf-8")
    needed = required_resources(run_of(ROOT / "deploy" / "train_1x8.yaml"))
    assert sum(group.minReplicas * gpus(group) for group in cluster.workerGroupSpecs) >= needed["GPU"]
    assert sum(group.maxReplicas * gpus(group) for group in cluster.workerGroupSpecs) == 32


def test_a_run_that_does_not_fit_is_noticed() -> None:
    config = run_of(ROOT / "deploy" / "train_1x8.yaml")
    larger = config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_actors": 9})})
    groups = ray_cluster(ROOT / "deploy" / "train_1x8.yaml").workerGroupSpecs
    assert sum(group.minReplicas * gpus(group) for group in groups) < required_resources(larger)["GPU"]


def _service() -> tuple[RewardServerConfig, dict[str, Any], RayClusterSpec, dict[str, Any]]:
    config, door, service = documents(ROOT / "deploy" / "rewards_service.yaml")
    rewards = parse_config(RewardServerConfig, tomllib.loads(config["data"]["rewards.toml"]), "rewards.toml")
    return rewards, yaml.safe_load(service["spec"]["serveConfigV2"]), cluster_of(service), door


def test_the_reward_service_deploys_its_rewards_where_they_belong() -> None:
    rewards, serve, cluster, _ = _service()
    (application,) = ServeDeploySchema.model_validate(serve).applications
    assert application.import_path == f"{build_application.__module__}:{build_application.__name__}"
    assert parse_config(DeployArgs, application.args, "args").config == "/etc/raylign/rewards.toml"
    options = {one["name"]: one["ray_actor_options"] for one in serve["applications"][0]["deployments"]}
    assert set(options) == {reward.name for reward in rewards.rewards}
    groups = {group.groupName: group for group in cluster.workerGroupSpecs}
    load = dict.fromkeys(groups, (0.0, 0.0))
    for name, given in options.items():
        serving, group = rewards.service.serving(name), given["label_selector"][ROLE_LABEL]
        assert (given["num_cpus"], given["num_gpus"]) == (serving.num_cpus_per_replica, serving.num_gpus_per_replica)
        assert (group == "judge") == (serving.num_gpus_per_replica > 0)
        most = serving.max_replicas
        load[group] = (load[group][0] + most * given["num_cpus"], load[group][1] + most * given["num_gpus"])
    for name, (cores, devices) in load.items():
        assert cores <= groups[name].maxReplicas * cpus(groups[name])
        assert devices <= groups[name].maxReplicas * gpus(groups[name])


def test_the_door_of_the_reward_service_is_open_at_the_head_and_asks_for_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards, serve, cluster, door = _service()
    head = cluster.headGroupSpec.template
    assert float(cluster.headGroupSpec.rayStartParams["num-cpus"]) >= HTTP_CPUS * rewards.service.http_replicas
    assert head.metadata is not None
    assert door["spec"]["selector"].items() <= head.metadata.labels.items()
    (port,) = door["spec"]["ports"]
    ports = {one.name: one.containerPort for one in head.spec.containers[0].ports}
    assert port["port"] == ports[port["targetPort"]] == rewards.service.port == ServiceConfig().port
    assert serve["proxy_location"] == "Disabled"
    monkeypatch.setenv("RAYLIGN_REWARD_TOKEN", "")
    with pytest.raises(ConfigError, match="open to everyone"):
        rewards.service.read_token()
    given = {entry.name for entry in head.spec.containers[0].env}
    assert {rewards.service.token_env, rewards.service.cache.url_env} <= given


def test_the_reward_service_names_a_judge_and_a_redis_that_are_there() -> None:
    rewards, _, cluster, _ = _service()
    services = {
        document["metadata"]["name"]: {port["port"] for port in document["spec"]["ports"]}
        for path in MANIFESTS
        for document in documents(path)
        if document.get("kind") == "Service"
    }
    judge = next(reward for reward in rewards.rewards if reward.type == "vlm_judge")
    (vllm,) = nodes_of(documents(ROOT / "deploy" / "judge_vllm.yaml"), "args")
    assert f"--served-model-name={judge.engine.model}" in vllm
    host, port = judge.engine.base_url.removeprefix("http://").removesuffix("/v1").split(":")  # type: ignore[union-attr]
    assert int(port) in services[host]
    assert cluster.gcsFaultToleranceOptions is not None
    host, port = cluster.gcsFaultToleranceOptions.redisAddress.split(":")
    assert int(port) in services[host]
    for path in MANIFESTS:
        for host, port in re.findall(r"redis://\S+@([\w-]+):(\d+)/\d", path.read_text(encoding="utf-8")):
            assert int(port) in services[host]


def test_prometheus_reads_ports_that_pods_have() -> None:
    (monitor,) = documents(ROOT / "deploy" / "monitoring.yaml")
    # KubeRay adds the last two to the head.
    ports = ["metrics", "run-metrics", "as-metrics", "dash-metrics"]
    assert [one["port"] for one in monitor["spec"]["podMetricsEndpoints"]] == ports
    assert ROLE_LABEL in monitor["spec"]["podTargetLabels"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_job_answers_prometheus_at_the_port_that_its_head_opens(path: Path) -> None:
    tracking = run_of(path).tracking
    (head,) = ray_cluster(path).headGroupSpec.template.spec.containers
    ports = {port.name: port.containerPort for port in head.ports}
    assert (tracking.metrics_port, tracking.metrics_host) == (ports["run-metrics"], "0.0.0.0")


def _queries() -> list[str]:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    variables = [one["definition"] for one in board["templating"]["list"] if one["type"] == "query"]
    return [*variables, *(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))]


def test_the_grafana_dashboard_asks_for_metrics_that_are_exported() -> None:
    """Ours by their exporter; Serve's by the dashboard that Ray itself brings."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    serve = "".join(path.read_text(encoding="utf-8") for path in folder.glob("serve*_panels.py"))
    known = names() | set(re.findall(r"ray_serve_[a-z_]+", serve))
    asked = {name for query in _queries() for name in re.findall(r"\b(?:raylign|ray_serve)_[a-z0-9_]+", query)}
    assert asked <= known
    assert len([name for name in asked if name.startswith("raylign_")]) > 20
    labels = {label for query in _queries() for label in re.findall(r'(\w+)(?:=~|!~|!=|=)"', query)}
    labels |= {label for query in _queries() for by in re.findall(r"by \((.*?)\)", query) for label in by.split(", ")}
    ours = {"run", "kind", "status", "state", *(family.label for family in FAMILIES)}
    assert labels <= ours | {"deployment", "le"}


def test_the_grafana_dashboard_is_one_that_grafana_takes() -> None:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 25
    assert {panel["type"] for panel in panels} == {"row", "timeseries", "stat"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "run"}
    for query in _queries():
        assert query.count("(") == query.count(")"), query
        assert query.count("{") == query.count("}"), query


def test_a_role_goes_to_the_nodes_that_are_set_aside_for_it_and_to_any_if_none_is() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Labels": {ROLE_LABEL: "learner"}},
        {"Alive": False, "Labels": {ROLE_LABEL: "rollout"}},
        {"Alive": True, "Labels": {}},
    ]
    assert role_selector(nodes, "learner") == {ROLE_LABEL: "learner"}
    assert role_selector(nodes, "rollout") == {}, "a node that is gone keeps nobody waiting"
    assert role_selector([], "learner") == {}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_and_not_root(path: Path) -> None:
    text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    bases = [rest.split()[0] for word, rest in lines if word == "FROM"]
    assert all(PINNED.match(base) for base in bases), bases
    final = lines[[word for word, _ in lines].index("FROM", 1 if len(bases) > 1 else 0) :]
    assert [rest for word, rest in final if word == "USER"] == ["10001:10001"], (
        "a number, so that runAsNonRoot can tell"
    )
    assert final.index(["USER", "10001:10001"]) > max(place for place, (word, _) in enumerate(final) if word == "RUN")
    for _, rest in (line for line in lines if line[0] == "COPY"):
        sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
        assert "--from=build" in rest or all((ROOT / source).exists() for source in sources), rest
    for command in (rest for word, rest in lines if word == "RUN"):
        assert "apt-get install" not in command or "rm -rf /var/lib/apt/lists/*" in command
        assert "pip install" not in command or "-c constraints.txt" in command
    if path.stem != "judge":
        assert len(bases) == 2, "what builds stays behind"
        packages = {rest.split()[0] for word, rest in lines if word == "COPY" and " " in rest}
        assert {"raylign", "learner", "rollout", "rewards", "services", "configs"} <= packages
        assert "PIP_NO_CACHE_DIR=1" in text
    health = [rest for word, rest in final if word == "HEALTHCHECK"]
    assert bool(health) == (path.stem in ("rewards", "judge"))
    assert f"raylign-{path.stem}:{raylign.__version__}" in text, (
        "the command in its head builds the name that deploy/ uses"
    )


def test_all_images_of_a_cluster_have_one_python_and_one_lock() -> None:
    bases = {
        line.split()[1]
        for path in DOCKERFILES
        if path.stem != "judge"
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("FROM ")
    }
    (base,) = bases
    assert "python:3.11." in base
    assert "torchao==" in (ROOT / "constraints.txt").read_text(encoding="utf-8"), "the rollout image's extra is locked"


def test_the_compose_file_builds_what_it_names() -> None:
    composed = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    for name, service in composed["services"].items():
        dockerfile = ROOT / service["build"]["dockerfile"]
        assert dockerfile in DOCKERFILES, name
        assert service["image"] == f"raylign-{dockerfile.stem}:{raylign.__version__}"
        assert service["cap_drop"] == ["ALL"]
    assert composed["services"]["rewards"]["ports"] == [f"{ServiceConfig().port}:{ServiceConfig().port}"]


def _train_or_resume(folder: Path, *arguments: str) -> str:
    """What the script runs, told by a `raylign` that only repeats its arguments."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "raylign").write_text('#!/bin/sh\necho "$@"\n')
    (commands / "raylign").chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    script = ROOT / "docker" / "train-or-resume"
    done = subprocess.run([str(script), *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_job_that_is_started_again_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _train_or_resume(tmp_path, str(run), "quickstart_image", "--num_steps", "3")
    assert first == f"train quickstart_image --num_steps 3 --run-dir {run} --address auto"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text("")
    assert _train_or_resume(tmp_path, str(run), "quickstart_image").startswith("train quickstart_image")
    (aside,) = tmp_path.glob("run.no-checkpoint-*")
    assert (aside / "config.toml").exists(), "what died before its first checkpoint is kept"
    (run / "checkpoints" / "step_20").mkdir(parents=True)
    assert _train_or_resume(tmp_path, str(run), "quickstart_image") == f"resume {run} --address auto"


STOPPABLE = """#!/bin/sh
status=finished
trap 'status=stopped' TERM
echo up
while [ $status = finished ] && [ "$2" = endless ]; do sleep 0.05; done
mkdir -p run
echo "{\\"status\\": \\"$status\\"}" > run/summary.json
"""
"""A `raylign` that stops when it is told to, as the real one does: after a while, with a summary, and with 0."""


def test_a_job_that_was_stopped_is_not_done(tmp_path: Path) -> None:
    run, commands = tmp_path / "run", tmp_path / "bin"
    commands.mkdir()
    (commands / "raylign").write_text(STOPPABLE)
    (commands / "raylign").chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}"}
    for config, expected in (("endless", 75), ("short", 0)):
        job = subprocess.Popen(
            [str(ROOT / "docker" / "train-or-resume"), str(run), config],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert job.stdout is not None
        with job.stdout:
            assert job.stdout.readline() == b"up\n"
            if config == "endless":
                os.killpg(job.pid, signal.SIGTERM)
            assert job.wait(10) == expected


def test_the_script_is_executable_and_speaks_the_shell_that_images_have() -> None:
    script = ROOT / "docker" / "train-or-resume"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text(encoding="utf-8").startswith("#!/bin/sh\n")


def test_commands_in_the_page_exist() -> None:
    page = (ROOT / "docs" / "deploy_cluster.md").read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:deploy|docker|configs|docs)/[\w./-]+\.\w+", page):
        assert (ROOT / name).exists(), name
    known = get_command(app).commands  # type: ignore[attr-defined]  # typer's groups are click's
    used = set(re.findall(r"^\s*raylign ([a-z-]+)", page, flags=re.MULTILINE))
    assert used
    assert used <= set(known)
    lines = re.findall(r"^ray start .*$", page, flags=re.MULTILINE)
    assert len(lines) == 2
    offered = {flag for parameter in ray_start.params for flag in parameter.opts}
    for line in lines:
        assert set(re.findall(r"--[a-z-]+", line)) <= offered, line
