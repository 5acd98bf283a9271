"""The same code on CUDA: bf16 rollouts against the fp32 learner, on the policy's real device."""

from __future__ import annotations

import pytest
import torch

from raylign.models import load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.sd3 import Sd3Config
from raylign.samplers import make_sampler
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.types import Needs, Prompt, SampleKey
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup, denoise
from rollout.prompts import GroupTask
from services.parity import parity_gap
from tests.tiny_models import sd3_folder

CONFIG_VALUES = {"height": 8, "width": 16, "lora": LoraSettings(rank=2, alpha=4), "max_sequence_length": 4}


def _engine(device: str, precision: str) -> RolloutEngine:
    config = Sd3Config(path=str(sd3_folder()), tuning="full", **CONFIG_VALUES)  # type: ignore[arg-type]
    policy = load_policy(config, "rollout", device, precision)  # type: ignore[arg-type]
    sampler = make_sampler(FlowSdeConfig(num_steps=4), policy.schedule)
    engine = RolloutEngine(policy, {"rollout": SamplerSetup(sampler, 1.0, Needs.STEPS | Needs.LOGPROBS)}, 0)
    master = load_policy(config, "learner", "cpu")
    engine.pull(master.export_weights(0))
    return engine


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_a_gpu_actor_agrees_with_the_cpu(precision: str, tolerance: float) -> None:
    probe = _engine("cuda", precision).probe("one cat")
    reference = _engine("cpu", "fp32").probe("one cat")
    assert torch.equal(probe.state, reference.state), "noise is drawn by key on the CPU, the same everywhere"
    assert parity_gap(probe, reference.answer, tolerance) <= tolerance


def test_log_probs_are_fp32_and_finite_under_bf16() -> None:
    (group,) = _engine("cuda", "bf16").generate(ChunkRequest((GroupTask(Prompt("p", "one cat"), 0, 0),), (0, 1)))
    logprobs = group.latents.rollout_logprob_GS
    assert logprobs is not None
    assert logprobs.dtype == torch.float32
    assert torch.isfinite(logprobs).all()


def test_the_same_key_gives_the_same_sample_twice_on_the_gpu() -> None:
    engine = _engine("cuda", "bf16")
    setup = engine._setups["rollout"]
    assert isinstance(setup, SamplerSetup)
    keys = [SampleKey(0, "p", 0, n) for n in range(3)]
    with torch.no_grad():
        conditioning = engine.policy.encode("one cat", with_negative=False).repeat(3)
        first = denoise(engine.policy, setup, conditioning, keys)
        second = denoise(engine.policy, setup, conditioning, keys)
    assert torch.equal(first.final_GCHW, second.final_GCHW)
