"""One prompt's way through both rounds, over a real engine and over the loop with fakes: what is drawn and kept."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from learner.learner import Learner
from raylign.config import parse_config
from raylign.errors import RewardError
from raylign.samplers import FlowSchedule, make_sampler, make_token_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.types import Needs, Prompt, RewardSample, RolloutGroup
from rollout.draft_sampler import draft_sampler
from rollout.drawn import Slot
from rollout.engine import ChunkRequest, RolloutEngine, SamplerSetup, TokenSetup, join_parts
from rollout.explore import DraftGroup, ExploreConfig, as_drafts
from rollout.prompts import GroupTask, PromptStream
from rollout.pruning import PruneConfig
from services.config import RunConfig
from services.controller import Controller
from services.exploration import explored_group, is_shown, requests_of
from services.scoring import score_groups
from tests.fakes import FakeFleet, FakeLearner, FakeScorer, TwoNumberPolicy, make_group
from tests.toy_text import ToyTextPolicy
from tests.unit.test_controller import PROMPTS, Recorder

TASK = GroupTask(Prompt("p", "fade"), 2, 0, learner_step=1)


def settings(pool: int = 12, group: int = 4, chunk: int = 2, **explore: Any) -> RunConfig:
    options = {"explore": {"pool_size": pool, **explore}, "chunk_size": chunk}
    data = {"num_steps": 3, "group_size": group, "groups_per_step": 2, "sampler": {"num_steps": 6}, "rollout": options}
    return parse_config(RunConfig, data, "test")


class Drawing:
    """The engine of a two-number policy behind `Draw`: rewards are functions of (slot, sample index)."""

    def __init__(
        self,
        reward: Any,
        sampler: Any = EulerOdeConfig(num_steps=6),  # noqa: B008  # frozen
        num_draft_steps: int = 6,
        prune: PruneConfig | None = None,
        engine: RolloutEngine[Any] | None = None,
    ) -> None:
        self.engine = engine or self._pictures(sampler, num_draft_steps, prune)
        self.requests: list[ChunkRequest] = []
        self.pools: list[RolloutGroup] = []
        self._reward = reward

    @staticmethod
    def _pictures(sampler: Any, num_draft_steps: int, prune: PruneConfig | None) -> RolloutEngine[Any]:
        policy, schedule = TwoNumberPolicy(), FlowSchedule(1.0)
        ode = make_sampler(EulerOdeConfig(num_steps=num_draft_steps), schedule)
        setups: dict[Slot, SamplerSetup] = {
            "rollout": SamplerSetup(make_sampler(sampler, schedule), 1.0, Needs.STEPS),
            "draft": SamplerSetup(ode, 1.0, Needs.FINAL, prune=prune),
        }
        engine = RolloutEngine(policy, setups, run_seed=0)
        engine.pull(policy.export_weights(7))
        return engine

    async def draw(self, requests: Sequence[ChunkRequest]) -> RolloutGroup:
        self.requests += requests
        joined = join_parts([self.engine.generate(request)[0] for request in requests])
        slot = requests[0].slot
        scorer = FakeScorer(lambda sample: self._reward(slot, int(sample.id.rpartition("/")[2])))
        (group,) = await score_groups(scorer, [joined])
        self.pools.append(group)
        return group

    def explored(self, config: RunConfig) -> RolloutGroup:
        assert config.rollout.explore is not None
        return asyncio.run(explored_group(config, config.rollout.explore, TASK, self.draw))


def _indices(group: RolloutGroup) -> list[int]:
    return [rollout.key.sample_index for rollout in group.rollouts]


def test_both_ends_of_the_drafts_are_drawn_again_and_only_their_new_rewards_count() -> None:
    # Drafts are worth their index; drawn again everything turns round.
    drawing = Drawing(lambda slot, index: index / 12 if slot == "draft" else 1 - index / 12)
    group = drawing.explored(settings(chunk_size=6))
    assert _indices(group) == [0, 1, 10, 11]
    assert [rollout.total for rollout in group.rollouts] == [1 - index / 12 for index in (0, 1, 10, 11)]
    assert group.exploration is not None
    assert group.exploration.totals == tuple(index / 12 for index in range(12))
    assert [(request.slot, request.sample_indices) for request in drawing.requests] == [
        ("draft", tuple(range(6))),
        ("draft", tuple(range(6, 12))),
        ("rollout", (0, 1)),
        ("rollout", (10, 11)),
    ]
    # The siblings are full rollouts: every state is there.
    assert group.latents.states_GS1CHW is not None
    assert group.latents.states_GS1CHW.shape[:2] == (4, 7)


def test_a_key_starts_from_the_same_noise_in_both_rounds() -> None:
    drawing = Drawing(lambda slot, index: float(index))
    group = drawing.explored(settings())
    pool = drawing.pools[0]
    # As many steps of the same sampler: the draft is the very picture.
    assert torch.equal(group.latents.final_GCHW, pool.latents.final_GCHW[_indices(group)])
    fewer = Drawing(lambda slot, index: float(index), num_draft_steps=2)
    again = fewer.explored(settings())
    assert torch.equal(again.latents.final_GCHW, group.latents.final_GCHW)
    assert not torch.equal(fewer.pools[0].latents.final_GCHW, pool.latents.final_GCHW)


def test_coupled_rollouts_are_drawn_again_by_their_noisy_sampler() -> None:
    noisy = Drawing(lambda slot, index: float(index), sampler=FlowSdeConfig(num_steps=6))
    group = noisy.explored(settings())
    alone = noisy.engine.generate(ChunkRequest((TASK,), (10, 11)))[0]
    assert group.latents.stochastic_S is not None
    assert group.latents.stochastic_S.any()
    assert torch.equal(group.latents.final_GCHW[2:], alone.latents.final_GCHW)


def test_pruned_drafts_are_no_candidates_and_no_failures() -> None:
    drawing = Drawing(lambda slot, index: float(index), prune=PruneConfig(at_step=2, keep=0.5))
    group = drawing.explored(settings(chunk_size=6, prune={"at_step": 2, "keep": 0.5}))
    seen = group.exploration
    assert seen is not None
    assert len(seen.indices) == len(seen.totals) == 6
    assert seen.num_failed == 0
    assert _indices(group) == [*seen.indices[:2], *seen.indices[-2:]]
    assert [sum(index < 6 for index in seen.indices), sum(index >= 6 for index in seen.indices)] == [3, 3]


def test_texts_are_drafted_at_a_large_budget_and_drawn_again_at_the_trained_one() -> None:
    text = {
        "model": {"type": "tiny_text"},
        "sampler": {"type": "entropy_bounded", "gamma": 0.05},
        "algorithm": {"type": "d1"},
        "group_size": 4,
        "rollout": {"chunk_size": 2, "explore": {"pool_size": 8, "gamma": 50.0}},
    }
    config = parse_config(RunConfig, text, "test")
    explore = config.rollout.explore
    assert explore is not None
    policy = ToyTextPolicy(seed=3)
    samplers: dict[Slot, Any] = {"rollout": config.sampler, "draft": draft_sampler(config.sampler, explore)}
    setups: dict[Slot, SamplerSetup | TokenSetup] = {
        slot: TokenSetup(make_token_sampler(sampler, policy.canvas_length), Needs.FINAL)
        for slot, sampler in samplers.items()
    }
    engine = RolloutEngine(policy, setups, run_seed=0)
    engine.pull(policy.export_weights(0))
    drawing = Drawing(lambda slot, index: float(index), engine=engine)
    group = drawing.explored(config)
    assert _indices(group) == [0, 1, 6, 7]
    pool = drawing.pools[0]
    # All at once in one call each, against several calls at the training budget; the same keys, so the same uniforms.
    assert pool.tokens.nfe_G.tolist() == [1] * 8
    assert float(group.tokens.nfe_G.float().mean()) > 1
    again = engine.generate(ChunkRequest((TASK,), (6, 7)))[0]
    assert torch.equal(group.tokens.tokens_GL[2:], again.tokens.tokens_GL)
    assert group.texts is not None
    assert group.texts[2:] == again.texts
    whole = ExploreConfig(pool_size=8, regenerate=False)
    kept = asyncio.run(explored_group(config, whole, TASK, drawing.draw))
    assert kept.texts is not None
    assert len(kept.texts) == len(kept.tokens.tokens_GL) == 4


def test_without_regeneration_the_selected_of_the_pool_are_the_group() -> None:
    drawing = Drawing(lambda slot, index: index / 12)
    group = drawing.explored(settings(regenerate=False, select="mean_deviation"))
    assert {request.slot for request in drawing.requests} == {"rollout"}
    assert [len(request.sample_indices) for request in drawing.requests] == [2] * 6
    pool = drawing.pools[0]
    assert _indices(group) == [0, 1, 10, 11]
    for name in ("final_GCHW", "states_GS1CHW"):
        assert torch.equal(getattr(group.latents, name), getattr(pool.latents, name)[_indices(group)])
    assert pool.images_GHWC is not None
    assert group.images_GHWC is not None
    assert np.array_equal(group.images_GHWC, pool.images_GHWC[_indices(group)])
    assert [rollout.total for rollout in group.rollouts] == [pool.rollouts[index].total for index in _indices(group)]
    assert group.exploration is not None
    assert not group.exploration.redrawn


def test_failed_drafts_are_passed_over_and_their_cause_is_told() -> None:
    drawing = Drawing(lambda slot, index: None if slot == "draft" and index in (0, 11) else float(index))
    group = drawing.explored(settings())
    assert _indices(group) == [1, 2, 9, 10]
    assert group.exploration is not None
    assert group.exploration.num_failed == 2
    assert "out of ink" in group.exploration.cause


def test_seconds_are_told_by_phase_and_by_stage() -> None:
    group = Drawing(lambda slot, index: float(index)).explored(settings())
    seconds = group.seconds
    assert seconds["sample"] + seconds["decode"] == pytest.approx(seconds["draft"] + seconds["regenerate"])
    assert min(seconds[name] for name in ("draft", "regenerate", "draft_reward", "select")) > 0
    assert seconds["draft_reward"] < seconds["reward"]


@pytest.mark.parametrize("regenerate", [True, False])
def test_the_work_of_both_rounds_is_told(regenerate: bool) -> None:
    group = Drawing(lambda slot, index: float(index)).explored(settings(regenerate=regenerate))
    drawn = ["draft", "draft"] * 6  # twelve drafts in chunks of two
    again = ["regenerate", "regenerate"] * 2 + ["score"] if regenerate else []
    assert [work.phase for work in group.work] == [*drawn, "score", *again]
    begun = [work.start_s for work in group.work]
    assert begun == sorted(begun)
    assert {work.who for work in group.work if work.phase == "score"} == {"rewards"}


def test_pictures_of_drafts_are_kept_for_the_shown_prompt_and_never_sent_to_the_learner() -> None:
    config = settings()
    shown = Drawing(lambda slot, index: float(index)).explored(config)
    assert shown.exploration is not None
    assert shown.exploration.images_NHWC is not None
    assert len(shown.exploration.images_NHWC) == 12
    sent = shown.without_outputs()
    assert sent.exploration is not None
    assert sent.exploration.images_NHWC is None
    assert sent.exploration.totals == shown.exploration.totals
    # The first of two prompts per step, at the first step, at evaluations and at the last of three.
    long = config.model_copy(update={"num_steps": 41})
    steps = {
        place // 2 + 1
        for place in range(82)
        if is_shown(long, GroupTask(TASK.prompt, 0, place, learner_step=place // 2 + 1))
    }
    assert steps == {1, 20, 40, 41}
    assert not is_shown(config, replace(TASK, sequence=1))


def test_chunks_are_cut_in_the_order_of_indices() -> None:
    assert [request.sample_indices for request in requests_of(TASK, [3, 5, 8, 9, 11], 2, "rollout")] == [
        (3, 5),
        (8, 9),
        (11,),
    ]


def test_a_draft_is_not_of_the_type_that_is_trained_on() -> None:
    drafts = as_drafts(make_group(TASK, (0, 1), 0).with_rewards(asyncio.run(FakeScorer().score([None, None]))))  # type: ignore[list-item]
    assert not isinstance(drafts, RolloutGroup)
    kept = {field.name for field in fields(DraftGroup)}
    assert not kept & {"trajectory", "rollouts", "conditioning"}
    wanted = typing.get_type_hints(Learner.begin_step)["groups"]
    assert wanted == Sequence[RolloutGroup]
    for method in ("rollouts", "trajectory", "latents", "without_outputs", "group_size"):
        with pytest.raises(AttributeError):
            getattr(drafts, method)


def test_drafts_without_rewards_are_no_drafts_yet() -> None:
    with pytest.raises(ValueError, match="not scored yet"):
        as_drafts(make_group(TASK, (0, 1), 0))


class Loop:
    """A controller over fakes that explores 8 drafts per prompt for groups of 2."""

    def __init__(self, value: Any, seed: int = 0, fleet: FakeFleet | None = None, **config: Any) -> None:
        data = {"num_steps": 3, "group_size": 2, "groups_per_step": 3, "rollout": {"explore": {"pool_size": 8}}}
        self.config = parse_config(RunConfig, {**data, **config}, "test")
        self.fleet, self.learner, self.recorder = fleet or FakeFleet(seed), FakeLearner(), Recorder()
        self.saved: list[int] = []
        self.controller = Controller(
            self.config,
            PromptStream(PROMPTS, 0, self.config.groups_per_step),
            [],
            self.fleet,
            FakeScorer(value),
            self.learner,
            self.recorder,
            self._save,
        )

    async def _save(self, step: int) -> None:
        self.saved.append(step)

    def go(self) -> Loop:
        asyncio.run(asyncio.wait_for(self.controller.run(0), timeout=20))
        return self

    @property
    def trained(self) -> list[list[list[int]]]:
        return [[_indices(group) for group in step] for step in self.learner.trained]


def _by_index(sample: RewardSample) -> float:
    return float(sample.id.rpartition("/")[2])


def test_the_loop_trains_on_the_selected_in_prompt_order_whatever_finishes_first() -> None:
    runs = [Loop(_by_index, seed).go() for seed in range(4)]
    assert runs[0].trained == [[[0, 7]] * 3] * 3
    for run in runs:
        assert run.trained == runs[0].trained
        assert [[g.sequence for g in step] for step in run.learner.trained] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
        assert all(group.exploration is not None for step in run.learner.trained for group in step)
    metrics = runs[0].recorder.steps[-1][1]
    assert metrics["failed/drafts"] == 0
    assert metrics["explore/reward_pool_mean"] == 3.5
    assert metrics["explore/kendall"] == metrics["explore/recall"] == pytest.approx(1)


@pytest.mark.parametrize("staleness", [1, 2])
def test_no_explored_group_is_older_than_allowed(staleness: int) -> None:
    for seed in range(4):
        run = Loop(_by_index, seed, num_steps=8, max_staleness=staleness).go()
        ages = [step - 1 - g.min_version for step, groups in enumerate(run.learner.trained, 1) for g in groups]
        assert 0 <= max(ages) <= staleness


def test_a_prompts_second_round_waits_for_no_other_prompt() -> None:
    class Held(FakeFleet):
        """Holds the drafts of one prompt back until another prompt was drawn again."""

        def __init__(self) -> None:
            super().__init__()
            self.drawn_again = asyncio.Event()

        async def generate(self, request: ChunkRequest) -> list[RolloutGroup]:
            if request.slot == "draft" and request.tasks[0].sequence == 0:
                await self.drawn_again.wait()
            if request.slot == "rollout" and request.tasks[0].sequence == 2:
                self.drawn_again.set()
            return await super().generate(request)

    assert Loop(_by_index, fleet=Held(), num_steps=1).go().trained == [[[0, 7]] * 3]


def test_too_many_failed_drafts_stop_the_run_with_the_cause() -> None:
    calls: dict[str, int] = {}

    def value(sample: RewardSample) -> float | None:
        calls[sample.id] = calls.get(sample.id, 0) + 1
        return None if calls[sample.id] == 1 and not sample.id.endswith(("/0", "/1")) else 1.0

    run = Loop(value)
    with pytest.raises(ExceptionGroup) as raised:
        run.go()
    (error,) = raised.value.exceptions
    assert isinstance(error, RewardError)
    assert "18 of 24 drafts have no reward" in str(error)
    assert "out of ink" in str(error)
    assert run.learner.trained == []
