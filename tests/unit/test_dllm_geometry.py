"""The roofline of benchmarks/dllm_geometry.py: worked out by hand, and against torch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import (
    Call,
    Ledger,
    Machine,
    block_parameters,
    call_bytes,
    call_flops,
    floor_s,
    head_parameters,
)
from raylign.models.bidirectional import BidirectionalNetwork, NetworkShape
from raylign.models.kv_cache import BlockCache
from raylign.models.tokens import CacheKind


def shape_of(hidden_size: int) -> NetworkShape:
    return NetworkShape(
        11, hidden_size, 6, num_layers=3, num_heads=2, num_kv_heads=1, rms_norm_eps=1e-5, rope_theta=1e4
    )


SMALL = shape_of(4)
LLADA_8B = NetworkShape(126464, 4096, 12288, 32, num_heads=32, num_kv_heads=32, rms_norm_eps=1e-5, rope_theta=5e5)


def test_parameters_by_hand() -> None:
    # A layer: query and output 4 x 4, key and value 4 x 2 (one head of width 2), three MLP matrices 4 x 6.
    assert block_parameters(SMALL) == 3 * (2 * 16 + 2 * 8 + 3 * 24) == 360
    assert head_parameters(SMALL) == 44


def test_llada_has_8_billion_parameters() -> None:
    # Blocks, output layer, an embedding as large, and 65 norms of width 4096: what its model card calls 8B.
    total = block_parameters(LLADA_8B) + 2 * head_parameters(LLADA_8B) + 65 * 4096
    assert total == 8_015_581_184


def test_operations_by_hand() -> None:
    # 2 rows of 5 positions, 3 of them computed, 1 read: 2 * 360 * 6 + 4 * 3 layers * width 4 * 6 * 5 + 2 * 44 * 2.
    call = Call(rows=2, computed=3, length=5, read=1)
    assert call_flops(SMALL, call) == 4320 + 1440 + 176
    trained = Call(rows=2, computed=3, length=5, read=1, trained=True)
    assert call_flops(SMALL, trained) == 3 * 4320 + 4 * 1440 + 2 * 176


def test_bytes_by_hand() -> None:
    # Weights 360 + 44; kept keys and values: 2 * 3 layers * width 2 * 2 rows * 2 positions.
    assert call_bytes(SMALL, Call(rows=2, computed=3, length=5, read=1), 2) == 2 * (404 + 48)
    assert call_bytes(SMALL, Call(rows=2, computed=5, length=5, read=1), 2) == 2 * 404
    assert call_bytes(SMALL, Call(rows=2, computed=5, length=5, read=5, trained=True), 2) == 2 * (1080 + 88)


def test_the_floor_is_the_slower_of_the_two_call_by_call() -> None:
    call = Call(rows=2, computed=3, length=5, read=1)
    other = Call(rows=2, computed=5, length=5, read=1)
    by_flops, by_bytes = Machine(100.0, 1e12), Machine(1e12, 100.0)
    assert floor_s(SMALL, [call], 2, by_flops) == pytest.approx(59.36)
    assert floor_s(SMALL, [call, other], 2, by_bytes) == pytest.approx(9.04 + 8.08)


def count(cache: BlockCache | None, span: slice, *, trained: bool = False) -> tuple[int, Call]:
    """Operations that torch counts in a call of 2 rows, 3 prompt tokens and 8 canvas tokens; what the ledger says."""
    network = BidirectionalNetwork(shape_of(8))
    network.recompute = trained
    network.requires_grad_(False)
    network.embed_tokens.weight.requires_grad_(trained)  # so that a gradient goes through every block to its input
    ids_BL = torch.arange(22).reshape(2, 11) % network.shape.vocab_size
    ledger, counter = Ledger(network), FlopCounterMode(display=False)
    # An adapter on a block's last matrix needs that product again; without one torch would stop short of it.
    with torch.set_grad_enabled(trained), sdpa_kernel(SDPBackend.MATH), set_checkpoint_early_stop(False):
        if cache is not None:
            network.read(ids_BL, ids_BL >= 0, 3, span, cache=cache)
        ledger.calls = []
        with counter:
            logits_BLV, _ = network.read(ids_BL, ids_BL >= 0, 3, span, cache=cache)
            if trained:
                logits_BLV.square().sum().backward()
    (call,) = ledger.calls
    return counter.get_total_flops(), call


@pytest.mark.parametrize(("kind", "computed"), [("none", 11), ("prefix", 6), ("dual", 2)])
def test_torch_counts_as_many_operations(kind: CacheKind, computed: int) -> None:
    span = slice(2, 4)
    cache = None if kind == "none" else BlockCache(kind, span)
    found, call = count(cache, span)
    assert call == Call(rows=2, computed=computed, length=11, read=2)
    assert found == call_flops(shape_of(8), call)


def test_torch_counts_as_many_operations_in_a_trained_call() -> None:
    found, call = count(None, slice(0, 8), trained=True)
    assert call == Call(rows=2, computed=11, length=11, read=8, trained=True)
    assert found == call_flops(shape_of(8), call)
