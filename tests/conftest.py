"""What every test runs under: no hub, no usage statistics, one compute thread, the same examples each time.

The folder says what kind a test is: `service`, `vllm` and `gpu` tests get their marker from it.
"""

from __future__ import annotations

from services.process import prepare_environment

prepare_environment()  # before anything imports torch, Ray or a hub library

# ruff: noqa: E402
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

_HERE = Path(__file__).parent
_MARKED_FOLDERS = ("service", "vllm", "gpu")

hypothesis.settings.register_profile("raylign", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("raylign")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and skip those that need a GPU where there is none."""
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        folder = item.path.relative_to(_HERE).parts[0]
        if folder in _MARKED_FOLDERS:
            item.add_marker(folder)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def one_thread_and_fixed_global_state() -> Iterator[None]:
    """One compute thread, and global generators in one state: code under test must not depend on either."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may read the global generator
    yield
    torch.set_num_threads(1)
