"""A run's configuration: one TOML file, every key with a default, impossible pairs refused with the remedy.

Reading it loads torch (algorithms sit beside their configurations) but neither Ray, diffusers nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from learner.algorithms import IMAGE_ALGORITHMS, TEXT_ALGORITHMS, AlgorithmConfig
from learner.algorithms.base import ImageAlgorithmConfig
from learner.algorithms.nft import NftConfig
from learner.learner import LearnerConfig
from raylign.assets import find_config
from raylign.config import Config, load_config
from raylign.models import MODEL_FAMILIES, ModelConfig
from raylign.models.sd3 import Sd3Config
from raylign.precision import Precision, RolloutPrecision
from raylign.precision.config import QuantizerConfig
from raylign.samplers import (
    IMAGE_SAMPLERS,
    TOKEN_SAMPLERS,
    ImageSamplerConfig,
    SamplerConfig,
)
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs
from rewards import RewardUnion
from rewards.ocr import OcrConfig
from rollout.datasets import PromptFields
from rollout.drawn import AS_CONFIGURED, EvalPoint
from rollout.explore import ExploreConfig
from services.async_checks import check_async
from services.elastic import ElasticConfig
from services.explore_checks import check_exploration
from services.guard_config import GuardConfig, check_guard
from services.image_checks import check_image_run
from services.nodes import NodesConfig
from services.parity import FORMAT_GAPS
from services.precision_checks import check_packed_publication, check_precision
from services.record import RecordConfig
from services.reward_config import ServiceConfig
from services.staleness import AsyncGuardConfig
from services.text_checks import check_text_run
from services.tracking import TrackingConfig
from services.weight_store_checks import check_weight_store
from services.weight_stores import ObjectStoreConfig, WeightStoreConfig

Placement = Literal["in_process", "colocated", "separate"]


class PromptsConfig(Config):
    """Prompt files: `.txt` with one prompt per line, `.jsonl`, `.parquet`, or the folder of a saved data set."""

    train: str = "asset:glyphs/prompts_train.txt"
    """Prompts that rollouts are drawn for."""
    heldout: str | None = "asset:glyphs/prompts_heldout.txt"
    """Prompts for evaluation only; none switches evaluation off."""
    fields: PromptFields = PromptFields()
    """Which columns hold what, where rows have columns."""


class RolloutConfig(ElasticConfig):
    """The rollout actors."""

    chunk_size: int | None = Field(default=None, ge=1)
    """Samples per batch; a multiple or a divisor of group_size. One group when not given."""
    precision: RolloutPrecision = "fp32"
    """Number format of rollout weights and activations; below bf16 in linear layers only, and bf16 elsewhere."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """How layers are quantised where a precision is below bf16."""
    explore: ExploreConfig | None = None
    """Draft many candidates cheaply, and draw again and train on the most telling; off when not given."""
    latents: Precision = "fp32"
    """Number format that pictures' states are rounded to on the way; bf16 halves what coupled methods must send."""
    fold_lora: bool | None = None
    """Fold adapters into the weights: faster, equal up to rounding. By default only where no log-prob is needed."""
    num_threads: int = Field(default=1, ge=1)
    """Compute threads per actor."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs per actor; 0 runs on the CPU."""
    hung_after_s: float = Field(default=60.0, gt=0)
    """An actor that does not answer in this, nor in ten times what such calls take, is given up and started anew."""
    parity_every_steps: int = Field(default=20, ge=1)
    """Versions between checks that actors and learner predict the same; the first version is always checked."""
    parity_tolerance: float | None = Field(default=None, gt=0)
    """Largest relative difference of velocities; by default what the precision and a folded adapter explain."""


class CheckpointConfig(Config):
    """When to write checkpoints."""

    every_steps: int = Field(default=20, ge=1)
    """Steps between checkpoints; one is always written at the end, on Ctrl-C and before a stop."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""


class EvalConfig(Config):
    """Held-out evaluation: the same keys every time. Pictures by the Euler ODE, texts as the rollouts draw them."""

    every_steps: int = Field(default=20, ge=1)
    """Steps between evaluations; the first and last are always made."""
    num_prompts: int | None = Field(default=None, ge=1)
    """The first prompts of the held-out file; all when not given."""
    samples_per_prompt: int = Field(default=2, ge=1)
    """Samples of each prompt; two or more also measure diversity."""
    num_steps: int | None = Field(default=None, ge=1)
    """Denoising steps of pictures; the rollout sampler's when not given."""
    guidance_scale: float = Field(default=1.0, ge=1.0)
    """Classifier-free guidance of pictures; 1 is off."""
    sampler: SamplerConfig | None = None
    """How texts are drawn; as in rollouts when not given."""
    gammas: tuple[float, ...] = ()
    """Entropy budgets at which the first and the last evaluation are repeated: the accuracy-calls frontier."""
    etas: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Stochasticities at which every evaluation of pictures is repeated: the reward gap to the ODE, which is 0."""
    eta_steps: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """Denoising steps of those repeats, the ODE with as many among them; the evaluation's own when not given."""


class RunServiceConfig(ServiceConfig):
    """The run's own reward service, and how the run reaches it."""

    transport: Literal["handle", "http"] = "handle"
    """handle: replicas are called directly. http: through the service's HTTP face, as any other client would."""


class RunConfig(Config):
    """One training run."""

    seed: int = Field(default=0, ge=0)
    """Seeds everything: prompts' order, every sample, the adapter's start."""
    num_steps: int = Field(default=60, ge=1)
    """Policy updates: rollouts, rewards, training, publication."""
    placement: Placement = "separate"
    """in_process: no Ray. colocated: each worker samples and trains. separate: rollout actors and learner ranks."""
    max_staleness: int = Field(default=0, ge=0)
    """How many versions old a sample may be when it is trained on; 0 is synchronous."""
    group_size: int = Field(default=12, ge=2)
    """Samples per prompt (G): credit compares siblings, so at least 2."""
    groups_per_step: int = Field(default=8, ge=1)
    """Prompts per step (P)."""
    max_failed_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Stop, after a checkpoint, when more than this share of a step's samples has no reward."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long actors may take to start and load the model, on a cluster that others use too."""
    wait_for_nodes: bool = False
    """The cluster will grow (by an autoscaler, or by hand): what it lacks is waited for, for start_timeout_s at most,
    instead of refused at once, and actors may be asked for beyond what its nodes hold."""
    max_refused_steps: int = Field(default=3, ge=1)
    """Stop, after a checkpoint, after this many refused (not finite) updates in a row."""
    max_learner_restarts: int = Field(default=3, ge=0)
    """Stop when learner processes died more often than this without a step done between; 0 stops at the first."""
    model: ModelConfig = Sd3Config()
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = EulerOdeConfig()
    algorithm: AlgorithmConfig = NftConfig()
    rewards: tuple[RewardUnion, ...] = Field(default=(OcrConfig(),), min_length=1)
    reward_service: RunServiceConfig = RunServiceConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    nodes: NodesConfig = NodesConfig()
    weight_store: WeightStoreConfig = ObjectStoreConfig()
    async_guard: AsyncGuardConfig = AsyncGuardConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    tracking: TrackingConfig = TrackingConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def modality(self) -> Literal["image", "text"]:
        """What the model makes."""
        return MODEL_FAMILIES[type(self.model)].modality

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        """Names of the rewards that are scored in evaluations only."""
        return tuple(reward.name for reward in self.rewards if reward.only_eval)

    @property
    def chunk_size(self) -> int:
        """Samples per generated batch."""
        return self.rollout.chunk_size or self.group_size

    @property
    def chunk_prompts(self) -> int:
        """Prompts whose groups are drawn together."""
        return max(1, self.chunk_size // self.group_size)

    @property
    def draft_chunk_size(self) -> int:
        """Drafts per generated batch, where drafts are explored."""
        explore = self.rollout.explore
        return self.chunk_size if explore is None else explore.chunk_size or self.chunk_size

    @property
    def micro_batch_size(self) -> int:
        """Items per learner forward: shaped like rollout batches unless set otherwise."""
        return self.learner.micro_batch_size or self.chunk_size

    @property
    def fold_lora(self) -> bool:
        """Whether actors fold adapters; policy-ratio methods need the learner's exact arithmetic instead."""
        if self.rollout.fold_lora is not None:
            return self.rollout.fold_lora
        return Needs.LOGPROBS not in self.algorithm.needs

    @property
    def parity_tolerance(self) -> float:
        """What rounding explains: a quantised format, else bf16 on either side, else folding an adapter, else nearly
        nothing."""
        if self.rollout.parity_tolerance is not None:
            return self.rollout.parity_tolerance
        if self.rollout.precision in FORMAT_GAPS:
            return FORMAT_GAPS[self.rollout.precision]
        if "bf16" in (self.rollout.precision, self.learner.precision):
            return 0.05
        return 1e-3 if self.model.tuning == "lora" and self.fold_lora else 1e-5

    @property
    def eval_points(self) -> tuple[EvalPoint, ...]:
        """Where evaluations are repeated: texts at each entropy budget, pictures at each stochasticity above 0 and, in
        other numbers of steps than the evaluation's, by the ODE."""
        if self.modality == "text":
            return tuple(EvalPoint(gamma=gamma) for gamma in self.eval.gammas)
        points: list[EvalPoint] = []
        for steps in self.eval.eta_steps or (self._eval_steps,):
            changed = None if steps == self._eval_steps else steps
            points += [EvalPoint(eta=eta or None, num_steps=changed) for eta in (0.0, *self.eval.etas)]
        return tuple(dict.fromkeys(point for point in points if point != AS_CONFIGURED))

    @property
    def _eval_steps(self) -> int:
        """Denoising steps of an evaluation of pictures."""
        return self.eval.num_steps or getattr(self.sampler, "num_steps", 1)

    @model_validator(mode="after")
    def _refuse_impossible_pairs(self) -> RunConfig:
        self._check_modality()
        large, small = max(self.chunk_size, self.group_size), min(self.chunk_size, self.group_size)
        if large % small:
            raise ValueError(
                f"rollout.chunk_size {self.chunk_size} must be a multiple or a divisor of group_size {self.group_size}"
            )
        if self.groups_per_step % self.chunk_prompts:
            raise ValueError(
                f"groups_per_step {self.groups_per_step} must be a multiple of the {self.chunk_prompts} prompts that "
                f"a chunk of {self.chunk_size} samples holds"
            )
        if self.rollout.explore is not None:
            check_exploration(self.rollout.explore, self.sampler, self.model, self.group_size, self.chunk_size)
        self._check_learner_division()
        check_precision(
            self.rollout.precision,
            self.rollout.explore,
            self.rollout.quantizer,
            self.algorithm.needs,
            self.algorithm.type,
            self.rollout.num_gpus > 0,
        )
        if self.learner.publish == "packed":
            check_packed_publication(self.model.tuning, self.rollout.precision, self.rollout.explore)
        check_weight_store(
            self.weight_store,
            self.placement,
            self.max_staleness,
            self.rollout.num_gpus,
            self.learner.num_gpus_per_rank,
            self.rollout.hung_after_s,
        )
        if self.placement == "in_process" and self.max_staleness:
            raise ValueError(
                f"in_process runs one thing at a time, so max_staleness must be 0, got {self.max_staleness}"
            )
        if all(reward.only_eval for reward in self.rewards):
            raise ValueError(
                "every reward is only_eval, so there is nothing to train on; add a [[rewards]] table without it"
            )
        kl_weight = float(getattr(self.algorithm, "kl_weight", 0.0))
        check_async(self.async_guard, self.max_staleness, self.algorithm.type, kl_weight)
        check_guard(
            self.guard,
            self.rewards,
            self.algorithm.type,
            kl_weight,
            explores=self.rollout.explore is not None,
            evaluates=self.prompts.heldout is not None,
        )
        self.reward_service.check_per_reward([reward.name for reward in self.rewards])
        if self.placement == "in_process" and self.reward_service.transport == "http":
            raise ValueError("in_process scores in its own process; reward_service.transport = 'http' needs a cluster")
        if self.placement == "colocated":
            self._check_colocated()
        return self

    def _check_modality(self) -> None:
        """Model, sampler and algorithm must be of one kind."""
        modality, family = self.modality, f"model {self.model.type!r} makes {self.modality}s"
        samplers = IMAGE_SAMPLERS if modality == "image" else TOKEN_SAMPLERS
        if type(self.sampler) not in samplers:
            raise ValueError(
                f"{family}, which sampler {self.sampler.type!r} cannot draw; set sampler.type to one of: "
                f"{', '.join(_types(samplers))}"
            )
        algorithms = IMAGE_ALGORITHMS if modality == "image" else TEXT_ALGORITHMS
        if type(self.algorithm) not in algorithms:
            raise ValueError(
                f"{family}, which algorithm {self.algorithm.type!r} cannot train; set algorithm.type to one of: "
                f"{', '.join(_types(algorithms))}"
            )
        if modality == "text":
            check_text_run(
                self.model, self.algorithm, self.sampler, self.eval.sampler or self.sampler, self.eval.gammas
            )
        elif self.eval.sampler is not None or self.eval.gammas:
            raise ValueError("eval.sampler and eval.gammas are for text models; pictures have eval.num_steps")
        self._check_stochasticities()
        if isinstance(self.algorithm, ImageAlgorithmConfig) and isinstance(self.sampler, ImageSamplerConfig):
            check_image_run(
                self.algorithm,
                self.sampler,
                self.rollout.latents,
                self.group_size,
                self.max_staleness,
                self.learner.num_updates,
            )

    def _check_stochasticities(self) -> None:
        if self.modality == "text" and (self.eval.etas or self.eval.eta_steps):
            raise ValueError("eval.etas and eval.eta_steps are for pictures; texts have eval.gammas")
        if max(self.eval.etas, default=0.0) > 0 and not self.eval.eta_steps and self._eval_steps < 2:
            raise ValueError(
                "eval.etas need at least 2 denoising steps, as the last one adds no noise, and evaluations take "
                f"{self._eval_steps}; raise eval.num_steps, or name others in eval.eta_steps"
            )

    def _check_learner_division(self) -> None:
        shares = self.learner.updates_per_step * self.learner.num_ranks
        samples = self.groups_per_step * self.group_size
        if samples % shares:
            raise ValueError(
                f"groups_per_step x group_size = {samples} samples do not divide into learner.updates_per_step x "
                f"num_ranks = {self.learner.updates_per_step} x {self.learner.num_ranks} equal shares"
            )
        if Needs.CHUNKS in self.algorithm.needs:
            # Their work is cut by whole rollout chunks, so that a micro-batch is what was sampled together.
            chunks = math.ceil(samples / self.micro_batch_size)
            if chunks % shares:
                raise ValueError(
                    f"algorithm {self.algorithm.type!r} trains whole chunks, and {chunks} chunk(s) of "
                    f"{self.micro_batch_size} do not divide into {shares} shares (updates_per_step x num_ranks); "
                    "lower rollout.chunk_size or raise groups_per_step"
                )
        if Needs.GROUPS in self.algorithm.needs and self.groups_per_step % shares:
            raise ValueError(
                f"algorithm {self.algorithm.type!r} compares the siblings of a group, so an update must hold whole "
                f"groups: {self.groups_per_step} groups per step do not divide into {shares} shares (updates_per_step "
                "x num_ranks); raise groups_per_step or lower learner.updates_per_step"
            )
        if self.learner.sharding == "fsdp" and getattr(self.model, "trust_remote_code", False):
            raise ValueError(
                "learner.sharding = 'fsdp' shards native networks only: how often a checkpoint's own code is asked "
                "depends on the batch; set learner.sharding = 'none', or model.trust_remote_code = false"
            )
        if self.placement == "in_process" and self.learner.num_ranks > 1:
            raise ValueError(f"in_process has one learner rank, got learner.num_ranks = {self.learner.num_ranks}")

    def _check_colocated(self) -> None:
        if self.max_staleness:
            raise ValueError(
                f"colocated workers cannot sample while they train, so max_staleness must be 0, got "
                f"{self.max_staleness}; use placement = 'separate'"
            )
        if self.rollout.num_actors != self.learner.num_ranks:
            raise ValueError(
                f"colocated workers are rollout actor and learner rank in one, so rollout.num_actors and "
                f"learner.num_ranks must be equal, got {self.rollout.num_actors} and {self.learner.num_ranks}"
            )
        if self.rollout.bounds.is_elastic:
            raise ValueError(
                "colocated workers are learner ranks too, so their number is fixed; leave out rollout.min_actors and "
                "max_actors, or use placement = 'separate'"
            )


def _types(table: Mapping[Any, object]) -> list[str]:
    """The `type` of each configuration class of a table."""
    return [config.model_fields["type"].default for config in table]


def load_run_config(name: str | Sequence[str], overrides: Mapping[str, str] | None = None) -> RunConfig:
    """A run's configuration by path or shipped name, with dotted overrides. Raises ConfigError.

    Of several names a later one is laid over the earlier: `["quickstart_image", "crd"]`.
    """
    names = [name] if isinstance(name, str) else name
    return load_config(RunConfig, [find_config(one) for one in names], overrides)


def read_resolved_config(path: Path) -> RunConfig:
    """The configuration that a run wrote into its directory."""
    return load_config(RunConfig, path)
