"""Determinism by key: every random draw comes from a generator seeded by what it is for.

A key is a tuple of plain values, such as (run seed, prompt id, visit, sample index, purpose). Equal keys give
equal draws on any process, in any order, with any number of workers; nothing reads global random state.
Draws are made on the CPU and moved, so a sample has the same noise on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from raylign.types import SampleKey

KeyPart = str | int


def derive_seed(*parts: KeyPart) -> int:
    """A 63-bit seed from a key. The type of each part counts: ("1",) and (1,) differ."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        token = f"{type(part).__name__}:{part}".encode()
        digest.update(len(token).to_bytes(4, "little"))
        digest.update(token)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*parts: KeyPart) -> torch.Generator:
    """A CPU generator seeded by a key."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def sample_generators(keys: Sequence[SampleKey], purpose: str) -> list[torch.Generator]:
    """One generator per sample for one purpose ("latent", "sde", "train_noise" …)."""
    return [generator(*key, purpose) for key in keys]


def normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal draws, one row per generator: (len(generators), *shape), fp32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
