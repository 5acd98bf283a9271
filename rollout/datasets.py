"""Where prompts come from: lines of text, JSON lines, Parquet, and what Hugging Face `datasets` saves; row by row.

pyarrow reads the last two, so the `datasets` package is not needed. `PromptFields` says which columns a prompt is
made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, cast

from pydantic import field_validator

from raylign.config import Config
from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024
_OWN_KEYS = {"id", "prompt", "metadata"}
"""Of our own JSON lines; any other key there is a slip."""


class PromptFields(Config):
    """Which columns of a data set make a prompt."""

    prompt: str = "prompt"
    """Column with the text given to the model."""
    template: str | None = None
    """Text with {column} places, instead of one column; a brace of its own is written twice."""
    answer: str | None = None
    """Column with the right answer, which rewards find as metadata `answer`."""
    id: str | None = None
    """Column with a name unique to each row; `id` where there is one, else the row's place, when not given."""
    keep: tuple[str, ...] | None = None
    """Other columns that go into the metadata; all of them when not given."""

    @field_validator("template")
    @classmethod
    def _template_has_places(cls, template: str | None) -> str | None:
        if template is not None:
            template_columns(template)
        return template


def template_columns(template: str) -> list[str]:
    """The columns that a template names. Raises ValueError for one without a place, or with more than names in it."""
    pieces = list(Formatter().parse(template))
    columns = [name for _, name, _, _ in pieces if name is not None]
    if any(spec or conversion for _, _, spec, conversion in pieces) or any(set(".[") & set(c) for c in columns):
        raise ValueError("a template's places are plain {column} names; write other braces twice")
    if not columns or not all(columns):
        raise ValueError("a template needs at least one {column}, and a name in each place")
    return columns


@dataclass(frozen=True, slots=True)
class Row:
    """A record, the default id of its prompt, and how errors name its place."""

    record: Mapping[str, Any]
    default_id: str
    where: str


def read_prompts(path: Path, fields: PromptFields) -> Iterator[Prompt]:
    """Every prompt of a file or folder, in order. Raises PromptError naming the first place that cannot be read."""
    if path.suffix == ".jsonl":
        own = fields == PromptFields()
        yield from (own_prompt(row) if own else prompt_of(row, fields) for row in _json_rows(path))
    elif path.suffix == ".parquet" or path.is_dir():
        yield from (prompt_of(row, fields) for row in _arrow_rows(path))
    elif fields != PromptFields():
        raise PromptError(
            f"{path} has no columns, but prompt fields are set; give a .jsonl, .parquet or data set folder"
        )
    else:
        yield from (Prompt(f"{path.stem}:{number}", line) for number, line in _lines(path))


def own_prompt(row: Row) -> Prompt:
    """A record of our own form: `prompt`, and optional `id` and `metadata`."""
    prompt = prompt_of(row, PromptFields())
    if unknown := set(row.record) - _OWN_KEYS:
        raise PromptError(
            f"{row.where}: unknown keys {sorted(unknown)}; put task data under metadata, or say in [prompts.fields] "
            "which columns to read"
        )
    return prompt


def prompt_of(row: Row, fields: PromptFields) -> Prompt:
    """The prompt that `fields` makes of a record; what it does not use goes into the metadata."""
    columns = [fields.prompt] if fields.template is None else template_columns(fields.template)
    texts = {column: _text(row, column) for column in columns}
    text = texts[fields.prompt] if fields.template is None else fields.template.format_map(texts)
    id_column = fields.id or "id"
    name = _cell(row, id_column) if fields.id or id_column in row.record else row.default_id
    used = {*columns, id_column, "metadata", fields.answer}
    kept = [key for key in row.record if key not in used] if fields.keep is None else fields.keep
    metadata = {**_metadata(row), **{key: _json_value(row, key) for key in kept}}
    if fields.answer is not None:
        metadata["answer"] = _json_value(row, fields.answer)
        if metadata["answer"] is None:
            raise PromptError(f"{row.where}: column {fields.answer!r} is empty; every row needs its answer")
    return Prompt(str(name), text, metadata)


def _cell(row: Row, column: str) -> Any:
    if column not in row.record:
        there = ", ".join(map(repr, row.record)) or "none"
        raise PromptError(f"{row.where}: no column {column!r}; there are {there}. Name yours in [prompts.fields]")
    return row.record[column]


def _text(row: Row, column: str) -> str:
    value = _cell(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise PromptError(f"{row.where}: column {column!r} must hold a text that is not blank, got {str(value)[:80]!r}")
    return str(value)


def _metadata(row: Row) -> Mapping[str, JsonValue]:
    """The record's own `metadata`, if it has any."""
    given = row.record.get("metadata", {})
    if not isinstance(given, Mapping):
        raise PromptError(f"{row.where}: metadata must be an object, got {str(given)[:80]}")
    return cast("Mapping[str, JsonValue]", given)


def _json_value(row: Row, column: str) -> JsonValue:
    value = _cell(row, column)
    if not _is_json(value):
        raise PromptError(
            f"{row.where}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, which no reward can be "
            "sent; list the columns that rewards read as `keep` in [prompts.fields]"
        )
    return value


def _is_json(value: Any) -> bool:
    match value:
        case None | bool() | int() | str():
            return True
        case float():
            return math.isfinite(value)
        case Mapping():
            return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
        case list() | tuple():
            return all(map(_is_json, value))
        case _:
            return False


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is neither blank nor a comment."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PromptError(f"cannot read the prompt file {path}: {error.strerror or error}") from None
    for number, raw in enumerate(lines, 1):
        if not raw.strip() or raw.lstrip().startswith(b"#"):
            continue
        try:
            yield number, raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise PromptError(
                f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from None


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise PromptError(f"{where}: must be an object, got {line[:80]!r}")
        yield Row(cast("dict[str, Any]", record), f"{path.stem}:{number}", where)


def _arrow_rows(path: Path) -> Iterator[Row]:
    for file in arrow_files(path):
        number = 0
        for batch in _batches(file):
            for record in batch.to_pylist():
                number += 1
                yield Row(record, f"{file.stem}:{number}", f"{file}, row {number}")


def arrow_files(path: Path) -> Sequence[Path]:
    """The files of a data set, in order: itself, those a `datasets` folder lists, or all Parquet files of one split."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise PromptError(f"{path} holds the splits {', '.join(splits)}; name one of them, such as {path / splits[0]}")
    state = path / "state.json"
    if state.is_file():
        listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        return [path / entry["filename"] for entry in listed]
    found = sorted(path.glob("*.parquet"))
    splits = sorted({file.stem.partition("-")[0] for file in found})
    if not found:
        raise PromptError(f"{path} is a folder without Parquet files, and none that `datasets` saved")
    if len(splits) > 1:
        raise PromptError(f"{path} holds Parquet files of {', '.join(splits)}; name one file, or a folder of one split")
    return found


def _batches(file: Path) -> Iterator[pa.RecordBatch]:  # type: ignore[reportUnknownParameterType]  # pyarrow has no types
    """Record batches of a Parquet file or an Arrow stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                yield from parquet.iter_batches(BATCH_ROWS)
        else:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                yield from stream
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise PromptError(f"cannot read the data set {file}: {reason}") from None
