"""Checkpoints by their name on the model hub, from a cache as its client keeps it, with no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "clip": ["model.safetensors", "config.json", "pytorch_model.bin"],
    "old": ["pytorch_model.bin", "config.json"],
    "tuned": ["HPS.pt"],
}
SCRIPT = """
from raylign.errors import ModelError
from rewards.vision.checkpoints import find_directory, find_file, weight_files

print(find_file("lab/tuned/HPS.pt", "fetch it").read_text())
for name in ("lab/clip", "lab/old"):
    print(*(file.read_text() for file in weight_files(find_directory(name, "fetch it"))))
for ask in (lambda: find_directory("lab/absent", "fetch it"), lambda: find_file("lab/tuned/absent.pt", "fetch it")):
    try:
        ask()
    except ModelError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for name, files in FILES.items():
        home = cache / f"models--lab--{name}"
        snapshot = home / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(REVISION)
        for file in files:
            (snapshot / file).write_text(f"{name}'s {file}")
    return cache


def test_names_on_the_hub_are_found_in_its_cache_and_absent_ones_named(hub_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    weights, clip, old, directory, file = done.stdout.splitlines()
    assert (weights, clip, old) == ("tuned's HPS.pt", "clip's model.safetensors", "old's pytorch_model.bin")
    assert directory.startswith("'lab/absent' is not here, and the model hub did not give it (")
    assert file.startswith("'lab/tuned/absent.pt' is not here, and the model hub did not give it (")
    assert directory.endswith("; fetch it")
    assert file.endswith("; fetch it")
