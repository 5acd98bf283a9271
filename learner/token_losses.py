"""Losses of text responses as pure functions: N responses of L tokens, everything fp32. Nothing here knows a model.

Averages are the caller's: a loss comes back per token, (N, L), or per response, (N,), and an algorithm sums it over
`counted` tokens and divides by its own denominator: token mean, response mean and 1/S differ by up to a factor L,
which learning rates feel.
"""

from __future__ import annotations

from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]
"""With d = ref_logprob - learner_logprob: -d, d²/2, or exp(d) - d - 1 (Schulman, "Approximating KL divergence")."""


def clipped_ratio_loss(
    learner_logprob: torch.Tensor,
    rollout_logprob: torch.Tensor,
    adv: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate, elementwise: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and rho.

    rho = exp(learner - rollout); the log-probs are those of tokens, (N, L) with adv (N, 1), or any per-response score,
    (N,) with adv (N,). Equal log-probs give rho exactly 1.
    """
    ratio = torch.exp(learner_logprob - rollout_logprob.detach())
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * adv, clipped * adv), ratio


def kl_penalty(learner_logprob: torch.Tensor, ref_logprob: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """An estimate of KL(learner || reference) from one sample, elementwise, with gradient to the learner's log-prob."""
    gap = ref_logprob.detach() - learner_logprob
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap**2 / 2
    return torch.exp(gap) - gap - 1


def budget_loss(
    log_gamma_N: torch.Tensor, mean_N: torch.Tensor, std: float, budget_adv_N: torch.Tensor
) -> torch.Tensor:
    """REINFORCE for the entropy budgets: -A log N(log gamma; mean, std²) up to a constant, (N,).

    Ours: DiFFPO (2510.02212) does not publish its own. Gradient goes to `mean_N` alone.
    """
    return budget_adv_N * (log_gamma_N - mean_N) ** 2 / (2 * std**2)


def masked_sum(values_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over the marked positions of each row, (N,); what lies at others, even NaN, does not matter."""
    return torch.where(mask_NL, values_NL, 0.0).sum(dim=1)


def masked_mean(values_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Mean over the marked positions of each row, (N,); 0 for a row without any."""
    return masked_sum(values_NL, mask_NL) / mask_NL.sum(dim=1).clamp_min(1)
