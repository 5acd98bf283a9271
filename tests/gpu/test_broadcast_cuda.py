"""Weights broadcast by NCCL: each member needs a GPU of its own."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import distributed

from raylign.weights import WeightSnapshot, make_snapshot
from services.weight_stores import CollectiveStore, Seat, take

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
NUM_MEMBERS = 2
TENSORS = {"w": torch.linspace(-1, 2, 1 << 20), "s": torch.arange(3, dtype=torch.uint8)}


def take_part(seat: Seat) -> tuple[str, float]:
    """One member, in a process of its own: why it failed, and the sum of what it holds."""
    torch.cuda.set_device(seat.rank)
    sent = make_snapshot(TENSORS, 1, "full")
    store = CollectiveStore(lambda whole: whole)
    if seat.rank == 0:
        store.put(sent, seat.which)
        return store.send(seat), float(sent.arrays["float32"].sum())

    def total(fetched: WeightSnapshot) -> float:
        return float(fetched.arrays["float32"].sum())

    found, fetched = take(store, seat, total)
    return fetched.detour, found


def test_nccl_brings_the_same_bytes() -> None:
    meeting = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sent = make_snapshot(TENSORS, 1, "full")
    address = f"127.0.0.1:{meeting.port}"
    first = Seat(address, "one", 0, 0, NUM_MEMBERS, "nccl", 60.0, "rollout", sent.sha256, whole=None)
    with ProcessPoolExecutor(NUM_MEMBERS, get_context("spawn")) as pool:
        outcomes: list[Any] = list(pool.map(take_part, [replace(first, rank=rank) for rank in range(NUM_MEMBERS)]))
    assert outcomes == [("", float(sent.arrays["float32"].sum()))] * NUM_MEMBERS
