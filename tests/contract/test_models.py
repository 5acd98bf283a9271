"""What every image row of the MODEL_FAMILIES table promises, on a tiny random model of the family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raylign.errors import ModelError, ShapeError, WeightError
from raylign.models import MODEL_FAMILIES, DenoisingPolicy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.base import guided_velocity, join_conditioning
from raylign.precision import autocast
from raylign.weights import make_snapshot
from tests.tiny_image_families import TINY_FAMILIES

TINY = {config: family.config for config, family in TINY_FAMILIES.items()}
IMAGE_FAMILIES = [config for config, family in MODEL_FAMILIES.items() if family.modality == "image"]
ROWS = pytest.mark.parametrize("family", IMAGE_FAMILIES)
TUNINGS = pytest.mark.parametrize("tuning", ["lora", "full"])


def load(family: type, role: str = "rollout", tuning: str = "lora", **options: Any) -> DenoisingPolicy:
    chosen: dict[str, Any] = {"role": role, "seed": 3, **options}
    return load_policy(TINY[family](tuning), **chosen)


def ask(policy: DenoisingPolicy, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, *policy.latent_shape, generator=generator), torch.linspace(0.1, 1.0, rows)


def moved(policy: DenoisingPolicy, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """The policy's tensors after some training: an adapter that does something."""
    generator = torch.Generator().manual_seed(6)
    return {
        name: p.detach() + scale * torch.randn(p.shape, generator=generator)
        for name, p in policy.trainable_parameters().items()
    }


def velocity(policy: DenoisingPolicy, encoder: DenoisingPolicy | None = None) -> torch.Tensor:
    state, sigma = ask(policy)
    with torch.no_grad():
        return policy.predict(state, sigma, (encoder or policy).encode("glow 7", False).repeat(2))


def test_every_family_has_a_tiny_model() -> None:
    assert TINY.keys() == set(IMAGE_FAMILIES)


@ROWS
def test_it_predicts_an_fp32_velocity_for_each_state(family: type) -> None:
    policy = load(family)
    state, sigma = ask(policy, 3)
    with torch.no_grad():
        answer = policy.predict(state, sigma, policy.encode("glow", False).repeat(3))
    assert answer.shape == state.shape
    assert answer.dtype == torch.float32
    assert torch.isfinite(answer).all()
    assert answer.std() > 0
    assert 0.9 < policy.schedule.levels(40, None)[0] <= 1.0


@ROWS
def test_it_is_told_the_time_as_a_float(family: type) -> None:
    # Several published trainers truncate sigma * 1000 to an integer.
    policy = load(family)
    state, _ = ask(policy, 1)
    told = policy.encode("glow", False)
    with torch.no_grad():
        first, second = (policy.predict(state, torch.tensor([sigma]), told) for sigma in (0.5001, 0.5004))
    assert not torch.equal(first, second)


@ROWS
def test_a_state_of_another_shape_is_refused(family: type) -> None:
    policy = load(family)
    state, sigma = ask(policy)
    with pytest.raises(ShapeError, match="state_BCHW must be"):
        policy.predict(state[..., :-1], sigma, policy.encode("glow", False).repeat(2))


@ROWS
def test_a_prompts_encoding_does_not_depend_on_its_neighbours_or_on_when(family: type) -> None:
    policy = load(family)
    first = policy.encode("glow 7", True)
    policy.encode("a much longer text than that", True)
    again = policy.encode("glow 7", True)
    assert torch.equal(first.prompt_embeds_PLD, again.prompt_embeds_PLD)
    assert first.pooled_PD is None or torch.equal(first.pooled_PD, again.need_pooled())
    assert torch.equal(first.need_negative().prompt_embeds_PLD, again.need_negative().prompt_embeds_PLD)
    assert policy.encode("glow 7", False).negative is None
    other = policy.encode("glow 8", True)
    assert not torch.equal(first.prompt_embeds_PLD, other.prompt_embeds_PLD)
    joined = join_conditioning([first, other]).rows(slice(0, 1))
    assert torch.equal(joined.prompt_embeds_PLD, first.prompt_embeds_PLD)


@ROWS
def test_a_rows_velocity_does_not_depend_on_its_neighbours_contents(family: type) -> None:
    policy = load(family)
    state, sigma = ask(policy)
    told = policy.encode("glow", False).repeat(2)
    other = state.clone()
    other[1] = 1e3
    with torch.no_grad():
        assert torch.equal(policy.predict(state, sigma, told)[0], policy.predict(other, sigma, told)[0])


@ROWS
def test_guidance_extrapolates_from_the_unconditional_velocity(family: type) -> None:
    policy = load(family)
    state, sigma = ask(policy)
    told = policy.encode("glow", True).repeat(2)
    with torch.no_grad():
        plain, without = policy.predict(state, sigma, told), policy.predict(state, sigma, told.need_negative())
        assert torch.equal(guided_velocity(policy, state, sigma, told, 1.0), plain)
        guided = guided_velocity(policy, state, sigma, told, 4.5)
    torch.testing.assert_close(guided, without + 4.5 * (plain - without), rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="needs negative conditioning"):
        guided_velocity(policy, state, sigma, policy.encode("glow", False).repeat(2), 4.5)


@ROWS
def test_it_decodes_rgb_bytes(family: type) -> None:
    policy = load(family)
    state, _ = ask(policy)
    pictures = policy.decode(state)
    config = TINY[family]()
    assert pictures.shape == (2, config.height, config.width, 3)
    assert pictures.dtype == "uint8"
    assert pictures.std() > 0


@ROWS
@TUNINGS
def test_learner_and_rollout_are_one_function_of_the_same_tensors(family: type, tuning: str) -> None:
    learner, rollout = load(family, "learner", tuning), load(family, "rollout", tuning)
    assert list(learner.trainable_parameters()) == list(rollout.trainable_parameters())
    assert torch.equal(velocity(learner, rollout), velocity(rollout))


@ROWS
def test_a_learner_has_only_what_training_touches(family: type) -> None:
    learner = load(family, "learner")
    state, _ = ask(learner)
    with pytest.raises(ModelError, match="a learner's policy cannot encode"):
        learner.encode("glow", False)
    with pytest.raises(ModelError, match="a learner's policy cannot decode"):
        learner.decode(state)


@ROWS
@TUNINGS
def test_published_weights_arrive_bit_for_bit(family: type, tuning: str) -> None:
    learner, rollout = load(family, "learner", tuning), load(family, "rollout", tuning)
    before = velocity(rollout)
    tensors = moved(learner)
    snapshot = learner.export_weights(7, tensors)
    rollout.load_weights(snapshot)
    assert snapshot.version == 7
    assert not torch.equal(velocity(rollout), before)
    for name, parameter in rollout.trainable_parameters().items():
        assert torch.equal(parameter, tensors[name])
    assert rollout.export_weights(7).sha256 == snapshot.sha256


@ROWS
def test_an_adapter_is_a_small_part_and_starts_as_nothing(family: type) -> None:
    adapted, plain = load(family, "rollout", "lora"), load(family, "rollout", "full")
    assert torch.equal(velocity(adapted), velocity(plain))
    sizes = [sum(p.numel() for p in policy.trainable_parameters().values()) for policy in (adapted, plain)]
    assert sizes[0] < sizes[1] / 4
    assert adapted.export_weights(0).kind == "adapter"
    assert plain.export_weights(0).kind == "full"


@ROWS
def test_an_adapters_start_is_its_seeds_and_leaves_global_randomness_alone(family: type) -> None:
    torch.manual_seed(0)
    first = load(family, "learner", seed=3).export_weights(0).sha256
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == drawn
    torch.manual_seed(123)
    assert load(family, "learner", seed=3).export_weights(0).sha256 == first
    assert load(family, "learner", seed=4).export_weights(0).sha256 != first


@ROWS
def test_a_folded_adapter_computes_what_an_attached_one_does(family: type) -> None:
    learner, attached, folded = load(family, "learner"), load(family), load(family, fold=True)
    assert torch.equal(velocity(folded), velocity(attached))
    snapshot = learner.export_weights(1, moved(learner))
    attached.load_weights(snapshot)
    folded.load_weights(snapshot)
    torch.testing.assert_close(velocity(folded), velocity(attached), rtol=1e-4, atol=1e-5)
    assert (velocity(attached) - velocity(learner, attached)).abs().max() > 1e-2


@ROWS
def test_folding_again_and_again_does_not_drift(family: type) -> None:
    learner, folded, once = load(family, "learner"), load(family, fold=True), load(family, fold=True)
    last = learner.export_weights(3, moved(learner))
    for version, scale in enumerate((3.0, 0.01, 1.0)):
        folded.load_weights(learner.export_weights(version, moved(learner, scale)))
    folded.load_weights(last)
    once.load_weights(last)
    assert torch.equal(velocity(folded), velocity(once))
    pristine = load(family, fold=True)
    folded.load_weights(learner.export_weights(4))  # B is zero: the untouched base again
    assert torch.equal(velocity(folded), velocity(pristine))


@ROWS
@pytest.mark.parametrize(("tuning", "fold"), [("lora", False), ("lora", True), ("full", False)])
def test_a_snapshot_that_does_not_fit_is_refused_with_nothing_loaded(family: type, tuning: str, fold: bool) -> None:
    learner, rollout = load(family, "learner", tuning), load(family, "rollout", tuning, fold=fold)
    tensors = moved(learner)
    name = sorted(tensors)[-1]
    before = velocity(rollout)
    good = learner.export_weights(1, tensors)
    torn = learner.export_weights(1, tensors)
    torn.arrays["float32"].view("uint8")[-1] ^= 1
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    bad = {
        f"{name} is torn": torn,
        f"lacks {name}": make_snapshot(missing, 1, good.kind),
        "has foreign.weight": make_snapshot({**tensors, "foreign.weight": torch.zeros(1)}, 1, good.kind),
        f"{name} must be": make_snapshot({**tensors, name: torch.zeros(1)}, 1, good.kind),
        "does not fit its hash": replace(good, sha256="0" * 64),
    }
    for message, snapshot in bad.items():
        with pytest.raises(WeightError, match=message):
            rollout.load_weights(snapshot)
        assert torch.equal(velocity(rollout), before)
    rollout.load_weights(good)
    assert not torch.equal(velocity(rollout), before)


@ROWS
def test_a_lora_target_that_matches_nothing_is_refused(family: type) -> None:
    config = TINY[family](lora=LoraSettings(rank=2, targets=("to_q", "attn.to_quarry")))
    with pytest.raises(ModelError, match=r"'attn\.to_quarry' matches no module"):
        load_policy(config, "learner")


@ROWS
def test_chosen_lora_targets_are_the_only_ones_trained(family: type) -> None:
    config = TINY[family](lora=LoraSettings(rank=2, targets=("to_q",)))
    names = load_policy(config, "learner").trainable_parameters()
    assert names
    assert all(".to_q." in name for name in names)


@ROWS
def test_gradients_reach_every_trained_tensor_of_an_adapter(family: type) -> None:
    learner, encoder = load(family, "learner"), load(family)
    learner.load_weights(learner.export_weights(1, moved(learner)))
    state, sigma = ask(learner)
    for recompute in (False, True):
        if recompute:
            learner.enable_gradient_checkpointing()
        learner.predict(state, sigma, encoder.encode("glow", False).repeat(2)).square().sum().backward()
        for name, parameter in learner.trainable_parameters().items():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
            parameter.grad = None


@ROWS
def test_a_bf16_rollout_is_close_to_an_fp32_one(family: type) -> None:
    exact, rounded = load(family), load(family, precision="bf16")
    assert velocity(rounded).dtype == torch.float32
    gap = (velocity(rounded) - velocity(exact)).abs().max()
    assert 0 < float(gap) < 0.1 * float(velocity(exact).abs().max())


@ROWS
def test_a_bf16_learner_trains_an_fp32_adapter_and_computes_the_bits_of_the_rollout(family: type) -> None:
    learner, rollout = load(family, "learner", precision="bf16"), load(family, precision="bf16")
    assert {p.dtype for p in learner.trainable_parameters().values()} == {torch.float32}
    snapshot = learner.export_weights(1, moved(learner))
    for policy in (learner, rollout):
        policy.load_weights(snapshot)
    state, sigma = ask(learner)
    with autocast("bf16", learner.device):
        answer = learner.predict(state, sigma, rollout.encode("glow 7", False).repeat(2))
    assert torch.equal(answer, velocity(rollout))
    answer.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in learner.trainable_parameters().values())


@ROWS
def test_sizes_the_model_cannot_draw_are_refused(family: type) -> None:
    with pytest.raises(ModelError, match=r"model\.width must be a multiple of"):
        load_policy(TINY[family](width=18 + 1), "learner")


@ROWS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is no directory"),
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks its component folder vae/"),
        (lambda folder: _edit(folder / "model_index.json", "_class_name", "WanPipeline"), "is a WanPipeline, not a"),
        (lambda folder: _edit(_network(folder) / "config.json", "_class_name", "Vit"), r"(transformer|unet) is a Vit"),
        (lambda folder: _edit(folder / "model_index.json", "tokenizer", [None, None]), "names no tokenizer"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "has no scheduler_config.json"),
        (lambda folder: _edit(folder / "scheduler" / "scheduler_config.json", "_class_name", "Fast"), "is a Fast"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_a_model_folder_with_a_fault_is_refused_by_name(
    family: type, spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY[family]().path, folder)
    spoil(folder)
    for role in ("learner", "rollout"):
        with pytest.raises(ModelError, match=message):
            load_policy(TINY[family](path=str(folder)), role)  # type: ignore[arg-type]


def _network(folder: Path) -> Path:
    return next(folder / name for name in ("transformer", "unet") if (folder / name).is_dir())


def _edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
