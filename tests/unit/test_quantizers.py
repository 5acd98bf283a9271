"""Quantizers and the layers that hold packed weights: memory, in-place versions, which backend is taken, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import ScalingType

from raylign.errors import ConfigError, NumericsError, ShapeError
from raylign.precision import Format, e2m1, nvfp4
from raylign.precision.config import QuantizerConfig
from raylign.precision.linear import QuantizedLinear
from raylign.precision.packed import FORMATS, Packed, pack_weight, unpack_weight
from raylign.precision.quantizer import UNITS, make_quantizer, native_backend, native_backends, obstacle
from raylign.precision.reference import ReferenceQuantizer
from raylign.precision.scaled_mm import ScaledMmQuantizer, swizzle
from raylign.precision.torchao import make_torchao_quantizer
from raylign.precision.transformer_engine import TransformerEngineQuantizer

FORMAT_NAMES: tuple[Format, ...] = ("fp8", "nvfp4", "mxfp4")


def _gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "bytes_per_value"), [("fp8", 1.015625), ("nvfp4", 0.5626), ("mxfp4", 0.53125)])
def test_packed_weights_are_as_small_as_the_format_says(name: Format, bytes_per_value: float) -> None:
    """FP8 adds 4 bytes a row, 4 / 256; NVFP4 a byte per 16 values and 4 in all; MXFP4 a byte per 32."""
    packed = pack_weight(name, _gaussian(128, 256))
    assert packed.num_bytes / (128 * 256) == pytest.approx(bytes_per_value, abs=1e-4)
    assert sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors.values()) == packed.num_bytes


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("shape", [(32, 64), (5, 19), (1, 1), (17, 48)])
def test_a_packed_weight_is_the_rounded_weight_bit_by_bit(name: Format, shape: tuple[int, int]) -> None:
    """A weight is one sample: its tensor scale is taken over all of it."""
    weight = _gaussian(*shape)
    unpacked = unpack_weight(pack_weight(name, weight), torch.float32)
    assert torch.equal(unpacked, FORMATS[name].round_activations(weight.unsqueeze(0))[0])
    assert torch.equal(unpack_weight(pack_weight(name, weight.bfloat16()), torch.bfloat16),
                       FORMATS[name].round_activations(weight.bfloat16().unsqueeze(0))[0])  # fmt: skip


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_refused_with_its_count(name: Format, bad: float) -> None:
    weight = _gaussian(8, 16)
    weight[2, :3] = bad
    with pytest.raises(NumericsError, match=re.escape("3 of 128 values of a (8, 16) weight are NaN or infinite")):
        pack_weight(name, weight)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2, dtype=torch.int32), torch.ones(0, 4)])
def test_what_is_no_matrix_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="keep this layer in high precision"):
        pack_weight("nvfp4", weight)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_reference_multiplies_what_was_rounded(name: Format) -> None:
    weight, value, bias = _gaussian(24, 40), _gaussian(2, 5, 40), _gaussian(24)
    quantizer = make_quantizer(name, QuantizerConfig(), "cpu")
    packed = quantizer.arrange(quantizer.pack(weight))
    wanted = functional.linear(FORMATS[name].round_activations(value), unpack_weight(packed, torch.float32), bias)
    assert torch.equal(quantizer.linear(value, packed, bias), wanted)
    small = make_quantizer(name, QuantizerConfig(activations=False), "cpu")
    assert torch.equal(small.linear(value, packed), value @ unpack_weight(packed, torch.float32).T)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_layer_takes_new_versions_in_place(name: Format) -> None:
    bias = nn.Parameter(_gaussian(16))
    layer = QuantizedLinear(ReferenceQuantizer(name), _gaussian(16, 40), bias)
    assert layer.bias is bias, "shared with the layer it stands for"
    pointers = {key: buffer.data_ptr() for key, buffer in layer.named_buffers()}
    new, value = 3 * _gaussian(16, 41)[:, :40], _gaussian(2, 40)
    layer.repack(new)
    assert {key: buffer.data_ptr() for key, buffer in layer.named_buffers()} == pointers
    assert torch.equal(layer(value), QuantizedLinear(ReferenceQuantizer(name), new, bias)(value))
    assert set(layer.state_dict()) == {"bias"}, "packed tensors follow from the weights and stay out of checkpoints"


def test_a_refused_version_leaves_the_layer_as_it_was() -> None:
    layer = QuantizedLinear(ReferenceQuantizer("nvfp4"), _gaussian(16, 40))
    before = layer(_gaussian(1, 40))
    with pytest.raises(NumericsError):
        layer.repack(torch.full((16, 40), float("nan")))
    with pytest.raises(ShapeError, match="holds nvfp4 of shape"):
        layer.repack(_gaussian(16, 41))
    with pytest.raises(ShapeError, match="got fp8"):
        layer.load_packed(pack_weight("fp8", _gaussian(16, 40)))
    assert torch.equal(layer(_gaussian(1, 40)), before)


def test_a_prepared_layer_computes_the_same_and_follows_its_versions() -> None:
    layer = QuantizedLinear(ReferenceQuantizer("nvfp4"), _gaussian(16, 40))
    value = _gaussian(3, 40)
    packed_only = layer(value)
    layer.prepare(torch.float32)
    working = layer._working_OI
    assert torch.equal(layer(value), packed_only)
    layer.repack(2 * _gaussian(16, 40))
    assert layer._working_OI is working, "in place, for compiled graphs"
    assert torch.equal(layer(value), 2 * packed_only), "a power of two changes scales only"
    layer.release()
    assert layer._working_OI is None
    assert torch.equal(layer(value), 2 * packed_only)


def test_a_layer_says_what_it_is() -> None:
    assert "40, 16, nvfp4, reference, emulated" in repr(QuantizedLinear(ReferenceQuantizer("nvfp4"), _gaussian(16, 40)))


# --- the native backends, on units made of plain torch


def _unswizzled(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Each scale from where cuBLAS documents it, one at a time."""
    flat, tiles = scales.view(torch.uint8), -(-columns // 4)
    got = torch.empty(rows, columns, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * tiles + column // 4
            got[row, column] = flat[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]
    return got.view(scales.dtype)


def _units(a: Any, b: Any, scale_a: Any, recipe_a: Any, scale_b: Any, recipe_b: Any, *swizzles: Any) -> torch.Tensor:
    """What `torch.nn.functional.scaled_mm` computes of FP4, in fp64, with the checks that CUDA makes."""
    assert swizzles[0] == swizzles[1]
    block = {ScalingType.BlockWise1x16: 16, ScalingType.BlockWise1x32: 32}[recipe_a]
    decoded: list[torch.Tensor] = []
    for codes, scales in ((a, scale_a), (b.t(), scale_b)):
        assert codes.dtype == torch.float4_e2m1fn_x2
        assert codes.shape[1] % 16 == 0
        values = e2m1.decode(e2m1.unpack(codes.view(torch.uint8)))
        rows, columns = values.shape[0], -(-values.shape[1] // block)
        assert scales.numel() == -(-rows // 128) * 128 * -(-columns // 4) * 4
        factors = _unswizzled(scales, rows, columns).double()
        decoded.append(values.double() * factors.repeat_interleave(block, dim=1)[:, : values.shape[1]])
    assert decoded[1].shape[0] % 16 == 0
    return (decoded[0] @ decoded[1].T).float()


@pytest.mark.parametrize("shape", [(1, 1), (130, 9), (128, 4), (40, 6)])
def test_scales_lie_where_the_units_read_them(shape: tuple[int, int]) -> None:
    scales = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(_unswizzled(swizzle(scales), *shape).float(), scales.float())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("out_features", "in_features"), [(32, 64), (19, 50), (130, 96)])
def test_fp4_units_compute_what_the_reference_does(name: Format, out_features: int, in_features: int) -> None:
    weight, value = _gaussian(out_features, in_features), _gaussian(2, 5, in_features)
    value[1] *= 1000.0
    quantizer = ScaledMmQuantizer(name, multiply=_units)
    layer = QuantizedLinear(quantizer, weight, nn.Parameter(_gaussian(out_features)))
    reference = QuantizedLinear(ReferenceQuantizer(name), weight, layer.bias)
    assert torch.allclose(layer(value), reference(value), rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer(value[0, 0]), reference(value[0, 0]), rtol=1e-4, atol=1e-4), "a vector is one sample"
    layer.prepare(torch.float32)
    assert layer._working_OI is None, "units need no unpacked weight"


@pytest.mark.parametrize(("out_features", "in_features"), [(32, 64), (19, 50)])
def test_the_fp8_path_runs_through_torch_itself(out_features: int, in_features: int) -> None:
    """scaled_mm has a row-wise FP8 kernel on CPUs too (slow); outputs are rounded to bf16, 2^-9."""
    weight, value = _gaussian(out_features, in_features), _gaussian(2, 5, in_features)
    layer = QuantizedLinear(ScaledMmQuantizer("fp8"), weight, nn.Parameter(_gaussian(out_features)))
    reference = QuantizedLinear(ReferenceQuantizer("fp8"), weight, layer.bias)
    assert layer(value).dtype == torch.float32
    assert _error(layer(value), reference(value)) < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(value).dtype == reference(value).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: ScaledMmQuantizer("fp8"), lambda: ReferenceQuantizer("nvfp4")])
def test_a_layer_compiles_into_one_graph_that_outlives_a_version(make: Callable[[], Any]) -> None:
    layer = QuantizedLinear(make(), _gaussian(16, 48))
    value = _gaussian(2, 3, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(value), layer(value))
        layer.repack(2 * _gaussian(16, 48))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.allclose(compiled(value), layer(value))


def test_one_sample_on_the_units_does_not_depend_on_its_neighbours() -> None:
    layer = QuantizedLinear(ScaledMmQuantizer("nvfp4", multiply=_units), _gaussian(16, 32))
    value = _gaussian(3, 4, 32)
    alone = layer(value[:1])
    value[1] *= 1e4
    value[2, 0, 0] = float("nan")
    together = layer(value)
    assert torch.equal(together[:1], alone)
    assert torch.isnan(together[2]).all()
    assert torch.isfinite(together[:2]).all()


class _TransformerEngine:
    """The part of `transformer_engine.pytorch` that is used: one scale per tensor, rows in sixteens, A @ B^T."""

    def __init__(self) -> None:
        self.cpp_extensions = self

    def NVFP4Quantizer(self, rowwise: bool, columnwise: bool, with_2d_quantization: bool = False) -> Any:
        assert rowwise
        assert not columnwise
        return lambda matrix: self._quantized(matrix, 16 if with_2d_quantization else 1)

    def _quantized(self, matrix: torch.Tensor, tile_rows: int) -> torch.Tensor:
        assert matrix.shape[0] % 16 == matrix.shape[1] % 16 == 0
        return nvfp4.dequantize_weight(nvfp4.quantize_weight(matrix, tile_rows), matrix.shape[1])

    def general_gemm(self, weight: torch.Tensor, value: torch.Tensor, out_dtype: Any, layout: str) -> Any:
        assert (out_dtype, layout) == (torch.bfloat16, "TN")
        return value @ weight.T, None, None, None


@pytest.mark.parametrize("tile", ["1x16", "16x16"])
def test_transformer_engine_is_called_sample_by_sample(tile: Any) -> None:
    weight, value = _gaussian(19, 50), _gaussian(3, 5, 50)
    value *= torch.tensor([1.0, 1000.0, 1.0]).view(3, 1, 1)
    layer = QuantizedLinear(TransformerEngineQuantizer(tile, _TransformerEngine()), weight, nn.Parameter(_gaussian(19)))
    reference = QuantizedLinear(ReferenceQuantizer("nvfp4", tile), weight, layer.bias)
    got, wanted = layer(value), reference(value)
    for index in range(3):
        assert _error(got[index], wanted[index]) < 1e-3
    value[2] = float("inf")
    assert torch.equal(layer(value)[:2], got[:2])
    assert torch.isnan(layer(value)[2]).all()


def test_torchao_quantises_activations_the_same() -> None:
    pytest.importorskip("torchao")
    quantizer = make_torchao_quantizer("1x16")
    ours = ScaledMmQuantizer("nvfp4", multiply=_units)
    theirs = ScaledMmQuantizer("nvfp4", quantize_nvfp4=quantizer._quantize_nvfp4, multiply=_units)
    weight, value = _gaussian(16, 64), _gaussian(3, 5, 64) * torch.tensor([1.0, 50.0, 1e-3]).view(3, 1, 1)
    packed = ours.arrange(ours.pack(weight))
    assert torch.allclose(theirs.linear(value, packed), ours.linear(value, packed), rtol=1e-5)


# --- which backend


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        (None, {"fp8": None, "nvfp4": None, "mxfp4": None}),
        ((8, 0), {"fp8": None, "nvfp4": None, "mxfp4": None}),
        ((8, 9), {"fp8": "torch", "nvfp4": None, "mxfp4": None}),
        ((9, 0), {"fp8": "torch", "nvfp4": None, "mxfp4": None}),
        ((10, 0), {"fp8": "torch", "nvfp4": "torch", "mxfp4": "torch"}),
        ((12, 0), {"fp8": "torch", "nvfp4": "torch", "mxfp4": None}),
    ],
)
def test_what_each_generation_computes(capability: Any, native: dict[str, str | None]) -> None:
    assert {name: native_backend(name, capability) for name in UNITS} == native


def test_a_cpu_computes_nothing_natively() -> None:
    assert set(native_backends("cpu").values()) == {None}
    quantizer = make_quantizer("nvfp4", QuantizerConfig(), "cpu")
    assert (quantizer.backend, quantizer.is_native) == ("reference", False)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nvfp4", {"require_native": True}, "cpu has no units for nvfp4: it needs a Blackwell GPU"),
        ("fp8", {"backend": "torch"}, "there is no NVIDIA GPU; fp8 needs an Ada, Hopper or Blackwell GPU"),
        ("fp8", {"backend": "transformer_engine"}, "it computes nvfp4 only"),
        ("fp8", {"weight_tile": "16x16"}, "NVFP4's; leave it out for fp8"),
        ("nvfp4", {"backend": "reference", "require_native": True}, 'backend = "reference" emulates'),
        ("nvfp4", {"activations": False, "require_native": True}, "activations = false"),
        ("nvfp4", {"activations": False, "backend": "torch"}, "multiplies quantised activations"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(name: Format, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_quantizer(name, QuantizerConfig(**values), "cpu")


def test_a_missing_library_is_named_with_its_installation() -> None:
    reason = obstacle("transformer_engine", "nvfp4", (10, 0))
    assert reason == "transformer_engine is not installed: `pip install transformer-engine[pytorch]`"


def test_packed_is_the_same_on_every_backend() -> None:
    weight = _gaussian(19, 50)
    quantizers = (ReferenceQuantizer("nvfp4"), ScaledMmQuantizer("nvfp4"))
    packed: list[Packed] = [quantizer.pack(weight) for quantizer in quantizers]
    for key, tensor in packed[0].tensors.items():
        assert torch.equal(tensor.float(), packed[1].tensors[key].float())
