"""Which steps are stochastic in which learner step."""

from __future__ import annotations

from collections import Counter

import pytest

from raylign.errors import ConfigError
from raylign.samplers.window import WindowConfig, window_starts, window_steps


def starts(config: WindowConfig, num_steps: int, learner_steps: range) -> list[int]:
    return [window_steps(config, num_steps, 7, step).start for step in learner_steps]


def test_a_fixed_window_stays() -> None:
    config = WindowConfig(strategy="fixed", size=3, first=2)
    assert {window_steps(config, 10, 7, step) for step in (1, 2, 30, 999)} == {range(2, 5)}


def test_mixgrpo_moves_a_window_of_four_on_every_25_learner_steps_and_starts_over() -> None:
    config = WindowConfig()
    # 25 steps, of which the last is left out: the window starts at 0 to 20, 25 learner steps at each.
    places = starts(config, 25, range(1, 2 * 21 * 25 + 1))
    assert places == [place for _ in range(2) for place in range(21) for _ in range(25)]
    assert window_steps(config, 25, 7, 21 * 25) == range(20, 24)


def test_without_roll_back_it_stays_at_the_end() -> None:
    config = WindowConfig(size=2, advance_every=3, roll_back=False)
    assert starts(config, 5, range(1, 13)) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("stride", "places"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (9, [0, 5])]
)
def test_every_step_but_the_last_is_reached_by_any_stride(stride: int, places: list[int]) -> None:
    assert list(window_starts(WindowConfig(size=4, stride=stride), 10)) == places


def test_decay_holds_later_places_for_less_time() -> None:
    # From 20 down to a quarter of it, linearly in start / 8 (8 is the last step reached of 10): 20, int(18.125), ...
    config = WindowConfig(strategy="decay", size=3, advance_every=20)
    places = [place for place, stay in enumerate([20, 18, 16, 14, 12, 10, 8]) for _ in range(stay)]
    assert starts(config, 10, range(1, 2 * len(places) + 1)) == 2 * places
    assert starts(config.model_copy(update={"min_advance": 20}), 10, range(1, 41)) == [0] * 20 + [1] * 20


def test_exponential_decay_begins_where_it_is_told() -> None:
    # ceil(4 exp(-.5 max(0, start - 1))): 4, 4, ceil(2.43) = 3, ceil(1.47) = 2.
    config = WindowConfig(strategy="exp_decay", size=2, advance_every=4, decay_from=1, decay_rate=0.5)
    places = [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2
    assert starts(config, 6, range(1, 14)) == places
    assert starts(config, 6, range(14, 18)) == [0] * 4


def test_a_random_window_falls_anywhere_between_its_bounds() -> None:
    # Flow-GRPO-Fast: three steps, somewhere in the first half of ten.
    config = WindowConfig(strategy="random", size=3, last=4)
    drawn = Counter(starts(config, 10, range(1, 301)))
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.values()) > 70  # 100 expected; five standard deviations are 41
    assert window_steps(config, 10, 7, 1).stop <= 5


def test_a_random_window_is_a_function_of_seed_and_learner_step() -> None:
    config = WindowConfig(strategy="random", size=1)
    first = starts(config, 50, range(1, 60))
    assert starts(config, 50, range(1, 60)) == first
    assert [window_steps(config, 50, 8, step).start for step in range(1, 60)] != first
    assert window_steps(config, 50, 7, 30).start == first[29]


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [({"size": 10}, 10), ({"size": 4, "first": 6}, 10), ({"size": 3, "last": 1}, 10), ({"last": 10}, 10), ({}, 4)],
)
def test_a_window_that_does_not_fit_is_refused(changes: dict[str, int], num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"does not fit between steps .* of {num_steps} .*change window\.size"):
        window_starts(WindowConfig.model_validate(changes), num_steps)


def test_the_last_step_is_in_reach_if_asked_for() -> None:
    assert window_steps(WindowConfig(strategy="fixed", size=10, last=9), 10, 7, 1) == range(10)


@pytest.mark.parametrize("strategy", ["fixed", "random", "progressive", "decay", "exp_decay"])
def test_the_only_place_is_held_by_every_strategy(strategy: str) -> None:
    config = WindowConfig.model_validate({"strategy": strategy, "size": 1})
    assert {window_steps(config, 2, 7, step) for step in (1, 2, 26, 1000)} == {range(1)}
