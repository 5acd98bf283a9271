"""One recorded step of a stochastic sampler, scored again by the learner: what every policy-ratio loss starts from.

The step is scored by the very function that drew it (`Sampler.transition`), under the rollout's guidance and in the
rollout's batch shapes, so that equal weights give an equal log-prob, bit for bit, and a ratio of exactly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learner.batching import MicroBatch
from learner.losses import KlSpace, gaussian_kl, norm_ratio, reference_kl
from learner.policies import PolicySet
from learner.token_losses import importance_weights
from raylign.errors import ShapeError
from raylign.keys import generator
from raylign.samplers import Sampler
from raylign.samplers.base import Transition
from raylign.types import LatentTrajectory, Needs


@dataclass(frozen=True, slots=True)
class Guess:
    """What one policy says of the step: its velocity (N, C, H, W), fp32, and the next state's distribution."""

    velocity_NCHW: torch.Tensor
    transition: Transition


@dataclass(frozen=True, slots=True)
class StepScores:
    """A step under the learner, with gradient, and under the relatives that are needed, without.

    Log-probs (N,) are of the recorded next state; `rollout_logprob_N` is the recorded one. delta_sigma < 0. The old
    policy is that of the learner step's beginning.
    """

    learner: Guess
    learner_logprob_N: torch.Tensor
    rollout_logprob_N: torch.Tensor
    delta_sigma: float
    ref: Guess | None = None
    old: Guess | None = None
    old_logprob_N: torch.Tensor | None = None

    def kl(self, space: KlSpace) -> torch.Tensor:
        """Distance of the learner's step to the reference's, (N,). Raises ShapeError without a reference."""
        ref, learner = _need(self.ref, "reference"), self.learner
        return reference_kl(
            space,
            learner.transition.mean_BCHW,
            ref.transition.mean_BCHW,
            learner.transition.std_B,
            learner.velocity_NCHW,
            ref.velocity_NCHW,
            self.delta_sigma,
        )

    def norm_ratio(self) -> torch.Tensor:
        """|v| / |v_ref|, (N,)."""
        return norm_ratio(self.learner.velocity_NCHW, _need(self.ref, "reference").velocity_NCHW)

    def drift(self) -> torch.Tensor:
        """KL of the learner's step to the old policy's, a mean over dims, (N,). Raises ShapeError without one."""
        old = _need(self.old, "old").transition
        return gaussian_kl(self.learner.transition.mean_BCHW, old.mean_BCHW, old.std_B)

    def need_old_logprob(self) -> torch.Tensor:
        """The log-prob of the old policy. Raises ShapeError without one."""
        _need(self.old, "old")
        assert self.old_logprob_N is not None
        return self.old_logprob_N

    def age_weight(self, cap: float) -> torch.Tensor:
        """How much likelier the old policy finds the step than the policy that drew it, up to `cap`, (N,): exactly 1
        where they are one. Raises ShapeError without an old policy."""
        return importance_weights(self.need_old_logprob(), self.rollout_logprob_N, cap)

    def away(self) -> torch.Tensor:
        """How far the learner's policy is from the one that drew the step, |rho - 1| of their ratio, (N,)."""
        return torch.exp(self.learner_logprob_N.detach() - self.rollout_logprob_N).sub(1).abs()


def score_step(
    policies: PolicySet, batch: MicroBatch, sampler: Sampler, guidance_scale: float, needs: Needs
) -> StepScores:
    """Score the one step that a micro-batch holds, also by the reference and the old policy where `needs` has them.

    The old policy is that of the learner step's beginning, and is not asked while the weights are still its own.
    Raises ShapeError for a batch of several steps, without states and log-probs, or at a step without a density.
    """
    if batch.states_NS1CHW is None or batch.rollout_logprob_NS is None:
        raise ShapeError("a policy ratio needs recorded states and log-probs; rollouts must record STEPS and LOGPROBS")
    step = batch.only_step()
    # Contiguous, as the rollout had them: another memory layout may round differently.
    state = batch.states_NS1CHW[:, step].contiguous()
    next_state = batch.states_NS1CHW[:, step + 1].contiguous()
    sigma, following = sampler.sigmas_S1[step : step + 2].tolist()
    sigma_N = sampler.sigmas_S1[step].to(state.device).expand(len(state)).contiguous()
    inputs = state, sigma_N, batch.conditioning, guidance_scale

    def guess(velocity: torch.Tensor) -> Guess:
        return Guess(velocity, sampler.transition(velocity, state, step))

    # Relatives first: the current policy's graph reads the parameters they are swapped into.
    ref = guess(policies.velocity_of("reference", *inputs)) if Needs.REFERENCE in needs else None
    moved = Needs.OLD in needs and not batch.on_policy
    old = guess(policies.velocity_of("old", *inputs)) if moved else None
    learner = guess(policies.velocity(*inputs))
    logprob_N = learner.transition.logprob(next_state)
    old_logprob_N = None if old is None else old.transition.logprob(next_state)
    if Needs.OLD in needs and old is None:
        old, old_logprob_N = guess(learner.velocity_NCHW.detach()), logprob_N.detach()
    rollout_logprob_N = batch.rollout_logprob_NS[:, step]
    return StepScores(learner, logprob_N, rollout_logprob_N, following - sigma, ref, old, old_logprob_N)


def trainable_steps(trajectory: LatentTrajectory, sampler: Sampler, num_usable: int) -> list[int]:
    """The steps among the first `num_usable` that added noise when the trajectory was drawn."""
    recorded = trajectory.stochastic_S
    added = sampler.stochastic_S if recorded is None else recorded.tolist()
    return [step for step in range(num_usable) if added[step]]


def draw_steps(steps: Sequence[int], count: int, run_seed: int, learner_step: int) -> torch.Tensor:
    """`count` of the steps, in order, drawn anew for each learner step: (count,) int64."""
    order = torch.randperm(len(steps), generator=generator(run_seed, "train_steps", learner_step))
    return torch.tensor(list(steps), dtype=torch.int64)[order[:count].sort().values]


def _need(guess: Guess | None, relative: str) -> Guess:
    if guess is None:
        raise ShapeError(f"the step was not scored by the {relative} policy; the algorithm's needs must name it")
    return guess
