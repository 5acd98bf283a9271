"""What a plan says of a model, against the model itself: every family, from headers, config.json and meta runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from raylign.errors import ModelError
from raylign.models import MODEL_FAMILIES, load_policy
from raylign.models.base import Conditioning
from raylign.models.tokens import TokenPrompts, join_prompts
from services.plan.activations import CLIP_TOKENS, conditioning, kept_activations
from services.plan.sizes import ARCHITECTURES, FORMATS, model_sizes, read_header
from tests.tiny_image_families import TINY_FAMILIES
from tests.tiny_text_models import text_config

IMAGES: dict[type, Callable[[Any], Any]] = {config: family.config for config, family in TINY_FAMILIES.items()}
TUNINGS = pytest.mark.parametrize("tuning", ["lora", "full"])
FAMILIES = pytest.mark.parametrize("family", list(MODEL_FAMILIES))
# The learner's CPU kernel of attention keeps other tensors than the meta device's.
BOUND = 0.25


def configured(family: type, tuning: str, **changes: Any) -> Any:
    if family in IMAGES:
        return IMAGES[family](tuning, **changes)
    return text_config(family, "full" if tuning == "full" else "lora", **changes)


def without_weights(config: Any, folder: Path) -> Any:
    """The same model as a folder of which only the small files were downloaded."""
    shutil.copytree(config.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return config.model_copy(update={"path": str(folder)})


def test_every_family_can_be_planned() -> None:
    assert ARCHITECTURES.keys() | FORMATS.keys() == MODEL_FAMILIES.keys()


@FAMILIES
@TUNINGS
def test_headers_say_what_the_learner_trains(family: type, tuning: str) -> None:
    config = configured(family, tuning)
    sizes = model_sizes(config)
    policy: Any = load_policy(config, "learner")
    trained = {name: tuple(parameter.shape) for name, parameter in policy.trainable_parameters().items()}
    assert dict(sizes.trained) == trained
    assert sizes.from_files
    assert sizes.missing == ()
    if tuning == "lora":
        adapted = {name for name, module in policy.network.named_modules() if hasattr(module, "lora_A")}
        assert sizes.adapted.keys() == adapted


@FAMILIES
def test_the_network_is_known_without_its_weights(family: type, tmp_path: Path) -> None:
    config = configured(family, "lora")
    whole, bare = model_sizes(config), model_sizes(without_weights(config, tmp_path / "bare"))
    assert not bare.from_files
    assert bare.trained == whole.trained
    assert bare.adapted == whole.adapted
    assert set(bare.missing) == {one.name for one in whole.others if one.num_values}


@pytest.mark.parametrize("family", list(IMAGES))
def test_the_rest_of_a_pipeline_is_counted(family: type) -> None:
    config = configured(family, "lora")
    pipeline = load_policy(config, "rollout")._pipeline  # type: ignore[union-attr]  # what the weights went into
    for one in model_sizes(config).others:
        module = getattr(pipeline, one.name)
        held = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
        assert one.num_values == pytest.approx(held, rel=0.05), one.name


@FAMILIES
@TUNINGS
def test_the_count_of_activations_is_what_autograd_keeps(family: type, tuning: str) -> None:
    config, rows = configured(family, tuning), 4
    sizes = model_sizes(config)
    policy: Any = load_policy(config, "learner")
    own = {StorageWeakRef(p.untyped_storage()).cdata for p in (*policy.network.parameters(), *policy.network.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        known = StorageWeakRef(tensor.untyped_storage()).cdata
        if known not in own:
            kept.setdefault(known, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ask(policy, config, sizes, rows)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = kept_activations(config, sizes, "fp32", rows, guided=False)
    assert counted.whole == pytest.approx(real, rel=BOUND)
    assert 0 < counted.working <= counted.whole
    assert counted.recomputed <= counted.whole
    assert kept_activations(config, sizes, "fp32", rows, guided=True).whole == pytest.approx(
        2 * counted.whole, rel=0.02
    )
    assert kept_activations(config, sizes, "bf16", rows, guided=False).whole < 0.8 * counted.whole


def _ask(policy: Any, config: Any, sizes: Any, rows: int) -> None:
    """A forward of the learner's kind: of a picture's network, or of the longest prompt and the canvas's logits."""
    if type(config) in FORMATS:
        ids = torch.zeros(1, config.max_prompt_length, dtype=torch.int64)
        prompts = join_prompts([TokenPrompts(ids, torch.ones_like(ids, dtype=torch.bool))]).repeat(rows)
        canvas = torch.full((rows, config.canvas_length), policy.vocabulary.mask_id)
        policy.predict(canvas, prompts).logits_BLV.logsumexp(dim=-1)
        return
    shapes = conditioning(config, sizes, rows)

    def real(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.ones_like(tensor, device="cpu")

    told = Conditioning(
        torch.ones_like(shapes.prompt_embeds_PLD, device="cpu"), real(shapes.pooled_PD), real(shapes.mask_PL)
    )
    policy.predict(torch.randn(rows, *policy.latent_shape), torch.linspace(0.1, 0.9, rows), told)


def test_prompts_are_as_long_as_the_encoders_make_them() -> None:
    for family in IMAGES:
        config = configured(family, "lora")
        sizes = model_sizes(config)
        real = load_policy(config, "rollout").encode("glow 7", False)
        planned = conditioning(config, sizes, 1)
        assert planned.prompt_embeds_PLD.shape[2] == real.prompt_embeds_PLD.shape[2], family
        if real.prompt_embeds_PLD.shape[1] >= CLIP_TOKENS:  # tiny tokenizers are shorter than CLIP's
            assert planned.prompt_embeds_PLD.shape == real.prompt_embeds_PLD.shape, family
        for mine, theirs in ((planned.pooled_PD, real.pooled_PD), (planned.mask_PL, real.mask_PL)):
            assert (mine is None) == (theirs is None), family


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "model.safetensors"
    bad.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        read_header(bad)
    with pytest.raises(ModelError, match=r"model\.path"):
        model_sizes(configured(next(iter(IMAGES)), "lora").model_copy(update={"path": str(tmp_path / "none")}))
