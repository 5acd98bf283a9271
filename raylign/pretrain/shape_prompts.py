"""What the embedded `shapes` model is asked for: GenEval's six kinds of prompts about a few shapes.

All prompts are listed, not drawn: the kinds are finite. Held-out prompts occur neither in pre-training nor in
reinforcement learning, so a score on them measures composition and not memory. Sentences and metadata are GenEval's
(djghosh13/geneval:prompts/create_prompts.py), so the `geneval` reward reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product, zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from raylign.pretrain.shape_pictures import COLOURS, Group, Relation

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TAGS: tuple[Tag, ...] = get_args(Tag)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

NAMES = ("circle", "square", "triangle", "cross")
"""The shapes of this task, those of the seven that can be told apart at twelve pixels by a tiny decoder."""
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
PLURALS = {name: f"{name}es" if name.endswith("s") else f"{name}s" for name in NAMES}
PROMPT_WORDS: tuple[str, ...] = (
    *("a", "an", "photo", "of", "and", "left", "right", "above", "below"),
    *NUMBER_WORDS.values(),
    *COLOURS,
    *NAMES,
    *PLURALS.values(),
)
"""Words that get a token of their own; they are all that the prompts use."""
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789\"'.,:;!?-&#"
"""Any other word of a prompt is spelt in these."""

SPLIT_SEED = 20261
"""Fixed, not a setting: a model and the prompts it is tested on must agree on what was held out."""
NUM_HELD_OUT: dict[Tag, int] = {
    "single_object": 1,
    "two_object": 4,
    "counting": 4,
    "colors": 14,
    "position": 16,
    "color_attr": 25,
}
MAX_TRAIN_PER_TAG = 160
"""Prompts of a kind in the training file; only `color_attr` has more."""


@dataclass(frozen=True, slots=True)
class ShapeTask:
    """One prompt: its kind and what a picture of it shows. A position is asked of the last group."""

    tag: Tag
    groups: tuple[Group, ...]

    @property
    def text(self) -> str:
        """GenEval's sentence."""
        first, last = self.groups[0], self.groups[-1]
        match self.tag:
            case "single_object" | "colors":
                return f"a photo of {_phrase(first)}"
            case "two_object" | "color_attr":
                return f"a photo of {_phrase(first)} and {_phrase(last)}"
            case "counting":
                return f"a photo of {NUMBER_WORDS[first.count]} {PLURALS[first.name]}"
            case "position":
                return f"a photo of {_phrase(last)} {last.relation} {_phrase(first)}"

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's record: tag, include and, for a number, exclude."""
        include: list[dict[str, Any]] = []
        for group in self.groups:
            record: dict[str, Any] = {"class": group.name, "count": group.count}
            if group.colour is not None:
                record["color"] = group.colour
            if group.relation is not None:
                record["position"] = [group.relation, group.target]
            include.append(record)
        exclude = [{"class": group.name, "count": group.count + 1} for group in self.groups if group.count > 1]
        return {"tag": self.tag, "include": include} | ({"exclude": exclude} if exclude else {})


def tasks_of(tag: Tag) -> list[ShapeTask]:
    """Every prompt of a kind, in a fixed order."""
    pairs = list(permutations(NAMES, 2))
    match tag:
        case "single_object":
            found = [(Group(name),) for name in NAMES]
        case "two_object":
            found = [(Group(one), Group(other)) for one, other in pairs]
        case "counting":
            found = [(Group(name, count),) for name, count in product(NAMES, NUMBER_WORDS)]
        case "colors":
            found = [(Group(name, colour=colour),) for name, colour in product(NAMES, COLOURS)]
        case "position":
            found = [
                (Group(target), Group(name, relation=relation, target=0))
                for (name, target), relation in product(pairs, RELATIONS)
            ]
        case "color_attr":
            found = [
                (Group(one, colour=colour), Group(other, colour=other_colour))
                for (one, other), (colour, other_colour) in product(pairs, permutations(COLOURS, 2))
            ]
    return [ShapeTask(tag, groups) for groups in found]


@cache
def split_tasks() -> tuple[dict[Tag, tuple[ShapeTask, ...]], dict[Tag, tuple[ShapeTask, ...]]]:
    """(everything that may be trained on, what is held out), by kind and disjoint."""
    train: dict[Tag, tuple[ShapeTask, ...]] = {}
    held_out: dict[Tag, tuple[ShapeTask, ...]] = {}
    rng = np.random.default_rng(SPLIT_SEED)
    for tag in TAGS:
        tasks = tasks_of(tag)
        shuffled = [tasks[i] for i in rng.permutation(len(tasks))]
        held_out[tag] = tuple(shuffled[: NUM_HELD_OUT[tag]])
        train[tag] = tuple(shuffled[NUM_HELD_OUT[tag] :])
    return train, held_out


def write_prompt_files(out_dir: Path) -> None:
    """`prompts_train.jsonl` and `prompts_heldout.jsonl`: id, prompt and metadata per line, the kinds in turn.

    In turn, because reports show the first prompts of a file.
    """
    for name, tasks in zip(("train", "heldout"), split_tasks(), strict=True):
        rounds = zip_longest(*(tasks[tag][:MAX_TRAIN_PER_TAG] for tag in TAGS))
        chosen = [task for turn in rounds for task in turn if task is not None]
        lines = (prompt_record(task, f"{task.tag}-{index:04d}") for index, task in enumerate(chosen))
        path = out_dir / f"prompts_{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def prompt_record(task: ShapeTask, prompt_id: str) -> dict[str, Any]:
    """A line of a prompt file."""
    return {"id": prompt_id, "prompt": task.text, "metadata": task.metadata}


def draw_task(rng: np.random.Generator, tags: Sequence[Tag], shares: Sequence[float]) -> ShapeTask:
    """A random prompt that is not held out, its kind drawn by share."""
    tasks = split_tasks()[0][tags[rng.choice(len(tags), p=shares)]]
    return tasks[rng.integers(len(tasks))]


def _phrase(group: Group) -> str:
    words = group.name if group.colour is None else f"{group.colour} {group.name}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"
