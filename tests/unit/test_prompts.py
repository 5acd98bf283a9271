"""Prompt files name the file and line of what they cannot read; the stream is a function of its cursor."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.assets import resolve
from raylign.errors import PromptError
from raylign.types import Prompt
from rollout.prompts import PromptStream, load_prompts, refuse_overlap


def test_text_file_skips_blanks_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "signs.txt"
    path.write_text('# signs\na sign that says "ONE"\n\n  a sign that says "TWO"  \n')
    prompts = load_prompts(path)
    assert [(p.id, p.text) for p in prompts] == [
        ("signs:2", 'a sign that says "ONE"'),
        ("signs:4", 'a sign that says "TWO"'),
    ]


def test_jsonl_carries_ids_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "metadata": {"target": "X"}}\n{"prompt": "y"}\n')
    first, second = load_prompts(path)
    assert (first.id, first.metadata["target"], second.id) == ("a", "X", "tasks:2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "x"', "not valid JSON"),
        (b'{"text": "x"}', "no column 'prompt'; there are 'text'"),
        (b'{"prompt": " "}', "text that is not blank"),
        (b'["x"]', "must be an object"),
        (b'{"prompt": "x", "target": "X"}', "unknown keys"),
        (b'{"prompt": "x", "metadata": 3}', "metadata must be an object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(PromptError, match=message) as raised:
        load_prompts(path)
    assert f"{path}, line 2" in str(raised.value)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="cannot read"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(PromptError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.txt")


def test_the_stream_visits_every_prompt_once_per_pass_and_needs_only_a_cursor() -> None:
    prompts = [Prompt(str(n), f"prompt {n}") for n in range(7)]
    stream = PromptStream(prompts, run_seed=3)
    tasks = [stream.task(n) for n in range(21)]
    for visit in range(3):
        one_pass = tasks[visit * 7 : visit * 7 + 7]
        assert {t.prompt.id for t in one_pass} == {p.id for p in prompts}
        assert {t.visit for t in one_pass} == {visit}
    assert [t.prompt.id for t in tasks[:7]] != [t.prompt.id for t in tasks[7:14]]
    assert PromptStream(prompts, run_seed=3).task(17) == tasks[17]
    assert [PromptStream(prompts, run_seed=4).task(n).prompt.id for n in range(7)] != [t.prompt.id for t in tasks[:7]]


def test_a_held_out_prompt_that_is_trained_on_is_named() -> None:
    train = [Prompt("a", "sort 1 2"), Prompt("b", "sort 2 1 ")]
    refuse_overlap(train, [Prompt("c", "sort 12")])
    with pytest.raises(PromptError, match=r"1 of 2 held-out prompts .*'sort  2 1' \(id 'd'\)"):
        refuse_overlap(train, [Prompt("c", "sort 3 1"), Prompt("d", "sort  2 1")])


def test_shipped_prompts_hold_out_what_they_say() -> None:
    folder = resolve("asset:glyphs")
    refuse_overlap(load_prompts(folder / "prompts_train.txt"), load_prompts(folder / "prompts_heldout.txt"))
