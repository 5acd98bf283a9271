"""Raylign's nouns. Frozen dataclasses, because tensors stay out of pydantic and nothing is edited in flight.

    Prompt ──▶ RolloutGroup (G siblings: Rollout × G, one trajectory of latents or of tokens, one conditioning)
           ──▶ RewardScore / RewardBreakdown on each Rollout ──▶ Advantage ──▶ TrainBatch (learner/batching.py)

The group is the unit of credit, of buffering and of failure. Tensors of a group are batched over its siblings
(axis G), so a group crosses a process boundary as a few contiguous arrays rather than G small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Flag, StrEnum, auto
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from raylign.errors import ShapeError

if TYPE_CHECKING:
    import numpy as np
    import torch

    Index = slice | list[int] | torch.Tensor

JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
WeightVersion = int
"""One per published policy, counting up; 0 is the model as loaded."""


class Needs(Flag):
    """What an algorithm wants recorded or kept; the seam between coupled and forward-process methods."""

    FINAL = auto()
    """The final state of each sample."""
    STEPS = auto()
    """Every state along the way."""
    LOGPROBS = auto()
    """The sampler's log-prob of each step it took; needs a stochastic sampler."""
    REFERENCE = auto()
    """The policy of weight version 0."""
    OLD = auto()
    """A slowly following copy of the policy."""
    CHUNKS = auto()
    """Samples trained on in the very batches they were drawn in, so that an equal policy rounds equally."""
    SAMPLING = auto()
    """A second slow copy of the policy, which makes the rollouts."""
    NEGATIVE = auto()
    """What the network is told of the empty prompt, for a guided reference, whatever guidance the rollouts use."""
    GROUPS = auto()
    """Whole groups in one optimiser update and on one rank: their siblings are compared with each other."""


class RolloutStatus(StrEnum):
    """How one attempt ended."""

    OK = "ok"
    GENERATION_FAILED = "generation_failed"
    REWARD_FAILED = "reward_failed"


class SampleKey(NamedTuple):
    """The name of one sample; it can be drawn again from this and the weights alone."""

    run_seed: int
    prompt_id: str
    visit: int
    """How often this prompt had been visited before; -1 for evaluation."""
    sample_index: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task: the text given to the model and what rewards need to know about it."""

    id: str
    text: str
    metadata: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a reward has no value. `code` is one of the wire statuses of the reward service."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class RewardScore:
    """One reward's answer for one sample: a finite value or an error, never both, never neither."""

    name: str
    value: float | None
    error: RewardFailure | None = None
    version: str = ""
    seconds: float = 0.0
    details: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    fingerprint: str = ""
    """Of the model files behind it; empty when there are none beside what `version` names."""
    cache: Literal["hit", "miss", "bypass"] = "bypass"
    """Whether it was remembered, scored and remembered, or scored without a cache."""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.error is None):
            raise ValueError(f"RewardScore {self.name!r} needs a value or an error, got {self.value}, {self.error}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"RewardScore {self.name!r} must be finite, got {self.value}; report an error instead")


@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """The mix of one sample's scores; `total` is None when a required reward failed, or none could be asked."""

    total: float | None
    scores: tuple[RewardScore, ...]
    failure: RewardFailure | None = None
    """Why no reward was asked, if so."""
    weights: tuple[float, ...] = ()
    """What each score counts in the total, in the order of `scores`; for credit that weighs rewards after it has
    normalised each."""


@dataclass(frozen=True, slots=True)
class RewardSample:
    """What a reward sees of one sample. Images are RGB, uint8, (height, width, 3)."""

    id: str
    prompt: Prompt
    image_HWC: np.ndarray | None = None
    text: str | None = None
    seed: int = 0
    """For rewards that draw (a judge's answer): equal samples with equal seeds score the same."""
    reference: str | None = None
    """The right answer or a reference answer, for rewards that compare with one."""
    group_id: str = ""
    """Names the siblings of one prompt in a request; empty when it does not matter."""
    more_images_HWC: tuple[np.ndarray, ...] = ()
    """Further pictures of the same sample (views, frames); rewards that look at one picture refuse them."""


@dataclass(frozen=True, slots=True)
class LatentTrajectory:
    """What an image sampler recorded for G siblings; fp32 on the CPU, but for states that were rounded to bf16.

    final_GCHW: the last state. states_GS1CHW: every state, from noise to final (only if STEPS is needed), in the format
    of `rollout.latents`.
    rollout_logprob_GS: mean over latent dims of each step's log-prob; 0 for a step without a density (only if LOGPROBS
    is needed).
    sigmas_S1: the noise levels of the states, falling.
    stochastic_S: bool, the steps that added noise.
    """

    final_GCHW: torch.Tensor
    sigmas_S1: torch.Tensor
    states_GS1CHW: torch.Tensor | None = None
    rollout_logprob_GS: torch.Tensor | None = None
    stochastic_S: torch.Tensor | None = None

    def rows(self, index: Index) -> LatentTrajectory:
        """A selection of siblings, with bytes of its own."""
        return replace(
            self,
            final_GCHW=self.final_GCHW[index].clone(),
            states_GS1CHW=None if self.states_GS1CHW is None else self.states_GS1CHW[index].clone(),
            rollout_logprob_GS=None if self.rollout_logprob_GS is None else self.rollout_logprob_GS[index].clone(),
        )


@dataclass(frozen=True, slots=True)
class TokenTrajectory:
    """What a text sampler recorded for G siblings of L response positions; on the CPU.

    tokens_GL: int64, the final canvas, with whatever follows the first end token.
    reveal_step_GL: int64, the denoising step (from 0) that revealed each position. With the tokens it gives back
    every canvas on the way, as nothing is ever remasked.
    rollout_logprob_GL: fp32, log-prob of each token when it was revealed, as sampled (temperature, top-p, guidance).
    plain_logprob_GL: fp32, the same under the bare policy (temperature 1, no top-p, no guidance).
    nfe_G: int64, calls of the network while the row was not done. cached_calls_G: int64, those of them that computed
    a part of the positions only.
    log_gamma_G: fp32, log of each row's entropy budget; None for samplers without one.
    budget_features_GD: fp32, what the budget head was told; None where no head chose the budgets.
    """

    tokens_GL: torch.Tensor
    reveal_step_GL: torch.Tensor
    rollout_logprob_GL: torch.Tensor
    plain_logprob_GL: torch.Tensor
    nfe_G: torch.Tensor
    cached_calls_G: torch.Tensor
    log_gamma_G: torch.Tensor | None = None
    budget_features_GD: torch.Tensor | None = None

    def rows(self, index: Index) -> TokenTrajectory:
        """A selection of siblings, with bytes of its own."""
        return TokenTrajectory(*(None if t is None else t[index].clone() for t in self.tensors()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> TokenTrajectory:
        return TokenTrajectory(*(None if t is None else t.to(device) for t in self.tensors()))  # type: ignore[arg-type]

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Every field, in order."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at a prompt. Versions are the oldest and newest weights used while it was made."""

    key: SampleKey
    status: RolloutStatus
    min_version: WeightVersion
    max_version: WeightVersion
    reward: RewardBreakdown | None = None

    @property
    def total(self) -> float | None:
        """The mixed reward, or None if there is none (not scored, or failed)."""
        return self.reward.total if self.reward is not None else None


@dataclass(frozen=True, slots=True)
class Exploration:
    """What the drafts of a prompt said, of which a group's siblings were chosen; for metrics and pictures, not credit.

    Drafts stand in the order of their sample indices; those dropped before they were done are not among them.
    """

    indices: tuple[int, ...]
    """Each draft's sample index; a sibling of the group carries its draft's."""
    totals: tuple[float | None, ...]
    """Each draft's mixed reward; None for a failed one."""
    redrawn: bool
    """Whether the siblings were drawn and scored again; if not, they are drafts themselves."""
    cause: str = ""
    """Why the first failed draft failed; empty if none did."""
    images_NHWC: np.ndarray | None = None
    """The drafts' pictures, of groups that are shown to people."""

    @property
    def num_failed(self) -> int:
        """Drafts without a reward."""
        return self.totals.count(None)


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work and when it was done, for timelines. No number of a run depends on it."""

    who: str
    """host:pid of the process; "rewards" and "loop" are the scoring calls and the phases of the run's loop."""
    phase: str
    start_s: float
    """Unix seconds of the machine it was done on."""
    seconds: float


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G siblings of one prompt."""

    prompt: Prompt
    visit: int
    sequence: int
    """Place in the run's prompt stream; the buffer hands groups out in this order."""
    rollouts: tuple[Rollout, ...]
    trajectory: LatentTrajectory | TokenTrajectory
    conditioning: Any
    """What the network was told of the prompt, P = 1: a Conditioning for pictures, TokenPrompts for texts."""
    images_GHWC: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    """What each sibling wrote, for text models."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """This group's share of the time its batch took, by phase ("sample", "decode")."""
    exploration: Exploration | None = None
    """Where its siblings come from, when they were chosen among drafts."""
    work: tuple[Work, ...] = ()
    """What was done for it, each once; groups drawn or scored together have pieces in common."""

    @property
    def group_size(self) -> int:
        return len(self.rollouts)

    @property
    def latents(self) -> LatentTrajectory:
        """The trajectory of a group of pictures. Raises ShapeError for texts."""
        if not isinstance(self.trajectory, LatentTrajectory):
            raise ShapeError(f"group {self.prompt.id!r} holds texts where pictures are wanted; check the model's type")
        return self.trajectory

    @property
    def tokens(self) -> TokenTrajectory:
        """The trajectory of a group of texts. Raises ShapeError for pictures."""
        if not isinstance(self.trajectory, TokenTrajectory):
            raise ShapeError(f"group {self.prompt.id!r} holds pictures where texts are wanted; check the model's type")
        return self.trajectory

    @property
    def min_version(self) -> WeightVersion:
        return min(rollout.min_version for rollout in self.rollouts)

    def with_rewards(
        self, rewards: Sequence[RewardBreakdown], seconds: float = 0.0, work: Sequence[Work] = ()
    ) -> RolloutGroup:
        """The same group with one breakdown per sibling; a missing total marks the sibling as failed.

        `seconds` is the time the rewards took for this group, `work` the calls that scored it.
        """
        if len(rewards) != self.group_size:
            raise ValueError(f"group {self.prompt.id!r} has {self.group_size} siblings, got {len(rewards)} rewards")
        rollouts = tuple(
            replace(
                rollout,
                reward=reward,
                status=_status_after(rollout.status, reward),
            )
            for rollout, reward in zip(self.rollouts, rewards, strict=True)
        )
        return replace(self, rollouts=rollouts, seconds={**self.seconds, "reward": seconds}, work=(*self.work, *work))

    def siblings(self, places: Sequence[int]) -> RolloutGroup:
        """The group of some of its siblings, in the order given."""
        rows = list(places)
        return replace(
            self,
            rollouts=tuple(self.rollouts[row] for row in rows),
            trajectory=self.trajectory.rows(rows),
            images_GHWC=None if self.images_GHWC is None else self.images_GHWC[rows],
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows),
        )

    def without_outputs(self) -> RolloutGroup:
        """The same group without decoded pictures or texts: what the learner needs."""
        seen = None if self.exploration is None else replace(self.exploration, images_NHWC=None)
        return replace(self, images_GHWC=None, texts=None, exploration=seen, work=())


def _status_after(status: RolloutStatus, reward: RewardBreakdown) -> RolloutStatus:
    if status is RolloutStatus.OK and reward.total is None:
        return RolloutStatus.REWARD_FAILED
    return status


@dataclass(frozen=True, slots=True)
class Advantage:
    """Credit for one group, assigned by an algorithm. Failed siblings carry 0 and are not in `valid_G`.

    budget_adv_G: credit for each row's choice of entropy budget, where a head chose them.
    """

    adv_G: torch.Tensor
    valid_G: torch.Tensor
    budget_adv_G: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one learner step reports. `finite` is False when the update was refused and weights were kept."""

    metrics: Mapping[str, float]
    finite: bool
