"""Variance-preserving diffusion models in flow time: an exact change of variables, so that every sampler serves them.

Stable Diffusion 1, 2 and XL know x_vp = a x0 + s eps with a = sqrt(abar), s = sqrt(1 - abar), at 1000 training levels.
With t = s / (a + s) and n = |(1 - t, t)| = 1 / (a + s),

    x = n x_vp = (1 - t) x0 + t eps,        a = (1 - t) / n,        s = t / n

so x is a flow state, and what the network answers of x_vp says what the velocity v = eps - x0 of x is:

    eps-prediction    x0 = (x_vp - s eps) / a           v = ((a + s) eps - x_vp) / a
    v-prediction      u = a eps - s x0 (2202.00512)     v = (a + s) u + (s - a) x_vp

A step of DDIM (2010.02502) with eta = 0 is then an Euler step, and with eta = 1 a step of `gddim` with eta = 1.

Levels are DDIM's of the scheduler's configuration, whatever scheduler it names (PNDM and Euler share its keys). They
start short of pure noise, and where `set_alpha_to_one` is false they end at the first training level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from raylign.errors import ConfigError, ModelError

Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]
SNAP = 2e-3
"""Timesteps this near to a whole one are it: a level in fp32 is off by 1e-4 of a timestep at most."""
# Those of diffusers that know the process by the same keys.
_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True, slots=True, eq=False)
class VpSchedule:
    """The training levels of a model, and which of them a run of S steps walks through.

    training_sigmas: fp64, rising, the level t of each training timestep. final_sigma: where runs end.
    """

    training_sigmas: torch.Tensor
    prediction: Prediction
    spacing: Spacing
    steps_offset: int
    final_sigma: float

    def timesteps(self, num_steps: int) -> list[int]:
        """The S training timesteps of a run, falling, as diffusers' DDIMScheduler chooses them.

        Raises ConfigError for more steps than there are levels.
        """
        total = len(self.training_sigmas)
        step = np.arange(num_steps)
        if self.spacing == "leading":
            chosen = step[::-1] * (total // num_steps) + self.steps_offset
        elif self.spacing == "trailing":
            chosen = np.round(total - step * (total / num_steps)) - 1
        else:
            chosen = np.linspace(0, total - 1, num_steps).round()[::-1]
        timesteps = chosen.astype(int).tolist()
        if num_steps > total or timesteps[0] >= total:
            raise ConfigError(f"num_steps must be below {total}, the levels this model was trained at; got {num_steps}")
        return timesteps

    def levels(self, num_steps: int, shift: float | None = None) -> torch.Tensor:
        """See NoiseSchedule. Raises ConfigError for a shift: these models were trained at levels of their own.

        Where the last step starts at the level that runs end at, DDIM stands still; here it goes to 0 instead, as Euler
        schedulers do, so that levels always fall.
        """
        if shift is not None:
            raise ConfigError(
                f"shift is for flow models; this one has levels of its own, so leave it out (got {shift})"
            )
        chosen = self.training_sigmas[self.timesteps(num_steps)]
        final = self.final_sigma if self.final_sigma < float(chosen[-1]) else 0.0
        return torch.cat([chosen, torch.tensor([final], dtype=chosen.dtype)]).float()

    def timestep_of(self, sigma_B: torch.Tensor) -> torch.Tensor:
        """The training timestep of each level, (B,) fp32, not truncated: between two of them by their levels t.

        (k-diffusion interpolates log-SNR, of which t is the logistic function; t is finite at an SNR of zero.) Levels
        outside the trained ones are given the nearest.
        """
        sigma, known = sigma_B.double(), self.training_sigmas.to(sigma_B.device)
        above = torch.searchsorted(known, sigma).clamp(1, len(known) - 1)
        lower, upper = known[above - 1], known[above]
        timestep = above - 1 + ((sigma - lower) / (upper - lower)).clamp(0, 1)
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < SNAP, whole, timestep).float()

    def network_state(self, state_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """x_vp of flow states, (B, C, H, W)."""
        sigma = _column(sigma_B)
        return (state_BCHW / torch.hypot(1 - sigma, sigma)).to(state_BCHW.dtype)

    def velocity(self, answer_BCHW: torch.Tensor, network_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """v = eps - x0 from the network's answer to `network_BCHW`, in their dtype.

        Above the last trained level, where eps-prediction grows singular, x_vp is read as a state of that level: the
        error is (s(t) - s(last)) / a(last) eps, .034 eps at t = 1 for Stable Diffusion.
        """
        sigma = _column(sigma_B).clamp(max=float(self.training_sigmas[-1]))
        norm = torch.hypot(1 - sigma, sigma)
        if self.prediction == "v_prediction":
            velocity = (answer_BCHW + (2 * sigma - 1) * network_BCHW) / norm
        else:
            velocity = (answer_BCHW - norm * network_BCHW) / (1 - sigma)
        return velocity.to(answer_BCHW.dtype)


def read_vp_schedule(config: Mapping[str, Any]) -> VpSchedule:
    """The schedule of a scheduler_config.json; keys that are missing have DDIMScheduler's defaults.

    Raises ModelError for another noise process, or a prediction that has no velocity.
    """
    if config.get("_class_name") not in _SCHEDULERS:
        raise ModelError(
            f"the scheduler is a {config.get('_class_name')}, of another noise process than this model's; save the "
            "pipeline with a DDIMScheduler, or choose the [model] type that fits it"
        )
    prediction, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing", "leading")
    _need_one_of("prediction_type", prediction, get_args(Prediction))
    _need_one_of("timestep_spacing", spacing, get_args(Spacing))
    signal = np.sqrt(np.cumprod(1 - _betas(config)))
    if config.get("rescale_betas_zero_snr", False):
        # 2305.08891, algorithm 1.
        signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    noise = np.sqrt(1 - signal**2)
    sigmas = torch.from_numpy(noise / (signal + noise))
    if not bool((sigmas.diff() > 0).all()):
        raise ModelError("the scheduler's betas must be above 0, so that the noise grows from level to level")
    if prediction == "epsilon" and signal[-1] <= 0:
        raise ModelError("prediction_type epsilon says nothing at a last level without signal (rescale_betas_zero_snr)")
    final_sigma = 0.0 if config.get("set_alpha_to_one", True) else float(sigmas[0])
    return VpSchedule(sigmas, prediction, spacing, int(config.get("steps_offset", 0)), final_sigma)


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """The variance that each training level adds, (num_train_timesteps,) fp64."""
    trained = config.get("trained_betas")
    if trained is not None:
        return np.asarray(trained, dtype=np.float64)
    total = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    _need_one_of("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if kind == "linear":
        return np.linspace(start, end, total)
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), total) ** 2
    # 2102.09672, section 3.2; the last betas are capped.
    kept = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999)


def _need_one_of(key: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ModelError(f"the scheduler's {key} {value!r} is not one of {', '.join(known)}")


def _column(sigma_B: torch.Tensor) -> torch.Tensor:
    """Levels against (B, C, H, W), fp64: 1 - t near 1 keeps its digits."""
    return sigma_B.double().view(-1, 1, 1, 1)
