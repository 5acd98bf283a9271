"""The parity gate: rollout policy and learner must answer the same states with the same velocities or logits."""

from __future__ import annotations

import torch

from raylign.errors import NumericsError
from raylign.precision import RolloutPrecision
from rollout.drawn import Probe

# About twice the largest gap measured on the models that ship (velocities of asset:glyphs and asset:shapes, logits of
# asset:text/tiny): 0.03 in fp8, 0.12 in nvfp4, 0.23 in mxfp4.
FORMAT_GAPS: dict[RolloutPrecision, float] = {"fp8": 0.06, "nvfp4": 0.25, "mxfp4": 0.45}
"""The largest relative difference that quantising explains."""


def parity_gap(probe: Probe, learner_answer: torch.Tensor, tolerance: float) -> float:
    """The largest relative difference, over the probe's noise levels, of two answers of one policy.

    Per level it is the norm of the difference over the learner's norm. Raises NumericsError, with the gap of
    every level, when one exceeds `tolerance` or is not finite: a wrong adapter scale, precision or weight shows
    here before it becomes a biased gradient.
    """
    learner = learner_answer.cpu().double().flatten(1)
    actor = probe.answer.double().flatten(1)
    gaps = ((actor - learner).norm(dim=1) / learner.norm(dim=1).clamp_min(1e-12)).tolist()
    if not all(gap <= tolerance for gap in gaps):
        shown = ", ".join(
            f"{gap:.2e} at sigma {sigma:g}" for gap, sigma in zip(gaps, probe.sigma_B.tolist(), strict=True)
        )
        raise NumericsError(
            f"parity gate at version {probe.version}: rollout actor and learner give answers that differ by "
            f"{shown} (tolerance {tolerance:g}); compare rollout.precision, rollout.fold_lora and the model "
            "directories of the nodes, or raise rollout.parity_tolerance knowingly"
        )
    return max(gaps)
