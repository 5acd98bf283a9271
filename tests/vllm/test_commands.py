"""Every documented command line of a judge, read by vLLM's own parser: a flag that it does not know fails here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def documented() -> list[list[str]]:
    """From docs/judge_engine.md, docker/compose.yaml and deploy/judge_vllm.yaml."""
    page = (ROOT / "docs" / "judge_engine.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(vllm serve .*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " "))[2:] for block in blocks]
    composed: Any = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    commands += [service["command"] for service in composed["services"].values() if "command" in service]
    deployment: Any = next(yaml.safe_load_all((ROOT / "deploy" / "judge_vllm.yaml").read_text(encoding="utf-8")))
    return [*commands, deployment["spec"]["template"]["spec"]["containers"][0]["args"]]


def parse(commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    assert PYTHON.exists(), "there is no .venv-vllm; these tests are run by `make test-vllm`, which makes it"
    environment = {**os.environ, "PYTHONPATH": str(HERE / "shim"), "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run(
        [str(PYTHON), str(HERE / "parse_commands.py"), json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_vllm_knows_every_documented_flag() -> None:
    commands = documented()
    assert len(commands) == 5
    done = parse(commands)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout[done.stdout.index("[{") :])
    judges = {(entry["model"], *entry["name"], entry["length"]) for entry in read}
    assert judges == {
        ("rubricreward/R3-Qwen3-8B-14k", "r3", 32768),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "vlm", 16384),
    }
    assert all((entry["domains"] is not None) == (entry["name"] == ["vlm"]) for entry in read)


def test_vllm_refuses_a_flag_that_it_does_not_know() -> None:
    done = parse([["some/model", "--reasning-parser=qwen3"]])
    assert done.returncode != 0
    assert "--reasning-parser" in done.stderr
