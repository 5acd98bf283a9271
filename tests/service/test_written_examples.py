"""The examples for calling the reward service, as docs print them, run against the command they name."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.documents import Block, blocks_of
from tests.service import command_line as cli

CONTRACT = cli.ROOT / "docs" / "reward_service.md"
COMMAND, *ASKS = [block for block in blocks_of(CONTRACT) if block.section == "Ask"]
SIGN = cli.ROOT / "docs" / "images" / "sign.png"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The page's own command, on a free port: what stands in place of 127.0.0.1:8000."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("service")
    program, *arguments = shlex.split(COMMAND.text, comments=True)
    assert Path(program).name == "raylign"
    arguments = [str(cli.ROOT / word) if word.startswith("configs/") else word for word in arguments]
    process = cli.start([*arguments, "--service.port", str(port)], folder)
    try:
        cli.wait_for(lambda: "Ctrl-C stops" in (folder / "output.txt").read_text(), process, timeout_s=180)
        yield f"127.0.0.1:{port}"
    finally:
        cli.end(process)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=cli.ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_in_both_languages() -> None:
    assert {block.kind for block in ASKS} == {"bash", "python"}


@pytest.mark.parametrize("block", ASKS, ids=lambda block: f"{block.kind}:{block.line}")
def test_the_contracts_examples_work(block: Block, service: str, tmp_path: Path) -> None:
    shutil.copy(SIGN, tmp_path / "sign.png")
    program = ["bash", "-euo", "pipefail", "-c"] if block.kind == "bash" else [sys.executable, "-c"]
    printed = _run([*program, block.text.replace("127.0.0.1:8000", service)], tmp_path)
    if block.kind == "python":
        assert float(printed.split()[0]) < 1, "a black picture says nothing"
        return
    for answer in (json.loads(line) for line in printed.replace("}{", "}\n{").splitlines()):
        if "results" in answer:
            assert answer["results"][0]["status"] == "ok"
        else:
            assert answer.get("ready") is True or [reward["name"] for reward in answer["rewards"]] == ["ocr", "jpeg"]


def test_the_client_among_the_examples_reads_the_sign(service: str, tmp_path: Path) -> None:
    client = [sys.executable, str(cli.ROOT / "examples" / "reward_client.py"), str(SIGN)]
    printed = _run([*client, "--url", f"http://{service}", "--prompt", 'a sign that says "HELLO"'], tmp_path)
    assert "sign.png  ocr  1.000" in printed
