"""A linear layer that holds its weight packed, in place of an `nn.Linear`."""

from __future__ import annotations

import torch
from torch import nn

from raylign.errors import ShapeError
from raylign.precision.packed import Packed
from raylign.precision.quantizer import Quantizer


class QuantizedLinear(nn.Module):
    """`nn.Linear` with a packed weight: buffers that `repack` overwrites in place, and the original's own bias.

    The buffers keep their storage for life, so a compiled graph or a captured CUDA graph stays valid over weight
    versions. They are left out of state dicts: a checkpoint holds the weights they come from. `part_shapes` are those
    of a packed weight's tensors as they travel, before a backend arranges them.
    """

    def __init__(self, quantizer: Quantizer, weight_OI: torch.Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        packed = quantizer.pack(weight_OI)
        self.quantizer = quantizer
        self.out_features, self.in_features = packed.shape
        self.bias = bias
        self._working_OI: torch.Tensor | None = None
        self.part_shapes = {name: tuple(tensor.shape) for name, tensor in packed.tensors.items()}
        arranged = quantizer.arrange(packed)
        self._names = tuple(arranged.tensors)
        for name, tensor in arranged.tensors.items():
            self.register_buffer(name, tensor.clone(), persistent=False)

    @property
    def packed(self) -> Packed:
        """The weight as it is held, in the quantizer's own layout. A view: do not change its tensors."""
        tensors = {name: self.get_buffer(name) for name in self._names}
        return Packed(self.quantizer.format, (self.out_features, self.in_features), tensors)

    @torch.no_grad()
    def repack(self, weight_OI: torch.Tensor) -> None:
        """Quantise a new version of the weight into the same storage. A refused weight leaves the old one in place."""
        self.load_packed(self.quantizer.pack(weight_OI))

    @torch.no_grad()
    def load_packed(self, packed: Packed) -> None:
        """Take a weight that was packed elsewhere. Raises ShapeError if it is of another format or shape."""
        if (packed.format, packed.shape) != (self.quantizer.format, (self.out_features, self.in_features)):
            raise ShapeError(
                f"this layer holds {self.quantizer.format} of shape {(self.out_features, self.in_features)}, got "
                f"{packed.format} of shape {packed.shape}; the sender's `[rollout]` precision must be the same"
            )
        device = self.get_buffer(self._names[0]).device
        here = Packed(packed.format, packed.shape, {name: part.to(device) for name, part in packed.tensors.items()})
        for name, tensor in self.quantizer.arrange(here).tensors.items():
            self.get_buffer(name).copy_(tensor)
        if self._working_OI is not None:
            self._working_OI.copy_(self.quantizer.unpack(self.packed, self._working_OI.dtype))

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Emulation's speed aid: unpack the weight once for many calls, at the price of its full size in memory.

        Does nothing on a native backend. Calls take inputs of `dtype` until `release`.
        """
        if not self.quantizer.is_native:
            self._working_OI = self.quantizer.unpack(self.packed, dtype)

    def release(self) -> None:
        """Drop what `prepare` unpacked; the packed weight alone stays."""
        self._working_OI = None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """(..., I) to (..., O)."""
        return self.quantizer.linear(value, self.packed if self._working_OI is None else self._working_OI, self.bias)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        how = "native" if self.quantizer.is_native else "emulated"
        return f"{self.in_features}, {self.out_features}, {self.quantizer.format}, {self.quantizer.backend}, {how}"
