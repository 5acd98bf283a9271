"""What a run on pictures must hold together, checked when its configuration is read: each refusal names its remedy."""

from __future__ import annotations

from learner.algorithms.base import ImageAlgorithmConfig
from raylign.precision import Precision
from raylign.samplers import ImageSamplerConfig
from raylign.types import Needs

BF16_LOGPROB_ERROR = 1e-4
"""What rounding a state to bf16 moves a mean log-prob by: 1e-5 to 8e-5 on Stable Diffusion 3.5's first nine levels."""


def check_image_run(
    algorithm: ImageAlgorithmConfig,
    sampler: ImageSamplerConfig,
    latents: Precision,
    group_size: int,
    max_staleness: int,
    num_updates: int,
) -> None:
    """Raise ValueError or ConfigError for an algorithm that cannot learn from such rollouts in that many updates."""
    name = f"algorithm {getattr(algorithm, 'type', '')!r}"
    algorithm.check_sampler(sampler)
    algorithm.check_group_size(group_size)
    algorithm.check_updates(max_staleness, num_updates)
    clip = algorithm.smallest_clip
    if Needs.LOGPROBS in algorithm.needs and latents != "fp32" and clip is not None and clip < BF16_LOGPROB_ERROR:
        raise ValueError(
            f"rollout.latents = {latents!r} rounds states by more than {name} can tell apart: its clip range is "
            f"{clip:g}, the rounding moves log-probs by up to {BF16_LOGPROB_ERROR:g}; use fp32 latents or a wider clip "
            "range"
        )
    if algorithm.guidance_free and sampler.guidance_scale > 1.0:
        raise ValueError(
            f"{name} trains without guidance, but its rollouts would use sampler.guidance_scale = "
            f"{sampler.guidance_scale:g}: it would learn from samples of another policy. Leave it at 1; "
            "eval.guidance_scale may differ"
        )
