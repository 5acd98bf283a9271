"""Clauses are read strictly: an error names the prompt, the place and what would be right."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from raylign.errors import PromptError
from raylign.types import Prompt
from rewards.scenes.task import COCO_OBJECTS, COLOURS, Clause, Exclusion, Task, parse_task

DOG = {"class": "dog", "count": 1}


def _prompt(**metadata: Any) -> Prompt:
    return Prompt("p7", "a photo", {"tag": "position", "include": [DOG], **metadata})


def test_the_object_names_are_the_official_file() -> None:
    # evaluation/object_names.txt: one name per line.
    content = "".join(f"{name}\n" for name in COCO_OBJECTS)
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "608f6a0e5c8ca1c7"
    assert len(set(COCO_OBJECTS)) == 80
    assert [COCO_OBJECTS[i] for i in (64, 65, 66)] == ["computer mouse", "tv remote", "computer keyboard"]
    assert len(COLOURS) == 10


def test_an_official_record_is_read_and_written() -> None:
    metadata = {
        "tag": "counting",
        "include": [
            {"class": "tv", "count": 2},
            {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "exclude": [{"class": "tv", "count": 3}],
    }
    task = parse_task(Prompt("p", "x", {**metadata, "prompt": "x", "target": "for another reward"}), COCO_OBJECTS)
    assert task == Task("counting", (Clause("tv", 2), Clause("cat", 1, "red", "left of", 0)), (Exclusion("tv", 3),))
    assert task.to_metadata() == metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "colour"}, r"metadata.tag must be one of single_object, .*; got 'colour'"),
        ({"tag": ["position"]}, r"metadata.tag must be one of"),
        ({"include": None}, r"metadata.include must be a list of at most 32; got 'None'"),
        ({"include": [DOG] * 33}, r"metadata.include must be a list of at most 32"),
        ({"include": []}, r"metadata.include is empty"),
        ({"include": ["dog"]}, r"metadata.include\[0\] must be an object"),
        (
            {"include": [{**DOG, "colour": "red"}]},
            r"include\[0\] has unknown keys \['colour'\]; it may have class",
        ),
        ({"include": [{"class": "dgo", "count": 1}]}, r"include\[0\].class 'dgo' .* did you mean 'dog'\?"),
        ({"include": [{"class": "mouse", "count": 1}]}, r"class 'mouse' is nothing .* did you mean 'computer mouse'"),
        ({"include": [{"class": "qqq", "count": 1}]}, r"the detector knows person, bicycle, .* and 68 more"),
        ({"include": [{"class": 3, "count": 1}]}, r"class 3 is nothing"),
        ({"include": [{"class": "dog"}]}, r"include\[0\].count must be a whole number from 1 to 100; got None"),
        ({"include": [{"class": "dog", "count": 0}]}, r"got 0"),
        ({"include": [{"class": "dog", "count": True}]}, r"got True"),
        ({"include": [{"class": "dog", "count": float("nan")}]}, r"got nan"),
        ({"include": [{**DOG, "color": "teal"}]}, r"include\[0\].color must be one of red, .*; got 'teal'"),
        ({"include": [{**DOG, "color": None}]}, r"color must be one of .*; got None"),
        ({"include": [{**DOG, "position": ["left of", 0]}]}, r"position must point at an earlier clause"),
        ({"include": [DOG, {"class": "cat", "count": 1, "position": ["left of", -1]}]}, r"0 to 0; got -1"),
        ({"include": [DOG, {"class": "cat", "count": 1, "position": ["near", 0]}]}, r"\[relation, index\]"),
        ({"include": [DOG, {"class": "cat", "count": 1, "position": "left of"}]}, r"position must be a list"),
        ({"include": [DOG, {**DOG, "color": "red"}]}, r"two clauses about 'dog'"),
        ({"exclude": [{**DOG, "color": "red"}]}, r"exclude\[0\] has unknown keys \['color'\]"),
        ({"exclude": [DOG]}, r"both asks for 'dog' and excludes it"),
    ],
)
def test_what_cannot_be_read_is_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        parse_task(_prompt(**metadata), COCO_OBJECTS)
    assert "'p7'" in str(raised.value)
