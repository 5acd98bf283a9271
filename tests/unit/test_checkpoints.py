"""Checkpoints by their name on the model hub, from a cache as its client keeps it, with no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_clip import clip_folder
from tests.tiny_open_clip import open_clip_file

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
from raylign.errors import ModelError
from rewards.checkpoints import weight_files, find_directory, find_file
from rewards.clip_model import ClipModel

assert find_file("lab/tuned/HPS.pt", "fetch it").name == "HPS.pt"
assert weight_files(find_directory("lab/clip", "fetch it"))
tuned = ClipModel("lab/tuned/HPS.pt", processor_path="lab/clip")
print(tuned.embed_texts(["a cat"]).shape)
for ask in (lambda: find_directory("lab/absent", "fetch it"), lambda: find_file("lab/tuned/absent.pt", "fetch it")):
    try:
        ask()
    except ModelError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for name, files in {"clip": list(Path(clip_folder("gelu")).iterdir()), "tuned": [Path(open_clip_file())]}.items():
        home = cache / f"models--lab--{name}"
        snapshot = home / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(REVISION)
        for file in files:
            shutil.copy(file, snapshot / ("HPS.pt" if file.suffix == ".pt" else file.name))
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
    shape, directory, file = done.stdout.splitlines()
    assert shape == "(1, 768)"
    assert directory.startswith("'lab/absent' is not here, and the model hub did not give it (")
    assert file.startswith("'lab/tuned/absent.pt' is not here, and the model hub did not give it (")
    assert directory.endswith("; fetch it")
    assert file.endswith("; fetch it")
