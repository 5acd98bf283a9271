"""What `[rollout.explore]` must hold together with the run around it, checked when a configuration is read."""

from __future__ import annotations

from typing import Any

from raylign.models.text_policy import TextModelConfig
from raylign.samplers import ImageSamplerConfig, TokenSamplerConfig, make_token_sampler
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from rollout.draft_sampler import adds_noise, draft_sampler
from rollout.explore import ExploreConfig

_OF_DRAFTS = ("num_steps", "sampler", "gamma", "precision", "chunk_size", "prune")
"""Keys that say how drafts are drawn."""


def check_exploration(explore: ExploreConfig, sampler: Any, model: Any, group_size: int, chunk_size: int) -> None:
    """Raise ValueError or ConfigError, with the remedy, for the first thing that cannot work.

    `sampler` is the rollouts', `model` any model's configuration; `chunk_size` the rollouts' as resolved.
    """
    _check_sizes(explore, group_size, chunk_size)
    if not explore.regenerate:
        _refuse_draft_keys(explore, _OF_DRAFTS, "regenerate = false draws no drafts, but the pool as rollouts are")
        return
    drafts: Any = draft_sampler(sampler, explore)
    if isinstance(drafts, ImageSamplerConfig):
        _refuse_draft_keys(explore, ("gamma",), "pictures have no entropy budget")
        _check_picture_drafts(explore, drafts, sampler)
    else:
        _refuse_draft_keys(explore, ("num_steps", "prune"), "texts take the calls that their sampler needs")
        _check_text_drafts(explore, drafts, model)


def _check_sizes(explore: ExploreConfig, group_size: int, chunk_size: int) -> None:
    if group_size > explore.pool_size:
        raise ValueError(
            f"group_size {group_size} samples cannot be selected among rollout.explore.pool_size = {explore.pool_size} "
            "drafts; raise pool_size, or lower group_size"
        )
    if chunk_size > group_size:
        raise ValueError(
            f"rollout.chunk_size {chunk_size} holds several prompts of group_size {group_size}, but with "
            f"rollout.explore each prompt is drawn again by itself; set chunk_size to {group_size} or a divisor of it"
        )
    chunk, name = explore.chunk_size or chunk_size, "explore.chunk_size" if explore.chunk_size else "chunk_size"
    if explore.pool_size % chunk:
        raise ValueError(
            f"rollout.{name} {chunk} does not divide rollout.explore.pool_size = {explore.pool_size}; change one of "
            "them"
        )
    if explore.prune is None:
        return
    kept = explore.prune.num_kept(chunk) * explore.pool_size // chunk
    if kept < group_size:
        raise ValueError(
            f"rollout.explore.prune keeps {kept} of {explore.pool_size} drafts, fewer than group_size {group_size}; "
            "raise prune.keep or pool_size"
        )


def _refuse_draft_keys(explore: ExploreConfig, keys: tuple[str, ...], why: str) -> None:
    """Keys that would say nothing. A default is not told from the same value given: resolved files have them all."""
    changed = [key for key in keys if getattr(explore, key) != ExploreConfig.model_fields[key].default]
    if changed:
        named = ", ".join(f"rollout.explore.{key}" for key in changed)
        raise ValueError(f"{why}; remove {named}")


def _check_picture_drafts(explore: ExploreConfig, drafts: ImageSamplerConfig, sampler: ImageSamplerConfig) -> None:
    if explore.sampler is not None:
        steps = ExploreConfig.model_fields["num_steps"].default
        if explore.num_steps not in (steps, drafts.num_steps):
            raise ValueError(
                f"rollout.explore.num_steps = {explore.num_steps} and rollout.explore.sampler.num_steps = "
                f"{drafts.num_steps} both say how many steps a draft takes; leave num_steps out"
            )
    if drafts.num_steps > sampler.num_steps:
        raise ValueError(
            f"drafts of {drafts.num_steps} steps cost more than the rollouts of sampler.num_steps = "
            f"{sampler.num_steps} that they are to save; lower rollout.explore.num_steps"
        )
    if drafts != sampler:  # its own noise is keyed by sample and step, so it would be the second drawing's too
        _refuse_other_noise(drafts, sampler)
    if explore.prune is not None and explore.prune.at_step >= drafts.num_steps:
        raise ValueError(
            f"rollout.explore.prune.at_step = {explore.prune.at_step} leaves nothing to save of drafts of "
            f"{drafts.num_steps} steps; lower it"
        )


def _refuse_other_noise(drafts: ImageSamplerConfig, sampler: ImageSamplerConfig) -> None:
    """Drafts that cannot tell which first noise is worth it: they have noise of their own, or all have the same."""
    if adds_noise(drafts):
        raise ValueError(
            f"rollout.explore.sampler.type = {getattr(drafts, 'type', '')!r} adds noise on the way, which is not the "
            "noise of the same keys drawn again, so its drafts foretell little; take 'euler_ode' or 'dpm_solver', or "
            "the very keys of [sampler], where only the precision differs"
        )
    if isinstance(sampler, SdeSamplerConfig) and sampler.shared_noise:
        raise ValueError(
            "sampler.shared_noise starts all siblings from one noise, so drafts without noise on the way are all "
            "equal; set it to false, give rollout.explore.sampler the very keys of [sampler] at a lower precision, or "
            "set rollout.explore.regenerate = false"
        )


def _check_text_drafts(explore: ExploreConfig, drafts: TokenSamplerConfig, model: Any) -> None:
    assert isinstance(model, TextModelConfig)
    if drafts.temperature == 0:
        raise ValueError(
            "rollout.explore.sampler.temperature 0 makes all drafts of a prompt equal, so they say nothing; set it to "
            "the rollouts'"
        )
    if explore.sampler is not None and explore.gamma is not None:
        raise ValueError(
            "rollout.explore.gamma is a budget for the rollouts' sampler, but drafts have a sampler of their own; set "
            "rollout.explore.sampler.gamma instead"
        )
    if isinstance(drafts, EntropyBoundedConfig) and drafts.budget == "learned" and not model.budget_head:
        raise ValueError(
            "rollout.explore.sampler.budget = 'learned' needs model.budget_head = true; set budget to 'fixed'"
        )
    if model.trust_remote_code and drafts.cache != "none":
        raise ValueError(
            "a checkpoint's own code keeps no cache, so model.trust_remote_code needs rollout.explore.sampler.cache = "
            "'none'"
        )
    make_token_sampler(drafts, model.canvas_length)
