"""What exploration must hold together is refused when the configuration is read, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from raylign.errors import ConfigError
from rollout.draft_sampler import draft_sampler
from services.config import RunConfig

ODE = {"type": "euler_ode", "num_steps": 10}
SDE = {"type": "flow_sde", "num_steps": 10}
DANCE = {"type": "dance_sde", "num_steps": 10, "shared_noise": True}
TEXT = {
    "model": {"type": "tiny_text"},
    "sampler": {"type": "entropy_bounded", "gamma": 0.1},
    "algorithm": {"type": "d1"},
}


def run(explore: dict[str, Any], **options: Any) -> RunConfig:
    """A run of groups of 12 that explores 24 drafts of 4 steps unless told otherwise."""
    settings: dict[str, Any] = {"sampler": ODE, "group_size": 12, **options}
    rollout = {**settings.pop("rollout", {}), "explore": {"pool_size": 24, **explore}}
    return RunConfig.model_validate({**settings, "rollout": rollout})


@pytest.mark.parametrize(
    ("explore", "options"),
    [
        ({}, {}),
        ({"pool_size": 12}, {}),
        ({"num_steps": 10, "precision": "nvfp4"}, {}),
        ({"sampler": {"type": "dpm_solver", "num_steps": 4}}, {}),
        ({"chunk_size": 24}, {"rollout": {"chunk_size": 4}}),
        ({}, {"sampler": SDE, "algorithm": {"type": "flow_grpo"}}),
        ({}, {"max_staleness": 2}),
        # Noise of the very same steps is keyed alike, so such drafts may add it, and siblings may share the first one.
        ({"sampler": SDE}, {"sampler": SDE, "algorithm": {"type": "flow_grpo"}}),
        ({"sampler": DANCE}, {"sampler": DANCE, "algorithm": {"type": "dance_grpo", "train_best_worst": 6}}),
        ({"regenerate": False}, {"sampler": DANCE, "algorithm": {"type": "dance_grpo"}}),
        ({"regenerate": False}, {"sampler": SDE, "algorithm": {"type": "flow_grpo"}}),
        ({"prune": {"at_step": 2, "keep": 0.5}}, {}),
        ({"gamma": 1.0}, TEXT),
        ({"sampler": {"type": "low_confidence", "num_steps": 2}}, TEXT),
    ],
)
def test_what_fits_passes(explore: dict[str, Any], options: dict[str, Any]) -> None:
    config = run(explore, **options)
    assert config.rollout.explore is not None
    # The resolved file of a run names every key, so it must parse as well.
    assert RunConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("explore", "options", "message"),
    [
        ({"pool_size": 8}, {}, r"group_size 12 samples cannot be selected among .*pool_size = 8.*raise pool_size"),
        ({"num_steps": 11}, {}, r"drafts of 11 steps cost more than .*sampler.num_steps = 10.*lower rollout.explore"),
        ({}, {"rollout": {"chunk_size": 24}, "groups_per_step": 8}, "set chunk_size to 12 or a divisor of it"),
        ({"chunk_size": 5}, {}, r"rollout.explore.chunk_size 5 does not divide .*pool_size = 24"),
        ({"pool_size": 20}, {"rollout": {"chunk_size": 12}}, "rollout.chunk_size 12 does not divide"),
        # Noise that the second drawing does not have, or that is all there is.
        ({"sampler": SDE | {"num_steps": 4}}, {}, "'flow_sde' adds noise on the way.*take 'euler_ode'"),
        (
            {"sampler": SDE | {"num_steps": 4}},
            {"sampler": SDE, "algorithm": {"type": "flow_grpo"}},
            "not the noise of the same keys drawn again",
        ),
        ({"sampler": {"type": "sa_solver", "num_steps": 6}}, {}, "'sa_solver' adds noise on the way"),
        ({}, {"sampler": DANCE, "algorithm": {"type": "dance_grpo"}}, "sampler.shared_noise.*set it to false"),
        # Keys of the other modality, or of drafts where there are none.
        ({"gamma": 1.0}, {}, "pictures have no entropy budget; remove rollout.explore.gamma"),
        ({"sampler": {"type": "low_confidence"}}, {}, "one is of pictures, the other of texts"),
        ({"sampler": ODE}, TEXT, "one is of pictures, the other of texts"),
        ({"num_steps": 4}, TEXT, "texts take the calls that their sampler needs; remove rollout.explore.num_steps"),
        ({"prune": {"at_step": 1}}, TEXT, "remove rollout.explore.prune"),
        (
            {"regenerate": False, "num_steps": 4, "precision": "bf16", "chunk_size": 6},
            {},
            "remove rollout.explore.num_steps, rollout.explore.precision, rollout.explore.chunk_size",
        ),
        ({"num_steps": 3, "sampler": ODE | {"num_steps": 4}}, {}, "both say how many steps a draft takes"),
        # Texts.
        ({"gamma": 1.0}, TEXT | {"sampler": {"type": "low_confidence"}}, "set sampler.type = 'entropy_bounded'"),
        ({"gamma": 1.0, "sampler": {"type": "entropy_bounded"}}, TEXT, "set rollout.explore.sampler.gamma instead"),
        ({"sampler": {"type": "low_confidence", "temperature": 0}}, TEXT, "makes all drafts of a prompt equal"),
        ({"sampler": {"type": "entropy_bounded", "budget": "learned"}}, TEXT, "set budget to 'fixed'"),
        # Pruning that leaves too few, or nothing to save.
        (
            {"prune": {"at_step": 2, "keep": 0.25}},
            {},
            "keeps 6 of 24 drafts, fewer than group_size 12; raise prune.keep",
        ),
        ({"prune": {"at_step": 6}}, {}, "leaves nothing to save of drafts of 6 steps; lower it"),
        ({"select": "luck"}, {}, "Input should be 'best_worst'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(
    explore: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        run(explore, **options)


def test_drafts_of_noisy_rollouts_follow_the_ode_on_the_same_levels() -> None:
    config = run({"num_steps": 4}, sampler=SDE | {"shift": 2.0}, algorithm={"type": "flow_grpo"})
    assert config.rollout.explore is not None
    drafts: Any = draft_sampler(config.sampler, config.rollout.explore)
    assert (drafts.type, drafts.num_steps, drafts.shift) == ("euler_ode", 4, 2.0)
