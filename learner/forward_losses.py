"""Losses of the forward-process family, one number per item, as pure functions: no model, batch or rank is known here.

A final sample x0 is noised again, x_t = (1 - t) x0 + t eps, and a policy's velocity v is compared with v* = eps - x0.
N items of a micro-batch; C H W the latent. Errors are means over latent dims, taken in float64: they are differenced,
and the normalisers of the papers are defined there.
"""

from __future__ import annotations

import torch

WEIGHT_FLOOR = 1e-5
"""Smallest self-normaliser, from the papers' code."""
_LATENT = (1, 2, 3)


def nft_loss(
    velocity_NCHW: torch.Tensor,
    old_velocity_NCHW: torch.Tensor,
    state_NCHW: torch.Tensor,
    final_NCHW: torch.Tensor,
    sigma_N: torch.Tensor,
    r_N: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DiffusionNFT's policy loss (2509.16117, in its self-normalised x0 form): (N,), float64.

        v+ = (1 - beta) v_old + beta v        v- = (1 + beta) v_old - beta v        x0± = x_t - t v±
        L  = [ r mean(x0+ - x0)² / w+  +  (1 - r) mean(x0- - x0)² / w- ] / beta
        w± = stop-gradient of mean |x0± - x0|, in float64, at least 1e-5

    `velocity` and `old_velocity` are the two policies' answers to the same `state` (same noise, same time); `old`
    carries no gradient. r in [0, 1] comes from `r_from_advantage`. The code's factor adv_clip is the caller's.
    """
    old = old_velocity_NCHW.detach()
    positive = (1 - beta) * old + beta * velocity_NCHW
    negative = (1 + beta) * old - beta * velocity_NCHW
    toward = _normalised_error(state_NCHW - _wide(sigma_N) * positive, final_NCHW)
    away = _normalised_error(state_NCHW - _wide(sigma_N) * negative, final_NCHW)
    r = r_N.double()
    return (r * toward + (1 - r) * away) / beta


def _normalised_error(predicted_NCHW: torch.Tensor, target_NCHW: torch.Tensor) -> torch.Tensor:
    """Self-normalised error mean (x - x*)² / w, w = sg mean |x - x*| in float64, (N,)."""
    gap = (predicted_NCHW - target_NCHW).double()
    weight = gap.detach().abs().mean(dim=_LATENT).clamp_min(WEIGHT_FLOOR)
    return (gap**2).mean(dim=_LATENT) / weight


def _wide(values_N: torch.Tensor) -> torch.Tensor:
    return values_N.view(-1, 1, 1, 1)
