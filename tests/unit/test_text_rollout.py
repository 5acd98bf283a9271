"""Rollouts of text: what is recorded can be computed again, and each row is its own whoever is beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from raylign.errors import ConfigError, PromptError
from raylign.models.tokens import (
    CacheKind,
    KvCache,
    TokenPrediction,
    TokenPrompts,
    Vocabulary,
    join_prompts,
    response_mask,
)
from raylign.samplers import TokenSamplerConfig, make_token_sampler
from raylign.samplers.dream import DreamConfig
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.factor import FactorConfig
from raylign.samplers.left_to_right import LeftToRightConfig
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.samplers.threshold import ThresholdConfig
from raylign.types import Needs, Prompt, RolloutGroup, RolloutStatus, TokenTrajectory
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup, TokenSetup, chunk_requests, join_parts
from rollout.prompts import GroupTask
from tests.tiny_models import euler
from tests.toy_text import EOS_ID, MASK_ID, ToyTextPolicy, draw_texts, written

ANY_SAMPLER = pytest.mark.parametrize(
    "config",
    [
        LowConfidenceConfig(num_steps=4, block_length=4),
        LowConfidenceConfig(ascending_steps=True, eos_rejection=True),
        ThresholdConfig(threshold=0.5, block_length=4),
        FactorConfig(factor=1.5, temperature=0.8, top_p=0.9),
        EntropyBoundedConfig(gamma=0.6, guidance_scale=1.5),
        EntropyBoundedConfig(gamma=0.6, budget="learned"),
        DreamConfig(order="entropy", alg_temp=0.3, num_steps=5),
        DreamConfig(order="origin"),
        LeftToRightConfig(stop_at_eos=False),
    ],
    ids=lambda config: config.type,
)
TWO_TEXTS = ("ab", "fedcba")
GREEDY = LowConfidenceConfig(temperature=0.0)


def unstopped(config: TokenSamplerConfig) -> TokenSamplerConfig:
    return config.model_copy(update={"stop_at_eos": False})


def canvas_before(tokens: TokenTrajectory, step_G: torch.Tensor) -> torch.Tensor:
    """Each row's canvas when its call number `step_G` was made."""
    return torch.where(tokens.reveal_step_GL < step_G.unsqueeze(1), tokens.tokens_GL, MASK_ID)


@ANY_SAMPLER
def test_the_policy_scores_every_recorded_canvas_as_recorded(config: TokenSamplerConfig) -> None:
    policy = ToyTextPolicy(seed=1, budget_head=True)
    for group in draw_texts(policy, config, TWO_TEXTS):
        tokens = written(group)
        assert isinstance(group.conditioning, TokenPrompts)
        prompts = group.conditioning.repeat(4)
        answered = response_mask(tokens.tokens_GL, EOS_ID) if config.stop_at_eos else torch.ones(4, 8, dtype=torch.bool)
        for step in range(int(tokens.nfe_G.max())):
            logits = policy.predict(canvas_before(tokens, torch.full((4,), step)), prompts).logits_BLV
            again = torch.log_softmax(logits, dim=-1).gather(2, tokens.tokens_GL.unsqueeze(2)).squeeze(2)
            here = (tokens.reveal_step_GL == step) & answered
            torch.testing.assert_close(again[here], tokens.plain_logprob_GL[here], rtol=0, atol=1e-5)
        assert bool((tokens.plain_logprob_GL[answered] < 0).all())
        if (config.temperature, config.top_p, config.guidance_scale) == (1, 1, 1):
            assert torch.equal(tokens.plain_logprob_GL, tokens.rollout_logprob_GL)


@ANY_SAMPLER
def test_every_position_is_revealed_once_and_calls_are_counted(config: TokenSamplerConfig) -> None:
    for group in draw_texts(ToyTextPolicy(seed=1), config, TWO_TEXTS):
        tokens = written(group)
        assert group.texts is not None
        assert len(group.texts) == 4
        assert not bool((tokens.tokens_GL == MASK_ID).any())
        for row in range(4):
            steps = set(tokens.reveal_step_GL[row].tolist())
            assert steps == set(range(int(tokens.nfe_G[row])))
        assert tokens.cached_calls_G.tolist() == [0] * 4
        assert tokens.tokens_GL.dtype == tokens.nfe_G.dtype == tokens.reveal_step_GL.dtype == torch.int64
        assert tokens.rollout_logprob_GL.dtype == torch.float32


@ANY_SAMPLER
def test_a_rows_answer_and_calls_do_not_depend_on_its_neighbours(config: TokenSamplerConfig) -> None:
    policy = ToyTextPolicy(seed=2, budget_head=True)
    together = written(draw_texts(policy, config, TWO_TEXTS)[0])
    for row in range(4):
        alone = written(draw_texts(policy, config, TWO_TEXTS[:1], [row])[0])
        assert torch.equal(alone.tokens_GL[0], together.tokens_GL[row])
        assert torch.equal(alone.reveal_step_GL[0], together.reveal_step_GL[row])
        assert int(alone.nfe_G) == int(together.nfe_G[row])
        torch.testing.assert_close(alone.rollout_logprob_GL[0], together.rollout_logprob_GL[row], rtol=0, atol=1e-5)


@ANY_SAMPLER
def test_equal_keys_draw_equal_texts_and_others_do_not(config: TokenSamplerConfig) -> None:
    policy = ToyTextPolicy(sharpness=1.0)
    first, second, other = (draw_texts(policy, config, run_seed=seed)[0] for seed in (0, 0, 1))
    assert all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(written(first).tensors(), written(second).tensors(), strict=True)
    )
    assert not torch.equal(written(first).tokens_GL, written(other).tokens_GL)
    assert len({tuple(row) for row in written(first).tokens_GL.tolist()}) > 1


def test_budget_0_takes_one_call_per_token_and_an_infinite_one_a_single_call() -> None:
    policy = ToyTextPolicy(canvas_length=12)
    config = unstopped(EntropyBoundedConfig(gamma=2.0))
    none, all_, own = (written(draw_texts(policy, config, gamma=gamma)[0]) for gamma in (0.0, math.inf, None))
    assert none.nfe_G.tolist() == [12] * 4
    assert all_.nfe_G.tolist() == [1] * 4
    assert bool(((own.nfe_G > 1) & (own.nfe_G < 12)).all())
    assert policy.num_calls == 12 + 1 + int(own.nfe_G.max())
    for tokens in (none, all_, own):
        assert tokens.log_gamma_G is not None
        assert bool(torch.isfinite(tokens.log_gamma_G).all())
    assert own.log_gamma_G is not None
    assert own.log_gamma_G.exp().tolist() == pytest.approx([2.0] * 4)
    blocks = EntropyBoundedConfig(gamma=0.3, block_length=4, stop_at_eos=False)
    assert written(draw_texts(policy, blocks, gamma=math.inf)[0]).nfe_G.tolist() == [3] * 4


def test_the_calls_of_a_fixed_schedule() -> None:
    policy = ToyTextPolicy()
    config = LowConfidenceConfig(num_steps=6, block_length=4, stop_at_eos=False)
    tokens = written(draw_texts(policy, config)[0])
    assert [torch.bincount(row).tolist() for row in tokens.reveal_step_GL] == [[2, 1, 1, 2, 1, 1]] * 4
    assert bool((tokens.reveal_step_GL[:, :4] < 3).all())
    assert bool((tokens.reveal_step_GL[:, 4:] >= 3).all())
    ascending = written(draw_texts(policy, LowConfidenceConfig(ascending_steps=True, stop_at_eos=False))[0])
    assert [torch.bincount(row).tolist() for row in ascending.reveal_step_GL] == [[1, 2, 4, 1]] * 4
    for length in (1, 4):
        order = written(draw_texts(policy, LeftToRightConfig(block_length=length, stop_at_eos=False))[0])
        assert order.reveal_step_GL.tolist() == [list(range(8))] * 4


def test_budgets_are_drawn_once_per_sample_around_gamma() -> None:
    policy = ToyTextPolicy()
    config = EntropyBoundedConfig(gamma=0.2, budget="sampled")
    tokens = written(draw_texts(policy, config, indices=range(64))[0])
    assert tokens.log_gamma_G is not None
    assert tokens.budget_features_GD is None
    assert len(set(tokens.log_gamma_G.tolist())) == 64
    assert abs(float(tokens.log_gamma_G.mean()) - math.log(0.2)) < 3 * 0.5 / 8
    again = written(draw_texts(policy, config, indices=[5])[0])
    assert again.log_gamma_G is not None
    assert again.log_gamma_G[0] == tokens.log_gamma_G[5]
    assert written(draw_texts(policy, ThresholdConfig())[0]).log_gamma_G is None


def test_the_budget_head_shifts_the_budgets_and_is_told_by_the_first_call() -> None:
    policy = ToyTextPolicy(budget_head=True)
    config = EntropyBoundedConfig(gamma=0.2, budget="learned", guidance_scale=2.0)
    before = written(draw_texts(policy, config, TWO_TEXTS)[1])
    with torch.no_grad():
        policy.trainable_parameters()["budget_head.bias"].fill_(0.4)
    calls = policy.num_calls
    after = written(draw_texts(policy, config, TWO_TEXTS)[1])
    assert before.log_gamma_G is not None
    assert after.log_gamma_G is not None
    torch.testing.assert_close(after.log_gamma_G, before.log_gamma_G + 0.4)
    assert policy.num_calls - calls >= int(after.nfe_G.max())
    assert after.budget_features_GD is not None
    first = policy.predict(torch.full((1, 8), MASK_ID), policy.encode(TWO_TEXTS[1]))
    assert first.prompt_features_BD is not None
    torch.testing.assert_close(after.budget_features_GD, first.prompt_features_BD.expand(4, -1))
    fixed = written(draw_texts(policy, config, gamma=0.7)[0])
    assert fixed.log_gamma_G is not None
    assert fixed.log_gamma_G.exp().tolist() == pytest.approx([0.7] * 4)
    assert fixed.budget_features_GD is None, "no head chose these budgets"


@pytest.mark.parametrize(
    ("config", "gamma", "complaint"),
    [
        (EntropyBoundedConfig(), -0.5, "at least 0, got -0.5"),
        (EntropyBoundedConfig(), math.nan, "at least 0, got nan"),
        (ThresholdConfig(), 0.5, "asked of a Threshold sampler"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(config: TokenSamplerConfig, gamma: float, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        draw_texts(ToyTextPolicy(), config, gamma=gamma)


class Scripted(ToyTextPolicy):
    """A policy that likes one text best, whatever the canvas, surer of what stands further right; or not a number."""

    def __init__(self, script: Sequence[int], spoiled: Sequence[int] = ()) -> None:
        super().__init__(len(script))
        self.script = torch.tensor(script)
        self.spoiled = spoiled
        self.rows_seen: list[int] = []

    def predict(
        self,
        canvas_BL: torch.Tensor,
        prompts: TokenPrompts,
        span: slice | None = None,
        cache: KvCache | None = None,
    ) -> TokenPrediction:
        prediction = super().predict(canvas_BL, prompts, span, cache)
        self.rows_seen.append(len(canvas_BL))
        sure = torch.arange(4.0, 4.0 + len(self.script))
        logits = torch.zeros(len(canvas_BL), len(self.script), self.vocabulary.size)
        logits[:, torch.arange(len(self.script)), self.script] = sure
        logits[:, :, MASK_ID] = -torch.inf
        if len(self.rows_seen) > 1:
            logits[list(self.spoiled)] = torch.nan
        return TokenPrediction(logits[:, span or slice(None)], prediction.prompt_features_BD)


def test_a_finished_answer_is_filled_with_end_tokens_without_calls() -> None:
    script = [4, 5, EOS_ID, 6, 7, 8, 3, 3]
    stopped = written(draw_texts(Scripted(script), LeftToRightConfig(temperature=0))[0])
    assert stopped.tokens_GL.tolist() == [[4, 5, *[EOS_ID] * 6]] * 4
    assert stopped.nfe_G.tolist() == [3] * 4
    assert stopped.reveal_step_GL.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2]] * 4
    assert stopped.plain_logprob_GL[:, 3:].tolist() == [[0.0] * 5] * 4
    assert bool((stopped.plain_logprob_GL[:, :3] < 0).all())
    assert stopped.rollout_logprob_GL.tolist() == [[0.0] * 8] * 4
    whole = written(draw_texts(Scripted(script), LeftToRightConfig(temperature=0, stop_at_eos=False))[0])
    assert whole.tokens_GL.tolist() == [script] * 4
    assert whole.nfe_G.tolist() == [8] * 4


def test_an_end_token_with_masks_before_it_finishes_nothing() -> None:
    # From right to left: the end token at 2 is revealed long before what stands before it.
    script = [4, 5, EOS_ID, 6]
    tokens = written(draw_texts(Scripted(script), GREEDY)[0])
    assert tokens.tokens_GL.tolist() == [script] * 4
    assert tokens.reveal_step_GL.tolist() == [[3, 2, 1, 0]] * 4
    assert tokens.nfe_G.tolist() == [4] * 4


def test_an_answer_that_ends_in_an_early_block_skips_the_later_ones() -> None:
    policy = Scripted([EOS_ID, 5, 6, 6])
    tokens = written(draw_texts(policy, LowConfidenceConfig(block_length=2, temperature=0))[0])
    assert tokens.tokens_GL.tolist() == [[EOS_ID, 5, EOS_ID, EOS_ID]] * 4
    assert tokens.nfe_G.tolist() == [2] * 4
    assert policy.rows_seen == [4, 4]


def test_rows_that_are_done_take_part_in_no_call() -> None:
    seen: list[int] = []

    class Watched(ToyTextPolicy):
        def predict(self, canvas_BL, prompts, span=None, cache=None):  # type: ignore[no-untyped-def]
            seen.append(len(canvas_BL))
            return super().predict(canvas_BL, prompts, span, cache)

    config = EntropyBoundedConfig(gamma=0.4, budget="sampled", block_length=4)
    tokens = written(draw_texts(Watched(sharpness=1.0), config, indices=range(12))[0])
    assert sum(seen) == int(tokens.nfe_G.sum())
    assert len(set(tokens.nfe_G.tolist())) > 1
    assert min(seen) < 12


@pytest.mark.parametrize("length", [2, 4])
def test_logits_that_are_not_finite_fail_their_row_only(length: int) -> None:
    spoiled, sound = Scripted([4, 5, 6, 7], spoiled=[1]), Scripted([4, 5, 6, 7])
    config = LowConfidenceConfig(temperature=0.0, block_length=length)
    (group,), (fine,) = draw_texts(spoiled, config), draw_texts(sound, config)
    # Place 1 of every call but the first is spoiled: rows 1, then 2, then 3 as the batch shrinks. Row 0 is unharmed.
    assert [rollout.status for rollout in group.rollouts] == [
        RolloutStatus.OK,
        *[RolloutStatus.GENERATION_FAILED] * 3,
    ]
    tokens = written(group)
    assert torch.equal(tokens.tokens_GL[0], written(fine).tokens_GL[0])
    assert torch.equal(tokens.plain_logprob_GL[0], written(fine).plain_logprob_GL[0])
    assert tokens.nfe_G.tolist() == [4, 2, 3, 4]
    assert spoiled.rows_seen == [4, 4, 3, 2], "a row that was given up takes part in no later call or block"
    first = length - 1
    assert tokens.tokens_GL[1].tolist() == [4 + k if k == first else MASK_ID for k in range(4)]
    assert tokens.reveal_step_GL[1].tolist() == [0 if k == first else -1 for k in range(4)]
    assert tokens.plain_logprob_GL[1].isnan().tolist() == [k != first for k in range(4)]
    assert group.texts is not None
    assert group.texts[0] == "bcde"


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_that_is_made_anew_in_every_call_changes_nothing(kind: CacheKind) -> None:
    policy = ToyTextPolicy(canvas_length=12, sharpness=1.0)
    base = EntropyBoundedConfig(gamma=0.3, block_length=4)
    plain = written(draw_texts(policy, base, TWO_TEXTS)[0])
    fresh = written(draw_texts(policy, base.model_copy(update={"cache": kind, "cache_refresh": 1}), TWO_TEXTS)[0])
    assert torch.equal(plain.tokens_GL, fresh.tokens_GL)
    assert torch.equal(plain.reveal_step_GL, fresh.reveal_step_GL)
    torch.testing.assert_close(plain.plain_logprob_GL, fresh.plain_logprob_GL)
    assert fresh.cached_calls_G.tolist() == [0] * 4


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_cached_calls_are_counted_apart_and_follow_their_rows(kind: CacheKind, guidance_scale: float) -> None:
    policy = ToyTextPolicy(canvas_length=12)
    config = EntropyBoundedConfig(
        gamma=1.0, budget="sampled", block_length=4, cache=kind, guidance_scale=guidance_scale, stop_at_eos=False
    )
    together = written(draw_texts(policy, config, TWO_TEXTS)[1])
    assert (together.nfe_G - together.cached_calls_G).tolist() == [3] * 4, "each block starts with a whole call"
    assert int(together.cached_calls_G.sum()) > 0
    # Rows leave the batch at different calls; a cache that kept the wrong rows would show here.
    assert len(set(together.nfe_G.tolist())) > 1
    for row in range(4):
        alone = written(draw_texts(policy, config, TWO_TEXTS[1:], [row])[0])
        assert torch.equal(alone.tokens_GL[0], together.tokens_GL[row])
        torch.testing.assert_close(alone.plain_logprob_GL[0], together.plain_logprob_GL[row], rtol=0, atol=1e-5)
    every_other = written(draw_texts(policy, config.model_copy(update={"cache_refresh": 2}), TWO_TEXTS)[1])
    for row in range(4):
        blocks = every_other.reveal_step_GL[row].view(3, 4)
        whole = sum((len(set(block.tolist())) + 1) // 2 for block in blocks)
        assert int(every_other.nfe_G[row] - every_other.cached_calls_G[row]) == whole
    assert bool((every_other.nfe_G - every_other.cached_calls_G > 3).any())


def test_guidance_draws_from_the_extrapolated_logits() -> None:
    policy = ToyTextPolicy(canvas_length=1, sharpness=1.0)
    config = LowConfidenceConfig(guidance_scale=3.0)
    tokens = written(draw_texts(policy, config, indices=range(2000))[0])
    prompts, canvas = policy.encode("abc"), torch.full((1, 1), MASK_ID)
    cond = policy.predict(canvas, prompts).logits_BLV[0, 0]
    blanked = TokenPrompts(torch.full_like(prompts.ids_PL, MASK_ID), prompts.real_PL)
    uncond = policy.predict(canvas, blanked).logits_BLV[0, 0]
    guided = torch.log_softmax(torch.nan_to_num(uncond + 3 * (cond - uncond), nan=-math.inf), dim=0)
    chosen = tokens.tokens_GL[:, 0]
    torch.testing.assert_close(tokens.rollout_logprob_GL[:, 0], guided[chosen], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.plain_logprob_GL[:, 0], torch.log_softmax(cond, 0)[chosen], rtol=0, atol=1e-5)
    shares = torch.bincount(chosen, minlength=policy.vocabulary.size) / 2000
    # Three standard errors of a share of .5 among 2000 draws are .034.
    torch.testing.assert_close(shares, guided.exp(), rtol=0, atol=0.034)


def test_temperature_0_is_greedy_and_repeats() -> None:
    tokens = written(draw_texts(ToyTextPolicy(), LeftToRightConfig(temperature=0.0, stop_at_eos=False))[0])
    assert len({tuple(row) for row in tokens.tokens_GL.tolist()}) == 1
    assert tokens.rollout_logprob_GL.tolist() == [[0.0] * 8] * 4
    policy = ToyTextPolicy()
    canvas = torch.full((1, 8), MASK_ID)
    for place in range(8):
        logits = policy.predict(canvas, policy.encode("abc")).logits_BLV
        canvas[0, place] = logits[0, place].argmax()
    assert torch.equal(canvas[0], tokens.tokens_GL[0])


def engine_of(policy: ToyTextPolicy, config: TokenSamplerConfig) -> RolloutEngine[ToyTextPolicy]:
    setup = TokenSetup(make_token_sampler(config, policy.canvas_length), Needs.FINAL)
    engine = RolloutEngine(policy, {"rollout": setup}, 0)
    engine.pull(policy.export_weights(3))
    return engine


def test_groups_carry_their_own_unpadded_prompt_and_join_from_parts() -> None:
    engine = engine_of(ToyTextPolicy(budget_head=True), EntropyBoundedConfig(budget="learned"))
    task = GroupTask(Prompt("p", "ab"), 2, 5)
    other = GroupTask(Prompt("q", "abcdef"), 2, 6)
    whole, beside = engine.generate(ChunkRequest((task, other), (0, 1, 2, 3)))
    assert isinstance(whole.conditioning, TokenPrompts)
    assert isinstance(beside.conditioning, TokenPrompts)
    assert whole.conditioning.ids_PL.shape == (1, 2)
    assert beside.conditioning.ids_PL.shape == (1, 6)
    assert whole.images_GHWC is None
    assert {r.min_version for r in whole.rollouts} == {3}
    assert set(whole.seconds) == {"sample", "decode"}
    parts: list[RolloutGroup] = [engine.generate(request)[0] for request in chunk_requests([task], 4, 2)]
    joined = join_parts(parts)
    assert [r.key for r in joined.rollouts] == [r.key for r in whole.rollouts]
    assert joined.texts == whole.texts
    for name in TokenTrajectory.__dataclass_fields__:
        torch.testing.assert_close(getattr(joined.trajectory, name), getattr(whole.trajectory, name))
    assert engine.policy.num_encoded == 2, "prompts are encoded once"


def test_a_prompt_that_is_too_long_is_refused_by_name() -> None:
    with pytest.raises(PromptError, match="at most 8 fit"):
        draw_texts(ToyTextPolicy(), ThresholdConfig(), ("abcdefabc",))


def test_probes_are_keyed_canvases_of_three_noise_levels() -> None:
    policy = ToyTextPolicy(canvas_length=10)
    probe = engine_of(policy, ThresholdConfig()).probe("cab")
    assert probe.version == 3
    assert probe.sigma_B.tolist() == pytest.approx([1.0, 0.5, 0.1])
    assert (probe.state == MASK_ID).sum(dim=1).tolist() == [10, 5, 1]
    rest = probe.state[probe.state != MASK_ID]
    assert int(rest.min()) > MASK_ID
    assert isinstance(probe.conditioning, TokenPrompts)
    logits = policy.predict(probe.state, probe.conditioning).logits_BLV
    assert torch.equal(probe.answer, logits.masked_fill(logits == -torch.inf, 0.0))
    assert bool(torch.isfinite(probe.answer).all())
    assert torch.equal(engine_of(policy, ThresholdConfig()).probe("cab").state, probe.state)


def test_a_probe_hides_no_number_that_is_not_finite() -> None:
    answer = engine_of(Scripted([4, 5, 6, 7]), ThresholdConfig()).probe("a").answer
    assert bool(torch.isfinite(answer).all())

    class Broken(ToyTextPolicy):
        vocabulary = Vocabulary(9, MASK_ID, EOS_ID, 0)

        def predict(self, canvas_BL, prompts, span=None, cache=None):  # type: ignore[no-untyped-def]
            logits = super().predict(canvas_BL, prompts, span, cache).logits_BLV.detach().clone()
            logits[0, 0, 4], logits[1, 0, 5] = -torch.inf, torch.nan
            return TokenPrediction(logits)

    broken = engine_of(Broken(), ThresholdConfig()).probe("a").answer
    assert (~torch.isfinite(broken)).flatten(1).sum(dim=1).tolist() == [1, 1, 0]


def test_slots_of_two_modalities_are_refused() -> None:
    setups = {
        "rollout": TokenSetup(make_token_sampler(ThresholdConfig(), 8), Needs.FINAL),
        "eval": SamplerSetup(euler(2), 1.0, Needs.FINAL),
    }
    with pytest.raises(ConfigError, match="use one kind"):
        RolloutEngine(ToyTextPolicy(), setups, 0)  # type: ignore[arg-type]
    assert EulerOdeConfig().type == "euler_ode"


def test_padding_does_not_change_an_answer() -> None:
    policy = ToyTextPolicy()
    config = EntropyBoundedConfig(gamma=0.3)
    padded = written(draw_texts(policy, config, ("ab", "abcdefab"))[0])
    alone = written(draw_texts(policy, config, ("ab",))[0])
    assert torch.equal(padded.tokens_GL, alone.tokens_GL)
    torch.testing.assert_close(padded.plain_logprob_GL, alone.plain_logprob_GL)
    assert join_prompts([policy.encode("ab"), policy.encode("abc")]).ids_PL.shape == (2, 3)
