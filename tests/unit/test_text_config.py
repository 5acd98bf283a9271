"""Configurations of text runs: kinds that do not fit are refused, with what to set instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.config import load_config
from raylign.errors import ConfigError
from services.assembly import evaluation_sampler
from services.config import RunConfig
from services.evaluate import evaluate_target

TEXT = {"model.type": "tiny_text", "model.path": "somewhere", "sampler.type": "entropy_bounded", "algorithm.type": "d1"}


def load(**changes: str) -> RunConfig:
    overrides = {**TEXT, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_config(RunConfig, None, overrides)


def test_a_text_run_is_of_one_kind() -> None:
    config = load()
    assert config.modality == "text"
    assert evaluation_sampler(config) is config.sampler
    assert load_config(RunConfig, None).modality == "image"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler__type": "euler_ode"},
            r"sampler 'euler_ode' cannot draw; set sampler.type to one of: low_confidence",
        ),
        ({"algorithm__type": "nft"}, r"algorithm 'nft' cannot train; set algorithm.type to one of: .*d1"),
        ({"model__type": "sd3"}, r"sampler 'entropy_bounded' cannot draw; set sampler.type to one of: euler_ode"),
        ({"sampler__temperature": "0"}, r"sampler.temperature 0 makes all samples of a prompt equal"),
        ({"sampler__gamma": "-0.1"}, r"sampler.entropy_bounded.gamma: .*greater than or equal to 0"),
        ({"sampler__top_p": "1.5"}, r"top_p: .*less than or equal to 1"),
        ({"sampler__budget": "learned"}, r"model.budget_head = true belong together.*got budget_head = false"),
        ({"model__budget_head": "true"}, r"belong together.*got budget_head = true"),
        ({"eval__gammas": "[-1.0]"}, r"eval.gammas must be at least 0, got -1"),
        (
            {"sampler__type": "left_to_right", "eval__gammas": "[0.1]"},
            r"eval.gammas are entropy budgets, and LeftToRightConfig has none",
        ),
        ({"eval__sampler": '{type = "flow_sde"}'}, r"eval.sampler 'flow_sde' draws pictures"),
        (
            {"sampler__type": "low_confidence", "sampler__num_steps": "6", "sampler__block_length": "2"},
            r"num_steps.*6",
        ),
        ({"sampler__block_length": "3"}, r"block_length.*3.*8"),
        (
            {"model__type": "llada", "model__trust_remote_code": "true", "sampler__cache": "dual"},
            r"keeps no cache, so model.trust_remote_code needs sampler.cache = 'none'",
        ),
        ({"algorithm__type": "just_grpo"}, r"needs rollouts from left to right.*set sampler.type = 'left_to_right'"),
        ({"algorithm__clip": "0.2"}, r"unknown key; did you mean `clip_range`"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_pictures_have_no_text_evaluation() -> None:
    with pytest.raises(ConfigError, match=r"eval.sampler and eval.gammas are for text models"):
        load_config(RunConfig, None, {"eval.gammas": "[0.1]"})


def test_greedy_evaluation_is_a_sampler_of_its_own() -> None:
    config = load(eval__sampler='{type = "low_confidence", temperature = 0, num_steps = 8}')
    assert evaluation_sampler(config).type == "low_confidence"
    assert config.sampler.type == "entropy_bounded"


def test_a_learned_budget_and_its_head_go_together() -> None:
    config = load(model__budget_head="true", sampler__budget="learned", eval__gammas="[0.05, 0.3]")
    assert config.eval.gammas == (0.05, 0.3)
    assert config.learner.budget_lr_scale == 50
    assert load(learner__epochs_per_step="3", learner__updates_per_step="2").learner.num_updates == 6


def test_pictures_of_a_text_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this model writes texts; leave it out"):
        evaluate_target(tmp_path, "quickstart_text", {}, tmp_path / "grid.png")
