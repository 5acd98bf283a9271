"""Scored groups of texts, written by the toy text policy: what tests of text algorithms feed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from learner.algorithms import Algorithm, AlgorithmUnion, LossSetting, make_algorithm
from learner.batching import StepData, TokenBatch, cut
from learner.policies import PolicySet
from raylign.keys import sample_generators
from raylign.models.tokens import TokenPolicy, TokenPrompts
from raylign.samplers.entropy_bounded import Budget, EntropyBounded, EntropyBoundedConfig, draw_budgets
from raylign.samplers.tokens import Candidates, TokenTransition
from raylign.types import Needs, Prompt, Rollout, RolloutGroup, RolloutStatus, SampleKey, TokenTrajectory
from tests.tiny_models import RUN_SEED, Reward, breakdown, by_sibling

WORDS = ("ab", "abcdef", "c", "fade", "bead", "dcba")
"""Prompts of the toy's letters, of several lengths."""


def entropy_bounded(canvas_length: int = 8, budget: Budget = "fixed", **options: Any) -> EntropyBounded:
    """The sampler of these groups: every position is drawn by the policy, also those after an end token."""
    values = {"budget": budget, "gamma": 0.5, "stop_at_eos": False, **options}
    return EntropyBounded(EntropyBoundedConfig.model_validate(values), canvas_length)


def draw_text_groups(
    policy: TokenPolicy,
    sampler: EntropyBounded | None = None,
    *,
    num_groups: int = 3,
    group_size: int = 4,
    reward: Reward = by_sibling,
    first_sequence: int = 0,
) -> list[RolloutGroup]:
    """Groups of the policy's answers to WORDS in turn, scored by `reward` of (group, sibling)."""
    sampler = sampler or entropy_bounded(policy.canvas_length)
    groups: list[RolloutGroup] = []
    for sequence in range(first_sequence, first_sequence + num_groups):
        prompt = Prompt(f"p{sequence}", WORDS[sequence % len(WORDS)])
        keys = [SampleKey(RUN_SEED, prompt.id, 0, index) for index in range(group_size)]
        prompts = policy.encode(prompt.text)
        with torch.no_grad():
            trajectory = unmask(policy, sampler, prompts.repeat(group_size), keys)
        rollouts = tuple(Rollout(key, RolloutStatus.OK, 0, 0) for key in keys)
        texts = tuple(policy.decode(trajectory.tokens_GL))
        groups.append(RolloutGroup(prompt, 0, sequence, rollouts, trajectory, prompts, texts=texts))
    return [
        group.with_rewards([breakdown(reward(index, sibling)) for sibling in range(group_size)])
        for index, group in enumerate(groups)
    ]


def rewarded(groups: Sequence[RolloutGroup], reward: Callable[[torch.Tensor], float]) -> list[RolloutGroup]:
    """The same groups scored by what each sibling wrote: `reward` is given its tokens, (L,)."""
    return [group.with_rewards([breakdown(reward(row)) for row in group.tokens.tokens_GL]) for group in groups]


def unmask(
    policy: TokenPolicy, sampler: EntropyBounded, prompts: TokenPrompts, keys: Sequence[SampleKey]
) -> TokenTrajectory:
    """One answer per key, on a canvas of one block; recorded as rollouts record it."""
    config, mask_id = sampler.config, policy.vocabulary.mask_id
    canvas_GL = torch.full((len(keys), policy.canvas_length), mask_id)
    plain_GL, sampled_GL = torch.zeros(canvas_GL.shape), torch.zeros(canvas_GL.shape)
    reveal_GL, nfe_G = torch.zeros_like(canvas_GL), torch.zeros(len(keys), dtype=torch.int64)
    gamma_G, features_GD = torch.full((len(keys),), config.gamma), None
    draws = sample_generators(keys, "tokens")
    for step in range(policy.canvas_length):
        masked_GL = canvas_GL == mask_id
        busy_G = masked_GL.any(dim=1)
        if not bool(busy_G.any()):
            break
        prediction = policy.predict(canvas_GL, prompts)
        if step == 0 and config.budget != "fixed":
            assert prediction.prompt_features_BD is not None
            features_GD = prediction.prompt_features_BD if config.budget == "learned" else None
            offset_G = torch.zeros(len(keys)) if features_GD is None else policy.log_budget(features_GD)
            gamma_G = draw_budgets(config, offset_G, sample_generators(keys, "budget"))
        transition = TokenTransition.of(prediction.logits_BLV, config.temperature, config.top_p)
        tokens_GL = transition.sample(torch.stack([torch.rand(policy.canvas_length, generator=one) for one in draws]))
        choice = Candidates(transition, tokens_GL, masked_GL, 0, step, policy.vocabulary.eos_id, gamma_G)
        revealed_GL = sampler.choose(choice) & masked_GL
        canvas_GL = torch.where(revealed_GL, tokens_GL, canvas_GL)
        plain_GL = torch.where(revealed_GL, transition.plain_logprob(tokens_GL), plain_GL)
        sampled_GL = torch.where(revealed_GL, transition.logprob(tokens_GL), sampled_GL)
        reveal_GL[revealed_GL] = step
        nfe_G += busy_G
    log_gamma_G = gamma_G.log() if math.isfinite(config.gamma) else None
    return TokenTrajectory(
        canvas_GL, reveal_GL, sampled_GL, plain_GL, nfe_G, torch.zeros_like(nfe_G), log_gamma_G, features_GD
    )


def text_algorithm(config: AlgorithmUnion, policy: TokenPolicy, budget: Budget = "fixed", epochs: int = 1) -> Algorithm:
    """The algorithm of a configuration, told of these groups' sampler."""
    return make_algorithm(
        config, LossSetting(entropy_bounded(policy.canvas_length, budget), 1.0, policy.vocabulary, epochs)
    )


def policies_for(algorithm: Algorithm, policy: TokenPolicy) -> PolicySet:
    """The policy with the relatives that the algorithm needs."""
    needs = algorithm.needs
    return PolicySet(policy, "fp32", old=Needs.OLD in needs, reference=Needs.REFERENCE in needs)


def token_batches(
    algorithm: Algorithm,
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
