"""`trust_remote_code`: a checkpoint's own network is trained like a native one, and not touched unless asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raylign.errors import ModelError
from raylign.models import check_model, export_policy, load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.dream import DreamConfig
from raylign.models.llada import LladaConfig
from raylign.models.remote_code import RemoteNetwork
from raylign.models.text_policy import TextModelConfig, TextPolicy
from raylign.models.tokens import TokenPrompts, finite_logits, join_prompts
from tests.tiny_text_models import CANVAS_LENGTH, random_tensors, text_config

FAMILIES = pytest.mark.parametrize("family", [LladaConfig, DreamConfig])
TEXTS = ("abc", "fghijab", "j")
WIDTH, ROWS = 8, 24
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (ROWS, WIDTH),
    "blocks.0.mix.weight": (WIDTH, WIDTH),
    "blocks.1.mix.weight": (WIDTH, WIDTH),
    "out.weight": (ROWS, WIDTH),
}
CONFIGURATION = """
from transformers import PretrainedConfig


class MixerConfig(PretrainedConfig):
    model_type = "{model_type}"
"""
# Every position sees the mean of all and, through its angles, where it is: padding and a wrong offset would tell. The
# angles are computed when it is constructed, in no file, as Dream's rotary frequencies are.
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_mixer import MixerConfig


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, hidden):
        return hidden + torch.tanh(self.mix(hidden + hidden.mean(dim=1, keepdim=True)))


class Mixer(PreTrainedModel):
    config_class = MixerConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding({rows}, {width})
        self.blocks = nn.ModuleList([Block({width}), Block({width})])
        self.out = nn.Linear({width}, {rows}, bias=False)
        self.register_buffer("angles", torch.linspace(0.1, 1.0, {width}), persistent=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, use_cache=None, output_hidden_states=False, return_dict=True):
        place = torch.arange(input_ids.shape[1])[:, None] * self.angles
        states = [self.embed(input_ids) + place.sin()]
        for block in self.blocks:
            states.append(block(states[-1]))
        return MaskedLMOutput(logits=self.out(states[-1]), hidden_states=tuple(states))
"""
Family = type[TextModelConfig]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a checkpoint goes; what transformers copies of its code is removed afterwards."""
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    path = tmp_path / f"remote_{tmp_path.parent.name}_{tmp_path.name}".replace("-", "_")
    yield path
    shutil.rmtree(Path(HF_MODULES_CACHE) / "transformers_modules" / path.name, ignore_errors=True)


def make_checkpoint(family: Family, folder: Path, **changes: Any) -> TextModelConfig:
    """A checkpoint of a family whose network is 500 numbers of its own code."""
    shutil.copytree(text_config(family).path, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    described = json.loads((folder / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "configuration_mixer.MixerConfig", "AutoModel": "modeling_mixer.Mixer"}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "configuration_mixer.py").write_text(CONFIGURATION.format(model_type=described["model_type"]))
    (folder / "modeling_mixer.py").write_text(MODELING.format(rows=ROWS, width=WIDTH))
    save_file(random_tensors(SHAPES), folder / "model.safetensors")
    return remote_config(family, folder, **changes)


def remote_config(family: Family, folder: Path, **changes: Any) -> TextModelConfig:
    tuning = changes.pop("tuning", "lora")
    return text_config(family, tuning, path=str(folder), trust_remote_code=True, **changes)


def load(config: TextModelConfig, role: Any = "learner", **options: Any) -> TextPolicy:
    policy = load_policy(config, role, **options)
    assert isinstance(policy, TextPolicy)
    return policy


def ask(policy: TextPolicy) -> tuple[torch.Tensor, TokenPrompts]:
    draws = torch.Generator().manual_seed(5)
    canvas = torch.randint(3, 10, (len(TEXTS), CANVAS_LENGTH), generator=draws)
    canvas[:, ::2] = policy.vocabulary.mask_id
    return canvas, join_prompts([policy.encode(text) for text in TEXTS])


def logits(policy: TextPolicy) -> torch.Tensor:
    with torch.no_grad():
        return finite_logits(policy.predict(*ask(policy)))


def moved(policy: TextPolicy) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(6)
    trained = policy.trainable_parameters().items()
    return {name: p.detach() + 0.3 * torch.randn(p.shape, generator=draws) for name, p in trained}


@FAMILIES
def test_it_says_what_the_code_says_of_each_row_without_its_padding(family: Family, folder: Path) -> None:
    config = make_checkpoint(family, folder)
    check_model(config)  # type: ignore[arg-type]
    policy = load(config)
    canvas, prompts = ask(policy)
    span, shift = slice(2, 5), int(family is DreamConfig)
    assert isinstance(policy.network, RemoteNetwork)
    with torch.no_grad():
        answer = policy.predict(canvas, prompts, span)
        for row, text in enumerate(TEXTS):
            ids = policy.encode(text).ids_PL
            alone = policy.network.remote(torch.cat([ids, canvas[row : row + 1]], dim=1), output_hidden_states=True)
            start = ids.shape[1] + span.start - shift
            said = alone.logits[0, start : start + 3]
            torch.testing.assert_close(answer.logits_BLV[row, :, :10], said[:, :10], rtol=0, atol=1e-6)
            assert answer.prompt_features_BD is not None
            mean = alone.hidden_states[-1][0, : ids.shape[1]].mean(dim=0)
            torch.testing.assert_close(answer.prompt_features_BD[row], mean, rtol=0, atol=1e-6)
    assert bool((answer.logits_BLV[..., policy.vocabulary.mask_id] == -torch.inf).all())
    torch.testing.assert_close(finite_logits(answer), logits(policy)[:, span], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tuning", "fold"), [("lora", False), ("lora", True), ("full", False)])
def test_what_is_trained_is_published_and_loaded(tuning: str, fold: bool, folder: Path) -> None:
    config = make_checkpoint(LladaConfig, folder, tuning=tuning, budget_head=True)
    learner, rollout = load(config), load(config, "rollout", fold=fold)
    assert torch.equal(logits(learner), logits(rollout))
    answer = learner.predict(*ask(learner))
    assert answer.prompt_features_BD is not None
    learner.log_budget(answer.prompt_features_BD).sum().backward()
    finite_logits(answer).square().sum().backward()
    gradients = [
        p.grad for name, p in learner.trainable_parameters().items() if not name.endswith("lora_A.default.weight")
    ]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    tensors = moved(learner)
    rollout.load_weights(learner.export_weights(1, tensors))
    learner.load_weights(learner.export_weights(1, tensors))
    torch.testing.assert_close(logits(rollout), logits(learner), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(learner), logits(load(config)), atol=1e-2)


def test_an_adapter_covers_every_linear_layer_but_the_output(folder: Path) -> None:
    config = make_checkpoint(LladaConfig, folder)
    adapted = {name.partition(".lora_")[0] for name in load(config).trainable_parameters()}
    assert adapted == {"remote.blocks.0.mix", "remote.blocks.1.mix"}
    first = remote_config(LladaConfig, folder, lora=LoraSettings(rank=2, targets=("0.mix",)))
    assert {name.partition(".lora_")[0] for name in load(first).trainable_parameters()} == {"remote.blocks.0.mix"}
    wrong = remote_config(LladaConfig, folder, lora=LoraSettings(targets=("q_proj",)))
    for use in (load, check_model):
        with pytest.raises(ModelError, match=r"LoRA target 'q_proj' matches no linear layer; names end in .*mix"):
            use(wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_export_is_a_checkpoint_with_the_same_names_and_code(tuning: str, folder: Path, tmp_path: Path) -> None:
    import peft

    config = make_checkpoint(LladaConfig, folder, tuning=tuning)
    learner, out = load(config), tmp_path / "out" / folder.name
    tensors = moved(learner)
    learner.load_weights(learner.export_weights(1, tensors))
    export_policy(config, tensors, out, False)  # type: ignore[arg-type]
    assert load_file(out / "model.safetensors").keys() == SHAPES.keys()
    exported = load(remote_config(LladaConfig, out, tuning="full"))
    torch.testing.assert_close(logits(exported), logits(learner), rtol=1e-5, atol=1e-5)
    if tuning == "lora":
        bare = load(remote_config(LladaConfig, folder, tuning="full"))
        assert isinstance(bare.network, RemoteNetwork)
        bare.network.remote = peft.PeftModel.from_pretrained(bare.network.remote, str(out / "adapter"))
        torch.testing.assert_close(logits(bare), logits(learner), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_caches_and_recomputed_activations_are_refused_with_the_remedy(kind: Any, folder: Path) -> None:
    policy = load(make_checkpoint(LladaConfig, folder))
    assert policy.start_cache("none", slice(0, 4)) is None
    with pytest.raises(ModelError, match=rf"no '{kind}' cache; set sampler\.cache = 'none', or model\.trust_remote"):
        policy.start_cache(kind, slice(0, 4))
    with pytest.raises(ModelError, match=r"set learner\.gradient_checkpointing = false, or model\.trust_remote_code"):
        policy.enable_gradient_checkpointing()


def test_code_is_not_touched_unless_trusted(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    shutil.copytree(text_config(LladaConfig).path, folder)
    described = json.loads((folder / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "configuration_bad.Bad", "AutoModel": "modeling_bad.Bad"}
    (folder / "config.json").write_text(json.dumps(described))
    for name in ("configuration_bad.py", "modeling_bad.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\nraise RuntimeError('of another time')\n")
    native = text_config(LladaConfig, path=str(folder))
    assert not native.trust_remote_code, "off by default"
    check_model(native)  # type: ignore[arg-type]
    load(native)
    check_model(remote_config(LladaConfig, folder))  # type: ignore[arg-type]
    assert not mark.exists(), "checking runs nothing, either"
    with pytest.raises(ModelError, match=r"does not run with transformers .*RuntimeError: of another time; set model"):
        load(remote_config(LladaConfig, folder))
    assert mark.exists()


def rename_code(folder: Path) -> None:
    (folder / "modeling_mixer.py").rename(folder / "elsewhere.py")


def describe(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | changes))

    return spoil


ELSEWHERE = {"AutoConfig": "configuration_mixer.MixerConfig", "AutoModel": "someone/model--modeling_mixer.Mixer"}
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no code": (describe(auto_map={}), "names no code for AutoModel or AutoModelForCausalLM in auto_map; set model"),
    "code that is not there": (rename_code, r"lacks the code 'modeling_mixer\.Mixer'"),
    "code of another repository": (describe(auto_map=ELSEWHERE), "lacks the code 'someone/model--modeling_mixer"),
    "another family": (describe(model_type="Dream"), "is a 'Dream', not a 'llada'"),
    "too few rows": (describe(embedding_size=12), "the tokenizer has 13 tokens, the embedding 12 rows"),
    "too few positions": (describe(max_sequence_length=19), "exceed the 19 positions"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused_before_its_code_runs(fault: str, folder: Path) -> None:
    config = make_checkpoint(LladaConfig, folder)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        check_model(config)  # type: ignore[arg-type]


def test_files_that_are_not_the_codes_network_are_refused(folder: Path) -> None:
    config = make_checkpoint(LladaConfig, folder)
    tensors = random_tensors(SHAPES)
    save_file({name: tensor for name, tensor in tensors.items() if name != "out.weight"}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensor\(s\): out\.weight"):
        load(config)
    save_file({**tensors, "out.weight": torch.zeros(3, 8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"out\.weight is \(3, 8\), by config\.json it must be \(24, 8\)"):
        load(config)
