"""Packed layers on the GPU's own units against the emulation, which computes the same on every device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raylign.precision import Format
from raylign.precision.config import QuantizerConfig
from raylign.precision.linear import QuantizedLinear
from raylign.precision.packed import pack_weight
from raylign.precision.quantizer import make_quantizer, native_backends
from raylign.precision.reference import ReferenceQuantizer

FORMAT_NAMES: tuple[Format, ...] = ("fp8", "nvfp4", "mxfp4")


def _gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm())


def _native(name: Format) -> None:
    if native_backends("cuda")[name] is None:
        pytest.skip(f"this GPU has no units for {name}")


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_weights_are_packed_to_the_same_bytes_as_on_the_cpu(name: Format) -> None:
    here, there = pack_weight(name, _gaussian(70, 200)), pack_weight(name, _gaussian(70, 200).cuda())
    for key, tensor in here.tensors.items():
        assert torch.equal(tensor.float(), there.tensors[key].cpu().float())


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize(("out_features", "in_features"), [(256, 512), (130, 200)])
def test_the_units_compute_what_the_emulation_does(name: Format, out_features: int, in_features: int) -> None:
    _native(name)
    weight = _gaussian(out_features, in_features).cuda()
    value = _gaussian(2, 77, in_features).cuda().bfloat16()
    bias = nn.Parameter(_gaussian(out_features).cuda().bfloat16())
    layer = QuantizedLinear(make_quantizer(name, QuantizerConfig(require_native=True), "cuda"), weight, bias)
    emulated = QuantizedLinear(ReferenceQuantizer(name), weight, nn.Parameter(bias.detach().float()))
    assert layer(value).dtype == torch.bfloat16
    assert _error(layer(value), emulated(value.float())) < 0.006, "two roundings to bf16, 2^-9 each"


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_compiled_layer_outlives_a_version_and_keeps_samples_apart(name: Format) -> None:
    _native(name)
    layer = QuantizedLinear(make_quantizer(name, QuantizerConfig(), "cuda"), _gaussian(128, 256).cuda())
    compiled = torch.compile(layer, fullgraph=True)
    value = _gaussian(4, 32, 256).cuda().bfloat16()
    with torch.no_grad():
        assert _error(compiled(value), layer(value)) < 0.006
        pointers = [buffer.data_ptr() for buffer in layer.buffers()]
        layer.repack(2 * _gaussian(128, 257)[:, :256].cuda())
        assert [buffer.data_ptr() for buffer in layer.buffers()] == pointers
        with torch.compiler.set_stance("fail_on_recompile"):
            assert _error(compiled(value), layer(value)) < 0.006
        alone = layer(value[:1])
        value[1] *= 1000
        assert _error(layer(value)[:1], alone) < 0.006
