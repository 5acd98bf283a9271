"""Pictures from noise: the part of the rollout engine that knows latents."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from raylign.config import parse_config
from raylign.errors import ConfigError
from raylign.keys import normal, sample_generators
from raylign.models.base import Conditioning, DenoisingPolicy, guided_velocity, join_conditioning
from raylign.models.schedule import final_scale, initial_scale
from raylign.precision import DTYPES, Precision
from raylign.samplers import ImageSamplerConfig, Past, Sampler, make_sampler, ode_transition
from raylign.samplers.base import SdeSamplerConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.window import window_steps
from raylign.types import LatentTrajectory, Needs, SampleKey, WeightVersion
from rollout.drawn import MAX_CACHED_PROMPTS, Drawn, EvalPoint, Probe, Slot
from rollout.pruning import PruneConfig, survivors

_PROBE_SIGMAS = (0.95, 0.5, 0.05)


@dataclass(frozen=True, slots=True)
class SamplerSetup:
    """An image sampler, its guidance, and what of a trajectory to keep.

    latents: every state is rounded to this format before it is used, scored or stored. prune: which samples of a prompt
    are not drawn to the end; only where nothing but the end is needed.
    """

    sampler: Sampler
    guidance_scale: float
    needs: Needs
    latents: Precision = "fp32"
    prune: PruneConfig | None = None


class ImageDenoiser:
    """Draws pictures with each slot's sampler; a prompt is encoded once.

    computing: the policies that compute some slots instead of `policy`, which encodes and decodes for all.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        setups: Mapping[Slot, SamplerSetup],
        run_seed: int,
        computing: Mapping[Slot, DenoisingPolicy] | None = None,
    ) -> None:
        self._policy = policy
        self._computing = computing or {}
        self._setups = setups
        self._run_seed = run_seed
        self._setup_at = functools.cache(self._make_setup)
        self._encode = functools.lru_cache(MAX_CACHED_PROMPTS)(policy.encode)

    def draw(
        self,
        texts: Sequence[str],
        count: int,
        slot: Slot,
        keys: Sequence[SampleKey],
        point: EvalPoint,
        learner_step: int,
    ) -> Drawn:
        """See Denoiser. A picture whose final latent is not finite has failed."""
        if point.gamma is not None:
            raise ConfigError(f"an entropy budget (gamma {point.gamma:g}) was asked of an image sampler; leave it out")
        setup = self._setup_at(slot, point)
        with_negative = setup.guidance_scale > 1.0 or Needs.NEGATIVE in setup.needs
        told = [self._encode(text, with_negative) for text in texts]
        stochastic_S = stochastic_steps(setup.sampler, self._run_seed, learner_step)
        started_s = time.perf_counter()
        policy = self._computing.get(slot, self._policy)
        batch = _Batch(policy, setup, join_conditioning(told).repeat(count), keys)
        trajectory = _walk(policy, setup, batch, stochastic_S, count)
        sampled_s = time.perf_counter()
        images_BHWC = self._policy.decode(trajectory.final_GCHW.to(self._policy.device))
        return Drawn(
            trajectory,
            [one.to(torch.device("cpu")) for one in told],
            torch.isfinite(trajectory.final_GCHW).flatten(1).all(dim=1).tolist(),
            sample_s=sampled_s - started_s,
            decode_s=time.perf_counter() - sampled_s,
            images_BHWC=images_BHWC,
            places=batch.places,
        )

    def _make_setup(self, slot: Slot, point: EvalPoint) -> SamplerSetup:
        setup = self._setups[slot]
        if point.eta is None and point.num_steps is None:
            return setup
        return replace(setup, sampler=make_sampler(sampler_at(setup.sampler.config, point), self._policy.schedule))

    def probe(self, text: str, slot: Slot, run_seed: int, version: WeightVersion) -> Probe:
        """Velocities at a high, a middle and a low noise level."""
        device = self._policy.device
        keys = [SampleKey(run_seed, "parity", -1, index) for index in range(len(_PROBE_SIGMAS))]
        state = normal(sample_generators(keys, "latent"), self._policy.latent_shape)
        sigma_B = torch.tensor(_PROBE_SIGMAS)
        conditioning = self._encode(text, False).repeat(len(keys))
        policy = self._computing.get(slot, self._policy)
        velocity = policy.predict(state.to(device), sigma_B.to(device), conditioning)
        return Probe(version, state, sigma_B, conditioning.to(torch.device("cpu")), velocity.cpu())


def sampler_at(config: ImageSamplerConfig, point: EvalPoint) -> ImageSamplerConfig:
    """A sampler's configuration with the point's number of steps; at its stochasticity gDDIM on the same noise levels.

    Raises ConfigError for values that the sampler refuses, such as a negative eta.
    """
    steps = config.num_steps if point.num_steps is None else point.num_steps
    if point.eta is None:
        return parse_config(type(config), {**config.model_dump(), "num_steps": steps}, "the evaluation's sampler")
    kept = {name: getattr(config, name) for name in ("guidance_scale", "shift", "halve_last_level")}
    return parse_config(GddimConfig, {**kept, "num_steps": steps, "eta": point.eta}, "the evaluation's stochasticity")


def stochastic_steps(sampler: Sampler, run_seed: int, learner_step: int) -> tuple[bool, ...]:
    """Which steps add noise in a learner step: those that the sampler can, inside its window if it has one."""
    config = sampler.config
    if not isinstance(config, SdeSamplerConfig) or config.window is None:
        return sampler.stochastic_S
    window = window_steps(config.window, config.num_steps, run_seed, max(1, learner_step))
    return tuple(can and step in window for step, can in enumerate(sampler.stochastic_S))


def denoise(
    policy: DenoisingPolicy,
    setup: SamplerSetup,
    conditioning: Conditioning,
    keys: Sequence[SampleKey],
    stochastic_S: Sequence[bool] | None = None,
) -> LatentTrajectory:
    """Walk one batch from noise to a clean latent; what `setup.needs` names is recorded, in fp32 on the CPU.

    Initial noise comes from each sample's "latent" key (of its group's first sample, where siblings share it), step
    noise from its "sde" key. stochastic_S: the steps that add noise, all that can if not given; where one that can
    does not, it follows the ODE.
    """
    return _walk(policy, setup, _Batch(policy, setup, conditioning, keys), stochastic_S, len(keys))


class _Batch:
    """Samples on their way, and where they stood in what was asked for."""

    def __init__(
        self, policy: DenoisingPolicy, setup: SamplerSetup, conditioning: Conditioning, keys: Sequence[SampleKey]
    ) -> None:
        noise = normal(sample_generators(_latent_keys(setup.sampler, keys), "latent"), policy.latent_shape)
        scaled = noise.to(policy.device) * initial_scale(setup.sampler.sigmas_S1)
        self.state_BCHW = _rounded(scaled, setup.latents)
        self.conditioning = conditioning
        self.step_noise = sample_generators(keys, "sde") if any(setup.sampler.stochastic_S) else []
        self.past: list[Past] = []
        self.places = tuple(range(len(keys)))

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some of the samples."""
        index = torch.tensor(places, device=self.state_BCHW.device)
        self.state_BCHW = self.state_BCHW[index]
        self.conditioning = self.conditioning.rows(index)
        self.step_noise = [self.step_noise[place] for place in places] if self.step_noise else []
        self.past = [Past(one.state_BCHW[index], one.velocity_BCHW[index]) for one in self.past]
        self.places = tuple(self.places[place] for place in places)


def _walk(
    policy: DenoisingPolicy, setup: SamplerSetup, batch: _Batch, stochastic_S: Sequence[bool] | None, per_prompt: int
) -> LatentTrajectory:
    """See `denoise`; with `setup.prune`, some of each prompt's samples, `per_prompt` in a row, are left behind."""
    sampler, device = setup.sampler, policy.device
    mask_S = sampler.stochastic_S if stochastic_S is None else tuple(stochastic_S)
    states, logprobs = [batch.state_BCHW], []
    for step in range(len(mask_S)):
        sigma_B = sampler.sigmas_S1[step].to(device).expand(len(batch.places))
        velocity = guided_velocity(policy, batch.state_BCHW, sigma_B, batch.conditioning, setup.guidance_scale)
        if setup.prune is not None and step == setup.prune.at_step:
            velocity = _prune(setup.prune, batch, velocity, float(sigma_B[0]), per_prompt)
        state = batch.state_BCHW
        added = normal(batch.step_noise, policy.latent_shape).to(device) if mask_S[step] else None
        if sampler.stochastic_S[step] and added is None:
            transition = ode_transition(sampler.sigmas_S1, velocity, state, step)
        else:
            transition = sampler.transition(velocity, state, step, batch.past)
        history = sampler.config.history
        batch.past = [*batch.past, Past(state, velocity)][-history:] if history else []
        state = _rounded(transition.mean_BCHW if added is None else transition.sample(added), setup.latents)
        batch.state_BCHW = state
        if Needs.LOGPROBS in setup.needs:
            logprobs.append(torch.zeros(len(state)) if added is None else transition.logprob(state).cpu())
        if Needs.STEPS in setup.needs:
            states.append(state)
    return LatentTrajectory(
        final_GCHW=(batch.state_BCHW * final_scale(sampler.sigmas_S1)).cpu(),
        sigmas_S1=sampler.sigmas_S1,
        states_GS1CHW=torch.stack(states, dim=1).to(DTYPES[setup.latents]).cpu()
        if Needs.STEPS in setup.needs
        else None,
        rollout_logprob_GS=torch.stack(logprobs, dim=1) if logprobs else None,
        stochastic_S=torch.tensor(mask_S),
    )


def _prune(
    prune: PruneConfig, batch: _Batch, velocity_BCHW: torch.Tensor, sigma: float, per_prompt: int
) -> torch.Tensor:
    """Leave samples behind by their clean estimates x_0 = x_t - sigma v; the others' velocity."""
    clean_BCHW = (batch.state_BCHW - sigma * velocity_BCHW).cpu()
    starts = range(0, len(clean_BCHW), per_prompt)
    kept = [start + place for start in starts for place in survivors(prune, clean_BCHW[start : start + per_prompt])]
    batch.keep(kept)
    return velocity_BCHW[torch.tensor(kept, device=velocity_BCHW.device)]


def _rounded(state: torch.Tensor, latents: Precision) -> torch.Tensor:
    """What the format can hold, in fp32: both log-probs, rollout's and learner's, are of the value that is stored."""
    return state if latents == "fp32" else state.to(DTYPES[latents]).float()


def _latent_keys(sampler: Sampler, keys: Sequence[SampleKey]) -> Sequence[SampleKey]:
    shared = isinstance(sampler.config, SdeSamplerConfig) and sampler.config.shared_noise
    return [key._replace(sample_index=0) for key in keys] if shared else keys
