"""What the engine and its denoisers pass to each other, whatever is drawn: batches of samples, slots, probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from raylign.models.base import Conditioning
from raylign.models.tokens import TokenPrompts
from raylign.types import LatentTrajectory, SampleKey, TokenTrajectory, WeightVersion, Work

WeightSlot = Literal["rollout", "eval"]
"""Which published weights."""
Slot = Literal["rollout", "eval", "draft"]
"""What a chunk is drawn for: it says which weights, which sampler and which precision."""
WEIGHTS_OF: dict[Slot, WeightSlot] = {"rollout": "rollout", "eval": "eval", "draft": "rollout"}

# Real models' embeddings are megabytes each; a run visits far fewer prompts between weight swaps than this.
MAX_CACHED_PROMPTS = 1024


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """What an evaluation changes of its sampler, to walk along a curve; nothing by default.

    gamma: every row's entropy budget (texts). eta: gDDIM at that stochasticity, 0 being the ODE; num_steps: so many
    denoising steps (both of pictures).
    """

    gamma: float | None = None
    eta: float | None = None
    num_steps: int | None = None


AS_CONFIGURED = EvalPoint()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch of samples: pictures or texts, how they came about, and which of them can be used.

    told: what the network was told about each prompt, on the CPU. ok: one per sample, False for a failed one.
    places: which of the samples that were asked for these are, as many of each prompt; all when not given.
    """

    trajectory: LatentTrajectory | TokenTrajectory
    told: Sequence[Conditioning | TokenPrompts]
    ok: Sequence[bool]
    sample_s: float
    decode_s: float
    images_BHWC: np.ndarray | None = None
    texts: Sequence[str] | None = None
    places: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a rollout policy answered at keyed states, for the learner to answer again (the parity gate).

    state: latents (B, C, H, W) or canvases (B, L). sigma_B: noise level or share of masked positions.
    answer: velocities (B, C, H, W) or logits (B, L, V), with 0 at the mask token.
    """

    version: WeightVersion
    state: torch.Tensor
    sigma_B: torch.Tensor
    conditioning: Conditioning | TokenPrompts
    answer: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pulled:
    """What loading a snapshot took: which it was, its bytes, and seconds to verify and swap it in.

    requantise_s, packed_bytes: making the low-precision copies anew from it, and their size; 0 where there are none.
    detour: why it did not come by the weight store that is configured; empty when it did.
    work: when that was, fetching it included where it came from elsewhere.
    """

    version: WeightVersion
    num_bytes: int
    load_s: float
    requantise_s: float = 0.0
    packed_bytes: int = 0
    detour: str = ""
    work: Work | None = None


class Denoiser(Protocol):
    """Draws samples of one modality, with whatever weights the policy holds."""

    def draw(
        self,
        texts: Sequence[str],
        count: int,
        slot: Slot,
        keys: Sequence[SampleKey],
        point: EvalPoint,
        learner_step: int,
    ) -> Drawn:
        """`count` samples of each prompt, prompt by prompt, one per key, for one learner step (0: evaluation)."""
        ...

    def probe(self, text: str, slot: Slot, run_seed: int, version: WeightVersion) -> Probe:
        """What a slot answers for one prompt, unguided, at keyed states of three noise levels."""
        ...


def trajectory_rows(trajectory: LatentTrajectory | TokenTrajectory, rows: slice) -> LatentTrajectory | TokenTrajectory:
    """A selection of samples, with bytes of its own."""
    if isinstance(trajectory, TokenTrajectory):
        return trajectory.rows(rows)

    def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[rows].clone()

    return LatentTrajectory(
        trajectory.final_GCHW[rows].clone(),
        trajectory.sigmas_S1,
        own(trajectory.states_GS1CHW),
        own(trajectory.rollout_logprob_GS),
        trajectory.stochastic_S,
    )


def join_trajectories(
    parts: Sequence[LatentTrajectory | TokenTrajectory],
) -> LatentTrajectory | TokenTrajectory:
    """Samples of several trajectories, all of one kind, one after the other."""
    texts = [part for part in parts if isinstance(part, TokenTrajectory)]
    if texts:
        columns = zip(*(part.tensors() for part in texts), strict=True)
        return TokenTrajectory(*(_stack(column) for column in columns))  # type: ignore[arg-type]  # in field order
    images = [part for part in parts if isinstance(part, LatentTrajectory)]
    return LatentTrajectory(
        final_GCHW=torch.cat([part.final_GCHW for part in images]),
        sigmas_S1=images[0].sigmas_S1,
        states_GS1CHW=_stack([part.states_GS1CHW for part in images]),
        rollout_logprob_GS=_stack([part.rollout_logprob_GS for part in images]),
        stochastic_S=images[0].stochastic_S,
    )


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
