"""Scored groups of texts with given answers, calls and budgets: what tests of samples, reports and frontiers show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from raylign.types import (
    JsonValue,
    Prompt,
    RewardBreakdown,
    RewardScore,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SampleKey,
    TokenTrajectory,
)


def answer_group(
    prompt_id: str,
    texts: Sequence[str],
    *,
    rewards: Sequence[float | None],
    calls: Sequence[int],
    exact: Sequence[bool] | None = None,
    log_gamma: Sequence[float] | None = None,
    metadata: Mapping[str, JsonValue] | None = None,
) -> RolloutGroup:
    """One prompt's answers; `exact` None leaves that detail out of the scores, a reward None is a failed one."""
    size = len(texts)
    canvas_GL = torch.zeros(size, 2, dtype=torch.int64)
    tokens = TokenTrajectory(
        tokens_GL=canvas_GL,
        reveal_step_GL=canvas_GL,
        rollout_logprob_GL=torch.zeros(size, 2),
        plain_logprob_GL=torch.zeros(size, 2),
        nfe_G=torch.tensor(calls),
        cached_calls_G=torch.zeros(size, dtype=torch.int64),
        log_gamma_G=None if log_gamma is None else torch.tensor(log_gamma),
    )
    rollouts = tuple(Rollout(SampleKey(0, prompt_id, -1, place), RolloutStatus.OK, 0, 0) for place in range(size))
    prompt = Prompt(prompt_id, f"sort {prompt_id}", metadata or {})
    group = RolloutGroup(prompt, -1, 0, rollouts, tokens, None, texts=tuple(texts))
    breakdowns: list[RewardBreakdown] = []
    for place, reward in enumerate(rewards):
        details: dict[str, JsonValue] = {} if exact is None else {"exact": exact[place]}
        scores = () if reward is None else (RewardScore("exact_answer", reward, details=details),)
        breakdowns.append(RewardBreakdown(reward, scores))
    return group.with_rewards(breakdowns)
