"""Drafts dropped early: which, how many, and that one bad draft spoils no other."""

from __future__ import annotations

import typing

import pytest
import torch
from pydantic import ValidationError

from rollout.pruning import PREDICTORS, PruneConfig, X0Spread, survivors


def _estimates(*values: float) -> torch.Tensor:
    """Clean estimates (N, 1, 2, 2) of one value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_spread_is_the_distance_from_the_mean_picture() -> None:
    # Mean 2: distances 2, 1, 0, 3.
    priority_N = X0Spread().priority(_estimates(0.0, 1.0, 2.0, 5.0))
    assert priority_N.tolist() == [2, 1, 0, 3]


def test_spread_is_a_root_mean_square_over_the_latents_numbers() -> None:
    one = torch.tensor([[[3.0, 4.0]]])  # and its mirror: the mean is 0
    assert X0Spread().priority(torch.stack([one, -one])).tolist() == pytest.approx([12.5**0.5] * 2)


def test_what_is_furthest_goes_on_in_the_batchs_order() -> None:
    config = PruneConfig(at_step=1, keep=0.5)
    assert survivors(config, _estimates(0.0, 1.0, 2.0, 5.0)) == [0, 3]
    assert survivors(config, _estimates(5.0, 2.0, 1.0, 0.0)) == [0, 3]
    assert survivors(config, _estimates(1.0, 1.0, 1.0, 1.0)) == [0, 1], "equal ones as they stand"


def test_a_draft_that_is_not_finite_goes_last_and_moves_no_mean() -> None:
    config = PruneConfig(at_step=1, keep=0.6)
    # Without it the mean of 0 1 2 5 is 2, so 0, 1 and 5 go on.
    assert survivors(config, _estimates(torch.nan, 0.0, 1.0, 2.0, 5.0)) == [1, 2, 4]
    assert survivors(config, _estimates(torch.inf, 1.0, torch.nan)) == [0, 1]


@pytest.mark.parametrize(("keep", "count", "kept"), [(0.5, 12, 6), (0.5, 5, 3), (0.01, 8, 1), (0.07, 100, 7)])
def test_the_share_is_rounded_up(keep: float, count: int, kept: int) -> None:
    assert PruneConfig(at_step=1, keep=keep).num_kept(count) == kept


@pytest.mark.parametrize("wrong", [{"keep": 1.0}, {"keep": 0.0}, {"at_step": 0}, {"type": "crystal_ball"}])
def test_what_prunes_nothing_or_everything_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        PruneConfig.model_validate({"at_step": 1, **wrong})


def test_every_predictor_that_can_be_asked_for_is_there() -> None:
    assert set(PREDICTORS) == set(typing.get_args(PruneConfig.model_fields["type"].annotation))
    for predictor in PREDICTORS.values():
        assert predictor().priority(torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))).shape == (5,)
