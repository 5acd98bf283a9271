"""An exported model is loaded by diffusers alone and draws the picture that Raylign drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.keys import normal, sample_generators
from raylign.models import export_policy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.base import DenoisingPolicy
from raylign.models.sd3 import Sd3Config
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs, Prompt, SampleKey
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup
from rollout.prompts import GroupTask
from tests.tiny_models import sd3_folder

PROMPT = "one cat"
NUM_STEPS = 5


def _config(tuning: str) -> Sd3Config:
    return Sd3Config(
        path=str(sd3_folder()),
        height=8,
        width=16,
        tuning=tuning,  # type: ignore[arg-type]  # pydantic checks it
        lora=LoraSettings(rank=2, alpha=6),
        max_sequence_length=4,
    )


def _trained(config: Sd3Config) -> DenoisingPolicy:
    """A policy whose trainable tensors are far from where they started."""
    policy = load_policy(config, "rollout", seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return policy


def _ours(policy: DenoisingPolicy) -> np.ndarray:
    sampler = make_sampler(EulerOdeConfig(num_steps=NUM_STEPS), policy.schedule)
    engine = RolloutEngine(policy, {"eval": SamplerSetup(sampler, 1.0, Needs.FINAL)}, 0)
    engine.pull(policy.export_weights(1), "eval")
    (group,) = engine.generate(ChunkRequest((GroupTask(Prompt("p", PROMPT), -1, 0),), (0,), "eval"))
    assert group.images_GHWC is not None
    return group.images_GHWC[0]


def _theirs(pipeline: object, policy: DenoisingPolicy) -> np.ndarray:
    latents = normal(sample_generators([SampleKey(0, "p", -1, 0)], "latent"), policy.latent_shape)
    result = pipeline(  # type: ignore[operator]  # a diffusers pipeline
        PROMPT,
        height=8,
        width=16,
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,
        max_sequence_length=4,
        latents=latents,
        output_type="np",
    )
    return (result.images[0] * 255).round().astype(np.uint8)


def _pipeline(folder: Path) -> object:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_exported_pipeline_draws_the_same_picture(tmp_path: Path, tuning: str) -> None:
    config = _config(tuning)
    policy = _trained(config)
    tensors = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    export_policy(config, tensors, tmp_path / "out", adapter_only=False)
    ours = _ours(policy)
    theirs = _theirs(_pipeline(tmp_path / "out"), policy)
    # Folding a LoRA rounds differently than adding it, so one grey level may differ; full weights are the same bits.
    tolerance = 0 if tuning == "full" else 1
    assert int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= tolerance
    untrained = _theirs(_pipeline(sd3_folder()), policy)
    assert int(np.abs(untrained.astype(int) - theirs.astype(int)).max()) > 10


def test_the_exported_adapter_loads_on_the_base_with_its_scale(tmp_path: Path) -> None:
    config = _config("lora")
    policy = _trained(config)
    tensors = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    export_policy(config, tensors, tmp_path, adapter_only=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_lora_weights.safetensors"]
    pipeline = _pipeline(sd3_folder())
    pipeline.load_lora_weights(str(tmp_path))  # type: ignore[attr-defined]
    ours, theirs = _ours(policy), _theirs(pipeline, policy)
    assert int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= 1
