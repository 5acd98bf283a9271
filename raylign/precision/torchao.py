"""The torchao backend: the torch backend's NVFP4, with activations quantised by torchao's fused kernel.

That kernel takes one fp32 scale per tensor, so samples are scaled alike before it (`nvfp4.normalize_samples`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from raylign.precision import nvfp4
from raylign.precision.packed import WeightTile
from raylign.precision.scaled_mm import Operand, ScaledMmQuantizer


def make_torchao_quantizer(weight_tile: WeightTile) -> ScaledMmQuantizer:
    """The NVFP4 quantizer. Needs torchao; its kernel is used where `mslk` is installed too."""
    return ScaledMmQuantizer("nvfp4", weight_tile, backend="torchao", quantize_nvfp4=nvfp4_operand)


def nvfp4_operand(value: torch.Tensor) -> Operand:
    """As `scaled_mm.nvfp4_operand`, by torchao. K must be a multiple of 16.

    Deviations: the kernel reads bf16, so scaled values are rounded to it first; torchao's smallest block scale is 2^-6.
    """
    module: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
    scaled, tensor_scale = nvfp4.normalize_samples(value)
    has_kernel = value.is_cuda and importlib.util.find_spec("mslk") is not None
    rows = scaled.flatten(0, -2)
    tensor = module.NVFP4Tensor.to_nvfp4(
        rows.bfloat16() if has_kernel else rows, is_swizzled_scales=True, use_triton_kernel=has_kernel
    )
    return {"codes": tensor.qdata, "scales": tensor.scale.flatten(), "tensor_scale": tensor_scale}
