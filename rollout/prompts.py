"""Prompt files and the endless, stateless stream of prompts that a run walks through.

A `.txt` file has one prompt per line; a `.jsonl` file one object per line with `prompt` and optional `id` and
`metadata`. Blank lines and lines that start with `#` are skipped. `PromptFields` reads objects of any other form,
Parquet files and folders that `datasets` saved (rollout/datasets.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raylign.errors import PromptError
from raylign.keys import generator
from raylign.types import Prompt
from rollout.datasets import PromptFields, read_prompts


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One visit to one prompt. `sequence` is its place in the run; `visit` counts earlier passes over the file.

    learner_step: the step it is trained in, from 1; 0 for evaluation.
    """

    prompt: Prompt
    visit: int
    sequence: int
    learner_step: int = 0


class PromptStream:
    """Prompts in a seeded order, shuffled anew for each pass; task number n is the same in every process.

    Being a pure function of n, its whole state is a cursor, so a resumed run goes on exactly where it was.
    """

    def __init__(self, prompts: Sequence[Prompt], run_seed: int, groups_per_step: int = 1) -> None:
        if not prompts:
            raise PromptError("no prompts to train on: the prompt file is empty")
        self.prompts = tuple(prompts)
        self._run_seed = run_seed
        self._groups_per_step = groups_per_step
        self._order: tuple[int, list[int]] = (-1, [])

    def task(self, sequence: int) -> GroupTask:
        """The task at a place in the stream, counting from 0."""
        visit, place = divmod(sequence, len(self.prompts))
        if self._order[0] != visit:
            order = torch.randperm(len(self.prompts), generator=generator(self._run_seed, "prompt_order", visit))
            self._order = (visit, order.tolist())
        learner_step = sequence // self._groups_per_step + 1
        return GroupTask(self.prompts[self._order[1][place]], visit, sequence, learner_step)


def load_prompts(path: Path, fields: PromptFields = PromptFields()) -> list[Prompt]:  # noqa: B008  # it is frozen
    """Read a prompt file or data set. Raises PromptError naming the first place that cannot be read."""
    prompts = list(read_prompts(path, fields))
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"{path} has two prompts with the id {prompt.id!r}; ids must be unique")
        seen.add(prompt.id)
    if not prompts:
        raise PromptError(f"{path} holds no prompts; write one per line")
    return prompts


def refuse_overlap(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    """Raise PromptError if a held-out prompt is trained on; white space does not make two prompts different."""
    trained = {" ".join(prompt.text.split()) for prompt in train}
    shared = [prompt for prompt in heldout if " ".join(prompt.text.split()) in trained]
    if shared:
        raise PromptError(
            f"{len(shared)} of {len(heldout)} held-out prompts are training prompts too, the first is "
            f"{shared[0].text[:200]!r} (id {shared[0].id!r}); a score on them would measure memory"
        )
