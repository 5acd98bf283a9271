"""Data sets of any form become prompts; a row that cannot is named with its file and the columns that are there."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import load_config
from raylign.errors import ConfigError, PromptError
from raylign.types import RewardSample
from rewards.math_answer import MathAnswerConfig, MathAnswerReward
from rollout.datasets import PromptFields
from rollout.prompts import load_prompts

ROWS = [
    {"question": "Tom has 6 boxes of 7. How many?", "answer": "6*7 = <<6*7=42>>42.\n#### 42", "level": 1},
    {"question": "And 8 of 9?", "answer": "#### 72", "level": 2},
]
GSM8K = PromptFields(template="{question}\nPut the answer in \\boxed{{}}.", answer="answer")
Rows = Sequence[Mapping[str, Any]]


def _jsonl(folder: Path, rows: Rows) -> Path:
    path = folder / "gsm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _parquet(folder: Path, rows: Rows, name: str = "gsm.parquet") -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    return folder / name


def _saved(folder: Path, rows: Rows) -> Path:
    """As `datasets.save_to_disk` leaves it: Arrow streams beside state.json, which says their order."""
    path = folder / "gsm"
    path.mkdir()
    files = [f"data-{i:05d}-of-{len(rows):05d}.arrow" for i in range(len(rows))]
    for row, file in zip(rows, files, strict=True):
        table = pa.Table.from_pylist([dict(row)])
        with pa.OSFile(str(path / file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def _folder(folder: Path, rows: Rows) -> Path:
    path = folder / "gsm"
    path.mkdir()
    for i, row in enumerate(rows):
        _parquet(path, [row], f"train-{i:05d}-of-{len(rows):05d}.parquet")
    return path


WRITERS = {"jsonl": _jsonl, "parquet": _parquet, "saved": _saved, "folder": _folder}


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_prompts(form: str, tmp_path: Path) -> None:
    prompts = load_prompts(WRITERS[form](tmp_path, ROWS), GSM8K)
    assert [prompt.text for prompt in prompts] == [
        str(row["question"]) + "\nPut the answer in \\boxed{}." for row in ROWS
    ]
    assert [dict(prompt.metadata) for prompt in prompts] == [
        {"answer": row["answer"], "level": row["level"]} for row in ROWS
    ]
    assert len({prompt.id for prompt in prompts}) == 2


def test_gsm8k_rows_are_what_the_math_reward_reads(tmp_path: Path) -> None:
    reward = MathAnswerReward(MathAnswerConfig(mode="gsm8k"))
    first, second = load_prompts(_parquet(tmp_path, ROWS), GSM8K)
    reward.check(first)
    samples = [RewardSample("a", first, text="<answer>42</answer>"), RewardSample("b", second, text="\\boxed{42}")]
    right, wrong = asyncio.run(reward.score(samples))
    reward.close()
    assert right.details["correct"] == 2.0
    assert wrong.details["correct"] == 0.0


def test_columns_named_for_prompt_answer_id_and_what_to_keep(tmp_path: Path) -> None:
    rows = [{"problem": "1+1", "solution": 2, "unique_id": "p1", "junk": dt.date(2026, 1, 1), "level": 3}]
    fields = PromptFields(prompt="problem", answer="solution", id="unique_id", keep=("level",))
    (prompt,) = load_prompts(_parquet(tmp_path, rows), fields)
    assert (prompt.id, prompt.text, dict(prompt.metadata)) == ("p1", "1+1", {"answer": 2, "level": 3})


def test_own_columns_of_a_parquet_file_need_no_fields(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "sort 2 1", "metadata": {"answer": "12"}}]
    (prompt,) = load_prompts(_parquet(tmp_path, rows))
    assert (prompt.id, prompt.text, dict(prompt.metadata)) == ("x", "sort 2 1", {"answer": "12"})


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "q"}, GSM8K, "no column 'answer'; there are 'question'"),
        ({"answer": "1", "q": "?"}, GSM8K, "no column 'question'; there are 'answer', 'q'"),
        ({"question": " ", "answer": "1"}, GSM8K, "'question' must hold a text that is not blank"),
        ({"question": None, "answer": "1"}, GSM8K, "'question' must hold a text that is not blank"),
        ({"question": "q", "answer": None}, GSM8K, "'answer' is empty"),
        ({"question": "q"}, PromptFields(prompt="question", id="uid"), "no column 'uid'"),
        ({"question": "q"}, PromptFields(prompt="question", keep=("level",)), "no column 'level'"),
        ({"question": "q", "metadata": 3}, PromptFields(prompt="question"), "metadata must be an object"),
    ],
)
def test_a_row_without_its_field_is_named(form: str, row: dict, fields: PromptFields, message: str, tmp_path: Path):
    with pytest.raises(PromptError) as raised:
        load_prompts(WRITERS[form](tmp_path, [row]), fields)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert ("line 1" if form == "jsonl" else "row 1") in str(raised.value)


@pytest.mark.parametrize("value", [b"\x89PNG", dt.date(2026, 1, 1), float("nan"), [1.0, float("inf")]])
def test_what_no_reward_can_be_sent_is_refused_until_left_out(value: object, tmp_path: Path) -> None:
    path = _parquet(tmp_path, [{"prompt": "q", "thing": value}])
    with pytest.raises(PromptError, match=r"row 1: column 'thing' holds .*`keep`"):
        load_prompts(path)
    assert load_prompts(path, PromptFields(keep=()))[0].metadata == {}


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _parquet(tmp_path, ROWS, f"{split}-00000-of-00001.parquet")
    with pytest.raises(PromptError, match="Parquet files of test, train; name one file"):
        load_prompts(tmp_path, GSM8K)
    assert len(load_prompts(tmp_path / "test-00000-of-00001.parquet", GSM8K)) == 2
    both = tmp_path / "both"
    both.mkdir()
    (both / "test").mkdir()
    (both / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(PromptError, match=r"holds the splits test; name one of them, such as .*both/test"):
        load_prompts(both, GSM8K)


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="a folder without Parquet files"):
        load_prompts(tmp_path)
    with pytest.raises(PromptError, match=r"cannot read the data set .*none\.parquet: .*No such file"):
        load_prompts(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(PromptError, match=r"cannot read the data set .*torn\.parquet"):
        load_prompts(tmp_path / "torn.parquet")
    saved = _saved(tmp_path, ROWS)
    (saved / "data-00001-of-00002.arrow").write_bytes(b"\xff\xff\xff\xff torn")
    with pytest.raises(PromptError, match=r"cannot read the data set .*data-00001-of-00002\.arrow"):
        load_prompts(saved, GSM8K)
    (tmp_path / "lines.txt").write_text("q\n")
    with pytest.raises(PromptError, match="has no columns, but prompt fields are set"):
        load_prompts(tmp_path / "lines.txt", GSM8K)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place", "at least one"),
        ("{}", "a name in each place"),
        ("{question.__class__}", "plain"),
        ("{question!r}", "plain"),
        ("{question", "expected '}'"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_when_read(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PromptFields, None, {"template": json.dumps(template)})


def test_text_in_a_column_is_never_a_template_itself(tmp_path: Path) -> None:
    rows = [{"question": "what is {answer}?", "answer": "42"}]
    (prompt,) = load_prompts(_jsonl(tmp_path, rows), PromptFields(template="Q: {question}", answer="answer"))
    assert prompt.text == "Q: what is {answer}?"
