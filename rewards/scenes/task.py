"""What a GenEval prompt asks for: clauses about objects, read strictly from the prompt's metadata.

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval:prompts/evaluation_metadata.jsonl at af4902f, whose
records have `tag`, `include` and sometimes `exclude`; here they stand in a prompt's metadata under the same names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from raylign.errors import PromptError
from raylign.types import Prompt

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
TAGS: tuple[Tag, ...] = get_args(Tag)
RELATIONS: tuple[Relation, ...] = get_args(Relation)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""In the order of the official evaluation, which decides ties."""
COCO_OBJECTS: tuple[str, ...] = tuple(
    " ".join(name.split())
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
    """.split(",")
)
"""djghosh13/geneval:evaluation/object_names.txt; a detector's class number is the place here. COCO calls three of them
mouse, remote and keyboard."""

METADATA_KEYS: Mapping[str, str] = {
    "tag": f"the kind of prompt: {', '.join(TAGS)}",
    "include": "what must be there: a list of {class, count, color (optional), position (optional: [relation, index of "
    "an earlier clause])}",
    "exclude": "what must not be there: a list of {class, count}; that many or more are too many (optional)",
}
MAX_COUNT = 100
MAX_CLAUSES = 32


@dataclass(frozen=True, slots=True)
class Clause:
    """Exactly `count` objects of a class, all of one colour, all in one relation to those of an earlier clause."""

    name: str
    count: int = 1
    colour: str | None = None
    relation: Relation | None = None
    target: int = 0
    """Place of the earlier clause; means nothing without a relation."""


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Fewer than `count` objects of a class."""

    name: str
    count: int


@dataclass(frozen=True, slots=True)
class Task:
    """Everything that a prompt asks for."""

    tag: Tag
    include: tuple[Clause, ...]
    exclude: tuple[Exclusion, ...] = ()

    def to_metadata(self) -> dict[str, Any]:
        """As the official records have it; `parse_task` reads it back."""
        include: list[dict[str, Any]] = []
        for clause in self.include:
            record: dict[str, Any] = {"class": clause.name, "count": clause.count}
            if clause.colour is not None:
                record["color"] = clause.colour
            if clause.relation is not None:
                record["position"] = [clause.relation, clause.target]
            include.append(record)
        exclude = [{"class": exclusion.name, "count": exclusion.count} for exclusion in self.exclude]
        return {"tag": self.tag, "include": include} | ({"exclude": exclude} if exclude else {})


def parse_task(prompt: Prompt, names: Sequence[str]) -> Task:
    """The task in a prompt's metadata; `names` are the objects that can be found.

    Raises PromptError, naming the prompt, the place and the remedy, for anything the protocol does not know, and for
    two `include` clauses about one class: the protocol counts all objects of a class, so both can never hold.
    """
    metadata = prompt.metadata
    where = f"prompt {prompt.id!r}: metadata"
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise PromptError(f"{where}.tag must be one of {', '.join(TAGS)}; got {tag!r}")
    records = _list(metadata.get("include"), f"{where}.include")
    if not records:
        raise PromptError(f"{where}.include is empty; name at least one object, as in [{{'class': 'dog', 'count': 1}}]")
    include = [_clause(record, i, names, f"{where}.include[{i}]") for i, record in enumerate(records)]
    classes = [clause.name for clause in include]
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise PromptError(
            f"{where}.include has two clauses about {twice[0]!r}; the protocol counts all objects of a class, so "
            "both can never hold: use one clause"
        )
    exclude = [
        Exclusion(*_class_and_count(_record(record, {"class", "count"}, place), names, place))
        for place, record in _places(_list(metadata.get("exclude", []), f"{where}.exclude"), f"{where}.exclude")
    ]
    for exclusion in exclude:
        if any(clause.name == exclusion.name and clause.count >= exclusion.count for clause in include):
            raise PromptError(f"{where} both asks for {exclusion.name!r} and excludes it; raise the exclude count")
    return Task(tag, tuple(include), tuple(exclude))


def _clause(data: Any, index: int, names: Sequence[str], where: str) -> Clause:
    record = _record(data, {"class", "count", "color", "position"}, where)
    name, count = _class_and_count(record, names, where)
    colour = record.get("color")
    if "color" in record and colour not in COLOURS:
        raise PromptError(f"{where}.color must be one of {', '.join(COLOURS)}; got {colour!r}")
    if "position" not in record:
        return Clause(name, count, colour)
    position = _list(record["position"], f"{where}.position")
    if len(position) != 2 or position[0] not in RELATIONS:
        raise PromptError(
            f"{where}.position must be [relation, index], the relation one of {', '.join(RELATIONS)}; got {position!r}"
        )
    relation, target = position
    if not _is_integer(target) or not 0 <= target < index:
        raise PromptError(f"{where}.position must point at an earlier clause, 0 to {index - 1}; got {target!r}")
    return Clause(name, count, colour, relation, target)


def _class_and_count(record: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, int]:
    name, count = record.get("class"), record.get("count")
    if not isinstance(name, str) or name not in names:
        near = _nearest(name, names) if isinstance(name, str) else []
        hint = f"did you mean {near[0]!r}?" if near else f"the detector knows {_some(names)}"
        raise PromptError(f"{where}.class {name!r} is nothing that the detector finds; {hint}")
    if not _is_integer(count) or not 1 <= cast("int", count) <= MAX_COUNT:
        raise PromptError(f"{where}.count must be a whole number from 1 to {MAX_COUNT}; got {count!r}")
    return name, cast("int", count)


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    return [known for known in names if name in known.split()] or difflib.get_close_matches(name, names, n=1)


def _record(data: Any, keys: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise PromptError(f"{where} must be an object with {', '.join(sorted(keys))}; got {str(data)[:80]!r}")
    record = cast("Mapping[str, Any]", data)
    if unknown := sorted(str(key) for key in record.keys() - keys):
        raise PromptError(f"{where} has unknown keys {unknown}; it may have {', '.join(sorted(keys))}")
    return record


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list | tuple) or len(cast("list[Any]", data)) > MAX_CLAUSES:
        raise PromptError(f"{where} must be a list of at most {MAX_CLAUSES}; got {str(cast('Any', data))[:80]!r}")
    return list(cast("list[Any]", data))


def _places(records: list[Any], where: str) -> list[tuple[str, Any]]:
    return [(f"{where}[{i}]", record) for i, record in enumerate(records)]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
