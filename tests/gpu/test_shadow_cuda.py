"""Shadows on CUDA: compiled once for all versions, native where the device has the units, close to the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylign.models import load_policy
from raylign.models.adapters import LoraSettings
from raylign.precision import Format
from raylign.precision.config import QuantizerConfig
from raylign.precision.kept_high import layers_to_quantise
from raylign.precision.quantizer import make_quantizer, native_backends
from raylign.precision.shadow import Shadow, linear_sizes
from raylign.types import Needs, Prompt
from rollout.engine import ChunkRequest, LowPrecision, RolloutEngine, SamplerSetup
from rollout.prompts import GroupTask
from tests.tiny_image_families import flux_config
from tests.tiny_models import euler

CONFIG = flux_config("lora", lora=LoraSettings(rank=4, alpha=8.0))
FORMATS: tuple[Format, ...] = ("fp8", "nvfp4", "mxfp4")


def _shadowed(format_name: Format) -> tuple[Any, Shadow]:
    """A bf16 FLUX with its adapter folded, as rollouts have it, and its shadow."""
    policy: Any = load_policy(CONFIG, "rollout", "cuda", "bf16", fold=True)
    layers = layers_to_quantise(linear_sizes(policy.network), "flux", QuantizerConfig())
    return policy, Shadow(policy.network, make_quantizer(format_name, QuantizerConfig(), "cuda"), layers)


def _version(version: int) -> Any:
    learner: Any = load_policy(CONFIG, "learner")
    tensors = {
        name: 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version + index))
        for index, (name, parameter) in enumerate(learner.trainable_parameters().items())
    }
    return learner.export_weights(version, tensors)


def _velocity(policy: Any) -> torch.Tensor:
    state = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).cuda()
    sigma_B = torch.tensor([0.95, 0.5, 0.05], device="cuda")
    with torch.no_grad():
        return policy.predict(state, sigma_B, policy.encode("one cat", False).repeat(3))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_shadow_answers_nearly_as_the_network_does(format_name: Format) -> None:
    policy, shadow = _shadowed(format_name)
    policy.load_weights(_version(1))
    shadow.refresh()
    exact, rough = _velocity(policy), _velocity(policy.with_network(shadow.network))
    gap = (rough - exact).norm() / exact.norm()
    assert 1e-3 < gap < 0.2
    native = native_backends("cuda")[format_name] is not None
    assert shadow.describe().startswith(f"{format_name}, {'native' if native else 'emulated'}")


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_compiled_shadow_stays_valid_over_versions(format_name: Format) -> None:
    policy, shadow = _shadowed(format_name)
    if native_backends("cuda")[format_name] is None:
        pytest.skip(f"this GPU emulates {format_name}, and emulation is not for compiling")
    low = policy.with_network(shadow.network)
    compiled = policy.with_network(torch.compile(shadow.network))
    before = _velocity(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for version in (1, 2):
            policy.load_weights(_version(version))
            shadow.refresh()
            after = _velocity(compiled)
            assert (after - _velocity(low)).norm() < 0.05 * after.norm(), "another order of roundings"
            assert (after - before).norm() > 0.05 * after.norm(), "the new version shows"


def test_drafts_on_the_gpu_leave_the_rollouts_bits_alone() -> None:
    policy, shadow = _shadowed("fp8")
    setup = SamplerSetup(euler(), 1.0, Needs.FINAL)
    low = LowPrecision(policy.with_network(shadow.network), shadow)
    request = ChunkRequest((GroupTask(Prompt("p", "one cat"), 0, 0),), (0, 1, 2))

    def drawn(engine: RolloutEngine[Any], slot: Any) -> torch.Tensor:
        (group,) = engine.generate(ChunkRequest(request.tasks, request.sample_indices, slot))
        return group.latents.final_GCHW

    plain: RolloutEngine[Any] = RolloutEngine(policy, {"rollout": setup}, 0)
    both: RolloutEngine[Any] = RolloutEngine(policy, {"rollout": setup, "draft": setup}, 0, {"draft": low})
    for engine in (plain, both):
        engine.pull(_version(1))
    alone = drawn(plain, "rollout")
    drafts = drawn(both, "draft")
    assert torch.equal(drawn(both, "rollout"), alone)
    assert 0 < (drafts - alone).norm() < 0.2 * alone.norm()
