"""Losses of text responses as pure functions: N responses of L tokens, everything fp32. Nothing here knows a model.

Averages are the caller's: a loss comes back per token, (N, L), or per response, (N,), and an algorithm sums it over
`counted` tokens and divides by its own denominator: token mean, response mean and 1/S differ by up to a factor L,
which learning rates feel.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

KlEstimator = Literal["k1", "k2", "k3"]
"""With d = ref_logprob - learner_logprob: -d, d²/2, or exp(d) - d - 1 (Schulman, "Approximating KL divergence")."""
_MAX_LOG_RATIO = 20.0


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


def linear_bound_loss(
    gap_N: torch.Tensor, adv_N: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """BGPO's bound (2510.11683): -A rho, clipped, where rho = 1 + d for A >= 0 and exp(d) else; and rho. All (N,).

    d = learner - rollout of one Monte-Carlo sample. As 1 + mean d <= exp(mean d) <= mean exp(d), the mean over samples
    bounds the objective A exp(mean d) from below for either sign, and has its value and gradient at d = 0. The bound is
    used as it is, so d <= -1 is a number; the released code goes through exp(log(1 + d)), where it is not. For A < 0
    the loss is at most -A dual_clip.
    """
    # exp() of a wild score would be infinite, and an infinite branch that is not taken still gives a NaN gradient.
    ratio_N = torch.where(adv_N >= 0, 1 + gap_N, torch.exp(gap_N.clamp_max(_MAX_LOG_RATIO)))
    loss_N = -torch.minimum(ratio_N * adv_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * adv_N)
    if dual_clip is not None:
        loss_N = torch.where(adv_N < 0, torch.minimum(loss_N, -adv_N * dual_clip), loss_N)
    return loss_N, ratio_N


def importance_weights(surrogate_logprob: torch.Tensor, behaviour_logprob: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated weights min(cap, surrogate / behaviour), elementwise, without gradient (Ionides 2008)."""
    return torch.exp(surrogate_logprob - behaviour_logprob).detach().clamp_max(cap)


def effective_sample_share(weights_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Kish's effective sample size over the marked positions of each row, as a share: (sum w)² / (n sum w²), (N,)."""
    kept_NL = torch.where(mask_NL, weights_NL, 0.0)
    # The share does not change with the scale of the weights, but squares of tiny ones vanish.
    kept_NL = kept_NL / kept_NL.amax(dim=1, keepdim=True).clamp_min(torch.finfo(kept_NL.dtype).tiny)
    squares_N = (kept_NL**2).sum(dim=1) * mask_NL.sum(dim=1)
    return kept_NL.sum(dim=1) ** 2 / squares_N.clamp_min(1.0)


def coupled_logprob(
    full_NL: torch.Tensor, part_NL: torch.Tensor, rest_NL: torch.Tensor, rate_N: torch.Tensor
) -> torch.Tensor:
    """Coupled-GRPO's token score (2506.20639): (p0 + [k in M] p1 / r + [k not in M] p2 / (1 - r)) / 2, (N, L).

    `full` are log-probs with all masked, `part` those of M with M masked (0 elsewhere), `rest` those of its
    complement with that masked. rate_N: r, the probability of being in M.
    """
    rate_N1 = rate_N[:, None]
    return (full_NL + part_NL / rate_N1 + rest_NL / (1 - rate_N1)) / 2


def paired_elbo(part_NL: torch.Tensor, rest_NL: torch.Tensor, count_N: torch.Tensor) -> torch.Tensor:
    """ESPO's ELBO of one mask and its complement (2512.03759), (N,).

        1/2 [ (L + 1) / n sum over M of log p  +  (L + 1) / (L - n) sum over its complement of log p' ],   n = |M|

    With n uniform on 0 .. L each half alone has the ELBO as its mean; an empty half is 0. The log-probs are 0 where
    they were not asked for.
    """
    length = part_NL.shape[1]
    part_N = part_NL.sum(dim=1) * (length + 1) / count_N.clamp_min(1)
    rest_N = rest_NL.sum(dim=1) * (length + 1) / (length - count_N).clamp_min(1)
    return (part_N + rest_N) / 2


def sandwich_lower(logprob_TNL: torch.Tensor, masked_TNL: torch.Tensor) -> torch.Tensor:
    """SPG's lower bound as coded (2510.09541): mean over the masked tokens of each of T canvases, mean over T, (N,)."""
    counts_TN = masked_TNL.sum(dim=2).clamp_min(1)
    return (torch.where(masked_TNL, logprob_TNL, 0.0).sum(dim=2) / counts_TN).mean(dim=0)


def sandwich_upper(
    logprob_TNL: torch.Tensor, masked_TNL: torch.Tensor, counted_NL: torch.Tensor, beta: float
) -> torch.Tensor:
    """SPG's evidence upper bound (2510.09541): 1/beta mean over k of log( mean over T of [k in M] p_k^beta / t ), (N,).

    t is the share of the counted tokens that a canvas masks; tokens that no canvas masks are left out. Taken in the
    log domain, so a token of tiny probability neither underflows nor drops out.
    """
    share_TN = masked_TNL.sum(dim=2) / counted_NL.sum(dim=1).clamp_min(1)
    terms_TNL = beta * logprob_TNL - share_TN.clamp_min(1e-8).log()[..., None]
    seen_NL = masked_TNL.any(dim=0)
    # A column of nothing but -inf would have NaN gradients; its value is dropped below.
    terms_TNL = torch.where(masked_TNL, terms_TNL, -torch.inf).masked_fill(~seen_NL, 0.0)
    score_NL = torch.logsumexp(terms_TNL, dim=0) - math.log(len(logprob_TNL))
    return masked_mean(score_NL, seen_NL) / beta


def masked_sum(values_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Sum over the marked positions of each row, (N,); what lies at others, even NaN, does not matter."""
    return torch.where(mask_NL, values_NL, 0.0).sum(dim=1)


def masked_mean(values_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Mean over the marked positions of each row, (N,); 0 for a row without any."""
    return masked_sum(values_NL, mask_NL) / mask_NL.sum(dim=1).clamp_min(1)
