"""Losses of the forward-process family, one number per item, as pure functions: no model, batch or rank is known here.

A final sample x0 is noised again, x_t = (1 - t) x0 + t eps, and a policy's velocity v is compared with v* = eps - x0.
N items of a micro-batch; C H W the latent. Errors are means over latent dims, taken in float64: they are differenced,
and the normalisers of the papers are defined there.
"""

from __future__ import annotations

from typing import Literal

import torch

AdvMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
"""Which advantages DiffusionNFT trains on."""
NftWeighting = Literal["adaptive", "uniform", "t", "one_minus_t"]
"""What each level counts in DiffusionNFT's loss."""
AwmWeighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
"""What a velocity error is worth as a log-prob."""
CrdLoss = Literal["mse", "bce"]
"""How centred rewards are matched."""
WEIGHT_FLOOR = 1e-5
"""Smallest self-normaliser, from the papers' code."""
HUBER_EPS = 1e-10
"""Added to a velocity error under a root, from AWM's code."""
_LATENT = (1, 2, 3)


def denoising_error(velocity_NCHW: torch.Tensor, target_NCHW: torch.Tensor, adaptive: bool) -> torch.Tensor:
    """mean (v - v*)², or self-normalised, mean (v - v*)² / w with w = sg mean |v - v*| >= 1e-5: (N,), float64."""
    gap = (velocity_NCHW - target_NCHW).double()
    error_N = (gap**2).mean(dim=_LATENT)
    return error_N / gap.detach().abs().mean(dim=_LATENT).clamp_min(WEIGHT_FLOOR) if adaptive else error_N


def shaped_advantage(adv_N: torch.Tensor, mode: AdvMode) -> torch.Tensor:
    """Advantages as DiffusionNFT's `adv_mode` has them, (N,), before they become r.

    "positive_only" and "negative_only" set the others to 0, where both branches pull alike; "one_only" is 1 for a
    better sample and else 0, "binary" the sign: with the clip at 5 that is r in {.4, .5, .6}.
    """
    match mode:
        case "all":
            return adv_N
        case "positive_only":
            return adv_N.clamp_min(0)
        case "negative_only":
            return adv_N.clamp_max(0)
        case "one_only":
            return (adv_N > 0).to(adv_N.dtype)
        case "binary":
            return adv_N.sign()


def nft_loss(
    velocity_NCHW: torch.Tensor,
    old_velocity_NCHW: torch.Tensor,
    state_NCHW: torch.Tensor,
    final_NCHW: torch.Tensor,
    sigma_N: torch.Tensor,
    r_N: torch.Tensor,
    beta: float,
    weighting: NftWeighting = "adaptive",
) -> torch.Tensor:
    """DiffusionNFT's policy loss (2509.16117; "adaptive" is its self-normalised x0 form): (N,), float64.

        v+ = (1 - beta) v_old + beta v        v- = (1 + beta) v_old - beta v        x0± = x_t - t v±
        L  = [ r e+ + (1 - r) e- ] / beta
        adaptive: e± = mean (x0± - x0)² / w±,  w± = stop-gradient of mean |x0± - x0|, in float64, at least 1e-5
        else:     e± = w(t) mean (v± - v*)²,   w = 1, t or 1 - t

    `velocity` and `old_velocity` are the two policies' answers to the same `state` (same noise, same time); `old`
    carries no gradient. r in [0, 1] comes from `r_from_advantage`. The code's factor adv_clip is the caller's.
    """
    old, t, r = old_velocity_NCHW.detach(), sigma_N.view(-1, 1, 1, 1), r_N.double()
    errors: list[torch.Tensor] = []
    for branch in ((1 - beta) * old + beta * velocity_NCHW, (1 + beta) * old - beta * velocity_NCHW):
        error_N = denoising_error(state_NCHW - t * branch, final_NCHW, adaptive=weighting == "adaptive")
        errors.append(error_N * _level_weight(sigma_N.double(), weighting))
    toward_N, away_N = errors
    return (r * toward_N + (1 - r) * away_N) / beta


def awm_logprob(error_N: torch.Tensor, sigma_N: torch.Tensor, weighting: AwmWeighting, power: float) -> torch.Tensor:
    """AWM's pseudo log-prob of a sample at a level (2509.25050): -w(l, t) of the velocity error l, (N,), float64.

    uniform l      t: t l      t2: t² l      huber: t (sqrt(l + 1e-10) - 1e-5)
    ghuber: (t / p) ((l + 1e-10)^p - 1e-10^p)
    """
    t, error = sigma_N.double(), error_N.double()
    match weighting:
        case "uniform":
            return -error
        case "t":
            return -t * error
        case "t2":
            return -(t**2) * error
        case "huber":
            return -t * ((error + HUBER_EPS).sqrt() - HUBER_EPS**0.5)
        case "ghuber":
            return -(t / power) * ((error + HUBER_EPS) ** power - HUBER_EPS**power)


def centres(implicit: torch.Tensor, target: torch.Tensor, present: torch.Tensor, temperature: float) -> torch.Tensor:
    """What CRD compares sets of B samples with, (..., B) each: weighted means of what is present, (..., 4), float64.

    Two weightings p, each giving the mean of the implicit rewards and that of the targets R: (r+, R+, r-, R-).
    temperature < 0: both are uniform. > 0: softmax(R / T) and softmax(-R / T). 0: uniform over R > 1/2 and R < 1/2, or
    over all where there is none. An empty set has centres 0.
    """
    found: list[torch.Tensor] = []
    for sign in (1.0, -1.0):
        score = sign * target.double() / temperature if temperature > 0 else torch.zeros_like(target).double()
        if temperature == 0:
            chosen = present & (sign * (target - 0.5) > 0)
            score = score.masked_fill(~chosen & chosen.any(dim=-1, keepdim=True), -torch.inf)
        # A set without anyone would be a softmax over nothing.
        weight = torch.softmax(score.masked_fill(~present, -torch.inf), dim=-1).nan_to_num(0.0)
        found += [(weight * implicit).sum(dim=-1), (weight * target).sum(dim=-1)]
    return torch.stack(found, dim=-1)


def crd_loss(
    implicit_N: torch.Tensor, target_N: torch.Tensor, centres_NF: torch.Tensor, beta: float, kind: CrdLoss
) -> torch.Tensor:
    """CRD's loss (2603.14128): the centred implicit reward regressed on the centred reward, (N,), float64.

        mse: [ beta (r - r̄) - (R - R̄) ]²        bce: BCE of sigmoid(beta (r - r̄)) to sigmoid(R - R̄)

    averaged over the two centres of `centres`, which carry no gradient. For mse with uniform weights over a complete
    set that changes no gradient: the residuals sum to 0, so what would flow through the mean cancels.
    """
    total_N = torch.zeros_like(implicit_N, dtype=torch.float64)
    for implicit_centre_N, target_centre_N in (centres_NF[:, 0:2].unbind(1), centres_NF[:, 2:4].unbind(1)):
        logit_N = beta * (implicit_N - implicit_centre_N.detach())
        wanted_N = (target_N - target_centre_N).detach()
        if kind == "mse":
            total_N = total_N + (logit_N - wanted_N) ** 2
        else:
            total_N = total_N + torch.nn.functional.binary_cross_entropy_with_logits(
                logit_N, torch.sigmoid(wanted_N), reduction="none"
            )
    return total_N / 2


def rewarded_kl_weight(reward_N: torch.Tensor, floor: float, ceiling: float) -> torch.Tensor:
    """CRD's KL weight of each sample, ceiling (m + R (1 - m)) with m = floor / ceiling: floor at R = 0, ceiling at 1.

    R is clamped to [0, 1].
    """
    return floor + reward_N.clamp(0, 1) * (ceiling - floor)


def _level_weight(t_N: torch.Tensor, weighting: NftWeighting) -> torch.Tensor:
    """What turns an x0 error, which is t² times the velocity's, into the weighted one."""
    match weighting:
        case "adaptive":
            return torch.ones_like(t_N)
        case "uniform":
            return t_N**-2
        case "t":
            return 1 / t_N
        case "one_minus_t":
            return (1 - t_N) * t_N**-2
