"""What every text row of the MODEL_FAMILIES table promises, on a tiny random checkpoint of the family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from raylign.errors import ModelError, PromptError, ShapeError, WeightError
from raylign.models import MODEL_FAMILIES, check_model, export_policy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.bidirectional import BidirectionalNetwork
from raylign.models.text_policy import TextModelConfig, TextPolicy
from raylign.models.tokens import BUDGET_HEAD, CacheKind, TokenPolicy, TokenPrompts, finite_logits, join_prompts
from raylign.precision import autocast
from raylign.weights import make_snapshot
from tests.tiny_text_models import CANVAS_LENGTH, FOLDERS, text_config

FAMILIES = cast(
    "list[type[TextModelConfig]]", [config for config, row in MODEL_FAMILIES.items() if row.modality == "text"]
)
ROWS = pytest.mark.parametrize("family", FAMILIES)
TUNINGS = pytest.mark.parametrize("tuning", ["lora", "full"])
CACHES = pytest.mark.parametrize("kind", ["prefix", "dual"])
SPAN = slice(2, 5)
TEXTS = ("abc", "fghijab", "j")
Family = type[TextModelConfig]


def load(
    family: Family, role: Any = "rollout", tuning: Any = "lora", *, head: bool = False, **options: Any
) -> TextPolicy:
    config = text_config(family, tuning, budget_head=head)
    chosen: dict[str, Any] = {"seed": 3, **options}
    policy = load_policy(config, role, **chosen)
    assert isinstance(policy, TextPolicy)
    return policy


def ask(policy: TokenPolicy, seed: int = 5) -> tuple[torch.Tensor, TokenPrompts]:
    """Three half-filled canvases and three prompts of different lengths, none with the mask token in the prompt."""
    draws = torch.Generator().manual_seed(seed)
    canvas = torch.randint(3, 10, (len(TEXTS), CANVAS_LENGTH), generator=draws)
    canvas[torch.rand(canvas.shape, generator=draws) < 0.5] = policy.vocabulary.mask_id
    return canvas, join_prompts([policy.encode(text) for text in TEXTS])


def logits(policy: TokenPolicy) -> torch.Tensor:
    with torch.no_grad():
        return finite_logits(policy.predict(*ask(policy)))


def moved(policy: TokenPolicy, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """The policy's tensors after some training: an adapter that does something."""
    draws = torch.Generator().manual_seed(6)
    return {
        name: p.detach() + scale * torch.randn(p.shape, generator=draws)
        for name, p in policy.trainable_parameters().items()
    }


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert set(FAMILIES) == FOLDERS.keys()


@ROWS
def test_it_predicts_fp32_logits_and_never_the_mask(family: Family) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        answer = policy.predict(canvas, prompts)
    assert answer.logits_BLV.shape == (3, CANVAS_LENGTH, policy.vocabulary.size)
    assert answer.logits_BLV.dtype == torch.float32
    mask_id = policy.vocabulary.mask_id
    assert bool((answer.logits_BLV[..., mask_id] == -torch.inf).all())
    others = torch.cat([answer.logits_BLV[..., :mask_id], answer.logits_BLV[..., mask_id + 1 :]], dim=-1)
    assert torch.isfinite(others).all()
    assert others.std() > 0.1
    assert answer.prompt_features_BD is not None
    assert answer.prompt_features_BD.shape == (3, policy.hidden_size)
    assert answer.prompt_features_BD.dtype == torch.float32


@ROWS
def test_a_prompt_computes_the_same_alone_and_in_a_padded_batch(family: Family) -> None:
    policy = load(family)
    canvas, together = ask(policy)
    garbage = TokenPrompts(torch.where(together.real_PL, together.ids_PL, 5), together.real_PL)
    with torch.no_grad():
        joined, dirty = policy.predict(canvas, together), policy.predict(canvas, garbage)
        assert torch.equal(finite_logits(joined), finite_logits(dirty)), "what lies in the padding is seen by nobody"
        for row, text in enumerate(TEXTS):
            alone = policy.predict(canvas[row : row + 1], policy.encode(text))
            gap = (finite_logits(alone)[0] - finite_logits(joined)[row]).abs().max()
            assert gap <= 1e-5
            assert alone.prompt_features_BD is not None
            assert joined.prompt_features_BD is not None
            torch.testing.assert_close(alone.prompt_features_BD[0], joined.prompt_features_BD[row], rtol=0, atol=1e-5)


@ROWS
def test_every_position_sees_every_other(family: Family) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    before = logits(policy)
    for position in (0, CANVAS_LENGTH - 1):
        changed = canvas.clone()
        changed[:, position] = (canvas[:, position] + 1) % 10
        with torch.no_grad():
            gap = (finite_logits(policy.predict(changed, prompts)) - before).abs().amax(dim=(0, 2))
        assert bool((gap > 0).all()), f"canvas position {position} is not seen from {gap.tolist()}"


@ROWS
def test_a_span_is_part_of_the_whole(family: Family) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        part = policy.predict(canvas, prompts, SPAN)
    torch.testing.assert_close(finite_logits(part), logits(policy)[:, SPAN], rtol=0, atol=1e-5)


@ROWS
def test_wrong_shapes_are_refused(family: Family) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with pytest.raises(ShapeError, match="canvas_BL must be"):
        policy.predict(canvas[:, 1:], prompts)
    with pytest.raises(ShapeError, match="canvas_BL must be"):
        policy.predict(canvas[:1], prompts)


@ROWS
@CACHES
def test_the_first_cached_call_is_the_uncached_one(family: Family, kind: CacheKind) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        plain = policy.predict(canvas, prompts, SPAN)
        first = policy.predict(canvas, prompts, SPAN, policy.start_cache(kind, SPAN))
    assert torch.equal(first.logits_BLV, plain.logits_BLV)
    assert first.prompt_features_BD is not None
    assert policy.start_cache("none", SPAN) is None


@ROWS
@CACHES
def test_what_a_cache_keeps_is_right_while_nothing_changes(family: Family, kind: CacheKind) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        cache = policy.start_cache(kind, SPAN)
        first = policy.predict(canvas, prompts, SPAN, cache)
        again = policy.predict(canvas, prompts, SPAN, cache)
    torch.testing.assert_close(finite_logits(again), finite_logits(first), rtol=0, atol=1e-5)
    assert again.prompt_features_BD is None


@ROWS
@CACHES
def test_a_cache_refreshed_each_step_is_exact(family: Family, kind: CacheKind) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        for position in range(SPAN.start, SPAN.stop):
            canvas[:, position] = 4
            fresh = policy.predict(canvas, prompts, SPAN, policy.start_cache(kind, SPAN))
            assert torch.equal(fresh.logits_BLV, policy.predict(canvas, prompts, SPAN).logits_BLV)


@ROWS
@CACHES
def test_a_stale_cache_is_close_and_sees_its_own_block(family: Family, kind: CacheKind) -> None:
    # These networks are random and two layers deep, so one new token moves everything more than a trained one's does.
    policy = load(family)
    canvas, prompts = ask(policy)
    with torch.no_grad():
        cache = policy.start_cache(kind, SPAN)
        before = policy.predict(canvas, prompts, SPAN, cache)
        canvas[:, SPAN.start] = torch.where(canvas[:, SPAN.start] == 4, 5, 4)
        cached = finite_logits(policy.predict(canvas, prompts, SPAN, cache))
        exact = finite_logits(policy.predict(canvas, prompts, SPAN))
    moved_by = (exact - finite_logits(before)).abs().mean()
    gap = (cached - exact).abs().mean()
    assert 0 < gap < 0.5 * moved_by
    assert (cached - finite_logits(before)).abs().amax(dim=(1, 2)).min() > 0, "every row saw the change"


@ROWS
@CACHES
def test_a_cache_goes_on_with_the_rows_that_are_kept(family: Family, kind: CacheKind) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        caches = [policy.start_cache(kind, SPAN) for _ in range(2)]
        for cache in caches:
            policy.predict(canvas, prompts, SPAN, cache)
        canvas[:, SPAN.start] = 4
        whole = policy.predict(canvas, prompts, SPAN, caches[0])
        assert caches[1] is not None
        caches[1].keep(rows)
        part = policy.predict(canvas[rows], prompts.rows(rows), SPAN, caches[1])
    torch.testing.assert_close(finite_logits(part), finite_logits(whole)[rows], rtol=0, atol=1e-5)


@ROWS
def test_a_span_that_a_filled_cache_does_not_compute_is_refused(family: Family) -> None:
    policy = load(family)
    canvas, prompts = ask(policy)
    cache = policy.start_cache("dual", SPAN)
    with torch.no_grad():
        policy.predict(canvas, prompts, SPAN, cache)
        for span in (slice(0, 2), slice(4, 7)):
            with pytest.raises(ShapeError, match=f"canvas positions {span.start} to {span.stop} are not all computed"):
                policy.predict(canvas, prompts, span, cache)


@ROWS
@TUNINGS
def test_learner_and_rollout_are_one_function_of_the_same_tensors(family: Family, tuning: str) -> None:
    learner, rollout = load(family, "learner", tuning, head=True), load(family, "rollout", tuning, head=True)
    assert list(learner.trainable_parameters()) == list(rollout.trainable_parameters())
    assert torch.equal(logits(learner), logits(rollout))


@ROWS
@TUNINGS
def test_published_weights_arrive_bit_for_bit(family: Family, tuning: str) -> None:
    learner, rollout = load(family, "learner", tuning, head=True), load(family, "rollout", tuning, head=True)
    before = logits(rollout)
    tensors = moved(learner)
    snapshot = learner.export_weights(7, tensors)
    rollout.load_weights(snapshot)
    assert (snapshot.version, snapshot.kind) == (7, "adapter" if tuning == "lora" else "full")
    assert not torch.equal(logits(rollout), before)
    for name, parameter in rollout.trainable_parameters().items():
        assert torch.equal(parameter, tensors[name])
    assert rollout.export_weights(7).sha256 == snapshot.sha256


@ROWS
def test_an_adapter_starts_as_nothing_from_its_own_seed(family: Family) -> None:
    assert torch.equal(logits(load(family)), logits(load(family, tuning="full")))
    torch.manual_seed(123)
    first = load(family, "learner", seed=3).export_weights(0).sha256
    drawn = torch.rand(1)
    torch.manual_seed(123)
    assert torch.rand(1) == drawn
    assert load(family, "learner", seed=3).export_weights(0).sha256 == first
    assert load(family, "learner", seed=4).export_weights(0).sha256 != first


@ROWS
def test_a_folded_adapter_computes_what_an_attached_one_does(family: Family) -> None:
    learner = load(family, "learner", head=True)
    attached, folded = load(family, head=True), load(family, fold=True, head=True)
    assert torch.equal(logits(folded), logits(attached))
    snapshot = learner.export_weights(1, moved(learner, 0.3))
    for policy in (attached, folded):
        policy.load_weights(snapshot)
    torch.testing.assert_close(logits(folded), logits(attached), rtol=1e-4, atol=1e-4)
    assert (logits(attached) - logits(learner)).abs().max() > 1e-2
    features = torch.ones(2, folded.hidden_size)
    assert torch.equal(folded.log_budget(features), attached.log_budget(features))
    assert folded.log_budget(features).abs().min() > 0


@ROWS
def test_folding_again_and_again_does_not_drift(family: Family) -> None:
    learner, folded, once = load(family, "learner"), load(family, fold=True), load(family, fold=True)
    last = learner.export_weights(3, moved(learner))
    for version, scale in enumerate((3.0, 0.01, 1.0)):
        folded.load_weights(learner.export_weights(version, moved(learner, scale)))
    folded.load_weights(last)
    once.load_weights(last)
    assert torch.equal(logits(folded), logits(once))
    folded.load_weights(learner.export_weights(4))  # B is zero: the untouched base again
    assert torch.equal(logits(folded), logits(load(family, fold=True)))


@ROWS
@pytest.mark.parametrize(("tuning", "fold"), [("lora", False), ("lora", True), ("full", False)])
def test_a_snapshot_that_does_not_fit_is_refused_with_nothing_loaded(family: Family, tuning: str, fold: bool) -> None:
    learner = load(family, "learner", tuning, head=True)
    rollout = load(family, "rollout", tuning, fold=fold, head=True)
    tensors = moved(learner)
    name = sorted(tensors)[-1]
    before = logits(rollout)
    good = learner.export_weights(1, tensors)
    torn = learner.export_weights(1, tensors)
    torn.arrays["float32"].view("uint8")[-1] ^= 1
    without_head = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUDGET_HEAD)}
    bad = {
        f"{name} is torn": torn,
        "lacks budget_head.bias": make_snapshot(without_head, 1, good.kind),
        "has foreign.weight": make_snapshot({**tensors, "foreign.weight": torch.zeros(1)}, 1, good.kind),
        f"{name} must be": make_snapshot({**tensors, name: torch.zeros(7)}, 1, good.kind),
        "does not fit its hash": replace(good, sha256="0" * 64),
    }
    for message, snapshot in bad.items():
        with pytest.raises(WeightError, match=message):
            rollout.load_weights(snapshot)
        assert torch.equal(logits(rollout), before)
    rollout.load_weights(good)
    assert not torch.equal(logits(rollout), before)


@ROWS
def test_an_adapter_covers_every_linear_layer_of_every_block(family: Family) -> None:
    plain = load(family, tuning="full").network
    assert isinstance(plain, BidirectionalNetwork)
    linears = {f"layers.{name}" for name, module in plain.layers.named_modules() if isinstance(module, nn.Linear)}
    adapted = {name.partition(".lora_")[0] for name in load(family, "learner").trainable_parameters()}
    assert len(linears) == 7 * plain.shape.num_layers
    assert adapted == linears


@ROWS
def test_every_lora_target_by_its_published_name_is_one_layer_of_each_block(family: Family) -> None:
    from safetensors import safe_open

    published: set[str] = set()
    for file in FOLDERS[family]().glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            matrices = [name for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) == 2]  # noqa: SIM118
        published |= {name.removesuffix(".weight").rpartition(".")[2] for name in matrices if ".0." in name}
    assert len(published) == 7
    for target in published:
        policy = load_policy(text_config(family, lora=LoraSettings(rank=2, targets=(target,))), "learner")
        assert len(policy.trainable_parameters()) == 2 * 2, f"{target}: A and B of two blocks"


@ROWS
def test_a_lora_target_that_matches_nothing_is_refused(family: Family) -> None:
    config = text_config(family, lora=LoraSettings(rank=2, targets=("q_proj", "q_project")))
    with pytest.raises(ModelError, match=r"'q_project' matches no linear layer; there are .*q_proj"):
        check_model(config)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'q_project' matches no linear layer"):
        load_policy(config, "learner")


@ROWS
@TUNINGS
def test_gradients_reach_every_trained_tensor_and_not_the_head(family: Family, tuning: str) -> None:
    learner = load(family, "learner", tuning, head=True)
    learner.load_weights(learner.export_weights(1, moved(learner)))
    canvas, prompts = ask(learner)
    found: list[dict[str, torch.Tensor]] = []
    for recompute in (False, True):
        if recompute:
            learner.enable_gradient_checkpointing()
        finite_logits(learner.predict(canvas, prompts)).square().sum().backward()
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in learner.trainable_parameters().items():
            if name.startswith(BUDGET_HEAD):
                assert parameter.grad is None
                continue
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0, name
            gradients[name], parameter.grad = parameter.grad, None
        found.append(gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@ROWS
def test_the_budget_head_starts_at_zero_and_has_a_gradient_of_its_own(family: Family) -> None:
    policy = load(family, "learner", head=True)
    features = policy.predict(*ask(policy)).prompt_features_BD
    assert features is not None
    assert not features.requires_grad
    offset = policy.log_budget(features)
    assert offset.tolist() == [0.0, 0.0, 0.0]
    offset.sum().backward()
    with_gradient = {name for name, p in policy.trainable_parameters().items() if p.grad is not None}
    assert with_gradient == {"budget_head.weight", "budget_head.bias"}
    without = load(family, "learner")
    assert not any(name.startswith(BUDGET_HEAD) for name in without.trainable_parameters())
    assert without.log_budget(features).tolist() == [0.0, 0.0, 0.0]


@ROWS
def test_bf16_is_close_to_fp32(family: Family) -> None:
    exact, rounded = load(family, "learner"), load(family, precision="bf16")
    with autocast("bf16", exact.device):
        cast_on_the_way = logits(exact)
    for answer in (logits(rounded), cast_on_the_way):
        assert answer.dtype == torch.float32
        gap = (answer - logits(exact)).abs().max()
        assert 0 < float(gap) < 0.1 * float(logits(exact).abs().max())
    rounded.load_weights(exact.export_weights(1, moved(exact)))
    finite_logits(rounded.predict(*ask(rounded))).sum().backward()
    for name, parameter in rounded.trainable_parameters().items():
        assert parameter.dtype == torch.float32, "adapters stay fp32"
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()


@ROWS
def test_text_is_encoded_and_decoded(family: Family) -> None:
    policy = load(family)
    prompts = policy.encode("abc")
    assert prompts.ids_PL.dtype == torch.int64
    assert bool(prompts.real_PL.all())
    letters = prompts.ids_PL[0, -3:]
    vocabulary = policy.vocabulary
    special = torch.tensor([vocabulary.eos_id, vocabulary.mask_id, vocabulary.pad_id])
    rows = torch.stack([torch.cat([letters, special]), torch.cat([special[1:2], letters, letters[:2]])])
    assert policy.decode(rows) == ["abc", "abcab"]


@ROWS
def test_prompts_that_do_not_fit_are_refused(family: Family) -> None:
    policy = load_policy(text_config(family, max_prompt_length=5, chat_template=False), "rollout")
    policy.encode("abcde")
    with pytest.raises(PromptError, match=r"'abcdef' has 6 tokens, model\.max_prompt_length is 5"):
        policy.encode("abcdef")
    with pytest.raises(PromptError, match="'' has no tokens"):
        policy.encode("")


@ROWS
@TUNINGS
def test_an_exported_policy_loads_again_and_says_the_same(family: Family, tuning: Any, tmp_path: Path) -> None:
    policy = load(family, "rollout", tuning, head=True)
    tensors = moved(policy, 0.3)
    policy.load_weights(policy.export_weights(1, tensors))
    config = text_config(family, tuning, budget_head=True)
    export_policy(config, tensors, tmp_path / "out", False)  # type: ignore[arg-type]
    files = {file.name for file in FOLDERS[family]().iterdir()}
    extra = {"adapter"} if tuning == "lora" else set[str]()
    assert {file.name for file in (tmp_path / "out").iterdir()} == files | extra
    again = load_policy(text_config(family, path=str(tmp_path / "out")), "rollout")
    torch.testing.assert_close(logits(again), logits(policy), rtol=1e-4, atol=1e-4)
    assert (logits(again) - logits(load(family))).abs().max() > 1e-2


@ROWS
def test_an_adapter_alone_is_written_alone(family: Family, tmp_path: Path) -> None:
    policy = load(family, head=True)
    export_policy(text_config(family, budget_head=True), moved(policy), tmp_path, True)  # type: ignore[arg-type]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@ROWS
@pytest.mark.parametrize("role", ["learner", "rollout"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is no directory"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3"}'), "is a 'qwen3', not a"),
        (lambda folder: [file.unlink() for file in folder.glob("*.safetensors")], "is the download complete"),
        (lambda folder: [file.unlink() for file in folder.glob("*[vt]o*[bn]*.json")], "no tokenizer that loads"),
        (lambda folder: [file.write_bytes(b"?" * 64) for file in folder.glob("*.safetensors")], "cannot be read"),
    ],
)
def test_a_checkpoint_with_a_fault_is_refused_by_name(
    family: Family, role: Any, spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS[family](), folder)
    spoil(folder)
    config = text_config(family, path=str(folder))
    with pytest.raises(ModelError, match=message):
        load_policy(config, role)
    with pytest.raises(ModelError, match=message):
        check_model(config)  # type: ignore[arg-type]
