"""How drafts are drawn when nobody says: cheaper than rollouts, and without noise on the way."""

from __future__ import annotations

from typing import Any

import pytest

from raylign.errors import ConfigError
from raylign.samplers.dpm_solver import DpmSolverConfig
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.flow_sde import FlowSdeConfig
from raylign.samplers.gddim import GddimConfig
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.samplers.sa_solver import SaSolverConfig
from rollout.draft_sampler import draft_sampler
from rollout.explore import ExploreConfig

SIX = ExploreConfig()


@pytest.mark.parametrize(
    "sampler",
    [
        FlowSdeConfig(num_steps=10, shift=2.0, guidance_scale=4.5),
        GddimConfig(num_steps=10, shift=2.0, guidance_scale=4.5, eta=0.0, eta_end=0.5),
        SaSolverConfig(num_steps=14, shift=2.0, guidance_scale=4.5, halve_last_level=False),
    ],
)
def test_where_rollouts_add_noise_drafts_follow_the_ode_of_the_same_levels(sampler: Any) -> None:
    assert draft_sampler(sampler, SIX) == EulerOdeConfig(num_steps=6, shift=2.0, guidance_scale=4.5)


def test_the_end_of_the_schedule_is_kept() -> None:
    assert draft_sampler(SaSolverConfig(), SIX) == EulerOdeConfig(num_steps=6, halve_last_level=True)


@pytest.mark.parametrize(
    "sampler",
    [
        EulerOdeConfig(num_steps=10, shift=3.0),
        DpmSolverConfig(num_steps=10, guidance_scale=2.0),
        SaSolverConfig(tau=0.0),
        GddimConfig(num_steps=10, eta=0.0),
    ],
)
def test_a_sampler_without_noise_takes_fewer_steps(sampler: Any) -> None:
    assert draft_sampler(sampler, SIX) == sampler.model_copy(update={"num_steps": 6})


def test_texts_get_a_greater_budget_that_no_head_changes() -> None:
    sampler = EntropyBoundedConfig(gamma=0.1, budget="learned", temperature=0.7)
    drafts = draft_sampler(sampler, ExploreConfig(gamma=5.0))
    assert drafts == EntropyBoundedConfig(gamma=5.0, budget="fixed", temperature=0.7)
    assert draft_sampler(sampler, SIX) == sampler, "then only the precision may differ"
    with pytest.raises(ConfigError, match=r"gamma = 5 is an entropy budget, which sampler.type 'low_confidence'"):
        draft_sampler(LowConfidenceConfig(), ExploreConfig(gamma=5.0))


def test_ones_own_sampler_is_taken_as_it_is_and_must_be_of_the_same_kind() -> None:
    mine = DpmSolverConfig(num_steps=4)
    assert draft_sampler(FlowSdeConfig(), ExploreConfig(sampler=mine)) is mine
    with pytest.raises(ConfigError, match=r"'low_confidence' cannot draw drafts for sampler.type 'flow_sde'"):
        draft_sampler(FlowSdeConfig(), ExploreConfig(sampler=LowConfidenceConfig()))
