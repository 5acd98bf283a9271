"""The learner of one rank: credit, batch, loss, gradient, optimiser, snapshots. It runs with or without Ray.

    begin_step(groups) ──▶ per update: forward_backward ──▶ optimise ──▶ end_step ──▶ publish

Every rank is given all groups (they are small), computes all credit, and trains its own part of each update; what
crosses ranks is one gradient bucket and one row of metrics per update; sharded ranks (`learner.trained`) also meet in
every forward and backward, and take part when rank 0 publishes. All state that decides the next step is in
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
from learner.parallel import RankGroup
from learner.policies import PolicySet, PolicyTensors, Relative, check_names, decay_towards
from learner.state import LearnerState, Rows, part_of, shapes_in
from learner.survey import surveyed_batches
from learner.tally import MetricTally
from learner.trained import Sharded, hold
from raylign.config import Config
from raylign.errors import CheckpointError, ConfigError, RewardError
from raylign.models.base import Conditioning
from raylign.models.tokens import BUDGET_HEAD, TokenPrompts, finite_logits, probed
from raylign.precision import Precision
from raylign.precision.broadcast import Packing, make_packed_snapshot
from raylign.types import JsonValue, RolloutGroup, StepResult, WeightVersion
from raylign.weight_delta import worthwhile_delta
from raylign.weights import SnapshotKind, WeightSnapshot

Which = Literal["rollout", "current", "eval"]
"""The policy that samples (a slow copy, for some algorithms), the one being trained, or the one that is evaluated (its
running mean, if there is one)."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM_STATE = (*_MOMENTS, "step")


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
    """Learner processes that share the work of a step."""
    sharding: Literal["none", "fsdp"] = "none"
    """What ranks hold: each everything, or (FSDP2) each a part of all weights, gradients, moments and slow copies, for
    models that do not fit one GPU. The same with one rank."""
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
        device: torch.device | None = None,
    ) -> None:
        """`policy` (a DenoisingPolicy or a TokenPolicy) is loaded with role "learner"; `sampler` (of pictures or of
        tokens) and `guidance_scale` are the rollouts'.

        `micro_batch_size` is what `config.micro_batch_size` resolves to: the rollout chunk size when it is None.
        `packing`: what of the rollout policy is published quantised; nothing when not given. `device`: where sharded
        ranks compute, when the policy was loaded elsewhere because it does not fit there.
        """
        self.config = config
        self.policy = policy
        self._setting = LossSetting(
            sampler, guidance_scale, getattr(policy, "vocabulary", None), config.epochs_per_step
        )
        self._algorithm_config = algorithm_config
        self.algorithm = make_algorithm(algorithm_config, self._setting)
        self._lr_scale = 1.0
        self._ranks = ranks or RankGroup.single()
        self._micro_batch_size = micro_batch_size
        self._run_seed = run_seed
        if config.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        self._trained = hold(policy, self._ranks, config.sharding == "fsdp", device or policy.device)
        tensors = self._trained.tensors
        needs = self.algorithm.needs
        self.policies = PolicySet(policy, config.precision, needs, average=config.ema_decay is not None)
        self._heads = [name for name in tensors if name.startswith(BUDGET_HEAD)]
        self._network = [name for name in tensors if not name.startswith(BUDGET_HEAD)]
        self._lr_scales = (1.0, config.budget_lr_scale) if self._heads else (1.0,)
        heads = [{"params": [tensors[name] for name in self._heads], "weight_decay": 0.0}] if self._heads else []
        self._optimizer = torch.optim.AdamW(
            [{"params": [tensors[name] for name in self._network]}, *heads],
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
            level=isinstance(self._trained, Sharded),
        )
        return metrics

    def forward_backward(self, update: int) -> None:
        """Accumulate the gradient of one update's loss. Weights are read, not changed.

        Raises NumericsError for a NaN that came with a valid sample.
        """
        batch = self._batches[update]
        self._trained.begin_update()
        self._tally = MetricTally(("loss", *self.algorithm.metrics), self.policy.device)
        last = batch.num_micro_batches - 1
        for place, micro_batch in enumerate(surveyed_batches(self.algorithm, self.policies, batch, self._ranks)):
            losses = self.algorithm.loss(self.policies, micro_batch)
            self._tally.add({"loss": losses.loss_N, **losses.metrics}, micro_batch.valid_N)
            self._trained.before_backward(is_last=place == last)
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
        self._trained.sum_gradients()
        metrics |= self._tally.reduce(self._ranks, num_items)
        # After the reduction every rank holds the same numbers, so every rank decides alike.
        norm = self._trained.clip(self._network, self.config.grad_clip)
        warmup = min(1.0, (self._num_optimiser_steps + 1) / max(1, self.config.warmup_steps))
        lr = self.config.lr * self._lr_scale * warmup
        metrics |= {"grad/norm": norm, "learner/lr": lr}
        if self._heads:
            metrics["grad/budget_norm"] = self._trained.clip(self._heads, self.config.grad_clip)
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

    def adjust(self, lr_scale: float, kl_scale: float) -> None:
        """Train from here on with the configured learning rate and weight of the KL times these.

        They are the owner's, as the configuration is, and not in `state_dict`: who goes on from a state adjusts anew.
        Called between steps. Raises ConfigError for a KL that the algorithm does not have.
        """
        kl_weight = float(getattr(self._algorithm_config, "kl_weight", 0.0))
        if kl_scale != 1 and kl_weight == 0:
            raise ConfigError(
                f"the weight of the KL cannot be raised: algorithm {self._algorithm_config.type!r} has none (its "
                "kl_weight is 0); set algorithm.kl_weight above 0"
            )
        self._lr_scale = lr_scale
        raised = {"kl_weight": kl_weight * kl_scale} if kl_weight else {}
        changed = self._algorithm_config.model_copy(update=raised)
        self.algorithm = make_algorithm(changed, self._setting)

    def publish(self, version: WeightVersion, which: Which = "rollout") -> WeightSnapshot:
        """A verified snapshot of one of the learner's policies. A copy: safe to send.

        Called on rank 0 alone; where ranks are sharded, the others are told to `contribute` meanwhile. Raises
        NumericsError, naming the layer, if a weight to be packed is not finite.
        """
        packs = self._packing is not None and which == "rollout"
        tensors = self._gather(which, self.policy.device if packs else torch.device("cpu"))
        if self._packing is not None and packs:
            return make_packed_snapshot(self._packing, tensors, version)
        return self.policy.export_weights(version, tensors)

    def contribute(self, which: Which) -> None:
        """What ranks but the first do when they are sharded and that one publishes: give it their parts."""
        self._gather(which, torch.device("cpu"))

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
        """Copies, on the CPU, of all that decides the next step: equal on every rank, or its part of it on each."""
        sections: dict[str, Mapping[str, torch.Tensor]] = {"params": self._trained.tensors, **self.policies.relatives}
        sections |= {f"adam/{part}": self._adam_state(part) for part in _ADAM_STATE}
        tensors: PolicyTensors = {}
        rows: dict[str, Rows] = {}
        for section, own in sections.items():
            for name, tensor in own.items():
                tensors[f"{section}/{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
                if name in self._trained.rows and section != "adam/step":
                    rows[f"{section}/{name}"] = self._trained.rows[name]
        return LearnerState(tensors, self.state_values(), rows)

    def state_values(self) -> dict[str, JsonValue]:
        """The plain values of the state, equal on every rank."""
        return {"num_optimiser_steps": self._num_optimiser_steps}

    def load_state_dict(self, state: LearnerState) -> None:
        """Go on from a state that is whole, whatever number of ranks it is from; a sharded rank takes its part.

        Raises WeightError, with nothing loaded, if it belongs to another model or algorithm.

        Raises CheckpointError if its optimiser moments do not fit its step count.
        """
        sections = {"params": self._trained.tensors, **self.policies.relatives}
        adam = {part: shapes_in(state.tensors, f"adam/{part}") for part in _ADAM_STATE}
        for section in sections:
            check_names(shapes_in(state.tensors, section), self.policy, f"learner state, section {section!r},")
        num_steps = state.values.get("num_optimiser_steps")
        if not isinstance(num_steps, int) or (num_steps > 0) != bool(adam["step"]):
            raise CheckpointError(
                f"learner state has num_optimiser_steps {num_steps!r} but {len(adam['step'])} moments"
            )
        if num_steps > 0:
            check_names(adam["exp_avg"], self.policy, "learner state, section 'adam/exp_avg',")
            check_names(adam["exp_avg_sq"], self.policy, "learner state, section 'adam/exp_avg_sq',")
        with torch.no_grad():
            for section, own in sections.items():
                for name, tensor in own.items():
                    tensor.copy_(part_of(state.tensors, f"{section}/{name}", self._trained.rows.get(name)))
        self._load_adam(state.tensors if num_steps > 0 else None)
        self._num_optimiser_steps = num_steps

    def _relative(self, which: Which) -> Relative | None:
        """Who is meant; None is the policy being trained."""
        if which == "eval":
            return "average" if "average" in self.policies.relatives else None
        wanted = self.algorithm.rollout_policy
        return wanted if which == "rollout" and wanted != "current" else None

    def _gather(self, which: Which, device: torch.device) -> PolicyTensors:
        """All of one of the learner's policies, on rank 0."""
        relative = self._relative(which)
        tensors = self._trained.tensors if relative is None else self.policies.relatives[relative]
        return self._trained.gather(tensors, device)

    def _adam_state(self, part: str) -> PolicyTensors:
        state = self._optimizer.state
        return {name: state[p][part] for name, p in self._trained.tensors.items() if part in state.get(p, {})}

    def _load_adam(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        self._optimizer.state.clear()
        if tensors is None:
            return
        for name, parameter in self._trained.tensors.items():
            # The step count stays on the CPU, where AdamW keeps it; moments lie with their parameter.
            moments = {part: self._moment(tensors, part, name).to(parameter.device, copy=True) for part in _MOMENTS}
            self._optimizer.state[parameter] = {**moments, "step": tensors[f"adam/step/{name}"].clone()}

    def _moment(self, tensors: Mapping[str, torch.Tensor], part: str, name: str) -> torch.Tensor:
        return part_of(tensors, f"adam/{part}/{name}", self._trained.rows.get(name))
