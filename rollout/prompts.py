"""Prompt files and the endless, stateless stream of prompts that a run walks through.

A `.txt` file has one prompt per line; a `.jsonl` file one object per line with `prompt` and optional `id` and
`metadata`. Blank lines and lines that start with `#` are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raylign.errors import PromptError
from raylign.keys import generator
from raylign.types import Prompt

_JSON_KEYS = {"id", "prompt", "metadata"}


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One visit to one prompt. `sequence` is its place in the run; `visit` counts earlier passes over the file."""

    prompt: Prompt
    visit: int
    sequence: int


class PromptStream:
    """Prompts in a seeded order, shuffled anew for each pass; task number n is the same in every process.

    Being a pure function of n, its whole state is a cursor, so a resumed run goes on exactly where it was.
    """

    def __init__(self, prompts: Sequence[Prompt], run_seed: int) -> None:
        if not prompts:
            raise PromptError("no prompts to train on: the prompt file is empty")
        self.prompts = tuple(prompts)
        self._run_seed = run_seed
        self._order: tuple[int, list[int]] = (-1, [])

    def task(self, sequence: int) -> GroupTask:
        """The task at a place in the stream, counting from 0."""
        visit, place = divmod(sequence, len(self.prompts))
        if self._order[0] != visit:
            order = torch.randperm(len(self.prompts), generator=generator(self._run_seed, "prompt_order", visit))
            self._order = (visit, order.tolist())
        return GroupTask(self.prompts[self._order[1][place]], visit, sequence)


def load_prompts(path: Path) -> list[Prompt]:
    """Read a prompt file. Raises PromptError naming file and line of the first line that cannot be read."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PromptError(f"cannot read the prompt file {path}: {error.strerror or error}") from None
    prompts = [
        _parse_line(raw, path, number)
        for number, raw in enumerate(lines, 1)
        if raw.strip() and not raw.lstrip().startswith(b"#")
    ]
    seen: dict[str, int] = {}
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"{path} has two prompts with the id {prompt.id!r}; ids must be unique")
        seen[prompt.id] = 1
    if not prompts:
        raise PromptError(f"{path} holds no prompts; write one per line")
    return prompts


def _parse_line(raw: bytes, path: Path, number: int) -> Prompt:
    where = f"{path}, line {number}"
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    default_id = f"{path.stem}:{number}"
    if path.suffix != ".jsonl":
        return Prompt(default_id, line)
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise PromptError(f'{where}: must be an object with a non-empty "prompt", got {line[:80]!r}')
    if unknown := set(record) - _JSON_KEYS:
        raise PromptError(f"{where}: unknown keys {sorted(unknown)}; put task data under metadata")
    if not isinstance(record.get("metadata", {}), dict):
        raise PromptError(f"{where}: metadata must be an object, got {record['metadata']!r}")
    return Prompt(str(record.get("id", default_id)), record["prompt"], record.get("metadata", {}))
