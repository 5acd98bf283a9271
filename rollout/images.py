"""Pictures from noise: the part of the rollout engine that knows latents."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raylign.errors import ConfigError
from raylign.keys import normal, sample_generators
from raylign.models.base import Conditioning, DenoisingPolicy, guided_velocity, join_conditioning
from raylign.samplers import Sampler
from raylign.types import LatentTrajectory, Needs, SampleKey, WeightVersion
from rollout.drawn import MAX_CACHED_PROMPTS, Drawn, Probe, Slot

_PROBE_SIGMAS = (0.95, 0.5, 0.05)


@dataclass(frozen=True, slots=True)
class SamplerSetup:
    """An image sampler, its guidance, and what of a trajectory to keep."""

    sampler: Sampler
    guidance_scale: float
    needs: Needs


class ImageDenoiser:
    """Draws pictures with each slot's sampler; a prompt is encoded once."""

    def __init__(self, policy: DenoisingPolicy, setups: Mapping[Slot, SamplerSetup]) -> None:
        self._policy = policy
        self._setups = setups
        self._encode = functools.lru_cache(MAX_CACHED_PROMPTS)(policy.encode)

    def draw(
        self, texts: Sequence[str], count: int, slot: Slot, keys: Sequence[SampleKey], gamma: float | None
    ) -> Drawn:
        """See Denoiser. A picture whose final latent is not finite has failed."""
        if gamma is not None:
            raise ConfigError(f"an entropy budget (gamma {gamma:g}) was asked of an image sampler; leave it out")
        setup = self._setups[slot]
        told = [self._encode(text, setup.guidance_scale > 1.0) for text in texts]
        started_s = time.perf_counter()
        trajectory = denoise(self._policy, setup, join_conditioning(told).repeat(count), keys)
        sampled_s = time.perf_counter()
        images_BHWC = self._policy.decode(trajectory.final_GCHW.to(self._policy.device))
        return Drawn(
            trajectory,
            [one.to(torch.device("cpu")) for one in told],
            torch.isfinite(trajectory.final_GCHW).flatten(1).all(dim=1).tolist(),
            sample_s=sampled_s - started_s,
            decode_s=time.perf_counter() - sampled_s,
            images_BHWC=images_BHWC,
        )

    def probe(self, text: str, run_seed: int, version: WeightVersion) -> Probe:
        """Velocities at a high, a middle and a low noise level."""
        device = self._policy.device
        keys = [SampleKey(run_seed, "parity", -1, index) for index in range(len(_PROBE_SIGMAS))]
        state = normal(sample_generators(keys, "latent"), self._policy.latent_shape)
        sigma_B = torch.tensor(_PROBE_SIGMAS)
        conditioning = self._encode(text, False).repeat(len(keys))
        velocity = self._policy.predict(state.to(device), sigma_B.to(device), conditioning)
        return Probe(version, state, sigma_B, conditioning.to(torch.device("cpu")), velocity.cpu())


def denoise(
    policy: DenoisingPolicy, setup: SamplerSetup, conditioning: Conditioning, keys: Sequence[SampleKey]
) -> LatentTrajectory:
    """Walk one batch from noise to a clean latent; what `setup.needs` names is recorded, in fp32 on the CPU.

    Initial noise comes from each sample's "latent" key, step noise from its "sde" key.
    """
    sampler, device = setup.sampler, policy.device
    state = normal(sample_generators(keys, "latent"), policy.latent_shape).to(device)
    step_noise = sample_generators(keys, "sde") if sampler.stochastic else []
    states, logprobs = [state], []
    for step in range(sampler.num_steps):
        sigma_B = sampler.sigmas_S1[step].to(device).expand(len(keys))
        velocity = guided_velocity(policy, state, sigma_B, conditioning, setup.guidance_scale)
        transition = sampler.transition(velocity, state, step)
        if sampler.stochastic:
            state = transition.sample(normal(step_noise, policy.latent_shape).to(device))
            if Needs.LOGPROBS in setup.needs:
                logprobs.append(transition.logprob(state))
        else:
            state = transition.mean_BCHW
        if Needs.STEPS in setup.needs:
            states.append(state)
    return LatentTrajectory(
        final_GCHW=state.cpu(),
        sigmas_S1=sampler.sigmas_S1,
        states_GS1CHW=torch.stack(states, dim=1).cpu() if Needs.STEPS in setup.needs else None,
        rollout_logprob_GS=torch.stack(logprobs, dim=1).cpu() if logprobs else None,
    )
