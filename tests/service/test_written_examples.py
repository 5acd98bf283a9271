"""The examples for calling the reward service, as README and docs print them, run against the command they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.service import command_line as cli

README = cli.ROOT / "README.md"
CONTRACT = cli.ROOT / "docs" / "reward_service.md"


def _section(path: Path, title: str) -> list[tuple[str, str]]:
    """The fenced blocks of one section: (language, text)."""
    text = path.read_text(encoding="utf-8")
    body = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(bash|python)\n(.*?)```", body, flags=re.DOTALL)


CALLS = _section(README, "Call the reward service")
COMMAND, *README_CALLS = CALLS
ASKS = _section(CONTRACT, "Ask")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """The README's own command, on a free port: what stands in place of 127.0.0.1:8000."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("service")
    program, *arguments = shlex.split(COMMAND[1], comments=True)
    assert Path(program).name == "raylign"
    arguments = [str(cli.ROOT / word) if word.startswith("configs/") else word for word in arguments]
    process = cli.start([*arguments, "--service.port", str(port)], folder)
    try:
        cli.wait_for(lambda: "Ctrl-C stops" in (folder / "output.txt").read_text(), process, timeout_s=180)
        yield f"127.0.0.1:{port}"
    finally:
        cli.end(process)


def _run(language: str, text: str, service: str, folder: Path) -> str:
    text = text.replace("127.0.0.1:8000", service)
    program = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, text], cwd=folder, env=cli.ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_in_both_languages() -> None:
    assert {language for language, _ in README_CALLS} == {language for language, _ in ASKS} == {"bash", "python"}


@pytest.mark.parametrize("example", [text for language, text in README_CALLS if language == "bash"])
def test_the_readmes_curl_works(example: str, service: str) -> None:
    answers = [json.loads(line) for line in _run("bash", example, service, cli.ROOT).replace("}{", "}\n{").splitlines()]
    for answer in answers:
        if "results" in answer:
            (result,) = answer["results"]
            assert result["status"] == "ok"
            assert result["components"]["ocr"]["value"] == 1.0
            assert result["components"]["ocr"]["details"]["recognised"] == "HELLO"
        else:
            assert answer.get("ready") is True or [reward["name"] for reward in answer["rewards"]] == ["ocr", "jpeg"]


@pytest.mark.parametrize("example", [text for language, text in README_CALLS if language == "python"])
def test_the_readmes_python_works(example: str, service: str) -> None:
    printed = _run("python", example, service, cli.ROOT)
    assert printed.startswith("1.0 1.0 ")
    assert "HELLO" in printed


@pytest.mark.parametrize(("language", "example"), ASKS)
def test_the_contracts_examples_work(language: str, example: str, service: str, tmp_path: Path) -> None:
    shutil.copy(cli.ROOT / "docs" / "images" / "sign.png", tmp_path / "sign.png")
    printed = _run(language, example, service, tmp_path)
    if language == "bash":
        assert json.loads(printed)["results"][0]["status"] == "ok"
    else:
        assert float(printed.split()[0]) < 1, "a black picture says nothing"
