"""Losses, one number per item, as pure functions of tensors. Nothing here knows a model, a batch or a rank.

N items of a micro-batch; C H W the latent. Inputs are fp32 unless said otherwise; every mean over latent dims is a
mean, not a sum (clip ranges such as 1e-4 only make sense with it).
"""

from __future__ import annotations

from typing import Literal

import torch

KlSpace = Literal["mean_over_std2_no_dt", "exact_gaussian", "velocity_mse"]
"""How the distance to the reference is measured; a weight is not transferable from one space to another."""
_LATENT = (1, 2, 3)


def velocity_mse(velocity_NCHW: torch.Tensor, ref_velocity_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared velocity gap, (N,): the KL term of DiffusionNFT's code, up to a factor that depends on time only."""
    return ((velocity_NCHW - ref_velocity_NCHW) ** 2).mean(dim=_LATENT)


def clipped_policy_loss(
    learner_logprob_N: torch.Tensor, rollout_logprob_N: torch.Tensor, adv_N: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate per denoising step, Flow-GRPO's objective (2505.05470): loss and ratio, both (N,).

    rho = exp(learner - rollout);  L = max(-A rho, -A clip(rho, 1 ± clip_range)).
    Log-probs are means over latent dims, so rho is the geometric mean over dims of the density ratio.
    """
    ratio_N = torch.exp(learner_logprob_N - rollout_logprob_N.detach())
    return _clipped_surrogate(ratio_N, adv_N, clip_range), ratio_N


def guarded_policy_loss(
    learner_logprob_N: torch.Tensor,
    rollout_logprob_N: torch.Tensor,
    adv_N: torch.Tensor,
    clip_range: float,
    bias_N: torch.Tensor,
    std_N: torch.Tensor,
    delta_sigma: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO-Guard's clipped surrogate (2510.22319): loss and ratio, both (N,).

    rho = exp((learner - rollout + bias) std);  L = max(-A rho, -A clip(rho, 1 ± clip_range)) / -delta_sigma.
    `bias_N` = mean (mu - mu_rollout)² / (2 std²), `gaussian_kl` of the two, is minus what a log-ratio is on average:
    without it ratios lie below 1. With it and the factor std the exponent is mean z (mu - mu_rollout), z being the
    step's noise, whose size no longer depends on the step's std. Dividing by the step's length -delta_sigma then
    evens out the gradients of steps.
    """
    ratio_N = torch.exp((learner_logprob_N - rollout_logprob_N.detach() + bias_N) * std_N)
    return _clipped_surrogate(ratio_N, adv_N, clip_range) / -delta_sigma, ratio_N


def gaussian_kl(mean_NCHW: torch.Tensor, ref_mean_NCHW: torch.Tensor, std_N: torch.Tensor) -> torch.Tensor:
    """KL of two Gaussians that share one standard deviation, per latent dim: mean (mu - mu_ref)² / (2 std²), (N,)."""
    squared = ((mean_NCHW - ref_mean_NCHW) ** 2).mean(dim=_LATENT)
    return squared / (2 * std_N**2)


def reference_kl(
    space: KlSpace,
    mean_NCHW: torch.Tensor,
    ref_mean_NCHW: torch.Tensor,
    std_N: torch.Tensor,
    velocity_NCHW: torch.Tensor,
    ref_velocity_NCHW: torch.Tensor,
    delta_sigma: float,
) -> torch.Tensor:
    """Distance of one sampler step to the reference's, (N,), in a named space.

    "mean_over_std2_no_dt": Flow-GRPO's closed form (2505.05470) as coded: mean (mu - mu_ref)² / (2 s²) with
    std = s sqrt(-delta_sigma), that is without the step length, so about ten times weaker than exact at 10 steps.
    "exact_gaussian": the KL of the two step distributions. "velocity_mse": mean (v - v_ref)², the same at every step.
    `delta_sigma` = sigma' - sigma < 0. No term but the policy's own mean and velocity may carry a gradient.
    """
    if space == "velocity_mse":
        return velocity_mse(velocity_NCHW, ref_velocity_NCHW)
    exact = gaussian_kl(mean_NCHW, ref_mean_NCHW, std_N)
    return exact if space == "exact_gaussian" else exact * -delta_sigma


def norm_ratio(velocity_NCHW: torch.Tensor, ref_velocity_NCHW: torch.Tensor) -> torch.Tensor:
    """|v| / |v_ref| per item, (N,): forward-process losses are known to inflate it. No gradient."""
    norm = velocity_NCHW.detach().flatten(1).norm(dim=1)
    return norm / ref_velocity_NCHW.detach().flatten(1).norm(dim=1).clamp_min(1e-12)


def _clipped_surrogate(ratio_N: torch.Tensor, adv_N: torch.Tensor, clip_range: float) -> torch.Tensor:
    return torch.maximum(-adv_N * ratio_N, -adv_N * ratio_N.clamp(1 - clip_range, 1 + clip_range))
