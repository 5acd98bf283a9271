"""Checkpoints of text models that do not fit together are refused by name; a LoRA file is one that PEFT reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raylign.errors import ModelError, PromptError
from raylign.models import check_model, export_policy, load_policy
from raylign.models.dream import DreamConfig
from raylign.models.llada import LladaConfig
from raylign.models.text_policy import TextModelConfig
from raylign.models.tiny_text import TinyTextConfig
from tests.tiny_text_models import dream_folder, llada_folder, text_config, tiny_text_folder

LLADA_SHARD = "model-00001-of-00002.safetensors"
FIRST_NORM = "model.transformer.blocks.0.attn_norm.weight"


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """A fault: these keys of a JSON file have other values; a key that is None is gone."""

    def spoil(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A fault in a safetensors file."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return spoil


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """A fault in LLaDA's index."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return spoil


def drop_template(folder: Path) -> None:
    edit_json("tokenizer_config.json", chat_template=None)(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


FAULTS: dict[str, tuple[type[TextModelConfig], Callable[[Path], object], str]] = {
    "a size that is not there": (LladaConfig, edit_json("config.json", d_model=None), r"config\.json has no 'd_model'"),
    "another kind of block": (LladaConfig, edit_json("config.json", block_type="sequential"), "block_type = 'sequent"),
    "tied weights": (DreamConfig, edit_json("config.json", tie_word_embeddings=True), "tie_word_embeddings = True"),
    "a missing tensor": (
        LladaConfig,
        edit_index(lambda index: index.pop(FIRST_NORM)),
        rf"lacks 1 tensor\(s\): {FIRST_NORM}$",
    ),
    "missing tensors of one file": (
        DreamConfig,
        edit_tensors("model.safetensors", lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:4]]),
        r"lacks 4 tensor\(s\): lm_head\.weight, .* …$",
    ),
    "a foreign tensor": (
        DreamConfig,
        edit_tensors("model.safetensors", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)})),
        r"has foreign 1 tensor\(s\): model\.extra\.weight",
    ),
    "a missing shard": (LladaConfig, lambda folder: (folder / LLADA_SHARD).unlink(), f"lacks {LLADA_SHARD}"),
    "a shard without what the index says": (
        LladaConfig,
        edit_tensors(LLADA_SHARD, lambda tensors: tensors.pop(FIRST_NORM)),
        rf"{LLADA_SHARD} cannot be read: .*{FIRST_NORM}",
    ),
    "a tensor of another shape": (
        LladaConfig,
        edit_tensors(LLADA_SHARD, lambda tensors: tensors.update({FIRST_NORM: torch.ones(16)})),
        rf"{FIRST_NORM} is \(16,\), by config\.json it must be \(32,\)",
    ),
    "more rows than config.json says": (
        DreamConfig,
        edit_json("config.json", vocab_size=25),
        r"lm_head\.weight is \(24, 32\), by config\.json it must be \(25, 32\)",
    ),
    "a tokenizer of more tokens than rows": (
        DreamConfig,
        edit_json("config.json", vocab_size=12),
        "the tokenizer has 13 tokens, the embedding 12 rows",
    ),
    "no mask token anywhere": (
        LladaConfig,
        edit_json("config.json", mask_token_id=None),
        r"neither config\.json \(mask_token_id: None\) nor the tokenizer names one mask token",
    ),
    "a mask that the tokenizer does not have": (
        LladaConfig,
        edit_json("config.json", mask_token_id=20),
        "the tokenizer has no token of the mask id 20",
    ),
    "two masks": (DreamConfig, edit_json("config.json", mask_token_id=3), "mask id 3 in config.json, 12 in the token"),
    "several end tokens": (DreamConfig, edit_json("config.json", eos_token_id=[1, 2]), r"names one eos token"),
    "no template": (LladaConfig, drop_template, "no chat template; set model.chat_template"),
    "a tiny model of unknown keys": (TinyTextConfig, edit_json("config.json", width=3), "width: unknown key"),
    "a tiny grid without boxes": (TinyTextConfig, edit_json("config.json", grid=5), "grid must be a square number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_together_is_refused(fault: str, tmp_path: Path) -> None:
    family, spoil, message = FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(text_config(family).path, folder)
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        check_model(text_config(family, path=str(folder)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [LladaConfig, DreamConfig])
def test_lengths_beyond_the_models_positions_are_refused(family: type[TextModelConfig]) -> None:
    check_model(text_config(family, canvas_length=16, max_prompt_length=16))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"model\.max_prompt_length 16 and model\.canvas_length 17 exceed the 32"):
        check_model(text_config(family, canvas_length=17, max_prompt_length=16))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [LladaConfig, DreamConfig, TinyTextConfig])
def test_a_prompt_that_is_too_long_is_named_before_anything_starts(family: type[TextModelConfig]) -> None:
    limit = load_policy(text_config(family), "learner").encode("aa").ids_PL.shape[1]  # type: ignore[arg-type]
    config = text_config(family, max_prompt_length=limit)
    check_model(config, ["aa"])  # type: ignore[arg-type]
    message = rf"prompt 'aaaa' has \d+ tokens, model.max_prompt_length is {limit}; shorten"
    with pytest.raises(PromptError, match=message):
        check_model(config, ["aa", "aaaa"])  # type: ignore[arg-type]


def test_special_ids_are_those_of_the_files() -> None:
    llada = load_policy(text_config(LladaConfig), "rollout").vocabulary
    dream = load_policy(text_config(DreamConfig), "rollout").vocabulary
    assert (llada.size, llada.mask_id, llada.eos_id, llada.pad_id) == (24, 12, 11, 11)
    assert (dream.size, dream.mask_id, dream.eos_id, dream.pad_id) == (24, 12, 10, 10)


def test_a_mask_that_only_the_tokenizer_names_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dream_folder(), folder)
    edit_json("config.json", mask_token_id=None, pad_token_id=None)(folder)
    assert load_policy(text_config(DreamConfig, path=str(folder)), "rollout").vocabulary.mask_id == 12


def test_a_checkpoint_keeps_its_dtype_and_its_shards_when_exported(tmp_path: Path) -> None:
    source = tmp_path / "bf16"
    shutil.copytree(llada_folder(), source)
    for file in source.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    for name in ("README.md", "LICENSE", "modeling_llada.py", "pytorch_model.bin"):
        (source / name).write_text("as published")
    config = text_config(LladaConfig, "full", path=str(source))
    policy = load_policy(config, "learner")
    tensors = {name: p.detach() + 1 for name, p in policy.trainable_parameters().items()}
    export_policy(config, tensors, tmp_path / "out", False)  # type: ignore[arg-type]
    left_out = {file.name for file in source.iterdir()} - {file.name for file in (tmp_path / "out").iterdir()}
    assert left_out == {"README.md", "pytorch_model.bin"}
    before, after = (load_file(folder / LLADA_SHARD) for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (before[name].float() + 1).bfloat16())


class PublishedModules(nn.Module):
    """Linear layers and other parameters under a checkpoint's names, as the family's own modelling code has them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *parents, last, kind = name.split(".")
            owner: nn.Module = self
            for parent in parents:
                if parent not in dict(owner.named_children()):
                    owner.add_module(parent, nn.Module())
                owner = owner.get_submodule(parent)
            if kind == "weight" and tensor.ndim == 2 and last not in ("wte", "embed_tokens"):
                linear = nn.Linear(tensor.shape[1], tensor.shape[0], bias=name.replace("weight", "bias") in tensors)
                owner.add_module(last, linear)
            elif kind == "weight":
                owner.add_module(last, nn.ParameterDict({"weight": tensor}))
        self.load_state_dict(tensors)


@pytest.mark.parametrize("family", [LladaConfig, DreamConfig, TinyTextConfig])
def test_peft_merges_the_exported_adapter_into_what_the_export_holds(
    family: type[TextModelConfig], tmp_path: Path
) -> None:
    import peft

    config = text_config(family)
    policy = load_policy(config, "learner")
    draws = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(p.shape, generator=draws) for name, p in policy.trainable_parameters().items()}
    export_policy(config, tensors, tmp_path, False)  # type: ignore[arg-type]

    base, exported = (_all_tensors(Path(folder)) for folder in (config.path, tmp_path))
    network: Any = PublishedModules(base)
    merged = peft.PeftModel.from_pretrained(network, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    assert merged.keys() == exported.keys()
    changed = {name for name, tensor in exported.items() if not torch.equal(tensor, base[name])}
    assert len(changed) == 7 * 2
    for name, tensor in exported.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def _all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_tiny_model_says_what_it_has_positions_for() -> None:
    for key in ("canvas_length", "max_prompt_length"):
        with pytest.raises(ModelError, match=rf"model\.{key} is 13, this model has positions for"):
            check_model(text_config(TinyTextConfig, path=str(tiny_text_folder()), **{key: 13}))  # type: ignore[arg-type]
