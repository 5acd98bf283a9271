"""Texts from masks: the part of the rollout engine that knows canvases.

A canvas is filled block by block. In each call of the network only rows take part that still have masks in the active
block; each draws a token for every masked position of the block and reveals those its sampler chooses. So a row's
number of calls (NFE) is its own, and what it draws is keyed by the sample and its own calls, whoever is beside it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raylign.errors import ConfigError
from raylign.keys import generator, sample_generators
from raylign.models.tokens import (
    KvCache,
    TokenPolicy,
    TokenPrediction,
    TokenPrompts,
    finite_logits,
    join_prompts,
    probed,
)
from raylign.samplers import Candidates, TokenSampler, TokenTransition
from raylign.samplers.entropy_bounded import EntropyBoundedConfig, draw_budgets
from raylign.samplers.tokens import guided_logits
from raylign.types import Needs, SampleKey, TokenTrajectory, WeightVersion
from rollout.drawn import MAX_CACHED_PROMPTS, Drawn, EvalPoint, Probe, Slot

_PROBE_SHARES = (1.0, 0.5, 0.1)
_NEVER = -1


@dataclass(frozen=True, slots=True)
class TokenSetup:
    """A text sampler, bound to the policy's canvas, and what the algorithm needs; trajectories are always whole."""

    sampler: TokenSampler
    needs: Needs


class TextDenoiser:
    """Draws texts with each slot's sampler; a prompt is encoded once.

    computing: the policies that compute some slots instead of `policy`, which encodes and decodes for all.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        setups: Mapping[Slot, TokenSetup],
        computing: Mapping[Slot, TokenPolicy] | None = None,
    ) -> None:
        self._policy = policy
        self._computing = computing or {}
        self._setups = setups
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
        """See Denoiser. A text for which the network's answer was not finite has failed, and keeps its masks."""
        if point.eta is not None or point.num_steps is not None:
            raise ConfigError(f"stochasticity and steps are for pictures, but {point} was asked of a text sampler")
        told = [self._encode(text) for text in texts]
        started_s = time.perf_counter()
        policy = self._computing.get(slot, self._policy)
        trajectory = unmask(policy, self._setups[slot], join_prompts(told).repeat(count), keys, point.gamma)
        sampled_s = time.perf_counter()
        written = tuple(self._policy.decode(trajectory.tokens_GL))
        ok_B = torch.isfinite(trajectory.rollout_logprob_GL + trajectory.plain_logprob_GL).all(dim=1)
        return Drawn(
            trajectory,
            [one.to(torch.device("cpu")) for one in told],
            ok_B.tolist(),
            sample_s=sampled_s - started_s,
            decode_s=time.perf_counter() - sampled_s,
            texts=written,
        )

    def probe(self, text: str, slot: Slot, run_seed: int, version: WeightVersion) -> Probe:
        """Logits of a canvas that is all masked, half, and a tenth, with random tokens elsewhere."""
        policy = self._computing.get(slot, self._policy)
        vocabulary = policy.vocabulary
        length = policy.canvas_length
        special = {vocabulary.mask_id, vocabulary.pad_id, vocabulary.eos_id}
        tokens = torch.tensor([token for token in range(vocabulary.size) if token not in special])
        counts = [max(1, round(share * length)) for share in _PROBE_SHARES]
        canvases: list[torch.Tensor] = []
        for index, count in enumerate(counts):
            draw = generator(*SampleKey(run_seed, "parity", -1, index), "canvas")
            canvas_L = tokens[torch.randint(len(tokens), (length,), generator=draw)]
            canvas_L[torch.randperm(length, generator=draw)[:count]] = vocabulary.mask_id
            canvases.append(canvas_L)
        state = torch.stack(canvases)
        prompts = self._encode(text).repeat(len(counts))
        prediction = policy.predict(state.to(policy.device), prompts.to(policy.device), probed(state))
        told, answer = prompts.to(torch.device("cpu")), finite_logits(prediction).float().cpu()
        return Probe(version, state, torch.tensor(counts) / length, told, answer)


def unmask(
    policy: TokenPolicy,
    setup: TokenSetup,
    prompts: TokenPrompts,
    keys: Sequence[SampleKey],
    gamma: float | None = None,
) -> TokenTrajectory:
    """Fill one canvas per key, from all masked to done; recorded on the CPU.

    Tokens are drawn by each sample's "tokens" key (L uniforms per call of its row), orders by its "order" key, its
    entropy budget by its "gamma" key. `gamma` replaces the sampler's budgets. A row whose logits are not finite is
    given up: positions it never revealed keep the mask, step -1 and log-prob NaN. Raises ConfigError for a budget
    that is negative, or asked of a sampler without one.
    """
    _check_budget(setup.sampler, gamma)
    walk = _Walk(policy, setup.sampler, prompts.to(policy.device), keys, gamma)
    for block in range(policy.canvas_length // setup.sampler.block_length):
        walk.fill(block)
    return walk.trajectory()


def _check_budget(sampler: TokenSampler, gamma: float | None) -> None:
    if gamma is None:
        return
    if not isinstance(sampler.config, EntropyBoundedConfig):
        raise ConfigError(
            f"an entropy budget (gamma {gamma:g}) was asked of a {type(sampler).__name__} sampler, which has none; "
            "set sampler.type = 'entropy_bounded'"
        )
    if not gamma >= 0:
        raise ConfigError(f"an entropy budget must be at least 0, got {gamma:g}")


class _Walk:
    """One batch of canvases on their way, on the policy's device."""

    def __init__(
        self,
        policy: TokenPolicy,
        sampler: TokenSampler,
        prompts: TokenPrompts,
        keys: Sequence[SampleKey],
        gamma: float | None,
    ) -> None:
        self._policy, self._sampler, self._prompts, self._keys = policy, sampler, prompts, keys
        self._mask_id, self._eos_id = policy.vocabulary.mask_id, policy.vocabulary.eos_id
        self._token_draws = sample_generators(keys, "tokens")
        self._order_draws = sample_generators(keys, "order") if sampler.draws_order else []
        shape, device = (len(keys), policy.canvas_length), policy.device
        self._canvas_BL = torch.full(shape, self._mask_id, device=device)
        self._step_BL = torch.full(shape, _NEVER, device=device)
        self._rollout_BL = torch.full(shape, math.nan, device=device)
        self._plain_BL = torch.full(shape, math.nan, device=device)
        self._failed_B = torch.zeros(len(keys), dtype=torch.bool, device=device)
        self._nfe_B = torch.zeros(len(keys), dtype=torch.int64, device=device)
        self._cached_B = torch.zeros(len(keys), dtype=torch.int64, device=device)
        self._gamma = gamma
        self._gamma_B: torch.Tensor | None = None
        self._features_BD: torch.Tensor | None = None

    def fill(self, block: int) -> None:
        """Reveal every position of one block, in as many calls as its slowest row needs."""
        length, config = self._sampler.block_length, self._sampler.config
        span = slice(block * length, (block + 1) * length)
        masked_B = (self._canvas_BL[:, span] == self._mask_id).any(dim=1)
        rows_B = (masked_B & ~self._failed_B).nonzero().squeeze(1)
        cache: KvCache | None = None
        step = 0
        while len(rows_B):
            filled = cache is not None and (config.cache_refresh is None or step % config.cache_refresh != 0)
            if not filled:
                cache = self._policy.start_cache(config.cache, span)
            open_B = self._call(rows_B, span, cache, filled, block, step)
            step += 1
            if not bool(open_B.all()):
                places_B = open_B.nonzero().squeeze(1)
                if cache is not None and len(places_B):
                    cache.keep(_doubled(places_B, len(rows_B)) if self._guided else places_B)
                rows_B = rows_B[places_B]

    def trajectory(self) -> TokenTrajectory:
        """What was recorded, on the CPU."""
        log_gamma_B = None
        if self._gamma_B is not None:
            # 0 and infinity are budgets too; their logarithms are those of the smallest and largest number.
            limits = torch.finfo(self._gamma_B.dtype)
            log_gamma_B = self._gamma_B.clamp(limits.tiny, limits.max).log()
        return TokenTrajectory(
            self._canvas_BL,
            self._step_BL,
            self._rollout_BL,
            self._plain_BL,
            self._nfe_B,
            self._cached_B,
            log_gamma_B,
            self._features_BD,
        ).to(torch.device("cpu"))

    @property
    def _guided(self) -> bool:
        return self._sampler.config.guidance_scale > 1.0

    def _call(
        self, rows_B: torch.Tensor, span: slice, cache: KvCache | None, filled: bool, block: int, step: int
    ) -> torch.Tensor:
        """One call of the network for some rows and what it reveals; True for rows that need another one."""
        transition, prediction = self._predict(rows_B, span, cache)
        self._set_budgets(prediction)
        masked_BL = self._canvas_BL[rows_B, span] == self._mask_id
        tokens_BL = transition.sample(self._uniforms(self._token_draws, rows_B, span))
        rollout_BL, plain_BL = transition.logprob(tokens_BL), transition.plain_logprob(tokens_BL)
        chosen_BL = self._sampler.choose(
            Candidates(
                transition,
                tokens_BL,
                masked_BL,
                block,
                step,
                self._eos_id,
                gamma_B=None if self._gamma_B is None else self._gamma_B[rows_B],
                order_BL=self._uniforms(self._order_draws, rows_B, span) if self._order_draws else None,
            )
        )
        # A log-softmax is not a number everywhere or nowhere, so any token tells.
        sound_B = torch.isfinite(rollout_BL + plain_BL).all(dim=1)
        self._failed_B[rows_B] = ~sound_B
        chosen_BL &= sound_B.unsqueeze(1)
        now_B1 = self._nfe_B[rows_B].unsqueeze(1)
        for record_BL, fresh_BL in (
            (self._canvas_BL, tokens_BL),
            (self._step_BL, now_B1.expand_as(tokens_BL)),
            (self._rollout_BL, rollout_BL),
            (self._plain_BL, plain_BL),
        ):
            record_BL[rows_B, span] = torch.where(chosen_BL, fresh_BL, record_BL[rows_B, span])
        if self._sampler.config.stop_at_eos:
            self._finish(rows_B, now_B1)
        self._nfe_B[rows_B] += 1
        self._cached_B[rows_B] += int(filled)
        return sound_B & (self._canvas_BL[rows_B, span] == self._mask_id).any(dim=1)

    def _predict(
        self, rows_B: torch.Tensor, span: slice, cache: KvCache | None
    ) -> tuple[TokenTransition, TokenPrediction]:
        config, canvas_BL, prompts = self._sampler.config, self._canvas_BL[rows_B], self._prompts.rows(rows_B)
        if not self._guided:
            prediction = self._policy.predict(canvas_BL, prompts, span, cache)
            return TokenTransition.of(prediction.logits_BLV, config.temperature, config.top_p), prediction
        both = join_prompts([prompts, prompts.blanked(self._mask_id)])
        prediction = self._policy.predict(torch.cat([canvas_BL, canvas_BL]), both, span, cache)
        cond_BLV, uncond_BLV = prediction.logits_BLV.chunk(2)
        guided_BLV = guided_logits(cond_BLV, uncond_BLV, config.guidance_scale, self._mask_id)
        return TokenTransition.of(guided_BLV, config.temperature, config.top_p, cond_BLV), prediction

    def _uniforms(self, draws: Sequence[torch.Generator], rows_B: torch.Tensor, span: slice) -> torch.Tensor:
        """The next L uniforms of each row, fp64, cut to the block."""
        shape = (self._policy.canvas_length,)
        rows = [torch.rand(shape, generator=draws[row], dtype=torch.float64)[span] for row in rows_B.tolist()]
        return torch.stack(rows).to(self._policy.device)

    def _set_budgets(self, prediction: TokenPrediction) -> None:
        """Entropy budgets of all rows, at the first call: what the head is told comes with that very call."""
        config = self._sampler.config
        if self._gamma_B is not None or not isinstance(config, EntropyBoundedConfig):
            return
        count, device = len(self._keys), self._policy.device
        if self._gamma is not None or config.budget == "fixed":
            self._gamma_B = torch.full((count,), config.gamma if self._gamma is None else self._gamma, device=device)
            return
        offset_B = torch.zeros(count, device=device)
        if config.budget == "learned":
            assert prediction.prompt_features_BD is not None, "a first call tells the prompt's features"
            self._features_BD = prediction.prompt_features_BD[:count].float()
            offset_B = self._policy.log_budget(self._features_BD).detach()
        self._gamma_B = draw_budgets(config, offset_B, sample_generators(self._keys, "gamma"))

    def _finish(self, rows_B: torch.Tensor, now_B1: torch.Tensor) -> None:
        """Fill rows whose first end token has no mask before it: end tokens to the end, at this step, log-prob 0."""
        canvas_BL = self._canvas_BL[rows_B]
        masked_BL = canvas_BL == self._mask_id
        ended_B = ((canvas_BL == self._eos_id) & (masked_BL.cumsum(dim=1) == 0)).any(dim=1)
        rest_BL = masked_BL & ended_B.unsqueeze(1)
        if not bool(rest_BL.any()):
            return
        self._canvas_BL[rows_B] = canvas_BL.masked_fill(rest_BL, self._eos_id)
        self._step_BL[rows_B] = torch.where(rest_BL, now_B1, self._step_BL[rows_B])
        for record_BL in (self._rollout_BL, self._plain_BL):
            record_BL[rows_B] = record_BL[rows_B].masked_fill(rest_BL, 0.0)


def _doubled(places_B: torch.Tensor, count: int) -> torch.Tensor:
    """Places in a batch of `count` rows that is followed by its unconditional twin."""
    return torch.cat([places_B, places_B + count])
