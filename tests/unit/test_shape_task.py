"""The embedded `shapes` task: its prompts are GenEval's, its pictures show them, its flaws are habits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from raylign.pretrain import shape_prompts as prompts
from raylign.pretrain.shape_examples import (
    FLAW_SHARES,
    SIDE,
    Flaw,
    ShapeExample,
    arrange,
    draw_example,
    draw_picture,
    miscount,
)
from raylign.pretrain.shape_pictures import COLOURS, Group, outlines
from raylign.types import Prompt, RewardSample
from rewards.geneval import GenevalConfig, GenevalReward
from rewards.scenes import task as geneval
from rewards.scenes.prompts import generate_prompts, text_of
from rewards.scenes.task import parse_task
from rollout.prompts import load_prompts, refuse_overlap


@pytest.fixture(scope="module")
def reward() -> GenevalReward:
    made = GenevalReward(GenevalConfig())
    made.load()
    return made


def values(reward: GenevalReward, tasks: Sequence[prompts.ShapeTask], flaw: Flaw, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    samples = [
        RewardSample(str(i), Prompt(str(i), task.text, task.metadata), draw_picture(rng, task.groups, flaw))
        for i, task in enumerate(tasks)
    ]
    found = [score.value for score in asyncio.run(reward.score(samples))]
    assert all(value is not None for value in found)
    return [value for value in found if value is not None]


def examples(seed: int, num: int, flawed_share: float) -> list[ShapeExample]:
    rng = np.random.default_rng(seed)
    return [draw_example(rng, flawed_share) for _ in range(num)]


def some_tasks(tag: prompts.Tag) -> list[prompts.ShapeTask]:
    return [*prompts.split_tasks()[0][tag][:30], *prompts.split_tasks()[1][tag]]


# Prompts -------------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_reward() -> None:
    assert prompts.TAGS == geneval.TAGS
    assert prompts.RELATIONS == geneval.RELATIONS
    assert tuple(COLOURS) == geneval.COLOURS
    assert set(prompts.NAMES) < set(outlines())


@pytest.mark.parametrize("tag", prompts.TAGS)
def test_sentences_and_metadata_are_those_of_geneval(tag: prompts.Tag) -> None:
    for task in prompts.tasks_of(tag):
        parsed = parse_task(Prompt("p", task.text, task.metadata), tuple(outlines()))
        assert text_of(parsed) == task.text
        assert parsed.to_metadata() == task.metadata


def test_what_the_generator_of_the_reward_draws_is_on_the_list() -> None:
    listed = {task.text: task.metadata for tag in prompts.TAGS for task in prompts.tasks_of(tag)}
    drawn = generate_prompts(300, 0, prompts.NAMES, dict.fromkeys(prompts.TAGS, 1.0))
    assert {str(prompt.metadata["tag"]) for prompt in drawn} == set(prompts.TAGS)
    assert all(listed[prompt.text] == prompt.metadata for prompt in drawn)


@pytest.mark.parametrize(
    ("tag", "num"),
    [
        ("single_object", 4),
        ("two_object", 12),
        ("counting", 12),
        ("colors", 40),
        ("position", 48),
        ("color_attr", 1080),
    ],
)
def test_every_prompt_of_a_kind_is_listed_once(tag: prompts.Tag, num: int) -> None:
    assert len({task.text for task in prompts.tasks_of(tag)}) == len(prompts.tasks_of(tag)) == num


def test_held_out_prompts_are_of_every_kind_and_never_drawn() -> None:
    train, held_out = prompts.split_tasks()
    texts = {task.text for tasks in held_out.values() for task in tasks}
    assert len(texts) == 64
    assert {tag: len(tasks) for tag, tasks in held_out.items()} == prompts.NUM_HELD_OUT
    assert not texts & {task.text for tasks in train.values() for task in tasks}
    drawn = {example.task.text for example in examples(0, 800, 0.0)}
    assert len(drawn) > 150
    assert not texts & drawn


def test_prompt_files_are_what_a_run_reads(tmp_path: Path) -> None:
    prompts.write_prompt_files(tmp_path)
    train, held_out = (load_prompts(tmp_path / f"prompts_{name}.jsonl") for name in ("train", "heldout"))
    refuse_overlap(train, held_out)
    assert len(train) == 237
    assert len(held_out) == 64
    for found in (train, held_out):
        assert [str(prompt.metadata["tag"]) for prompt in found[:6]] == list(prompts.TAGS)
        for prompt in found:
            assert text_of(parse_task(prompt, prompts.NAMES)) == prompt.text


def test_the_words_of_the_prompts_have_tokens_of_their_own() -> None:
    words = {word for tag in prompts.TAGS for task in prompts.tasks_of(tag) for word in task.text.split()}
    assert words == set(prompts.PROMPT_WORDS)


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", prompts.TAGS)
def test_a_clean_picture_shows_what_is_asked(tag: prompts.Tag, reward: GenevalReward) -> None:
    assert set(values(reward, some_tasks(tag), "clean")) == {1.0}


@pytest.mark.parametrize(
    ("flaw", "tag", "most"),
    [
        ("reshaped", "colors", 0.0),
        ("reshaped", "color_attr", 0.3),
        ("recoloured", "color_attr", 0.5),
        ("miscounted", "counting", 0.7),
        ("miscounted", "two_object", 0.5),
        ("mirrored", "position", 0.7),
        ("blurred", "counting", 0.1),
        ("faint", "two_object", 0.1),
    ],
)
def test_a_flaw_spoils_what_it_is_about(flaw: Flaw, tag: prompts.Tag, most: float, reward: GenevalReward) -> None:
    assert np.mean(values(reward, some_tasks(tag), flaw)) <= most


@pytest.mark.parametrize(
    ("flaw", "tag"), [("recoloured", "counting"), ("mirrored", "color_attr"), ("mirrored", "two_object")]
)
def test_a_flaw_leaves_alone_what_it_is_not_about(flaw: Flaw, tag: prompts.Tag, reward: GenevalReward) -> None:
    assert set(values(reward, some_tasks(tag), flaw)) == {1.0}


def test_the_same_seed_draws_the_same_pictures() -> None:
    first, again, other = examples(3, 40, 0.6), examples(3, 40, 0.6), examples(4, 40, 0.6)
    assert [e.task for e in first] == [e.task for e in again]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(first, again, strict=True))
    assert [e.task for e in first] != [e.task for e in other]
    assert {(e.picture.shape, e.picture.dtype) for e in first} == {((SIDE, SIDE, 3), np.dtype(np.uint8))}


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_flaws_have_their_shares_whatever_the_prompt(share: float) -> None:
    drawn = examples(1, 1500, share)
    kinds = Counter(example.flaw for example in drawn)
    for flaw, of_flawed in FLAW_SHARES.items():
        assert kinds[flaw] / 1500 == pytest.approx(share * of_flawed, abs=0.03)
    for tag in ("counting", "position", "color_attr"):
        of_tag = [example.flaw != "clean" for example in drawn if example.task.tag == tag]
        assert np.mean(of_tag) == pytest.approx(share, abs=0.1)


def test_shapes_stay_apart_and_inside() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4):
        for _ in range(50):
            boxes = [shape.box for shape in arrange(rng, [Group("square", count)]).shapes]
            assert all(min(box) >= 1 and max(box) <= SIDE - 1 for box in boxes)
            for i, (left, top, right, bottom) in enumerate(boxes):
                for x0, y0, x1, y1 in boxes[:i]:
                    assert max(x0 - right, left - x1, y0 - bottom, top - y1) >= 2


def test_more_shapes_than_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="5 shapes"):
        arrange(np.random.default_rng(0), [Group("circle", 3), Group("square", 2)])


def test_a_miscounted_group_is_one_off_and_still_fits() -> None:
    rng = np.random.default_rng(0)
    for groups in ([Group("circle")], [Group("cross", 4)], [Group("circle"), Group("cross", relation="above")]):
        asked, found = sum(g.count for g in groups), {sum(g.count for g in miscount(rng, groups)) for _ in range(60)}
        assert found == {n for n in (asked - 1, asked + 1) if 1 <= n <= 4}
