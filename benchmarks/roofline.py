"""What calls of a bidirectional text network must cost at least: operations, bytes, and seconds on a machine.

    operations = 2 (block parameters) (positions computed) + 4 layers width (positions computed) (positions attended to)
                 + 2 vocabulary width (positions read)
    bytes      = every weight of blocks and output layer once, and the keys and values that a cache kept
    seconds    = the larger of operations / rate and bytes / bandwidth

The embedding is a look-up and counts nothing; activations, logits, norms and adapters are left out, so that the
seconds stay a floor. With a gradient (frozen base, activations recomputed block by block) a block is computed forward,
again, and backward to its input: 3 times its matrices and 4 times its attention, whose backward pass has four products
for the forward's two; the output layer 2 times. (The first block's input needs no gradient: part of one block of many.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from raylign.models.bidirectional import BidirectionalNetwork, NetworkShape


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the network for `rows` sequences of `length` positions, prompt and canvas.

    computed: positions per row that go through the blocks. read: positions per row whose logits are computed.
    trained: recorded for a backward pass.
    """

    rows: int
    computed: int
    length: int
    read: int
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device was measured to do."""

    flops_per_s: float
    bytes_per_s: float


class Ledger:
    """The calls that a network is asked for, in order, since somebody last put an empty list here."""

    def __init__(self, network: BidirectionalNetwork) -> None:
        self.calls: list[Call] = []
        self._computed, self._length = 0, 0
        network.register_forward_hook(self._after_blocks)
        network.lm_head.register_forward_hook(self._after_head)

    def _after_blocks(self, _: object, inputs: tuple[Any, ...], hidden_BLD: torch.Tensor) -> None:
        self._computed, self._length = hidden_BLD.shape[1], inputs[0].shape[1]

    def _after_head(self, _: object, __: object, logits_BLV: torch.Tensor) -> None:
        rows, read = logits_BLV.shape[:2]
        self.calls.append(Call(rows, self._computed, self._length, read, logits_BLV.requires_grad))


def block_parameters(shape: NetworkShape) -> int:
    """Numbers in the matrices of all blocks: query and output, key and value, gate, up and down."""
    width = shape.hidden_size
    return shape.num_layers * width * (2 * width + 2 * key_width(shape) + 3 * shape.intermediate_size)


def key_width(shape: NetworkShape) -> int:
    """Numbers per position in the keys of one layer."""
    return shape.hidden_size // shape.num_heads * shape.num_kv_heads


def head_parameters(shape: NetworkShape) -> int:
    """Numbers in the output layer."""
    return shape.vocab_size * shape.hidden_size


def call_flops(shape: NetworkShape, call: Call) -> int:
    """Multiplications and additions of a call."""
    blocks = 2 * block_parameters(shape) * call.rows * call.computed
    attention = 4 * shape.num_layers * shape.hidden_size * call.rows * call.computed * call.length
    head = 2 * head_parameters(shape) * call.rows * call.read
    return 3 * blocks + 4 * attention + 2 * head if call.trained else blocks + attention + head


def call_bytes(shape: NetworkShape, call: Call, bytes_per_number: int) -> int:
    """Bytes that a call must read."""
    blocks, head = block_parameters(shape), head_parameters(shape)
    weights = 3 * blocks + 2 * head if call.trained else blocks + head
    kept = 2 * shape.num_layers * key_width(shape) * call.rows * (call.length - call.computed)
    return bytes_per_number * (weights + kept)


def floor_s(shape: NetworkShape, calls: Iterable[Call], bytes_per_number: int, machine: Machine) -> float:
    """Seconds that calls, one after the other, take at least."""
    return sum(
        max(
            call_flops(shape, call) / machine.flops_per_s,
            call_bytes(shape, call, bytes_per_number) / machine.bytes_per_s,
        )
        for call in calls
    )
