"""GenEval's rules: which detections count, where one object is relative to another, and what a picture is worth.

Pure functions of detections; who found them and who names their colours is not known here.

Sources: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval:evaluation/evaluate_images.py at af4902f (the official
accuracy, `official` here), and yifan123/reward-server:reward_server/gen_eval.py at 92ac29f (the reward that
Flow-GRPO, DiffusionNFT and AWM train on, `flow_grpo` here). `clean` is ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rewards.scenes.task import RELATIONS, TAGS, Clause, Relation, Tag, Task

if TYPE_CHECKING:
    import numpy.typing as npt

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are the first pixel outside."""
Aspect = Literal["count", "color", "position", "exclude"]

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
"""Per class."""
MAX_OVERLAP = 1.0
"""Of two boxes of one class that overlap this much the weaker goes; 1 keeps all, even identical ones."""
POSITION_MARGIN = 0.1
"""The share of both objects' sizes by which their centres must be apart."""
LOWEST_FLOW_GRPO = 1.0 - (MAX_OBJECTS - 1)
"""One object asked for, as many as can be found."""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """One object that a detector saw."""

    name: str
    score: float
    box: Box
    mask_HW: npt.NDArray[np.bool_] | None = None


ColourReader = Callable[[Sequence[Detection]], list[str]]
"""Names the colour of each detection; asked only about objects whose colour matters."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of a score: what one clause got for one aspect."""

    name: str
    aspect: Aspect
    value: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a picture got and why. `perfect` is the rule's own idea of a picture with nothing wrong."""

    value: float
    perfect: bool
    terms: tuple[Term, ...] = ()
    reasons: tuple[str, ...] = ()


def threshold_of(tag: Tag) -> float:
    """The score above which a detection counts: counting asks for surer ones."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def select(
    detections: Iterable[Detection],
    threshold: float,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> dict[str, list[Detection]]:
    """The detections that count, by class, best first: above the threshold, the best `max_objects` of each class,
    without those that overlap a better one by `max_overlap` or more (1 switches that off, as officially).

    Equal scores are ordered by box, so the answer does not depend on the order of arrival.
    """
    found: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: (-detection.score, detection.box)):
        if detection.score > threshold:
            found[detection.name].append(detection)
    return {name: _without_overlaps(objects[:max_objects], max_overlap) for name, objects in found.items()}


def box_of(mask_HW: npt.NDArray[np.bool_]) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def overlap(box_a: Box, box_b: Box) -> float:
    """Intersection over union of two boxes whose right and bottom pixels count as inside (the +1 convention)."""
    corners = (*map(max, box_a[:2], box_b[:2]), *map(min, box_a[2:], box_b[2:]))
    shared = _area(corners)
    union = _area(box_a) + _area(box_b) - shared
    return shared / union if union else 0.0


def relations(box_a: Box, box_b: Box, margin: float = POSITION_MARGIN) -> set[Relation]:
    """Where A is relative to B: none, one or two of the four relations.

    With d the offset of A's centre from B's, and d' = sign(d) max(|d| − margin (size_A + size_B), 0) by axis, A is to a
    side when d'/|d| goes more than half that way. In fp32, as the official boxes are.
    """
    a, b = (np.asarray(box, np.float32).reshape(2, 2) for box in (box_a, box_b))
    offset = a.mean(axis=0) - b.mean(axis=0)
    reduced = np.maximum(np.abs(offset) - margin * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0) * np.sign(offset)
    if (np.abs(reduced) < 1e-3).all():
        return set()
    x, y = reduced / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def official(task: Task, found: Mapping[str, Sequence[Detection]], colours_of: ColourReader) -> Verdict:
    """The benchmark's own verdict, 1 or 0: at least the objects asked for, colour and place of the surest of them.

    Sixteen dogs are "a dog" here: more objects than asked for hurt only where a clause excludes them.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = list(found.get(clause.name, ()))[: clause.count]
        problem = _shortage(clause, objects, colours_of) or _misplacement(clause, objects, groups)
        if problem:
            reasons.append(problem)
        groups.append(None if problem else objects)
    reasons += _excess(task, found)
    return Verdict(float(not reasons), not reasons, reasons=tuple(reasons))


def flow_grpo(task: Task, found: Mapping[str, Sequence[Detection]], colours_of: ColourReader) -> Verdict:
    """The published training reward, bug for bug: the mean of its terms, at most 1 and without a lower bound.

    Per clause 1 − |asked − found| / asked. With the wrong number, one 0 for colour and position together; otherwise
    1 − |asked − of that colour| / asked for the colour, and for the position, if the colour was right: a 0 at the first
    pair in the wrong place *and then always a 1*, or just a 0 when the other clause was not met. So an object on the
    wrong side costs a quarter, and three terms become four. `exclude` is ignored. `perfect` is its strict correctness.
    """
    terms: list[Term] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = list(found.get(clause.name, ()))
        terms.append(Term(clause.name, "count", _closeness(clause.count, len(objects))))
        problem = _wrong_number(clause, objects)
        if problem:
            if clause.colour is not None or clause.relation is not None:
                terms.append(Term(clause.name, "position" if clause.colour is None else "color", 0.0))
        elif clause.colour is not None:
            num_right = colours_of(objects).count(clause.colour)
            terms.append(Term(clause.name, "color", _closeness(clause.count, num_right)))
            problem = _wrong_colour(clause, num_right)
        if not problem and clause.relation is not None:
            problem = _misplacement(clause, objects, groups)
            if problem:
                terms.append(Term(clause.name, "position", 0.0))
            if groups[clause.target] is not None:
                terms.append(Term(clause.name, "position", 1.0))
        if problem:
            reasons.append(problem)
        groups.append(None if problem else objects)
    return Verdict(_mean(terms), not reasons, tuple(terms), tuple(reasons))


def clean(task: Task, found: Mapping[str, Sequence[Detection]], colours_of: ColourReader) -> Verdict:
    """`flow_grpo` without its bugs, in [0, 1], and 1 only for a picture with nothing wrong.

    Every term lies in [0, 1]: max(0, 1 − |asked − found| / asked) for numbers and colours, 1 or 0 for a position. A
    task always has the same terms, so values of one prompt compare: a colour counts 0 while the number is wrong, a
    position counts 0 while number or colour is wrong or the other clause is not met. An `exclude` clause is a term
    of its own, 1 or 0, unless an `include` clause implies it, as it does in the official counting prompts.
    """
    terms: list[Term] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = list(found.get(clause.name, ()))
        terms.append(Term(clause.name, "count", max(0.0, _closeness(clause.count, len(objects)))))
        problem = _wrong_number(clause, objects)
        if clause.colour is not None:
            num_right = 0 if problem else colours_of(objects).count(clause.colour)
            terms.append(Term(clause.name, "color", _closeness(clause.count, num_right)))
            problem = problem or _wrong_colour(clause, num_right)
        if clause.relation is not None:
            problem = problem or _misplacement(clause, objects, groups)
            terms.append(Term(clause.name, "position", float(not problem)))
        if problem:
            reasons.append(problem)
        groups.append(None if problem else objects)
    asked = {clause.name: clause.count for clause in task.include}
    for exclusion in task.exclude:
        if asked.get(exclusion.name, exclusion.count) >= exclusion.count:
            held = len(found.get(exclusion.name, ())) < exclusion.count
            terms.append(Term(exclusion.name, "exclude", float(held)))
    reasons += _excess(task, found)
    return Verdict(_mean(terms), not reasons, tuple(terms), tuple(reasons))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """GenEval's figures for many pictures, by one verdict. `overall` is the mean over the tags, not over pictures."""

    overall: float
    by_tag: Mapping[str, float]
    num_by_tag: Mapping[str, int]


def geneval_accuracy(results: Iterable[Mapping[str, object]]) -> dict[Literal["official", "strict"], Accuracy]:
    """Share of right pictures by tag, and its mean over the tags that occur, by the benchmark's verdict and strictly.

    `results`: one mapping per picture with `tag`, `official` and `strict`, such as the details of a `geneval` score.
    The published figure is `["official"].overall` over all six tags. Raises ValueError without results, or for a tag
    that GenEval has not.
    """
    by_tag: dict[str, list[Mapping[str, object]]] = {}
    for result in results:
        if result["tag"] not in TAGS:
            raise ValueError(f"GenEval has no tag {result['tag']!r}; its tags are {', '.join(TAGS)}")
        by_tag.setdefault(str(result["tag"]), []).append(result)
    if not by_tag:
        raise ValueError("no results to average; score at least one picture")
    return {"official": _accuracy(by_tag, "official"), "strict": _accuracy(by_tag, "strict")}


def _accuracy(by_tag: Mapping[str, Sequence[Mapping[str, object]]], verdict: str) -> Accuracy:
    tags = [tag for tag in TAGS if tag in by_tag]
    shares = {tag: sum(bool(result[verdict]) for result in by_tag[tag]) / len(by_tag[tag]) for tag in tags}
    numbers = {str(tag): len(by_tag[tag]) for tag in tags}
    return Accuracy(sum(shares.values()) / len(shares), {str(tag): share for tag, share in shares.items()}, numbers)


def _without_overlaps(objects: Sequence[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap >= 1.0:
        return list(objects)
    kept: list[Detection] = []
    for candidate in objects:
        if all(overlap(better.box, candidate.box) < max_overlap for better in kept):
            kept.append(candidate)
    return kept


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _closeness(asked: int, found: int) -> float:
    return 1.0 - abs(asked - found) / asked


def _mean(terms: Sequence[Term]) -> float:
    return sum(term.value for term in terms) / len(terms)


def _wrong_number(clause: Clause, objects: Sequence[Detection]) -> str:
    if len(objects) == clause.count:
        return ""
    return f"expected {clause.count} {clause.name}, found {len(objects)}"


def _wrong_colour(clause: Clause, num_right: int) -> str:
    if num_right == clause.count:
        return ""
    return f"expected {clause.count} {clause.colour} {clause.name}, found {num_right}"


def _shortage(clause: Clause, objects: Sequence[Detection], colours_of: ColourReader) -> str:
    """What is missing of the objects asked for; the official rule's view."""
    if len(objects) < clause.count:
        return f"expected at least {clause.count} {clause.name}, found {len(objects)}"
    return "" if clause.colour is None else _wrong_colour(clause, colours_of(objects).count(clause.colour))


def _misplacement(clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None]) -> str:
    """The first pair that is not in the clause's relation; `groups` are the objects of the clauses before, if met."""
    if clause.relation is None:
        return ""
    targets = groups[clause.target]
    if targets is None:
        return f"nothing for {clause.name} to be {clause.relation}"
    for one in objects:
        for other in targets:
            true = relations(one.box, other.box)
            if clause.relation not in true:
                place = " and ".join(sorted(true)) or "in no relation to"
                return f"expected {clause.name} {clause.relation} {other.name}, found it {place} it"
    return ""


def _excess(task: Task, found: Mapping[str, Sequence[Detection]]) -> list[str]:
    """What is there that should not be."""
    return [
        f"expected fewer than {exclusion.count} {exclusion.name}, found {len(found.get(exclusion.name, ()))}"
        for exclusion in task.exclude
        if len(found.get(exclusion.name, ())) >= exclusion.count
    ]
