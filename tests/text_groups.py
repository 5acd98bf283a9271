"""Scored groups of texts, written by the toy text policy: what tests of text algorithms feed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from learner.algorithms import Algorithm, AlgorithmUnion, LossSetting, make_algorithm
from learner.algorithms.just_grpo import JustGrpoConfig
from learner.batching import StepData, TokenBatch, cut
from learner.policies import PolicySet
from raylign.models.tokens import TokenPolicy
from raylign.samplers import TokenSampler
from raylign.samplers.entropy_bounded import Budget, EntropyBounded, EntropyBoundedConfig
from raylign.types import Needs, Prompt, RolloutGroup
from rollout.engine import ChunkRequest, RolloutEngine
from rollout.prompts import GroupTask
from rollout.texts import TokenSetup
from tests.tiny_models import RUN_SEED, Reward, breakdown, by_sibling

WORDS = ("ab", "abcdef", "c", "fade", "bead", "dcba")
"""Prompts of the toy's letters, of several lengths."""


def entropy_bounded(canvas_length: int = 8, budget: Budget = "fixed", **options: Any) -> EntropyBounded:
    """The sampler of these groups: every position is drawn by the policy, also those after an end token."""
    values = {"budget": budget, "gamma": 0.5, "stop_at_eos": False, **options}
    return EntropyBounded(EntropyBoundedConfig.model_validate(values), canvas_length)


def draw_text_groups(
    policy: TokenPolicy,
    sampler: TokenSampler | None = None,
    *,
    num_groups: int = 3,
    group_size: int = 4,
    reward: Reward = by_sibling,
    first_sequence: int = 0,
    words: Sequence[str] = WORDS,
) -> list[RolloutGroup]:
    """Groups of the policy's answers to `words` in turn, scored by `reward` of (group, sibling)."""
    setup = TokenSetup(sampler or entropy_bounded(policy.canvas_length), Needs.FINAL)
    engine = RolloutEngine(policy, {"rollout": setup}, RUN_SEED)
    engine.pull(policy.export_weights(0))
    tasks = tuple(
        GroupTask(Prompt(f"p{sequence}", words[sequence % len(words)]), 0, sequence)
        for sequence in range(first_sequence, first_sequence + num_groups)
    )
    groups = engine.generate(ChunkRequest(tasks, tuple(range(group_size))))
    return [
        group.with_rewards([breakdown(reward(index, sibling)) for sibling in range(group_size)])
        for index, group in enumerate(groups)
    ]


def rewarded(groups: Sequence[RolloutGroup], reward: Callable[[torch.Tensor], float]) -> list[RolloutGroup]:
    """The same groups scored by what each sibling wrote: `reward` is given its tokens, (L,)."""
    return [group.with_rewards([breakdown(reward(row)) for row in group.tokens.tokens_GL]) for group in groups]


def sampler_for(config: AlgorithmUnion, canvas_length: int = 8, budget: Budget = "fixed") -> EntropyBounded:
    """What an algorithm's rollouts are drawn with: one block, or one position after the other where it must be."""
    if isinstance(config, JustGrpoConfig):
        return entropy_bounded(canvas_length, budget, block_length=1)
    return entropy_bounded(canvas_length, budget)


def text_algorithm(
    config: AlgorithmUnion, policy: TokenPolicy, budget: Budget = "fixed", epochs: int = 1
) -> Algorithm[TokenBatch]:
    """The algorithm of a configuration, told of the sampler that `sampler_for` gives it."""
    sampler = sampler_for(config, policy.canvas_length, budget)
    return make_algorithm(config, LossSetting(sampler, 1.0, policy.vocabulary, epochs))


def policies_for(algorithm: Algorithm[TokenBatch], policy: TokenPolicy) -> PolicySet:
    """The policy with the relatives that the algorithm needs."""
    needs = algorithm.needs
    return PolicySet(policy, "fp32", needs)


def token_batches(
    algorithm: Algorithm[TokenBatch],
    groups: Sequence[RolloutGroup],
    size: int = 4,
    *,
    epochs: int = 1,
    on_policy: bool | None = None,
) -> list[TokenBatch]:
    """The micro-batches of one learner step, epoch after epoch; `on_policy` overrides what the batches say."""
    items = [algorithm.items(group, RUN_SEED, 1) for group in groups]
    shares = [algorithm.shares(group) for group in groups]
    data = StepData(groups, algorithm.credit(groups), items, shares, algorithm.needs)
    batches = cut(data, num_epochs=epochs, num_updates=1, rank=0, num_ranks=1, micro_batch_size=size)
    found = [one for batch in batches for one in batch.micro_batches() if isinstance(one, TokenBatch)]
    return found if on_policy is None else [replace(one, on_policy=on_policy) for one in found]
