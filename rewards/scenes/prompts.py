"""Prompts for GenEval, made by its templates, and the official prompt file read.

Source: djghosh13/geneval:prompts/create_prompts.py at af4902f (templates, articles, plurals as simple as there: "two
sheeps", "three benchs"), and the shares of the tags in the training set of yifan123/flow_grpo:dataset/geneval. Draws
are our own, keyed by the seed, so the prompts of a seed are always the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from raylign.errors import PromptError
from raylign.keys import derive_seed
from raylign.types import Prompt
from rewards.scenes.task import COCO_OBJECTS, COLOURS, RELATIONS, Clause, Exclusion, Tag, Task, parse_task

EVALUATION_WEIGHTS: Mapping[Tag, float] = {
    "single_object": 0.8,
    "two_object": 1.0,
    "counting": 1.0,
    "colors": 1.0,
    "position": 1.0,
    "color_attr": 1.0,
}
"""Shares of the tags as the official generator draws them: every object once, and 100 of each other kind."""
TRAINING_WEIGHTS: Mapping[Tag, float] = {
    "position": 0.7,
    "counting": 0.5,
    "color_attr": 0.3,
    "colors": 0.1,
    "two_object": 0.1,
}
"""Shares of the tags in the published training set, before they are brought to a sum of 1."""
UNCOLOURED = frozenset({"person"})
"""Never asked for in a colour."""
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_COUNT = 4
_MAX_TRIES = 500
"""A tag that gives nothing new this many times in a row is used up."""


def generate_prompts(
    num: int,
    seed: int,
    names: Sequence[str] = COCO_OBJECTS,
    weights: Mapping[Tag, float] = TRAINING_WEIGHTS,
    exclude: Collection[str] = (),
    distinct: bool = True,
) -> list[Prompt]:
    """That many prompts about objects of these names, none of whose texts is in `exclude`.

    Tags are drawn by weight. With `distinct` no text comes twice, and a tag that is used up is left out from then on:
    there are 240 counting prompts about COCO's objects. Without it the shares hold for any number, as in the published
    training set of 50 000. Raises PromptError when there are too few prompts, and for fewer than two names.
    """
    if len(set(names) - UNCOLOURED) < 2:
        raise PromptError(f"prompts need at least two objects that may be coloured; got {list(names)}")
    rng = np.random.default_rng(derive_seed(seed, "geneval_prompts"))
    left: dict[Tag, float] = {tag: weight for tag, weight in weights.items() if weight > 0}
    used = set(exclude)
    prompts: list[Prompt] = []
    while len(prompts) < num:
        if not left:
            raise PromptError(f"there are only {len(prompts)} such prompts, {num} were asked for; ask for fewer")
        shares = np.asarray(list(left.values()))
        tags: list[Tag] = list(left)
        tag = tags[rng.choice(len(tags), p=shares / shares.sum())]
        task = _new_task(rng, tag, names, used)
        if task is None:
            del left[tag]
            continue
        text = text_of(task)
        if distinct:
            used.add(text)
        prompts.append(Prompt(f"{tag}-{len(prompts):05d}", text, task.to_metadata()))
    return prompts


def draw_task(rng: np.random.Generator, tag: Tag, names: Sequence[str]) -> Task:
    """A random task of a kind."""
    coloured = [name for name in names if name not in UNCOLOURED]
    match tag:
        case "single_object":
            return Task(tag, (Clause(_pick(rng, names, 1)[0]),))
        case "two_object":
            one, other = _pick(rng, names, 2)
            return Task(tag, (Clause(one), Clause(other)))
        case "counting":
            (name,), count = _pick(rng, names, 1), int(rng.integers(2, MAX_COUNT, endpoint=True))
            return Task(tag, (Clause(name, count),), (Exclusion(name, count + 1),))
        case "colors":
            return Task(tag, (Clause(_pick(rng, coloured, 1)[0], colour=_pick(rng, COLOURS, 1)[0]),))
        case "position":
            (name, target), (relation,) = _pick(rng, names, 2), _pick(rng, RELATIONS, 1)
            return Task(tag, (Clause(target), Clause(name, relation=relation, target=0)))
        case "color_attr":
            pairs = zip(_pick(rng, coloured, 2), _pick(rng, COLOURS, 2), strict=True)
            return Task(tag, tuple(Clause(name, colour=colour) for name, colour in pairs))


def text_of(task: Task) -> str:
    """The official sentence for a task of one of the six kinds."""
    first, last = task.include[0], task.include[-1]
    match task.tag:
        case "single_object":
            return f"a photo of {_with_article(first.name)}"
        case "two_object":
            return f"a photo of {_with_article(first.name)} and {_with_article(last.name)}"
        case "counting":
            return f"a photo of {NUMBER_WORDS[first.count]} {_plural(first.name)}"
        case "colors":
            return f"a photo of {_coloured(first)}"
        case "position":
            return f"a photo of {_with_article(last.name)} {last.relation} {_with_article(first.name)}"
        case "color_attr":
            return f"a photo of {_coloured(first)} and {_coloured(last)}"


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """A prompt file (`.jsonl`: id, prompt, metadata) that a run can train on."""
    lines = (
        json.dumps({"id": prompt.id, "prompt": prompt.text, "metadata": prompt.metadata}, ensure_ascii=False)
        for prompt in prompts
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_official(path: Path, names: Sequence[str] = COCO_OBJECTS) -> list[Prompt]:
    """The prompts of a file in the official layout, evaluation_metadata.jsonl: a record with `prompt` per line.

    Raises PromptError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {path}: {error}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _official_prompt(line, f"{path.stem}:{number}")
            parse_task(prompt, names)
            prompts.append(prompt)
    return prompts


def _official_prompt(line: str, name: str) -> Prompt:
    try:
        data: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"prompt {name!r}: not valid JSON ({error.msg} at column {error.colno})") from None
    record = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f'prompt {name!r}: must be an object with a non-empty "prompt", got {line[:80]!r}')
    return Prompt(name, text, record)


def _new_task(rng: np.random.Generator, tag: Tag, names: Sequence[str], used: Collection[str]) -> Task | None:
    for _ in range(_MAX_TRIES):
        task = draw_task(rng, tag, names)
        if text_of(task) not in used:
            return task
    return None


def _pick(rng: np.random.Generator, choices: Sequence[Any], num: int) -> list[Any]:
    """Different ones, in random order."""
    return [choices[i] for i in rng.choice(len(choices), size=num, replace=False)]


def _coloured(clause: Clause) -> str:
    return f"{_with_article(str(clause.colour))} {clause.name}"


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"
