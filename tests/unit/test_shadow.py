"""Shadows: shared storage, an untouched original, adapters that show, packed weights that follow and do not drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from raylign.errors import NumericsError
from raylign.models import load_policy
from raylign.models.adapters import LoraSettings
from raylign.models.tokens import finite_logits
from raylign.models.tuned import TunedWeights, Tuning
from raylign.precision import Format
from raylign.precision.config import QuantizerConfig
from raylign.precision.kept_high import layers_to_quantise
from raylign.precision.linear import QuantizedLinear
from raylign.precision.quantizer import make_quantizer
from raylign.precision.shadow import Shadow, effective_weight, linear_sizes
from tests.tiny_image_families import TINY_FAMILIES
from tests.tiny_text_models import FOLDERS, text_config

SETTINGS = LoraSettings(rank=2, alpha=4.0)


class Net(nn.Module):
    """Two linear layers, a norm between them, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.norm = nn.LayerNorm(32)
        self.second = nn.Linear(32, 24, bias=False)
        self.register_buffer("shift", torch.ones(24))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(value))) + self.get_buffer("shift")


def _net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def _input() -> torch.Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))


def _shadow(network: nn.Module, format_name: Format = "nvfp4", layers: tuple[str, ...] = ("first", "second")) -> Shadow:
    return Shadow(network, make_quantizer(format_name, QuantizerConfig(), "cpu"), layers)


def _codes(shadow: Shadow) -> dict[str, torch.Tensor]:
    """Every packed tensor of a shadow, copied."""
    packed = {name: m.packed.tensors for name, m in shadow.network.named_modules() if isinstance(m, QuantizedLinear)}
    return {f"{name}.{part}": tensor.clone() for name, parts in packed.items() for part, tensor in parts.items()}


def _same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(_bits_equal(first[name], second[name]) for name in first)


def _bits_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(
        first.view(torch.uint8) if first.dim() else first, second.view(torch.uint8) if second.dim() else second
    )


def test_a_shadow_holds_nothing_twice_but_what_is_packed() -> None:
    network = _net()
    shadow = _shadow(network, layers=("first",))
    own = {id(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    packed = {id(tensor) for tensor in shadow.network.first.packed.tensors.values()}
    for name, tensor in [*shadow.network.named_parameters(), *shadow.network.named_buffers()]:
        assert id(tensor) in own | packed, f"{name} was copied"
    assert shadow.network.first.bias is network.first.bias
    assert shadow.network.second.weight is network.second.weight
    assert not any(parameter is network.first.weight for parameter in shadow.network.parameters())


def test_the_original_is_what_it_was_bit_for_bit() -> None:
    network, value = _net(), _input()
    names = [(name, type(module)) for name, module in network.named_modules()]
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    places = [tensor.data_ptr() for tensor in network.state_dict().values()]
    answer = network(value)
    shadow = _shadow(network)
    shadow.refresh()
    with shadow.prepared():
        assert not torch.equal(shadow.network(value), answer)
    assert [(name, type(module)) for name, module in network.named_modules()] == names
    assert _same(network.state_dict(), tensors)
    assert [tensor.data_ptr() for tensor in network.state_dict().values()] == places
    assert torch.equal(network(value), answer)


def test_a_layer_that_stays_high_follows_without_a_refresh_and_a_packed_one_does_not() -> None:
    network, value = _net(), _input()
    shadow = _shadow(network, layers=("first",))
    before = shadow.network(value)
    with torch.no_grad():
        network.first.weight.mul_(2.0)
    assert torch.equal(shadow.network(value), before)
    with torch.no_grad():
        network.second.weight.mul_(2.0)
    assert torch.allclose(shadow.network(value) - 1, 2 * (before - 1), atol=1e-5), "all but the shift doubles"


@pytest.mark.parametrize(("tuning", "fold"), [("lora", False), ("lora", True), ("full", False)])
def test_published_weights_show_in_the_shadow(tuning: Tuning, fold: bool) -> None:
    network = _net()
    weights = TunedWeights(network, tuning, SETTINGS, ("first",), fold=fold, seed=0)
    shadow, value = _shadow(network), _input()
    learner = TunedWeights(learnt := _net(), tuning, SETTINGS, ("first",), fold=False, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(learner.parameters().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    before = shadow.network(value)
    weights.load(learner.export(1))
    packed = shadow.refresh()
    after = shadow.network(value)
    assert packed.num_bytes == shadow.packed_bytes == sum(tensor.nbytes for tensor in _codes(shadow).values())
    # What the learner computes in fp32, quantised; far from what it was.
    assert _same(_codes(shadow), _codes(_shadow(learnt)))
    exact = learnt(value)
    assert (after - exact).norm() < 0.2 * (before - exact).norm()


def test_an_adapter_is_added_in_single_precision() -> None:
    network = _net().to(torch.bfloat16)
    TunedWeights(network, "lora", SETTINGS, ("first",), fold=False, seed=0)
    layer: Any = network.first
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1e-3)
    weight_OI = effective_weight(layer)
    base, down = layer.base_layer.weight.float(), layer.lora_A["default"].weight
    # alpha / rank = 2; every row of B A is 1e-3 times the sum of A's rows.
    assert weight_OI.dtype == torch.float32
    assert torch.allclose(weight_OI, base + 2e-3 * down.sum(dim=0), atol=1e-8)
    assert linear_sizes(network) == {"first": (24, 32), "second": (32, 24)}


@pytest.mark.parametrize(("fold", "num_versions"), [(True, 1000), (False, 30)])
def test_a_thousand_versions_leave_no_trace(fold: bool, num_versions: int) -> None:
    network = _net()
    weights = TunedWeights(network, "lora", SETTINGS, ("first",), fold=fold, seed=0)
    shadow = _shadow(network)
    places = {name: buffer.data_ptr() for name, buffer in shadow.network.named_buffers()}
    start = _codes(shadow)
    learner = TunedWeights(_net(), "lora", SETTINGS, ("first",), fold=False, seed=0)
    origin, draw = learner.export(0), torch.Generator().manual_seed(3)
    for version in range(1, num_versions):
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        weights.load(learner.export(version))
        shadow.refresh()
        if version == 1:
            assert not _same(_codes(shadow), start)
    weights.load(origin)
    shadow.refresh()
    assert _same(_codes(shadow), start)
    assert {name: buffer.data_ptr() for name, buffer in shadow.network.named_buffers()} == places


def test_a_weight_that_is_not_finite_is_refused_by_name_and_the_old_one_stays() -> None:
    network = _net()
    shadow = _shadow(network)
    before = _codes(shadow)
    with torch.no_grad():
        network.second.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="layer second: 1 of 768 values"):
        shadow.refresh()
    assert _same(_codes(shadow), before)


def test_prepared_layers_compute_the_same_and_are_given_back_after_an_error() -> None:
    shadow, value = _shadow(_net()), _input()
    plain = shadow.network(value)
    with shadow.prepared():
        assert shadow.network.first._working_OI is not None
        assert torch.equal(shadow.network(value), plain)
    assert shadow.network.first._working_OI is None
    with pytest.raises(RuntimeError, match="cannot be multiplied"), shadow.prepared():
        shadow.network(torch.ones(1, 3))
    assert shadow.network.first._working_OI is None


def test_a_subclass_of_linear_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    assert list(linear_sizes(network)) == ["0"], "attention reads its output layer's weight itself"


@pytest.mark.parametrize(
    ("format_name", "bytes_per_value", "gap"), [("fp8", 1.04, 0.06), ("nvfp4", 0.5632, 0.25), ("mxfp4", 0.5313, 0.3)]
)
def test_packed_weights_are_small_and_close(format_name: Format, bytes_per_value: float, gap: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(96, 256), nn.Linear(256, 24))
    shadow = _shadow(network, format_name, ("0", "1"))
    num_values = 96 * 256 + 256 * 24
    assert shadow.packed_bytes <= bytes_per_value * num_values
    value = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    difference = shadow.network(value) - network(value)
    assert 0 < difference.norm() < gap * network(value).norm()


def test_what_computes_is_said() -> None:
    assert _shadow(_net(), "mxfp4", ("first",)).describe() == (
        "mxfp4, emulated, so not faster (reference), 1 of 2 linear layers"
    )


# Twice the relative distance that nvfp4 answers were measured to have from fp32 ones, and how many layers are packed.
FAMILIES = {
    "sd3": (0.025, 4),
    "sd15": (0.05, 40),
    "sdxl": (0.04, 40),
    "flux": (0.035, 17),
    "sana": (0.4, 10),
    "tiny_text": (0.2, 14),
    "llada": (0.8, 14),
    "dream": (0.5, 14),
}


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *FOLDERS], ids=lambda family: family.model_fields["type"].default)
def test_every_family_has_a_shadow_that_answers_nearly_alike(family: type[Any]) -> None:
    is_image = family in TINY_FAMILIES
    config: Any = TINY_FAMILIES[family].config() if is_image else text_config(family)
    policy: Any = load_policy(config, "rollout")
    quantizer = QuantizerConfig()
    layers = layers_to_quantise(linear_sizes(policy.network), config.type, quantizer)
    shadow = Shadow(policy.network, make_quantizer("nvfp4", quantizer, "cpu"), layers)
    low = policy.with_network(shadow.network)
    with torch.no_grad(), shadow.prepared():
        exact, rough = (_answers(one, is_image) for one in (policy, low))
    gap_B = (rough - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    bound, count = FAMILIES[config.type]
    assert len(layers) == count
    assert (gap_B > 0.1 * bound).all(), "something is quantised"
    assert (gap_B < bound).all(), f"measured {gap_B.tolist()}"


def _answers(policy: Any, is_image: bool) -> torch.Tensor:
    """A velocity at three noise levels, or the logits of a masked canvas."""
    if not is_image:
        canvas_BL = torch.full((2, policy.canvas_length), policy.vocabulary.mask_id)
        return finite_logits(policy.predict(canvas_BL, policy.encode("abc").repeat(2)))
    state = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.predict(state, torch.tensor([0.95, 0.5, 0.05]), policy.encode("one cat", False).repeat(3))
