"""The house's own rules, checked over the tree: what is imported when, what is tracked, how long things are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.algorithms import IMAGE_ALGORITHMS
from raylign.config import load_config
from services.config import RunConfig, load_run_config
from services.reward_config import RewardServerConfig

ROOT = Path(__file__).parents[2]
PACKAGES = ("raylign", "learner", "rollout", "rewards", "services")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "docs", "tests")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
RUN_CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.toml") if not path.name.startswith("rewards_"))
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.toml"))
ALGORITHM_PRESETS = [path for path in PRESETS if path.stem != "explore"]
PICTURE_TASKS = ("quickstart_image", "quickstart_shapes")
REWARD_CONFIGS = sorted((ROOT / "configs").glob("rewards_*.toml"))

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 120
HEAVY = {"torch", "ray", "diffusers", "transformers", "peft", "cv2", "rapidocr", "onnxruntime", "tensorboard"}
_MODULES = "-- modules:"
_ONE_MACHINE = re.compile(r"(?<![\w.])/(work|home|Users)/")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`, which may raise SystemExit."""
    script = (
        f"import sys\ntry:\n{textwrap.indent(code, '    ')}\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print('{_MODULES}', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition(_MODULES)[2].split())


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["serve-rewards", "--help"]])
def test_asking_the_command_line_for_help_imports_nothing_heavy(argv: list[str]) -> None:
    loaded = _imported_by(f"import sys\nsys.argv = ['raylign', *{argv!r}]\nfrom services.cli import main\nmain()")
    assert "services" in loaded
    assert not loaded & HEAVY


def test_reading_a_configuration_imports_neither_ray_nor_a_model_library() -> None:
    loaded = _imported_by("import services.config")
    assert not loaded & (HEAVY - {"torch"})


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "services"])
def test_a_package_works_without_ray(package: str) -> None:
    assert "ray" not in _imported_by(f"import {package}")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=_name)
def test_a_run_configuration_parses(path: Path) -> None:
    assert isinstance(load_run_config(str(path)), RunConfig)


@pytest.mark.parametrize("task", PICTURE_TASKS)
@pytest.mark.parametrize("path", ALGORITHM_PRESETS, ids=_name)
def test_a_preset_fits_every_picture_task(path: Path, task: str) -> None:
    assert load_run_config([task, str(path)]).algorithm.type == path.stem


def test_every_picture_algorithm_has_a_preset() -> None:
    types = [config.model_fields["type"].default for config in IMAGE_ALGORITHMS]
    assert sorted(types) == [path.stem for path in ALGORITHM_PRESETS]


@pytest.mark.parametrize("task", PICTURE_TASKS)
def test_the_preset_of_exploration_fits_every_picture_task(task: str) -> None:
    explore = load_run_config([task, "explore"]).rollout.explore
    assert explore is not None
    assert explore.regenerate


@pytest.mark.parametrize("path", REWARD_CONFIGS, ids=_name)
def test_a_reward_server_configuration_parses(path: Path) -> None:
    assert isinstance(load_config(RewardServerConfig, path), RewardServerConfig)


def test_the_readme_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"make ([a-z][a-z-]+)  ", readme)) <= set(targets)
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_quickstart_is_shipped() -> None:
    assert ROOT / "configs" / "quickstart_image.toml" in RUN_CONFIGS


def test_no_root_module_can_shadow_another() -> None:
    roots = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert roots == set(PACKAGES), "every root module is importable by its bare name wherever a run's code is"


@pytest.mark.parametrize("folder", ["docker", "deploy", "tests", "benchmarks", "docs", "configs", "examples"])
def test_a_folder_that_is_no_package_has_no_init(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_pytest_finds_every_test_file() -> None:
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= {"unit", "contract", "numeric", "service", "vllm", "gpu"}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_source_file_keeps_the_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imported = set(_imports(tree))
    long_functions = [
        f"{node.name}: {(node.end_lineno or 0) - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    package = path.relative_to(ROOT).parts[0]
    assert text.count("\n") <= MAX_FILE_LINES
    assert not long_functions
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle"}, "JSON, multipart or safetensors instead"
    assert "ray" not in imported or package in {"services", "benchmarks", "examples", "tests"}, "Ray stays in services"


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    suffixes = {".py", ".toml", ".md", ".yaml", ".yml", ".sh"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = [
        f"{name}:{number}: {line.strip()[:80]}"
        for name in listed.splitlines()
        if Path(name).suffix in suffixes and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if _ONE_MACHINE.search(line)
    ]
    assert not found
