"""What blocks of the documentation find already there: names that the text around them speaks of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raylign.models import load_policy
from raylign.models.swapping import clone_tensors
from raylign.weights import make_snapshot
from services.assembly import adapter_seed
from services.config import load_run_config


def two_snapshots(folder: Path) -> dict[str, Any]:
    """Two whole snapshots of the same tensors."""
    before = {"weight": torch.arange(256, dtype=torch.float32).reshape(16, 16)}
    after = {"weight": before["weight"].clone()}
    after["weight"][0, :4] += 0.5
    return {"base": make_snapshot(before, 1, "full"), "new": make_snapshot(after, 2, "full")}


def geneval_file(folder: Path) -> dict[str, Any]:
    """Two prompts in GenEval's own format."""
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    ]
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def trained_quickstart(folder: Path) -> dict[str, Any]:
    """A snapshot of the quickstart's weights, each a little larger."""
    config = load_run_config("quickstart_image")
    tensors = clone_tensors(load_policy(config.model, "rollout", seed=adapter_seed(config)))
    return {"snapshot": make_snapshot({name: 1.01 * tensor for name, tensor in tensors.items()}, 1, "full")}


PRELUDES: dict[tuple[str, str], Callable[[Path], dict[str, Any]]] = {
    ("docs/weights.md", "Deltas"): two_snapshots,
    ("docs/reward_gap.md", "RLG: how much of the training to apply"): trained_quickstart,
    ("docs/rewards/geneval.md", "Prompts"): geneval_file,
}
