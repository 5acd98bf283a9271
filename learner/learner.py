"""The learner of one rank: credit, batch, loss, gradient, optimiser, snapshots. It runs with or without Ray.

    begin_step(groups) ──▶ per update: forward_backward ──▶ optimise ──▶ end_step ──▶ publish

Every rank is given all groups (they are small), computes all credit, and trains its own part of each update; what
crosses ranks is one gradient bucket and one row of metrics per update. All state that decides the next step is in
`state_dict`, so a learner that loads it goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from learner.advantages import credit_metrics
from learner.algorithms import AlgorithmConfig, LossSetting, make_algorithm
from learner.batching import ABSENT, StepData, TrainBatch, cut
from learner.parallel import GradientBucket, RankGroup
from learner.policies import PolicySet, PolicyTensors, Relative, check_names, decay_towards
from learner.state import LearnerState
from learner.survey import surveyed_batches
from learner.tally import MetricTally
from raylign.config import Config
from raylign.errors import CheckpointError, RewardError
from raylign.models.base import Conditioning
from raylign.models.tokens import BUDGET_HEAD, TokenPrompts, finite_logits, probed
from raylign.precision import Precision
from raylign.precision.broadcast import Packing, make_packed_snapshot
from raylign.types import RolloutGroup, StepResult, WeightVersion
from raylign.weight_delta import worthwhile_delta
from raylign.weights import SnapshotKind, WeightSnapshot

Which = Literal["rollout", "current", "eval"]
"""The policy that samples (a slow copy, for some algorithms), the one being trained, or the one that is evaluated (its
running mean, if there is one)."""
_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


class LearnerConfig(Config):
    """How the policy is optimised. Defaults are Flow-GRPO's and DiffusionNFT's for LoRA on SD3.5 Medium."""

    lr: float = Field(default=3e-4, gt=0)
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """AdamW decoupled weight decay."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps over which the learning rate rises linearly."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimiser steps per pass over the step's samples; each takes its share of them."""
    epochs_per_step: int = Field(default=1, ge=1)
    """Passes over each step's samples (the inner updates mu of the diffusion-LM papers), with fresh noise in each where
    the algorithm draws any."""
    budget_lr_scale: float = Field(default=50.0, gt=0)
    """The budget head's learning rate over `lr`; it has a gradient clip of its own."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward; the rollout chunk size when not given. With Flow-GRPO another size makes the on-policy
    ratio differ from 1 by rounding."""
    num_ranks: int = Field(default=1, ge=1)
    """Data-parallel learner processes."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads per rank; set by the process that owns the learner, not by the learner."""
    num_gpus_per_rank: float = Field(default=0.0, ge=0)
    """GPUs each rank reserves."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Evaluate and export a running mean of the weights; after s optimiser steps, min((1 + s) / (10 + s), this) of it
    survives one more (.9 in Flow-GRPO and DiffusionNFT, .99 in AWM). The weights themselves when not given."""
    precision: Precision = "fp32"
    """Compute precision; master weights are fp32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    publish: Literal["whole", "delta", "packed"] = "whole"
    """What goes to rollout actors: all trained weights; what changed since the last version, to other processes, where
    that is less (a delta keeps a copy of the last version in host memory; it pays over slow networks only); or, packed,
    the layers that rollouts compute below bf16 as the learner quantised them, and the rest whole."""

    @property
    def num_updates(self) -> int:
        """Optimiser steps per learner step."""
        return self.epochs_per_step * self.updates_per_step


class Learner:
    """See the module's docstring. Methods are called in its order, on every rank alike."""

    def __init__(
        self,
        config: LearnerConfig,
        algorithm_config: AlgorithmConfig,
        policy: Any,
        sampler: Any,
        guidance_scale: float,
        micro_batch_size: int,
        run_seed: int,
        ranks: RankGroup | None = None,
        packing: Packing | None = None,
    ) -> None:
        """`policy` (a DenoisingPolicy or a TokenPolicy) is loaded with role "learner"; `sampler` (of pictures or of
        tokens) and `guidance_scale` are the rollouts'.

        `micro_batch_size` is what `config.micro_batch_size` resolves to: the rollout chunk size when it is None.
        `packing`: what of the rollout policy is published quantised; nothing when not given.
        """
        self.config = config
        self.policy = policy
        setting = LossSetting(sampler, guidance_scale, getattr(policy, "vocabulary", None), config.epochs_per_step)
        self.algorithm = make_algorithm(algorithm_config, setting)
        self._ranks = ranks or RankGroup.single()
        self._micro_batch_size = micro_batch_size
        self._run_seed = run_seed
        self._parameters = policy.trainable_parameters()
        if config.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        self._ranks.broadcast([parameter.data for parameter in self._parameters.values()])
        needs = self.algorithm.needs
        self.policies = PolicySet(policy, config.precision, needs, average=config.ema_decay is not None)
        self._bucket = GradientBucket(self._parameters.values())
        heads = [p for name, p in self._parameters.items() if name.startswith(BUDGET_HEAD)]
        self._network = [p for name, p in self._parameters.items() if not name.startswith(BUDGET_HEAD)]
        self._heads = heads
        self._lr_scales = (1.0, config.budget_lr_scale) if heads else (1.0,)
        self._optimizer = torch.optim.AdamW(
            [{"params": self._network}, *([{"params": heads, "weight_decay": 0.0}] if heads else [])],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self._num_optimiser_steps = 0
        self._batches: tuple[TrainBatch, ...] = ()
        self._tally = MetricTally((), policy.device)
        self._packing = packing
        self._published: dict[Which, WeightSnapshot] = {}

    @property
    def num_optimiser_steps(self) -> int:
        """Optimiser steps taken in the run; refused ones do not count."""
        return self._num_optimiser_steps

    def begin_step(self, groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
        """Credit the groups and cut this rank's batches. Returns what the credit looked like.

        Raises RewardError if no sample has a reward, NumericsError for rewards that give no finite advantage.
        """
        advantages = self.algorithm.credit(groups)
        metrics = credit_metrics(groups, advantages)
        if metrics["batch/valid_samples"] == 0:
            raise RewardError(f"step {step}: none of the {len(groups)} groups has a sample with a reward")
        items = [self.algorithm.items(group, self._run_seed, step) for group in groups]
        most = max(one.shape[1] for one in items)
        items = [torch.nn.functional.pad(one, (0, most - one.shape[1]), value=ABSENT) for one in items]
        shares = [self.algorithm.shares(group) for group in groups]
        self._batches = cut(
            StepData(groups, advantages, items, shares, self.algorithm.needs, version=step - 1),
            num_epochs=self.config.epochs_per_step,
            num_updates=self.config.updates_per_step,
            rank=self._ranks.rank,
            num_ranks=self._ranks.num_ranks,
            micro_batch_size=self._micro_batch_size,
        )
        return metrics

    def forward_backward(self, update: int) -> None:
        """Accumulate the gradient of one update's loss. Weights are read, not changed.

        Raises NumericsError for a NaN that came with a valid sample.
        """
        batch = self._batches[update]
        self._bucket.zero()
        self._tally = MetricTally(("loss", *self.algorithm.metrics), self.policy.device)
        for micro_batch in surveyed_batches(self.algorithm, self.policies, batch, self._ranks):
            losses = self.algorithm.loss(self.policies, micro_batch)
            self._tally.add({"loss": losses.loss_N, **losses.metrics}, micro_batch.valid_N)
            # Rows that only keep a chunk's shape are left out by index: a product with 0 would let a NaN through.
            (losses.loss_N[micro_batch.valid_N].sum() / batch.denominator).backward()

    def optimise(self, update: int) -> StepResult:
        """Sum gradients over ranks, clip, and take one AdamW step.

        If loss or gradient is not finite on any rank, no rank changes weights, moments or counters, and the result
        says so; its metrics then hold what was not finite. An update without a valid sample changes nothing either.
        """
        num_items = self._batches[update].num_items
        metrics = {"batch/num_items": float(num_items)}
        if num_items == 0:
            return StepResult(metrics, finite=True)
        self._ranks.all_reduce_gradients(self._bucket)
        metrics |= self._tally.reduce(self._ranks, num_items)
        # After the reduction every rank holds the same numbers, so every rank decides alike.
        norm = float(torch.nn.utils.clip_grad_norm_(self._network, self.config.grad_clip))
        lr = self.config.lr * min(1.0, (self._num_optimiser_steps + 1) / max(1, self.config.warmup_steps))
        metrics |= {"grad/norm": norm, "learner/lr": lr}
        if self._heads:
            metrics["grad/budget_norm"] = float(torch.nn.utils.clip_grad_norm_(self._heads, self.config.grad_clip))
        decisive = ("grad/norm", "grad/budget_norm", "loss")
        if not all(math.isfinite(metrics[name]) for name in decisive if name in metrics):
            return StepResult(metrics, finite=False)
        for parameter_group, scale in zip(self._optimizer.param_groups, self._lr_scales, strict=True):
            parameter_group["lr"] = lr * scale
        self._optimizer.step()
        self._num_optimiser_steps += 1
        average = self.policies.relatives.get("average")
        if average is not None and self.config.ema_decay is not None:
            count = self._num_optimiser_steps
            decay_towards(self.policy, average, min((1 + count) / (10 + count), self.config.ema_decay))
        return StepResult(metrics, finite=True)

    def end_step(self, step: int) -> dict[str, float]:
        """Let the policy's relatives follow, once per learner step. Drops the step's batches."""
        self._batches = ()
        metrics: dict[str, float] = {}
        for relative, tensors in self.policies.relatives.items():
            if relative == "average":
                continue
            decay = self.algorithm.decay(relative, self._num_optimiser_steps, step)
            if relative != "reference":
                metrics[f"learner/{relative}_decay"] = decay
            if decay < 1:
                decay_towards(self.policy, tensors, decay)
        return metrics

    def publish(self, version: WeightVersion, which: Which = "rollout") -> WeightSnapshot:
        """A verified snapshot of one of the learner's policies. A copy: safe to send.

        Raises NumericsError, naming the layer, if a weight to be packed is not finite.
        """
        relative = self._relative(which)
        tensors = None if relative is None else self.policies.relatives[relative]
        if self._packing is not None and which == "rollout":
            return make_packed_snapshot(self._packing, self._parameters if tensors is None else tensors, version)
        return self.policy.export_weights(version, tensors)

    def publish_changes(
        self, version: WeightVersion, which: Which = "rollout"
    ) -> tuple[WeightSnapshot | None, WeightSnapshot, SnapshotKind]:
        """What changed since this was last called for the same policy, the whole snapshot, and which of them to send.

        There is no delta, and the whole is to be sent, the first time and where a delta would not pay.
        """
        whole = self.publish(version, which)
        base = self._published.get(which)
        self._published[which] = whole
        delta = None if base is None else worthwhile_delta(base, whole)
        return delta, whole, (delta or whole).kind

    def predict(
        self,
        state: torch.Tensor,
        sigma_B: torch.Tensor,
        conditioning: Conditioning | TokenPrompts,
        which: Which = "rollout",
    ) -> torch.Tensor:
        """What a published policy predicts in the learner, without gradient or guidance: for parity checks.

        Velocities of latents (B, C, H, W), or logits of the probed positions of canvases (B, L), 0 at the mask.
        """
        device, relative = self.policy.device, self._relative(which)
        with torch.no_grad():
            if isinstance(conditioning, TokenPrompts):
                told = conditioning.to(device)
                return finite_logits(self.policies.predict_tokens(state.to(device), told, relative, probed(state)))
            inputs = state.to(device), sigma_B.to(device), conditioning.to(device)
            return self.policies.velocity_of(relative, *inputs) if relative else self.policies.velocity(*inputs)

    def weights_sha256(self) -> str:
        """Hash of the trained tensors: names, shapes, dtypes and contents."""
        return self.publish(0, "current").sha256

    def state_dict(self) -> LearnerState:
        """Copies, on the CPU, of all that decides the next step. Equal on every rank: save it from one."""
        tensors = _prefixed("params", {name: parameter.data for name, parameter in self._parameters.items()})
        for relative, relative_tensors in self.policies.relatives.items():
            tensors |= _prefixed(relative, relative_tensors)
        for part in _ADAM_STATE:
            tensors |= _prefixed(f"adam/{part}", self._adam_state(part))
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        return LearnerState(copies, {"num_optimiser_steps": self._num_optimiser_steps})

    def load_state_dict(self, state: LearnerState) -> None:
        """Go on from a state. Raises WeightError, with nothing loaded, if it belongs to another model or algorithm.

        Raises CheckpointError if its optimiser moments do not fit its step count.
        """
        own: dict[str, PolicyTensors] = {"params": _section(state.tensors, "params")}
        for relative in self.policies.relatives:
            own[relative] = _section(state.tensors, relative)
        adam = {part: _section(state.tensors, f"adam/{part}") for part in _ADAM_STATE}
        for section, tensors in own.items():
            check_names(tensors, self.policy, f"learner state, section {section!r},")
        num_steps = state.values.get("num_optimiser_steps")
        if not isinstance(num_steps, int) or (num_steps > 0) != bool(adam["step"]):
            raise CheckpointError(
                f"learner state has num_optimiser_steps {num_steps!r} but {len(adam['step'])} moments"
            )
        if num_steps > 0:
            check_names(adam["exp_avg"], self.policy, "learner state, section 'adam/exp_avg',")
            check_names(adam["exp_avg_sq"], self.policy, "learner state, section 'adam/exp_avg_sq',")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(own["params"][name])
        for relative, current in self.policies.relatives.items():
            for name, tensor in current.items():
                tensor.copy_(own[relative][name])
        self._load_adam(adam if num_steps > 0 else None)
        self._num_optimiser_steps = num_steps

    def _relative(self, which: Which) -> Relative | None:
        """Who is meant; None is the policy being trained."""
        if which == "eval":
            return "average" if "average" in self.policies.relatives else None
        wanted = self.algorithm.rollout_policy
        return wanted if which == "rollout" and wanted != "current" else None

    def _adam_state(self, part: str) -> PolicyTensors:
        state = self._optimizer.state
        return {name: state[p][part] for name, p in self._parameters.items() if part in state.get(p, {})}

    def _load_adam(self, adam: Mapping[str, PolicyTensors] | None) -> None:
        self._optimizer.state.clear()
        if adam is None:
            return
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                # The step count stays on the CPU, where AdamW keeps it; moments lie with their parameter.
                part: adam[part][name].clone() if part == "step" else adam[part][name].to(parameter.device, copy=True)
                for part in _ADAM_STATE
            }


def _prefixed(section: str, tensors: PolicyTensors) -> PolicyTensors:
    return {f"{section}/{name}": tensor for name, tensor in tensors.items()}


def _section(tensors: PolicyTensors, section: str) -> PolicyTensors:
    return {name.removeprefix(f"{section}/"): t for name, t in tensors.items() if name.startswith(f"{section}/")}
