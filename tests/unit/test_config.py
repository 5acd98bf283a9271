"""Configurations: mistyped keys name the nearest one, impossible pairs name the remedy, overrides parse as TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.algorithms.flow_grpo import FlowGrpoConfig
from learner.algorithms.nft import NftConfig
from raylign.assets import find_config, resolve
from raylign.config import load_config
from raylign.errors import ConfigError
from services.cli import parse_overrides, split_config, split_configs
from services.config import RunConfig, load_run_config


def _load(**overrides: str) -> RunConfig:
    return load_config(RunConfig, None, {key.replace("__", "."): value for key, value in overrides.items()})


def test_the_default_run_needs_no_value() -> None:
    config = _load()
    assert config.algorithm.type == "nft"
    assert config.chunk_size == config.micro_batch_size == config.group_size


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("num_step", "num_steps"),
        ("learner__lrr", "lr"),
        ("sampler__num_step", "num_steps"),
        ("algorithm__bta", "beta"),
        ("model__lora__rnk", "rank"),
        ("rollout__num_actor", "num_actors"),
    ],
)
def test_a_mistyped_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key; did you mean `{near}`"):
        _load(**{key: "1"})


def test_a_mistyped_type_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'flow_grpo'"):
        _load(algorithm__type="flow_grop")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"algorithm__type": "flow_grpo"}, "set sampler.type = 'flow_sde'"),
        ({"group_size": "1"}, "greater than or equal to 2"),
        ({"group_size": "6", "rollout__chunk_size": "4"}, "multiple or a divisor of group_size 6"),
        (
            {"group_size": "4", "groups_per_step": "3", "rollout__chunk_size": "8"},
            "groups_per_step 3 must be a multiple",
        ),
        ({"learner__updates_per_step": "5"}, "96 samples do not divide"),
        ({"learner__num_ranks": "7"}, "96 samples do not divide"),
        (
            {
                "algorithm__type": "flow_grpo",
                "sampler__type": "flow_sde",
                "rollout__chunk_size": "96",
                "learner__updates_per_step": "2",
            },
            "lower rollout.chunk_size",
        ),
        ({"placement": "in_process", "max_staleness": "1"}, "max_staleness must be 0"),
        ({"placement": "in_process", "learner__num_ranks": "2"}, "one learner rank"),
        ({"placement": "colocated", "rollout__num_actors": "2"}, "must be equal, got 2 and 1"),
        ({"placement": "colocated", "rollout__num_actors": "1", "max_staleness": "2"}, "use placement = 'separate'"),
        ({"placement": "colocated", "rollout__num_actors": "1", "rollout__max_actors": "2"}, "their number is fixed"),
        ({"learner__lr": "nan"}, "learner.lr"),
        ({"learner__lr": "-1"}, "greater than 0 .got -1"),
        ({"placement": "nearby"}, "placement"),
    ],
)
def test_impossible_pairs_say_what_to_do(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(**overrides)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        _load(num_step="3", learner__lr="0")
    assert "2 problem(s)" in str(raised.value)


def test_overrides_reach_lists_and_keep_text_that_is_no_toml() -> None:
    config = load_run_config(
        "quickstart_image",
        parse_overrides(["--rewards.0.weight", "2.5", "--model.path=/models/sd3", "--num-steps", "7"]),
    )
    assert (config.rewards[0].weight, config.model.path, config.num_steps) == (2.5, "/models/sd3", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["learner.lr"], "unexpected argument"), (["--learner.lr"], "needs a value")],
)
def test_overrides_without_key_or_value_are_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(arguments)


def test_overrides_may_follow_a_command_without_a_configuration() -> None:
    assert split_config("--num_steps", "quickstart_image", ["3"]) == ("quickstart_image", {"num_steps": "3"})
    assert split_config("mine.toml", "quickstart_image", ["--seed=1"]) == ("mine.toml", {"seed": "1"})


def test_a_command_may_take_several_configurations() -> None:
    assert split_configs("a", "d", ["b", "c.toml", "--seed", "1"]) == (["a", "b", "c.toml"], {"seed": "1"})
    assert split_configs("a", "d", []) == (["a"], {})
    assert split_configs("--seed", "d", ["1"]) == (["d"], {"seed": "1"})
    with pytest.raises(ConfigError, match="unexpected argument 'b'"):
        split_configs("a", "d", ["--seed", "1", "b"])


def test_a_later_file_is_laid_over_the_earlier(tmp_path: Path) -> None:
    task, preset = tmp_path / "task.toml", tmp_path / "preset.toml"
    task.write_text(
        "seed = 3\n[algorithm]\ntype = 'nft'\nbeta = 0.5\n[learner]\nlr = 1e-3\nwarmup_steps = 4\n"
        "[[rewards]]\ntype = 'ocr'\nweight = 2.0\n"
    )
    preset.write_text("[algorithm]\ntype = 'nft'\nadv_clip = 1.0\n[learner]\nlr = 1e-5\n")
    config = load_run_config([str(task), str(preset)], {"learner.warmup_steps": "5"})
    assert (config.seed, config.learner.lr, config.learner.warmup_steps, config.rewards[0].weight) == (3, 1e-5, 5, 2.0)
    assert isinstance(config.algorithm, NftConfig)
    assert (config.algorithm.beta, config.algorithm.adv_clip) == (0.5, 1.0)
    preset.write_text("[algorithm]\ntype = 'flow_grpo'\nclip_range = 1e-3\n[sampler]\ntype = 'flow_sde'\n")
    other = load_run_config([str(task), str(preset)]).algorithm
    assert isinstance(other, FlowGrpoConfig)
    with pytest.raises(ConfigError, match=r"task\.toml \+ .*preset\.toml has 1 problem"):
        load_run_config([str(task), str(preset)], {"learner.lr": "0"})


def test_overrides_that_lead_through_a_value_or_a_missing_item_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\n[[rewards]]\ntype = 'ocr'\n")
    with pytest.raises(ConfigError, match="seed is the value 3, not a table"):
        load_config(RunConfig, path, {"seed.x": "1"})
    with pytest.raises(ConfigError, match="no index of a list of 1"):
        load_config(RunConfig, path, {"rewards.1.weight": "1"})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(RunConfig, broken)
    with pytest.raises(ConfigError, match=r"shipped: .*quickstart_image"):
        find_config("quickstart_imag")
    with pytest.raises(ConfigError, match="Raylign ships no 'asset:glyph'"):
        resolve("asset:glyph")


def test_adapters_fold_only_where_no_log_prob_is_needed() -> None:
    assert _load().fold_lora
    assert not _load(algorithm__type="flow_grpo", sampler__type="flow_sde").fold_lora
    assert not _load(rollout__fold_lora="false").fold_lora
