"""Noised canvases along the way a response was really written, from the recorded step map. Pure functions.

Nothing is ever remasked, so the canvas before step g shows exactly the positions with reveal step < g. What a sampler
filled in after a finished answer was not drawn and lies after the first end token; it is never counted, and no canvas
shows it, because it carries the step of its row's last call.
"""

from __future__ import annotations

import torch

from learner.batching import ABSENT
from learner.noising import NoisedCanvas


def merged_steps(reveal_step_NL: torch.Tensor, counted_NL: torch.Tensor, merge: int) -> torch.Tensor:
    """Which merged step revealed each counted position, (N, L) int64 from 0; ABSENT for the others.

    A row's steps that revealed a counted position are put in order and merged `merge` at a time (the "shrink" of
    TraceRL, 2509.06949); steps that revealed nothing that counts cost no forward.
    """
    merged_NL = torch.full_like(reveal_step_NL, ABSENT)
    for row, (step_L, counted_L) in enumerate(zip(reveal_step_NL, counted_NL, strict=True)):
        rank = torch.unique(step_L[counted_L], return_inverse=True)[1]
        merged_NL[row, counted_L] = rank.div(merge, rounding_mode="floor")
    return merged_NL


def step_canvas(reveal_step_NL: torch.Tensor, merged_NL: torch.Tensor, item_N: torch.Tensor) -> NoisedCanvas:
    """Before the merged step `item_N` of each row: what was revealed earlier is shown, what it revealed is selected."""
    selected_NL = merged_NL == item_N.to(merged_NL.device)[:, None]
    never = torch.iinfo(reveal_step_NL.dtype).max
    first_N = torch.where(selected_NL, reveal_step_NL, never).amin(dim=1)
    # A row without a position to score shows nothing.
    first_N = torch.where(selected_NL.any(dim=1), first_N, 0)
    return NoisedCanvas(reveal_step_NL < first_N[:, None], selected_NL)


def two_stage_canvases(
    reveal_step_NL: torch.Tensor, counted_NL: torch.Tensor, tau_N: torch.Tensor
) -> tuple[NoisedCanvas, NoisedCanvas]:
    """The two questions of DiFFPO's two-stage mean field (2510.02212): on the prompt alone, and after step tau.

    Counted positions with reveal step <= tau are selected under a fully masked canvas, the later ones under the canvas
    after step tau, which shows every position with reveal step <= tau. tau = the last step gives d1's canvas without
    prompt masking; tau = s - 1 gives the positions of step s their own canvas.
    """
    early_NL = reveal_step_NL <= tau_N.to(reveal_step_NL.device)[:, None]
    nothing_NL = torch.zeros_like(early_NL)
    return NoisedCanvas(nothing_NL, early_NL & counted_NL), NoisedCanvas(early_NL, counted_NL & ~early_NL)


def last_steps(reveal_step_NL: torch.Tensor, counted_NL: torch.Tensor) -> torch.Tensor:
    """The step that revealed the last counted position of each row, (N,) int64."""
    return torch.where(counted_NL, reveal_step_NL, 0).amax(dim=1)
