"""Builds an engine or a learner from a run's configuration: the same in this process and in an actor."""

from __future__ import annotations

import torch

from learner.learner import Learner
from learner.parallel import RankGroup
from raylign.keys import derive_seed
from raylign.models import load_policy
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs
from rollout.engine import RolloutEngine, SamplerSetup
from services.config import RunConfig


def build_engine(config: RunConfig) -> RolloutEngine:
    """A rollout engine with the run's sampler and its evaluation sampler. Loads every model component."""
    torch.set_num_threads(config.rollout.num_threads)
    device = "cuda" if config.rollout.num_gpus > 0 else "cpu"
    policy = load_policy(
        config.model, "rollout", device, config.rollout.precision, config.fold_lora, adapter_seed(config)
    )
    evaluation = EulerOdeConfig(
        num_steps=config.eval.num_steps or config.sampler.num_steps,
        guidance_scale=config.eval.guidance_scale,
        shift=config.sampler.shift,
    )
    needs = config.algorithm.needs
    return RolloutEngine(
        policy,
        {
            "rollout": SamplerSetup(
                make_sampler(config.sampler, policy.schedule_shift), config.sampler.guidance_scale, needs
            ),
            "eval": SamplerSetup(
                make_sampler(evaluation, policy.schedule_shift), evaluation.guidance_scale, Needs.FINAL
            ),
        },
        config.seed,
    )


def build_learner(config: RunConfig, ranks: RankGroup) -> Learner:
    """One learner rank with the run's algorithm. Loads the trained network only."""
    torch.set_num_threads(config.learner.num_threads)
    device = "cuda" if config.learner.num_gpus_per_rank > 0 else "cpu"
    policy = load_policy(config.model, "learner", device, "fp32", False, adapter_seed(config))
    return Learner(
        config.learner,
        config.algorithm,
        policy,
        make_sampler(config.sampler, policy.schedule_shift),
        guidance_scale=config.sampler.guidance_scale,
        micro_batch_size=config.micro_batch_size,
        run_seed=config.seed,
        ranks=ranks,
    )


def adapter_seed(config: RunConfig) -> int:
    """Seed of a fresh adapter: the same in every actor and the learner."""
    return derive_seed(config.seed, "adapter")
