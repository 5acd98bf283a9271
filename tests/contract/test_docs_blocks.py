"""Every code block of the documentation is checked or run: configurations parse, Python runs, commands exist.

What a block is follows from its language; a block that needs what no test has says so in its title, where readers see
it. Calls of the reward service run against a live one in tests/service/test_written_examples.py.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from raylign.config import parse_config
from raylign.errors import ConfigError, RaylignError
from rewards.judging.rubrics import Rubric
from services.cli import app, parse_overrides, split_config, split_configs
from services.config import RunConfig, load_run_config
from services.reward_config import RewardServerConfig
from tests import document_preludes
from tests.documents import BLOCKS, NEEDS, ROOT, Block

REASONS = {
    "needs a Ray cluster",
    "needs a Kubernetes cluster",
    "needs a container registry",
    "needs the published weights",
    "needs a second machine",
}
MOST_UNTESTED = 20
SERVED = {("docs/reward_service.md", "Ask")}
"""Sections whose commands and programs talk to a service that the test of written examples starts."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GROUP: Any = typer.main.get_command(app)


def over(name: str) -> Callable[[dict[str, Any]], None]:
    """A check: a fragment is laid over a shipped run's configuration."""

    def check(data: dict[str, Any]) -> None:
        shipped = load_run_config(name).model_dump(mode="json", exclude_unset=True)
        parse_config(RunConfig, {**shipped, **_merged(shipped, data)}, "the block")

    check.__name__ = f"over {name}"
    return check


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        same = isinstance(value, dict) and isinstance(both.get(key), dict)
        same = same and value.get("type", both[key].get("type")) == both[key].get("type")
        both[key] = _merged(both[key], value) if same else value
    return both


def whole(data: dict[str, Any]) -> None:
    parse_config(RunConfig, data, "the block")


def server(data: dict[str, Any]) -> None:
    rewards = [{"type": "ocr"}, {"type": "jpeg", "name": "judge"}]
    parse_config(RewardServerConfig, {"rewards": rewards, **data}, "the block")


def rubric(data: dict[str, Any]) -> None:
    assert Rubric.model_validate(data).modes


TOML = (
    whole,
    *map(
        over, ("quickstart_image", "quickstart_text", "flux_sol_rl", "flux_flow_grpo", "llada_gsm8k", "dream_countdown")
    ),
    server,
)
"""What a block of TOML may be: a run's configuration, a part of one, a reward server's, or a part of that."""


def check_toml(block: Block, folder: Path) -> None:
    """A block fits one of `TOML`, or is a rubric."""
    data = tomllib.loads(block.text)
    if {"task", "version"} <= data.keys():
        rubric(data)
        return
    refusals: list[str] = []
    for check in TOML:
        try:
            check(data)
        except ConfigError as error:
            refusals.append(f"{check.__name__}: {error}")
        else:
            return
    raise AssertionError("fits no configuration:\n" + "\n".join(refusals))


def check_python(block: Block, folder: Path) -> None:
    """A block runs, from a folder that has the repository's own beside what it writes."""
    for name in ("raylign", "docs", "configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    prelude = document_preludes.PRELUDES.get((block.page, block.section))
    names: dict[str, Any] = {"__name__": "__main__"} | (prelude(folder) if prelude else {})
    exec(compile(block.text, block.name, "exec"), names)  # noqa: S102 - our own pages


def check_json(block: Block, folder: Path) -> None:
    json.loads(block.text)


def nothing(block: Block, folder: Path) -> None:
    """Drawings and output."""


def check_bash(block: Block, folder: Path) -> None:
    """Every command of a block exists, with its options."""
    for words in commands(block.text):
        program = Path(words[0]).name
        assert program in PROGRAMS, f"{program}: no check for it; title the block `{NEEDS}…` if no test can run it"
        PROGRAMS[program](words[1:])


def check_untold(block: Block, folder: Path) -> None:
    """Of a block without a language: what calls Raylign."""
    calls = [line for line in block.text.splitlines() if re.match(r"(\.venv/bin/)?raylign ", line)]
    check_bash(replace(block, text="\n".join(calls)), folder)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a script, without comments, assignments before them, and what follows `|` or `&&` apart."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        while words:
            cut = next((at for at, word in enumerate(words) if word in {"&&", "|", ";"}), len(words))
            if words[:cut]:
                yield words[:cut]
            words = words[cut + 1 :]


def raylign(words: list[str]) -> None:
    """The command line takes these words, and the configuration these keys."""
    if words[0].startswith("--"):
        return
    assert words[0] in GROUP.commands, f"no command raylign {words[0]}"
    command = GROUP.commands[words[0]]
    context = command.make_context(words[0], words[1:])
    if words[0] == "train":
        names, overrides = split_configs(context.params["config"], "quickstart_image", context.args)
        load_run_config([_shipped(name) for name in names], overrides)
    elif words[0] in {"ablate", "submit", "serve-rewards"}:
        name, overrides = split_config(context.params["config"], "", context.args)
        if words[0] != "serve-rewards":
            load_run_config(_shipped(name) or "quickstart_text", overrides)
    elif words[0] in {"resume", "fork", "evaluate"}:
        load_run_config("quickstart_image", parse_overrides(context.args))


def _shipped(name: str) -> str:
    """A file of the user's own stands for the quickstart."""
    return "quickstart_image" if name.startswith("my_") else str(ROOT / name) if name.startswith("configs/") else name


def python(words: list[str]) -> None:
    """A program of the repository with options that its source names, or a module."""
    if words[0] == "-m":
        assert words[1] in {"build", "docs.generator", "mkdocs", "http.server", "venv", "pytest"}
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    unknown = [word for word in words[1:] if word.startswith("--") and f'"{word.lstrip("-")}"' not in source]
    assert [word for word in unknown if f'"{word}"' not in source] == []


def make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def pip(words: list[str]) -> None:
    extras = {extra for word in words for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "raylign": raylign,
    "python": python,
    "python3": python,
    "make": make,
    "pip": pip,
    "vllm": lambda words: None,  # vLLM's own parser reads docs/judge_engine.md in tests/vllm
}
KINDS: dict[str, Callable[[Block, Path], None]] = {
    "toml": check_toml,
    "python": check_python,
    "json": check_json,
    "bash": check_bash,
    "text": nothing,
    "": check_untold,
}


@cache
def _checked() -> list[Block]:
    return [block for block in BLOCKS if not block.needs and (block.page, block.section) not in SERVED]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_is_of_a_known_kind(block: Block) -> None:
    assert block.kind in KINDS, f"{block.kind} has no check; `text` is for drawings and output"
    assert not block.title.startswith(NEEDS) or block.title in REASONS


def test_few_blocks_need_what_no_test_has() -> None:
    needed = Counter(block.title for block in BLOCKS if block.needs)
    assert set(needed) == REASONS
    assert needed.total() <= MOST_UNTESTED


@pytest.mark.parametrize("block", _checked(), ids=lambda block: block.name)
def test_a_block_does_what_it_says(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[block.kind](block, tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("toml", "[rollout]\nnum_actor = 2\n", "num_actors"),
        ("toml", '[algorithm]\ntype = "grpo"\n', "no such type"),
        ("bash", "raylign trian quickstart_image\n", "no command"),
        ("bash", "raylign train quickstart_image --learner.lrr 1e-4\n", "learner.lr"),
        ("bash", "raylign train quickstart_image \\\n  --learner.lrr 1e-4  # a comment\n", "learner.lr"),
        ("bash", "kubectl get pods\n", "no check"),
        ("", "a drawing\nraylign trian quickstart_image\n", "no command"),
        ("bash", "make everything\n", "everything"),
        ("bash", "python benchmarks/quickstart.py --no-such-option 3\n", "--no-such-option"),
        ("python", "from raylign.config import no_such_name\n", "no_such_name"),
        ("json", "{", "Expecting"),
    ],
)
def test_a_wrong_block_is_found(kind: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, RaylignError, ImportError, ValueError), match=re.escape(said)):
        KINDS[kind](Block("docs/made_up.md", 1, "", kind, "", text), tmp_path)
