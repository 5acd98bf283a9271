"""Noise levels of a flow sampler, exactly as diffusers' FlowMatchEulerDiscreteScheduler spaces them."""

from __future__ import annotations

import numpy as np
import torch


def flow_sigmas(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> torch.Tensor:
    """The S + 1 noise levels of an S-step run, fp32, from 1 to 0.

    Static shift sigma <- s sigma / (1 + (s - 1) sigma) of Stable Diffusion 3 (2403.03206, eq. 23). Like the
    scheduler, the smallest level is the shifted 1/num_train_timesteps, and the shift is applied to the spaced
    levels once more. Example: 10 steps at shift 3 start 1, .9601, .9133 and end .2780, .0089, 0.
    """
    levels = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1] / num_train_timesteps
    shifted = shift * levels / (1 + (shift - 1) * levels)
    timesteps = np.linspace(
        float(shifted[0]) * num_train_timesteps, float(shifted[-1]) * num_train_timesteps, num_steps
    )
    spaced = timesteps / num_train_timesteps
    spaced = shift * spaced / (1 + (shift - 1) * spaced)
    return torch.cat([torch.from_numpy(spaced.astype(np.float32)), torch.zeros(1)])
