"""What a text run's parts ask of each other, checked when its configuration is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raylign.models.text_policy import TextModelConfig
from raylign.samplers import TokenSamplerConfig, make_token_sampler
from raylign.samplers.entropy_bounded import EntropyBoundedConfig


def check_text_run(model: Any, algorithm: Any, rollouts: Any, evaluation: Any, gammas: Sequence[float]) -> None:
    """Raise ValueError, with the remedy, for the first pair that cannot work: a head without its sampler, a step
    count or block that does not divide the canvas, rollouts that the algorithm cannot score.

    `model` and `algorithm` are configurations for text, `rollouts` and `evaluation` those of samplers.
    """
    assert isinstance(model, TextModelConfig)
    assert isinstance(rollouts, TokenSamplerConfig)
    if not isinstance(evaluation, TokenSamplerConfig):
        raise ValueError(f"eval.sampler {evaluation.type!r} draws pictures; choose one for texts")
    if rollouts.temperature == 0:
        raise ValueError(
            "sampler.temperature 0 makes all samples of a prompt equal, so nothing can be learnt from them; "
            "set it above 0, and eval.sampler for greedy evaluation"
        )
    if model.trust_remote_code and (rollouts.cache, evaluation.cache) != ("none", "none"):
        raise ValueError(
            "a checkpoint's own code keeps no cache, so model.trust_remote_code needs sampler.cache = 'none'"
        )
    samplers = [make_token_sampler(sampler, model.canvas_length) for sampler in (rollouts, evaluation)]
    algorithm.check_sampler(samplers[0])
    _check_budgets(model, rollouts, evaluation, gammas)


def _check_budgets(
    model: TextModelConfig, rollouts: TokenSamplerConfig, evaluation: TokenSamplerConfig, gammas: Sequence[float]
) -> None:
    learned = any(getattr(sampler, "budget", None) == "learned" for sampler in (rollouts, evaluation))
    if learned != model.budget_head:
        raise ValueError(
            "sampler.budget = 'learned' and model.budget_head = true belong together, as the head chooses the budgets; "
            f"got budget_head = {str(model.budget_head).lower()}"
        )
    if gammas and not isinstance(evaluation, EntropyBoundedConfig):
        raise ValueError(
            f"eval.gammas are entropy budgets, and {type(evaluation).__name__} has none; "
            "set eval.sampler.type = 'entropy_bounded'"
        )
    if min(gammas, default=0.0) < 0:
        raise ValueError(f"eval.gammas must be at least 0, got {min(gammas)}")
