"""`raylign plan`'s arithmetic: how a step is cut, how its time is composed, what fits, and what it prints."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from learner.batching import StepData, cut
from raylign.config import with_overrides
from raylign.models import load_policy
from raylign.models.tiny_text import TinyTextConfig
from raylign.types import Advantage, Needs, RolloutGroup
from services.cli import app
from services.config import RunConfig, load_run_config
from services.plan.batches import step_batches
from services.plan.build import Plan, as_json, make_plan
from services.plan.memory import GIB, MIB, Part, Role, payload_bytes
from services.plan.samples import group_bytes, load_groups, save_groups
from services.plan.show import print_plan, size
from services.plan.sizes import model_sizes
from services.plan.timing import RAY_CALL_S, STORE_BYTES_PER_S, StepTime, UnitTimes, step_time
from services.plan.verdict import fits
from services.run_inputs import with_absolute_paths
from tests.text_groups import draw_text_groups
from tests.tiny_models import ToyPolicy, draw_groups, euler, flow_sde
from tests.tiny_text_models import text_config


def planned(name: str, gpu_gib: float | None = None, **overrides: str) -> Plan:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    config = with_absolute_paths(load_run_config(name, keys))
    return make_plan(config, 10, probe=False, gpu_gib=gpu_gib, told=lambda _: None)


@pytest.mark.parametrize(
    ("updates", "ranks", "micro"), [(1, 1, None), (4, 1, None), (2, 2, 5), (1, 3, 12), (4, 2, 12), (1, 1, 96)]
)
def test_a_step_is_cut_as_the_learner_cuts_it(updates: int, ranks: int, micro: int | None) -> None:
    keys = {"learner.updates_per_step": str(updates), "learner.num_ranks": str(ranks)}
    keys |= {} if micro is None else {"learner.micro_batch_size": str(micro)}
    config = load_run_config("quickstart_image", keys)
    planned = step_batches(config, 0)
    (drawn,) = draw_groups(ToyPolicy(), euler(), Needs.FINAL, num_groups=1, group_size=config.group_size)
    groups = [replace(drawn, sequence=place) for place in range(config.groups_per_step)]
    credit = [_credit(group) for group in groups]
    items = [torch.zeros(group.group_size, planned.items_per_sample, dtype=torch.int64) for group in groups]
    shares = [torch.ones(group.group_size) for group in groups]
    data = StepData(groups, credit, items, shares, config.algorithm.needs)
    by_rank = [
        cut(
            data,
            num_epochs=config.learner.epochs_per_step,
            num_updates=updates,
            rank=rank,
            num_ranks=ranks,
            micro_batch_size=config.micro_batch_size,
        )
        for rank in range(ranks)
    ]
    assert planned.updates == len(by_rank[0])
    assert planned.blocks_per_share == max(len(batch.blocks) for batches in by_rank for batch in batches)
    assert planned.rows_per_share == max(sum(map(len, b.blocks)) for batches in by_rank for b in batches)
    passes = max(sum(1 for batch in batches for _ in batch.micro_batches()) for batches in by_rank)
    assert planned.backward_passes == passes


def _credit(group: RolloutGroup) -> Advantage:
    return Advantage(torch.ones(group.group_size), torch.ones(group.group_size, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "preset", "items", "calls"),
    [
        ("quickstart_image", None, 2, 6),
        ("quickstart_image", "flow_grpo", 5, 6),
        ("quickstart_shapes", "nft", 2, 6),
        ("quickstart_text", None, 1, 8),
    ],
)
def test_work_is_counted_without_a_model(name: str, preset: str | None, items: int, calls: int) -> None:
    config = load_run_config([name] if preset is None else [name, preset])
    batches = step_batches(config, 10)
    assert batches.items_per_sample == items
    assert batches.calls_per_sample == calls
    assert batches.nfe == batches.samples * calls
    assert batches.bounded == (name == "quickstart_text"), "a text may need fewer calls"


def test_drafts_are_counted_with_the_rollouts_they_choose() -> None:
    batches = step_batches(load_run_config(["quickstart_image", "explore"]), 10)
    assert batches.drafts > batches.samples
    assert batches.nfe == batches.drafts * batches.draft_calls + batches.samples * batches.calls_per_sample


def test_bad_division_names_the_key() -> None:
    config = load_run_config("quickstart_image", {"rollout.num_actors": "3", "learner.micro_batch_size": "10"})
    actors, micro = step_batches(config, 0).notes
    assert "8 chunks do not divide among 3 rollout actors" in actors
    assert "rollout.chunk_size" in actors
    assert "learner.micro_batch_size = 8 divides it evenly" in micro
    assert (
        "2 of 10 rollout actors idle" in step_batches(with_overrides(config, {"rollout.num_actors": "10"}), 0).notes[0]
    )


WORK = UnitTimes(
    chunk_s=1.0,
    draft_chunk_s=0.5,
    eval_sample_s=0.1,
    reward_sample_s={"ocr": 0.01},
    credit_sample_s=0.001,
    micro_first_s=0.2,
    micro_later_s=0.3,
    optimise_s=0.05,
    publish_s=0.02,
    pull_s=0.03,
    items_per_sample=2.0,
    sample_bytes=1000.0,
    payload_bytes=10_000_000,
)


def _timed(cores: int, **overrides: str) -> StepTime:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    config = load_run_config("quickstart_image", keys)
    return step_time(config, step_batches(config, 10), WORK, cores)


def test_a_step_in_one_process_is_the_sum_of_its_parts() -> None:
    time = _timed(8, placement="in_process")
    assert time.rollout_s == pytest.approx(8 * 1.0 + 96 * 0.01)
    # 24 samples per update are two micro-batches of two items; the first update is on policy.
    assert time.train_s == pytest.approx(4 * 0.2 + 3 * 4 * 0.3 + 4 * 0.05)
    assert time.credit_s == pytest.approx(96 * 0.001)
    assert (time.publish_s, time.pull_s) == (0.02, 0.03)
    assert time.step_s == pytest.approx(time.rollout_s + time.credit_s + time.train_s + 0.05)
    assert time.evaluate_s == pytest.approx(30 * (0.1 + 0.01)), "10 prompts, 3 samples each, by the first reward"
    assert time.run_s == pytest.approx(30 * time.step_s + 3 * time.evaluate_s)


def test_actors_share_rounds_and_cores() -> None:
    calls = (8 + 2 * 8) * RAY_CALL_S
    two = _timed(8)
    assert two.rollout_s == pytest.approx(4 * 1.0 + 12 * 0.01 + calls / 2)
    assert two.publish_s == pytest.approx(0.02 + RAY_CALL_S + 10_000_000 / STORE_BYTES_PER_S)
    assert _timed(8, rollout__num_actors="3").rollout_s == pytest.approx(3 * 1.0 + 12 * 0.01 + calls / 3), "3, 3 and 2"
    crowded = _timed(1)
    assert crowded.rollout_s == pytest.approx(2 * 4 * 1.0 + max(12 * 0.01, 96 * 0.01) + calls, abs=0.9)
    assert crowded.rollout_s >= 8 * 1.0 + 96 * 0.01, "one core does all the work"


def test_an_asynchronous_step_is_as_long_as_its_longer_half() -> None:
    together, in_turn = _timed(64, max_staleness="1"), _timed(64)
    assert together.step_s == pytest.approx(max(in_turn.rollout_s, in_turn.step_s - in_turn.rollout_s))
    assert together.bound_by == "learner"
    shared = _timed(1, max_staleness="1")
    assert shared.bound_by != "learner"
    assert shared.step_s >= 8 * 1.0 + 96 * 0.01


def test_a_role_needs_what_it_holds_and_the_largest_of_what_passes() -> None:
    parts = (Part("process", 10, "host"), Part("network", 5), Part("a", 3, passing=True), Part("b", 4, "host", True))
    assert Role("x", 1, 0.0, parts).host_bytes == 10 + 5 + 4, "without a GPU all of it is one memory"
    assert Role("x", 1, 1.0, parts).host_bytes == 10 + 4
    assert Role("x", 1, 1.0, parts).device_bytes == 5 + 3
    assert Role("x", 1, 1.0, (*parts, Part("?", None))).unknown == ("?",)


def test_the_payload_is_what_a_snapshot_weighs() -> None:
    config = load_run_config("quickstart_image")
    sizes = model_sizes(config.model)
    assert payload_bytes(config, sizes) == 4 * sizes.num_trained == 11_522_688
    keys = {"rollout.precision": "nvfp4", "learner.publish": "packed"}
    packed = payload_bytes(with_overrides(config, keys), sizes)
    assert 0.1 * 11_522_688 < packed < 11_522_688


def test_relatives_and_moments_are_there_once_each() -> None:
    (rank,) = [role for role in planned("quickstart_image").roles if role.name == "learner rank"]
    by_name = {part.name: part.num_bytes for part in rank.parts}
    trained = 4 * model_sizes(load_run_config("quickstart_image").model).num_trained
    assert by_name["gradients"] == by_name["old policy"] == trained
    assert by_name["AdamW's two moments"] == 2 * trained
    assert "reference policy" not in by_name
    kept = {part.name for role in planned("quickstart_image", algorithm__kl_weight="0.1").roles for part in role.parts}
    assert "reference policy" in kept


def test_what_does_not_fit_comes_with_keys_that_make_it_fit() -> None:
    plan = planned("quickstart_image", gpu_gib=0.66)
    (learner,) = [one for one in plan.fit if one.role == "learner rank"]
    assert not learner.fits
    assert not plan.fits
    mending = [remedy for remedy in learner.remedies if learner.mended_by(remedy)]
    assert mending
    for remedy in mending:
        overrides = {key.replace(".", "__"): value for key, value in remedy.overrides.items()}
        changed = planned("quickstart_image", gpu_gib=0.66, **overrides)
        assert next(one for one in changed.fit if one.role == "learner rank").fits, remedy.words
    assert planned("quickstart_image", gpu_gib=80.0).fits


def test_sharded_ranks_hold_a_part_each() -> None:
    def held(sharding: str) -> dict[str, int | None]:
        plan = planned("quickstart_image", learner__num_ranks="4", learner__sharding=sharding)
        return {part.name: part.num_bytes for part in next(r for r in plan.roles if r.name == "learner rank").parts}

    whole, parts = held("none"), held("fsdp")
    for name in ("network", "gradients", "old policy", "AdamW's two moments"):
        assert parts[name] == pytest.approx((whole[name] or 0) / 4, abs=8), name
    assert 0 < (parts["blocks gathered from other ranks"] or 0) < (whole["network"] or 0)


def test_small_roles_are_guests_on_a_larger_ones_gpu() -> None:
    config = load_run_config("quickstart_image")
    actor = Role("rollout actor", 4, 0.9, (Part("network", 10 * GIB),))
    reward = Role("reward a", 1, 0.1, (Part("model", 3 * GIB),))
    half = Role("learner rank", 2, 0.5, (Part("network", 6 * GIB),))
    alone, shared = fits(config, [actor, reward, half], 16.0, lambda _: [])
    assert (alone.guests, alone.num_bytes, alone.of_guests) == (("reward a",), 13 * GIB, 3 * GIB)
    assert (shared.processes, shared.num_bytes, shared.fits) == (2, 12 * GIB, True)
    assert not fits(config, [actor, reward], 13.0, lambda _: [])[0].fits, "a part of every GPU cannot be filled"


def test_groups_come_out_of_a_folder_as_they_went_in(tmp_path: Path) -> None:
    pictures = draw_groups(ToyPolicy(), flow_sde(), Needs.STEPS | Needs.LOGPROBS | Needs.NEGATIVE, guidance_scale=2.0)
    texts = draw_text_groups(load_policy(text_config(TinyTextConfig), "learner"))
    for groups in (pictures, texts):
        save_groups(groups, tmp_path)
        again = load_groups(tmp_path)
        assert len(again) == len(groups)
        for mine, theirs in zip(groups, again, strict=True):
            assert [rollout.key for rollout in theirs.rollouts] == [rollout.key for rollout in mine.rollouts]
            assert theirs.prompt == mine.prompt
            assert theirs.texts == mine.texts
            assert group_bytes(theirs) == group_bytes(mine) > 0
            for name in type(mine.trajectory).__dataclass_fields__:
                before, after = getattr(mine.trajectory, name), getattr(theirs.trajectory, name)
                assert (before is None) == (after is None), name
                assert before is None or torch.equal(before, after), name


def test_the_command_prints_a_table_or_one_object() -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["plan", "quickstart_text", "--no-probe", "--gpu-gib", "80", "--json", "--num_steps", "3"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {role["role"] for role in found["roles"]} >= {
        "driver",
        "learner rank",
        "rollout actor",
        "reward exact_answer",
    }
    assert found["gpu"]["fits"] is True
    assert found["step"] is None
    assert found["batches"]["tokens"] == 16 * 8 * 8
    assert runner.invoke(app, ["plan", "quickstart_text", "--no-probe", "--gpu-gib", "0.2"]).exit_code == 1


def test_a_plan_is_readable() -> None:
    plan = planned("quickstart_image", gpu_gib=0.66)
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=150))
    text = stream.getvalue()
    assert "8 prompts x 12 = 96 samples" in text
    assert "learner rank: " in text
    assert "does not fit on a GPU of 0.66 GiB" in text
    assert "--learner." in text
    assert json.loads(json.dumps(as_json(plan)))["notes"] == list(plan.notes)
    assert (size(3 * MIB), size(2 * GIB), size(512), size(None)) == ("3.0 MiB", "2.0 GiB", "0 KiB", "unknown")


def test_a_run_for_gpus_is_planned_where_there_are_none() -> None:
    keys = {"rollout.num_gpus": "1", "learner.num_gpus_per_rank": "1"}
    config: RunConfig = with_absolute_paths(load_run_config("quickstart_image", keys))
    plan = make_plan(config, 10, probe=not torch.cuda.is_available(), gpu_gib=None, told=lambda _: None)
    (rank,) = [role for role in plan.roles if role.name == "learner rank"]
    assert "CUDA context" in {part.name for part in rank.parts}
    assert rank.device_bytes > 512 * MIB
    assert torch.cuda.is_available() or any("no probe" in note for note in plan.notes)
