"""What may change in a run's configuration when it goes on: the difference, what is let pass, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.checkpoint import CheckpointManifest
from raylign.config import Config, covers, difference, leaves, parse_config, with_overrides
from raylign.errors import CheckpointError, ConfigError, RunDirError
from services.config import RunConfig
from services.config_changes import (
    FIXED,
    NEUTRAL,
    changes_since,
    check_allowed,
    kept_policies,
    note_changes,
    read_changes,
    read_made_with,
    refuse_fixed,
    refuse_new_policies,
    refuse_others,
)
from services.run_checkpoints import run_record
from services.run_dir import RunDir
from services.run_inputs import RunInputs

INPUTS = {"prompts.train": "a" * 64, "model.path": "b" * 64}


class _Table(Config):
    lr: float = 1e-3
    names: tuple[str, ...] = ()


class _Whole(Config):
    seed: int = 0
    limit: int | None = None
    table: _Table = _Table()
    many: tuple[_Table, ...] = ()


def config(**overrides: str) -> RunConfig:
    return with_overrides(RunConfig(), {key.replace("__", "."): value for key, value in overrides.items()})


def manifest(made_with: RunConfig, step: int = 4) -> CheckpointManifest:
    record = {"step": step, **run_record(made_with, RunInputs([], [], INPUTS))}
    return CheckpointManifest(Path(f"step_{step}"), step, str(record["config_sha256"]), record, {}, {}, "c" * 64)


def test_equal_configurations_differ_in_nothing() -> None:
    assert difference(_Whole(), _Whole()) == {}


def test_the_difference_names_leaves_with_both_values() -> None:
    old = _Whole(seed=1, table=_Table(names=("a",)), many=(_Table(), _Table()))
    new = _Whole(seed=2, limit=3, table=_Table(lr=2e-3, names=("a", "b")), many=(_Table(lr=5.0),))
    assert difference(old, new) == {
        "seed": (1, 2),
        "limit": (None, 3),
        "table.lr": (1e-3, 2e-3),
        "table.names": (["a"], ["a", "b"]),
        "many.0.lr": (1e-3, 5.0),
        "many.1.lr": (1e-3, None),
        "many.1.names": ([], None),
    }


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("learner.lr", "learner.lr", True),
        ("learner", "learner.lr", True),
        ("learner.l", "learner.lr", False),
        ("learner.lr.x", "learner.lr", False),
        ("rewards.0", "rewards.0.weight", True),
        ("a.*.b", "a.ocr.b", True),
        ("a.*.b", "a.b", False),
    ],
)
def test_a_name_covers_itself_and_what_is_in_its_table(name: str, key: str, expected: bool) -> None:
    assert covers(name, key) == expected


def test_overrides_are_set_over_a_whole_configuration() -> None:
    changed = config(learner__lr="1e-4", rewards__0__weight="2", seed="3")
    assert (changed.learner.lr, changed.rewards[0].weight, changed.seed) == (1e-4, 2.0, 3)
    assert set(difference(RunConfig(), changed)) == {"learner.lr", "rewards.0.weight", "seed"}


def test_a_table_of_another_type_begins_anew_whatever_the_order_of_keys() -> None:
    changed = config(algorithm__beta="0.5", algorithm__type="crd")
    assert changed.algorithm == parse_config(RunConfig, {"algorithm": {"type": "crd", "beta": 0.5}}, "").algorithm
    assert config(algorithm__type="nft", algorithm__beta="0.5").algorithm.beta == 0.5  # type: ignore[union-attr]
    assert with_overrides(changed, {"algorithm.type": "crd"}) == changed, "the same type keeps what was set"


def test_a_wrong_override_is_refused_as_in_a_file() -> None:
    with pytest.raises(ConfigError, match="did you mean `lr`"):
        config(learner__lrr="1")


def test_every_exception_is_a_key_and_has_its_reason() -> None:
    known = leaves(
        parse_config(
            RunConfig,
            {
                "model": {"lora": {"start": "asset:x"}},
                "reward_service": {
                    "per_reward": {"ocr": {"num_replicas": 2, "num_cpus_per_replica": 1}},
                    "cache": {"type": "none"},
                },
            },
            "",
        )
    )
    text = leaves(parse_config(RunConfig, _TEXT, ""))
    optional = {
        "rollout.min_actors",
        "rollout.max_actors",
        "reward_service.autoscaling",
        "reward_service.per_reward.*.autoscaling",
    }
    for table in (NEUTRAL, FIXED):
        assert [name for name in table if not any(covers(name, key) for key in known | text)] == [
            name for name in table if name in optional
        ]
        assert all(table.values())


_TEXT = {
    "model": {"type": "tiny_text"},
    "sampler": {"type": "entropy_bounded"},
    "algorithm": {"type": "diffpo"},
    "rewards": [{"type": "exact_answer"}],
}


def test_a_checkpoint_knows_the_configuration_it_was_made_with() -> None:
    made_with = config(learner__lr="1e-4", rollout__num_actors="3")
    assert read_made_with(manifest(made_with)) == made_with


def test_a_checkpoint_without_a_configuration_is_refused() -> None:
    bare = CheckpointManifest(Path("step_4"), 4, "", {"step": 4, "config_sha256": ""}, {}, {}, "")
    with pytest.raises(CheckpointError, match="does not hold the configuration"):
        read_made_with(bare)


def test_a_key_that_came_later_with_a_default_is_no_change() -> None:
    old = manifest(RunConfig())
    made_with = old.record["config"]
    assert isinstance(made_with, dict)
    assert made_with.pop("max_refused_steps") == 3
    older = CheckpointManifest(old.path, 4, "", {**old.record, "config": made_with}, {}, {}, "")
    assert changes_since(older, RunConfig(), INPUTS) == {}


def test_changed_contents_of_a_prompt_file_are_a_change_of_its_key() -> None:
    changes = changes_since(manifest(RunConfig()), RunConfig(), {**INPUTS, "prompts.train": "d" * 64})
    assert changes == {"prompts.train": ("contents aaaaaaaaaaaa..", "contents dddddddddddd..")}


def test_what_changes_results_is_refused_key_by_key(tmp_path: Path) -> None:
    made_with = manifest(RunConfig())
    new = config(learner__lr="1e-4", sampler__num_steps="7", rollout__num_actors="5")
    with pytest.raises(CheckpointError) as caught:
        refuse_others(changes_since(made_with, new, INPUTS), [], made_with, RunDir(tmp_path))
    message = str(caught.value)
    assert "learner.lr: was 0.0003, is 0.0001" in message
    assert f"sampler.num_steps: was {RunConfig().sampler.num_steps}, is 7" in message  # type: ignore[union-attr]
    assert "--allow-config-change sampler.num_steps --allow-config-change learner.lr" in message
    assert "num_actors" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_steps": "200"},
        {"rollout__num_actors": "7"},
        {"checkpoint__every_steps": "1", "checkpoint__keep": "9"},
        {"eval__every_steps": "3"},
        {"reward_service__num_replicas": "4"},
        {"reward_service__cache__type": "none"},
        {"learner__publish": "delta"},
    ],
)
def test_what_changes_no_result_passes(tmp_path: Path, overrides: dict[str, str]) -> None:
    made_with = manifest(RunConfig())
    changes = changes_since(made_with, config(**overrides), INPUTS)
    assert changes
    refuse_others(changes, [], made_with, RunDir(tmp_path))


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": "1"},
        {"learner__num_ranks": "2"},
        {"learner__num_threads": "2"},
        {"rollout__chunk_size": "6"},
        {"eval__samples_per_prompt": "3"},
        {"rollout__precision": "bf16"},
        {"max_failed_fraction": "0.9"},
        {"max_staleness": "1"},
        {"placement": "in_process"},
    ],
)
def test_what_could_change_a_result_must_be_allowed_by_name_or_table(tmp_path: Path, overrides: dict[str, str]) -> None:
    made_with = manifest(RunConfig())
    changes = changes_since(made_with, config(**overrides), INPUTS)
    with pytest.raises(CheckpointError, match="cannot go on exactly"):
        refuse_others(changes, ["learner.lr", "prompts"], made_with, RunDir(tmp_path))
    refuse_others(changes, list(changes), made_with, RunDir(tmp_path))
    refuse_others(changes, [key.partition(".")[0] for key in changes], made_with, RunDir(tmp_path))


def test_what_was_allowed_once_at_a_step_needs_no_second_word_there(tmp_path: Path) -> None:
    folder, made_with = RunDir(tmp_path), manifest(RunConfig(), step=4)
    changes = changes_since(made_with, config(learner__lr="1e-4"), INPUTS)
    note_changes(folder, 4, changes)
    refuse_others(changes, [], made_with, folder)
    others = changes_since(made_with, config(learner__lr="2e-4"), INPUTS)
    with pytest.raises(CheckpointError):
        refuse_others(others, [], made_with, folder)
    with pytest.raises(CheckpointError):
        refuse_others(changes, [], manifest(RunConfig(), step=6), folder)


def test_the_record_of_changes_ends_where_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    note_changes(folder, 4, {})
    assert list(tmp_path.iterdir()) == []
    for step, lr in ((4, 1e-4), (6, 2e-4), (8, 3e-4)):
        note_changes(folder, step, {"learner.lr": (None, lr)})
    assert [one["step"] for one in read_changes(folder)] == [4, 6, 8]
    note_changes(folder, 6, {"seed": (0, 1)})
    assert read_changes(folder) == [
        {"step": 4, "changed": {"learner.lr": [None, 1e-4]}},
        {"step": 6, "changed": {"seed": [0, 1]}},
    ]
    note_changes(folder, 6, {})
    assert [one["step"] for one in read_changes(folder)] == [4]


def test_a_broken_record_of_changes_is_named(tmp_path: Path) -> None:
    (tmp_path / "config_changes.json").write_text("[")
    with pytest.raises(RunDirError, match=r"config_changes\.json is not JSON"):
        read_changes(RunDir(tmp_path))


def test_a_name_that_is_no_key_is_refused_with_the_nearest() -> None:
    check_allowed(["learner", "learner.lr", "rewards.0"], RunConfig(), RunConfig())
    with pytest.raises(ConfigError, match=r"learner\.ler: no such key is set; did you mean `learner\.lr`"):
        check_allowed(["learner.ler"], RunConfig(), RunConfig())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"model__lora__rank": "4"}, r"model\.lora\.rank: was 32, is 4: adapters of another rank"),
        ({"model__tuning": "full"}, r"model\.tuning: was \"lora\", is \"full\""),
        ({"model__lora__targets": '["attn.to_q"]'}, r"model\.lora\.targets"),
    ],
)
def test_what_the_weights_do_not_fit_is_refused_with_the_reason(overrides: dict[str, str], told: str) -> None:
    new = config(**overrides)
    with pytest.raises(ConfigError, match=told):
        refuse_fixed(difference(RunConfig(), new), new)


def test_an_adapters_keys_are_free_where_there_is_none() -> None:
    old = config(model__tuning="full")
    new = with_overrides(old, {"model.lora.rank": "4", "learner.lr": "1e-4"})
    refuse_fixed(difference(old, new), new)


def test_a_policy_that_was_never_kept_cannot_be_gone_on_with() -> None:
    assert kept_policies(config(algorithm__type="crd", learner__ema_decay="0.9")) == [
        "old",
        "sampling",
        "reference",
        "average",
    ]
    with pytest.raises(CheckpointError, match=r"keeps the policy 'sampling', which this run never had; `raylign fork`"):
        refuse_new_policies(RunConfig(), config(algorithm__type="crd"))
    with pytest.raises(CheckpointError, match="'average'"):
        refuse_new_policies(RunConfig(), config(learner__ema_decay="0.9"))
    refuse_new_policies(config(learner__ema_decay="0.9"), RunConfig())
