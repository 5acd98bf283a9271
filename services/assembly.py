"""Builds an engine or a learner from a run's configuration: the same in this process and in an actor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from learner.learner import Learner
from learner.parallel import RankGroup
from raylign.keys import derive_seed
from raylign.models import load_policy
from raylign.models.tokens import TokenPolicy
from raylign.precision import DTYPES, Precision, base_precision
from raylign.precision.broadcast import Packing, make_packing
from raylign.precision.kept_high import layers_to_quantise
from raylign.precision.quantizer import make_quantizer
from raylign.precision.shadow import Shadow, linear_sizes
from raylign.samplers import IMAGE_SAMPLERS, make_sampler, make_token_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.types import Needs
from rollout.draft_sampler import draft_sampler
from rollout.drawn import Slot
from rollout.engine import LowPrecision, RolloutEngine, SamplerSetup, TokenSetup
from services.config import RunConfig
from services.precision_checks import low_precision_slots


def build_engine(config: RunConfig) -> RolloutEngine[Any]:
    """A rollout engine with the run's sampler and its evaluation sampler. Loads every model component."""
    torch.set_num_threads(config.rollout.num_threads)
    device = "cuda" if config.rollout.num_gpus > 0 else "cpu"
    policy: Any = load_policy(
        config.model,
        "rollout",
        device,
        base_precision(config.rollout.precision),
        config.fold_lora,
        adapter_seed(config),
    )
    setups: dict[Slot, SamplerSetup | TokenSetup] = {
        "rollout": sampler_setup(policy, config.sampler, config.algorithm.needs, config.rollout.latents),
        "eval": sampler_setup(policy, evaluation_sampler(config), Needs.FINAL),
    }
    explore = config.rollout.explore
    if explore is not None and explore.regenerate:
        # Of a draft only its end is looked at; its states are rounded as those of the rollout that it foretells.
        sampler = draft_sampler(config.sampler, explore)
        drafts = sampler_setup(policy, sampler, Needs.FINAL, config.rollout.latents)
        setups["draft"] = replace(drafts, prune=explore.prune) if isinstance(drafts, SamplerSetup) else drafts
    return RolloutEngine(policy, setups, config.seed, low_precision(config, policy))


def low_precision(config: RunConfig, policy: Any) -> dict[Slot, LowPrecision[Any]]:
    """The copies of the policy's network that slots of a format below bf16 compute with. Raises ConfigError."""
    copies: dict[Slot, LowPrecision[Any]] = {}
    for slot, format_name in low_precision_slots(config.rollout.precision, config.rollout.explore).items():
        quantizer = make_quantizer(format_name, config.rollout.quantizer, policy.device)
        layers = layers_to_quantise(linear_sizes(policy.network), config.model.type, config.rollout.quantizer)
        shadow = Shadow(policy.network, quantizer, layers)
        copies[slot] = LowPrecision(policy.with_network(shadow.network), shadow)
    return copies


def build_learner(config: RunConfig, ranks: RankGroup) -> Learner:
    """One learner rank with the run's algorithm. Loads the trained network only."""
    torch.set_num_threads(config.learner.num_threads)
    device = "cuda" if config.learner.num_gpus_per_rank > 0 else "cpu"
    # What an adapter is added to is frozen and may be small; what is trained stays fp32.
    precision = config.learner.precision if config.model.tuning == "lora" else "fp32"
    # What is to be sharded may be larger than one GPU: it comes from the host, part by part.
    sharded = config.learner.sharding == "fsdp" and ranks.num_ranks > 1
    place = "cpu" if sharded else device
    policy: Any = load_policy(config.model, "learner", place, precision, False, adapter_seed(config))
    return Learner(
        config.learner,
        config.algorithm,
        policy,
        sampler_setup(policy, config.sampler, config.algorithm.needs).sampler,
        guidance_scale=config.sampler.guidance_scale,
        micro_batch_size=config.micro_batch_size,
        run_seed=config.seed,
        ranks=ranks,
        packing=packing(config, policy.network),
        device=torch.device(device),
    )


def packing(config: RunConfig, network: Any) -> Packing | None:
    """What the learner publishes packed: the layers that rollout actors quantise, in the precision they hold."""
    format_name = low_precision_slots(config.rollout.precision, config.rollout.explore).get("rollout")
    if config.learner.publish != "packed" or format_name is None:
        return None
    quantizer = config.rollout.quantizer
    layers = layers_to_quantise(linear_sizes(network), config.model.type, quantizer)
    held = DTYPES[base_precision(config.rollout.precision)]
    return make_packing(network, layers, format_name, quantizer.weight_tile, held)


def sampler_setup(policy: Any, sampler: Any, needs: Needs, latents: Precision = "fp32") -> SamplerSetup | TokenSetup:
    """A sampler's configuration, bound to the policy's schedule or canvas."""
    if type(sampler) in IMAGE_SAMPLERS:
        return SamplerSetup(make_sampler(sampler, policy.schedule), sampler.guidance_scale, needs, latents)
    text_policy: TokenPolicy = policy
    return TokenSetup(make_token_sampler(sampler, text_policy.canvas_length), needs)


def evaluation_sampler(config: RunConfig) -> Any:
    """The configuration of the sampler of held-out prompts: the Euler ODE for pictures, the rollouts' for texts."""
    if config.modality == "text":
        return config.eval.sampler or config.sampler
    sampler: Any = config.sampler
    return EulerOdeConfig(
        num_steps=config.eval.num_steps or sampler.num_steps,
        guidance_scale=config.eval.guidance_scale,
        shift=sampler.shift,
    )


def adapter_seed(config: RunConfig) -> int:
    """Seed of a fresh adapter: the same in every actor and the learner."""
    return derive_seed(config.seed, "adapter")
