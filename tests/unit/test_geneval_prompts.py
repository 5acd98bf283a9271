"""Prompts by the official templates: the same for a seed, none twice, none that is held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raylign.errors import PromptError
from raylign.pretrain.shape_pictures import outlines
from raylign.types import Prompt
from rewards.scenes.prompts import (
    EVALUATION_WEIGHTS,
    TRAINING_WEIGHTS,
    draw_task,
    generate_prompts,
    read_official,
    text_of,
    write_prompts,
)
from rewards.scenes.task import COCO_OBJECTS, TAGS, Clause, Exclusion, Task, parse_task
from rollout.prompts import load_prompts

# Lines of prompts/evaluation_metadata.jsonl, one per tag.
OFFICIAL = [
    ('{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'),
    (
        '{"tag": "two_object", "include": [{"class": "parking meter", "count": 1}, '
        '{"class": "teddy bear", "count": 1}], '
        '"prompt": "a photo of a parking meter and a teddy bear"}'
    ),
    (
        '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], '
        '"prompt": "a photo of two clocks"}'
    ),
    (
        '{"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}], '
        '"prompt": "a photo of a blue fire hydrant"}'
    ),
    (
        '{"tag": "position", "include": [{"class": "cup", "count": 1}, '
        '{"class": "couch", "count": 1, "position": ["below", 0]}], '
        '"prompt": "a photo of a couch below a cup"}'
    ),
    (
        '{"tag": "color_attr", "include": [{"class": "car", "count": 1, "color": "black"}, '
        '{"class": "parking meter", "count": 1, "color": "green"}], '
        '"prompt": "a photo of a black car and a green parking meter"}'
    ),
]


def test_official_records_are_read_and_their_sentences_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(OFFICIAL) + "\n")
    prompts = read_official(path)
    assert [prompt.metadata["tag"] for prompt in prompts] == list(TAGS)
    assert prompts[4].id == "evaluation_metadata:5"
    for prompt, line in zip(prompts, OFFICIAL, strict=True):
        task = parse_task(prompt, COCO_OBJECTS)
        assert text_of(task) == prompt.text
        assert {**task.to_metadata(), "prompt": prompt.text} == json.loads(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not valid JSON"), ("[]", 'non-empty "prompt"'), ('{"prompt": "x", "tag": "colour"}', "metadata.tag")],
)
def test_a_bad_official_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{OFFICIAL[0]}\n\n{line}\n")
    with pytest.raises(PromptError, match=f"'tasks:3'.*{message}"):
        read_official(path)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Task("single_object", (Clause("orange"),)), "a photo of an orange"),
        (Task("counting", (Clause("bus", 3),), (Exclusion("bus", 4),)), "a photo of three buses"),
        (Task("counting", (Clause("sheep", 2),)), "a photo of two sheeps"),
        (Task("colors", (Clause("apple", colour="orange"),)), "a photo of an orange apple"),
        (Task("position", (Clause("oven"), Clause("cat", relation="left of"))), "a photo of a cat left of an oven"),
    ],
)
def test_articles_and_plurals(task: Task, text: str) -> None:
    assert text_of(task) == text


def test_generated_prompts_are_distinct_reproducible_and_not_held_out() -> None:
    held_out = {prompt.text for prompt in generate_prompts(50, seed=1)}
    prompts = generate_prompts(400, seed=2, exclude=held_out)
    texts = {prompt.text for prompt in prompts}
    assert len(texts) == 400
    assert not texts & held_out
    assert prompts == generate_prompts(400, seed=2, exclude=held_out)
    assert prompts[:20] != generate_prompts(20, seed=3)
    assert len({prompt.id for prompt in prompts}) == 400


def test_tags_come_in_their_shares() -> None:
    prompts = generate_prompts(4000, seed=0, distinct=False)
    shares = Counter(str(prompt.metadata["tag"]) for prompt in prompts)
    for tag, weight in TRAINING_WEIGHTS.items():
        expected = 4000 * weight / 1.7  # the weights sum to 1.7
        assert abs(shares[tag] - expected) < 5 * expected**0.5, tag
    assert "single_object" not in shares


def test_shapes_get_all_six_kinds_and_run_out_honestly() -> None:
    names = list(outlines())
    prompts = generate_prompts(300, seed=0, names=names, weights=EVALUATION_WEIGHTS)
    assert {str(prompt.metadata["tag"]) for prompt in prompts} == set(TAGS)
    for prompt in prompts:
        assert text_of(parse_task(prompt, names)) == prompt.text
    # Seven shapes, two to four of each.
    assert len(generate_prompts(21, 0, names, {"counting": 1})) == 21
    with pytest.raises(PromptError, match="there are only 21 such prompts, 22 were asked for"):
        generate_prompts(22, 0, names, {"counting": 1})
    with pytest.raises(PromptError, match="at least two objects"):
        generate_prompts(1, 0, ["person", "cat"])


def test_nobody_is_asked_to_paint_a_person() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_task(rng, tag, COCO_OBJECTS[:3]) for tag in ("colors", "color_attr") for _ in range(50)]
    assert not any(clause.name == "person" for task in drawn for clause in task.include)


def test_a_written_file_is_a_prompt_file(tmp_path: Path) -> None:
    prompts = generate_prompts(30, seed=5)
    write_prompts(tmp_path / "train.jsonl", prompts)
    read = load_prompts(tmp_path / "train.jsonl")
    assert read == [Prompt(prompt.id, prompt.text, prompt.metadata) for prompt in prompts]
