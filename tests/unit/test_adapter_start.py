"""Training that goes on from a saved LoRA: what fits is taken whole, what does not is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raylign.errors import ModelError
from raylign.models import DenoisingPolicy, check_model, export_policy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.image_export import ADAPTER_FILE
from raylign.models.llada import LladaConfig
from tests.tiny_image_families import TINY_FAMILIES
from tests.tiny_stable_diffusion import sd15_config, sdxl_config

FAMILIES = pytest.mark.parametrize("family", TINY_FAMILIES)


def save_adapter(config: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Export an adapter that does something; its tensors."""
    draws = torch.Generator().manual_seed(2)
    parameters = load_policy(config, "learner").trainable_parameters()
    tensors = {name: 0.3 * torch.randn(p.shape, generator=draws) for name, p in parameters.items()}
    export_policy(config, tensors, folder, adapter_only=True)
    return tensors


def starting(config: Any, start: Path, **lora: Any) -> Any:
    return config.model_copy(update={"lora": config.lora.model_copy(update={"start": str(start), **lora})})


def velocity(policy: DenoisingPolicy, encoder: DenoisingPolicy) -> torch.Tensor:
    state = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.predict(state, torch.tensor([0.3, 0.7]), encoder.encode("glow 7", False).repeat(2))


@FAMILIES
def test_an_exported_adapter_is_where_training_goes_on(family: type, tmp_path: Path) -> None:
    config = TINY_FAMILIES[family].config()
    tensors = save_adapter(config, tmp_path)
    began = starting(config, tmp_path)
    check_model(began)
    learner, attached = load_policy(began, "learner"), load_policy(began, "rollout")
    folded = load_policy(began, "rollout", fold=True)
    for policy in (learner, attached):
        for name, parameter in policy.trainable_parameters().items():
            assert torch.equal(parameter, tensors[name])
    trained = load_policy(config, "rollout")
    before = velocity(trained, trained)
    trained.load_weights(learner.export_weights(3, tensors))
    expected = velocity(trained, trained)
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(velocity(learner, trained), expected)
    assert torch.equal(velocity(attached, trained), expected)
    torch.testing.assert_close(velocity(folded, trained), expected, rtol=1e-4, atol=1e-5)
    # A published adapter replaces the one it started from; it is not added to it.
    nothing = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    folded.load_weights(learner.export_weights(4, nothing))
    torch.testing.assert_close(velocity(folded, trained), before, rtol=1e-5, atol=1e-6)


def test_pefts_own_files_are_read_too(tmp_path: Path) -> None:
    config = sd15_config()
    tensors = save_adapter(config, tmp_path / "diffusers")
    saved = load_file(tmp_path / "diffusers" / ADAPTER_FILE)
    folder = tmp_path / "peft"
    folder.mkdir()
    renamed = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in saved.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "rank_pattern": {}}))
    for start in (folder, folder / "adapter_model.safetensors"):
        parameters = load_policy(starting(config, start), "learner").trainable_parameters()
        assert all(torch.equal(parameter, tensors[name]) for name, parameter in parameters.items())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_rslora": True}))
    with pytest.raises(ModelError, match="was made with use_rslora"):
        check_model(starting(config, folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"has alpha 2, lora\.alpha is 4; set lora\.alpha = 2"):
        check_model(starting(config, folder))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    with safe_open(file, framework="pt") as saved:
        metadata = saved.metadata()
    save_file(change(load_file(file)), file, metadata)


def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    return {**tensors, name: torch.zeros(2, 999)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), r"lacks down_blocks\.0\..*lora_A.*take an adapter of this"),
        (lambda tensors: {**tensors, "unet.far.lora_A.weight": torch.zeros(2, 8)}, r"foreign tensor unet\.far\.lora_A"),
        (lambda tensors: {**tensors, "unet.far.alpha": torch.zeros(1)}, r"unet\.far\.alpha of .* is no LoRA matrix"),
        (lambda tensors: {**tensors, "text_encoder.m.lora_A.weight": torch.zeros(1)}, r"text_encoder\.m.* is no LoRA"),
        (widened, r"lora_A\.weight of .* is \(2, 999\), this model's must be \(2, 8\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    config = sd15_config()
    save_adapter(config, tmp_path)
    rewrite(tmp_path / ADAPTER_FILE, change)
    with pytest.raises(ModelError, match=message):
        check_model(starting(config, tmp_path))


def test_an_adapter_of_another_model_is_refused_before_anything_loads(tmp_path: Path) -> None:
    save_adapter(sdxl_config(), tmp_path)
    with pytest.raises(ModelError, match="take an adapter of this model"):
        check_model(starting(sd15_config(), tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"has rank 2, lora\.rank is 4; set lora\.rank = 2"),
        ({"alpha": 8.0}, r"has alpha 4, lora\.alpha is 8; set lora\.alpha = 4"),
        ({"targets": ("to_q",)}, r"foreign tensor .*, with lora\.targets as it was trained"),
    ],
)
def test_other_settings_than_the_adapters_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(sd15_config(), tmp_path)
    with pytest.raises(ModelError, match=message):
        check_model(starting(sd15_config(), tmp_path, **changes))


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no adapter and holds none \(pytorch_lora_weights"):
        check_model(starting(sd15_config(), tmp_path))
    (tmp_path / ADAPTER_FILE).write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        check_model(starting(sd15_config(), tmp_path))
    with pytest.raises(ModelError, match=r"lora\.start needs tuning = 'lora'"):
        check_model(starting(sd15_config("full"), tmp_path))
    with pytest.raises(ValidationError, match=r"lora\.start is for image models"):
        LladaConfig(path="x", lora=LoraSettings(start="y"))
