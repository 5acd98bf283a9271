"""An exported model of any image family is loaded by diffusers alone and draws the picture that Raylign drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.keys import normal, sample_generators
from raylign.models import export_policy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.base import DenoisingPolicy
from raylign.models.image_export import ADAPTER_FILE
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs, Prompt, SampleKey
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup
from rollout.prompts import GroupTask
from tests.tiny_image_families import TINY_FAMILIES, draw_with_diffusers, load_with_diffusers

PROMPT = "one cat"
NUM_STEPS = 5
FAMILIES = pytest.mark.parametrize("family", TINY_FAMILIES)


def _trained(config: Any) -> tuple[DenoisingPolicy, dict[str, torch.Tensor]]:
    """A policy whose trainable tensors are far from where they started, and these."""
    policy = load_policy(config, "rollout", seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return policy, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


def _ours(policy: DenoisingPolicy) -> np.ndarray:
    sampler = make_sampler(EulerOdeConfig(num_steps=NUM_STEPS), policy.schedule)
    engine = RolloutEngine(policy, {"eval": SamplerSetup(sampler, 1.0, Needs.FINAL)}, 0)
    engine.pull(policy.export_weights(1), "eval")
    (group,) = engine.generate(ChunkRequest((GroupTask(Prompt("p", PROMPT), -1, 0),), (0,), "eval"))
    assert group.images_GHWC is not None
    return group.images_GHWC[0].astype(int)


def _theirs(pipeline: Any, config: Any, policy: DenoisingPolicy) -> np.ndarray:
    noise = normal(sample_generators([SampleKey(0, "p", -1, 0)], "latent"), policy.latent_shape)
    (picture,) = draw_with_diffusers(pipeline, config, PROMPT, noise, NUM_STEPS, output_type="np")
    return (picture * 255).round().astype(int)


@FAMILIES
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_exported_pipeline_draws_the_same_picture(family: type, tuning: str, tmp_path: Path) -> None:
    config = TINY_FAMILIES[family].config(tuning, lora=LoraSettings(rank=2, alpha=6))
    policy, tensors = _trained(config)
    export_policy(config, tensors, tmp_path / "out", adapter_only=False)
    ours = _ours(policy)
    theirs = _theirs(load_with_diffusers(tmp_path / "out"), config, policy)
    # Folding a LoRA rounds differently than adding it, so a grey level may differ.
    assert np.abs(ours - theirs).max() <= 1
    untrained = _theirs(load_with_diffusers(config.path), config, policy)
    assert np.abs(untrained - theirs).max() > 10
    assert (tmp_path / "out" / "adapter").is_dir() == (tuning == "lora")


@FAMILIES
def test_the_exported_adapter_loads_on_the_base_with_its_scale(family: type, tmp_path: Path) -> None:
    config = TINY_FAMILIES[family].config("lora", lora=LoraSettings(rank=2, alpha=6))
    policy, tensors = _trained(config)
    export_policy(config, tensors, tmp_path, adapter_only=True)
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]
    pipeline = load_with_diffusers(config.path)
    pipeline.load_lora_weights(str(tmp_path))
    assert np.abs(_ours(policy) - _theirs(pipeline, config, policy)).max() <= 1
