"""What a run on pictures must hold together is refused when its configuration is read, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from services.config import RunConfig

SDE = {"type": "flow_sde"}
WINDOW = {"strategy": "random", "size": 3, "last": 4}


def run(algorithm: dict[str, Any], sampler: dict[str, Any], **options: Any) -> RunConfig:
    return RunConfig.model_validate({"algorithm": algorithm, "sampler": sampler, **options})


@pytest.mark.parametrize(
    ("algorithm", "sampler"),
    [
        ({"type": "flow_grpo"}, SDE),
        ({"type": "flow_grpo"}, SDE | {"guidance_scale": 4.5}),
        ({"type": "flow_grpo", "kl_space": "velocity_mse"}, {"type": "gddim"}),
        ({"type": "flow_grpo", "kl_space": "exact_gaussian"}, {"type": "cps"}),
        ({"type": "flow_grpo", "kl_weight": 0.0}, {"type": "cps"}),
        ({"type": "flow_grpo_fast"}, {"type": "cps", "window": WINDOW}),
        ({"type": "grpo_guard"}, SDE),
        ({"type": "grpo_guard"}, {"type": "cps", "density": "gaussian"}),
        ({"type": "mix_grpo"}, SDE | {"num_steps": 25, "window": {}, "shared_noise": True}),
        ({"type": "dance_grpo", "train_best_worst": 12}, {"type": "dance_sde", "shared_noise": True}),
        ({"type": "ddpo"}, {"type": "gddim", "num_steps": 50, "guidance_scale": 5.0}),
    ],
)
def test_published_settings_pass(algorithm: dict[str, Any], sampler: dict[str, Any]) -> None:
    config = run(algorithm, sampler)
    assert config.algorithm.type == algorithm["type"]
    assert config.sampler.type == sampler["type"]


@pytest.mark.parametrize(
    ("algorithm", "sampler", "message"),
    [
        # A log-prob asked of a deterministic step, or of one that looks back.
        ("flow_grpo", {"type": "euler_ode"}, "set sampler.type = 'flow_sde'"),
        ("flow_grpo", {"type": "dpm_solver"}, "set sampler.type = 'flow_sde'"),
        ("dance_grpo", {"type": "euler_ode"}, "set sampler.type = 'dance_sde'"),
        ("ddpo", {"type": "gddim", "eta": 0.0}, r"sampler\.eta above 0 only; raise it"),
        ("ddpo", {"type": "gddim", "eta": -0.5}, "stochasticity cannot be negative"),
        # A window is what these train.
        ("flow_grpo_fast", {"type": "cps", "num_steps": 10}, "strategy = 'random', size = 3, last = 4"),
        ("mix_grpo", SDE | {"shared_noise": True}, "the sampler has no window"),
        ("mix_grpo", SDE | {"window": {}}, "sampler.shared_noise = true"),
        ("dance_grpo", {"type": "dance_sde"}, "set sampler.shared_noise = true"),
        # Spaces and densities that do not go together.
        ("flow_grpo", {"type": "cps"}, "set algorithm.kl_space = 'exact_gaussian'"),
        ("flow_grpo", {"type": "gddim"}, "set algorithm.kl_space = 'exact_gaussian'"),
        ("grpo_guard", {"type": "cps"}, "set sampler.density = 'gaussian'"),
        # Windows that leave nothing to train: the last of 10 steps is never trained.
        (
            "flow_grpo",
            SDE | {"num_steps": 10, "window": {"strategy": "fixed", "size": 1, "first": 9, "last": 9}},
            r"these can: \[0, 1, 2, 3, 4, 5, 6, 7, 8\]. Change sampler.window",
        ),
        (
            "flow_grpo",
            SDE | {"num_steps": 10, "window": {"size": 2, "last": 9}},
            None,  # one of the two is left in the last place
        ),
        (
            "flow_grpo",
            SDE | {"num_steps": 10, "window": {"size": 11}},
            "a window of 11 steps does not fit",
        ),
        # Guidance with a recipe that trains without.
        ("nft", {"type": "euler_ode", "guidance_scale": 4.5}, "Leave it at 1"),
    ],
)
def test_rollouts_that_an_algorithm_cannot_learn_from_are_refused(
    algorithm: str, sampler: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert run({"type": algorithm}, sampler).algorithm.type == algorithm
        return
    with pytest.raises(ValueError, match=message):
        run({"type": algorithm}, sampler)


def test_more_steps_than_the_narrowest_place_of_the_window_has_are_refused() -> None:
    sampler = SDE | {"num_steps": 10, "window": {"size": 3, "last": 9}}
    assert run({"type": "flow_grpo", "num_train_steps": 2}, sampler)
    with pytest.raises(ValueError, match=r"algorithm\.num_train_steps is 3, but only 2 sampler steps"):
        run({"type": "flow_grpo", "num_train_steps": 3}, sampler)


def test_a_group_must_hold_the_siblings_that_are_chosen_from_it() -> None:
    algorithm = {"type": "dance_grpo", "train_best_worst": 8}
    sampler = {"type": "dance_sde", "shared_noise": True}
    assert run(algorithm, sampler, group_size=8)
    with pytest.raises(ValueError, match=r"8 siblings cannot be chosen from groups of 6; lower it or raise group_size"):
        run(algorithm, sampler, group_size=6)
    with pytest.raises(ValueError, match="multiple of 2"):
        run(algorithm | {"train_best_worst": 3}, sampler)


def test_samples_and_updates_that_a_method_has_no_means_against_are_refused() -> None:
    assert run({"type": "grpo_guard"}, SDE, learner={"updates_per_step": 2})
    with pytest.raises(
        ValueError, match=r"staleness_correction = 'decoupled' .*algorithm.type = 'nft', 'awm' or 'crd'"
    ):
        run({"type": "flow_grpo"}, SDE, max_staleness=1)
    assert run({"type": "flow_grpo", "staleness_correction": "clip"}, SDE, max_staleness=1)
    for plain in ({"type": "grpo_guard"}, {"type": "grpo_guard", "staleness_correction": "clip"}):
        with pytest.raises(ValueError, match=r"max_staleness = 1 samples are older policies'; set it to 0"):
            run(plain, SDE, max_staleness=1)
    assert run({"type": "grpo_guard", "staleness_correction": "decoupled"}, SDE, max_staleness=1)
    reinforce = {"type": "ddpo", "variant": "reinforce"}
    assert run(reinforce, {"type": "gddim"})
    for learner in ({"updates_per_step": 2}, {"epochs_per_step": 2}):
        with pytest.raises(ValueError, match=r"only the first of 2 updates per step is on policy"):
            run(reinforce, {"type": "gddim"}, learner=learner)
    with pytest.raises(ValueError, match=r"'reinforce' has no ratio to clip.*staleness_correction = 'decoupled'"):
        run(reinforce | {"staleness_correction": "clip"}, {"type": "gddim"}, max_staleness=1)
    assert run(reinforce | {"staleness_correction": "decoupled"}, {"type": "gddim"}, max_staleness=1)


@pytest.mark.parametrize(
    ("algorithm", "fits"),
    [
        ({"type": "flow_grpo", "clip_range": 1e-4}, True),
        ({"type": "flow_grpo", "clip_range": 5e-5}, False),
        ({"type": "grpo_guard"}, False),
        ({"type": "grpo_guard", "clip_range": 1e-3}, True),
        ({"type": "ddpo", "clip_range": 1e-5, "kl_space": "velocity_mse"}, False),
        ({"type": "ddpo", "clip_range": 1e-5, "variant": "reinforce"}, True),
    ],
)
def test_bf16_latents_need_a_clip_range_above_their_error(algorithm: dict[str, Any], fits: bool) -> None:
    rollout = {"latents": "bf16"}
    assert run(algorithm, SDE)
    if fits:
        assert run(algorithm, SDE, rollout=rollout).rollout.latents == "bf16"
        return
    with pytest.raises(ValueError, match="use fp32 latents or a wider clip range"):
        run(algorithm, SDE, rollout=rollout)
