"""Reads the scheduler of a flow model's directory as a FlowSchedule, or refuses what it cannot reproduce."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from raylign.errors import ModelError
from raylign.models.pipeline_folder import component_config
from raylign.models.schedule import FlowSchedule

EULER = "FlowMatchEulerDiscreteScheduler"
SOLVER = "DPMSolverMultistepScheduler"
# Options of diffusers that change the levels beyond spacing and time shift.
_OTHER_LEVELS = (
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
_NEEDED = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def euler_schedule(folder: Path) -> FlowSchedule:
    """A statically shifted FlowMatchEulerDiscreteScheduler that is asked for a number of steps. Raises ModelError."""
    config = _scheduler(folder, EULER)
    _refuse_dynamic_shift(folder, config)
    return FlowSchedule(float(config.get("shift", 1.0)))


def euler_or_solver_schedule(folder: Path) -> FlowSchedule:
    """SANA's: the same, or a DPMSolverMultistepScheduler in its flow mode. Raises ModelError."""
    if component_config(folder, "scheduler").get("_class_name") != SOLVER:
        return euler_schedule(folder)
    config = _scheduler(folder, SOLVER)
    _refuse_dynamic_shift(folder, config)
    for key, value in _NEEDED.items():
        if config.get(key) != value:
            raise ModelError(f"{folder}/scheduler has {key} = {config.get(key)!r}; a flow model needs {value!r}")
    return FlowSchedule(float(config.get("flow_shift", 1.0)), "solver")


def resolution_schedule(folder: Path, num_tokens: int) -> FlowSchedule:
    """FLUX's: evenly spaced levels, shifted by how many tokens a picture has. Raises ModelError.

    With mu on the line from base_shift at base_image_seq_len to max_shift at max_image_seq_len, the scheduler's time
    shift is t <- s t / (1 + (s - 1) t) with s = e^mu ("exponential") or s = mu ("linear"). Without
    `use_dynamic_shifting` s is the scheduler's `shift` (FLUX.1-schnell: 1).
    """
    config = _scheduler(folder, EULER)
    if not config.get("use_dynamic_shifting", False):
        return FlowSchedule(float(config.get("shift", 1.0)), "even")
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    at_low, at_high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = at_low + (at_high - at_low) * (num_tokens - low) / (high - low)
    return FlowSchedule(mu if config.get("time_shift_type") == "linear" else math.exp(mu), "even")


def _scheduler(folder: Path, wanted: str) -> dict[str, Any]:
    config = component_config(folder, "scheduler")
    if config.get("_class_name") != wanted:
        raise ModelError(f"{folder}/scheduler is a {config.get('_class_name')}; this model is drawn with a {wanted}")
    for option in _OTHER_LEVELS:
        if config.get(option):
            raise ModelError(f"{folder}/scheduler sets {option}, whose noise levels are not supported; set it to false")
    return config


def _refuse_dynamic_shift(folder: Path, config: dict[str, Any]) -> None:
    if config.get("use_dynamic_shifting"):
        raise ModelError(f"{folder}/scheduler sets use_dynamic_shifting, which is not supported for this family")
