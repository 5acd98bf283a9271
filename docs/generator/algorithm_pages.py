"""A page for each algorithm: its file's docstring, when to use it, its keys, and what was measured here."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from docs.generator.config_pages import Classes, key_table, section, tag
from docs.generator.text import table
from learner.algorithms import IMAGE_ALGORITHMS, TEXT_ALGORITHMS

_DOCS = Path(__file__).parents[1]
_PICTURES, _TEXTS = _DOCS / "benchmarks" / "image_algorithms.md", _DOCS / "benchmarks.md"

WHEN = {
    "nft": "The first choice for pictures: any sampler and few steps, no recorded trajectory, three forwards per "
    "trained level. Watch diversity: rewards that do not ask for variety lose it.",
    "crd": "Where the reward keeps rising but the pictures must stay near the base model: its anchor is to the guided "
    "base and weighs better samples more. Needs the exact group's mean, so whole groups per update.",
    "awm": "Where variety matters: it kept all of it here, at a reward that comes nearly as fast as by `nft`. Cheap "
    "like `nft`, with a penalty to a slow copy instead of a KL to the base.",
    "flow_grpo": "To compare with the literature, or when a clipped policy ratio and an exact on-policy check "
    "(ratio 1) are wanted. Needs a sampler with noise and stores every step.",
    "flow_grpo_fast": "`flow_grpo` in less training time: three steps of a random window are trained.",
    "grpo_guard": "`flow_grpo` where late steps are clipped on one side or rewards are over-optimised: ratios are "
    "centred and spread alike at every step.",
    "mix_grpo": "`flow_grpo` with noise in a sliding window only: just the window's steps are recorded and trained.",
    "dance_grpo": "Many rewards of different scale, or siblings that should share their first noise. It "
    "needed the most samples here.",
    "ddpo": "Ancestral chains of Stable Diffusion 1.5 and XL as published; with `kl_weight` above 0 it is DPOK.",
    "d1": "The first choice for texts: one forward per answer and update, and enough for tasks of selection.",
    "coupled_grpo": "Where a task needs new computation per prompt: it rose most on countdown. "
    "Three forwards per answer.",
    "unigrpo": "Several passes over each step's samples: every pass masks another share.",
    "wd1": "The cheapest in seconds, and without a ratio: nothing of the rollouts' policy is needed.",
    "spg": "Where answers that score badly must be pushed away without a ratio: they get an upper bound.",
    "espo": "Short answers whose tokens belong together: the whole answer is one action.",
    "diffpo": 'With learned entropy budgets (`sampler.budget = "learned"`): the paper\'s joint objective.',
    "gdpo": "Sequence-level ratios with little noise from few canvases, by quadrature.",
    "bgpo": "Many Monte-Carlo samples in the memory of one: each is a backward pass of its own.",
    "trajectory": "Answers written in few large steps by a model that must keep writing so. Lower the learning rate: "
    "scoring every step destroyed the policy on countdown at that of the other algorithms.",
    "just_grpo": "Rollouts from left to right, one token per call: the likelihood is exact. "
    "One forward per token: dear for long answers.",
}
"""One or two sentences for each algorithm: when it is the one to take. Figures are on the benchmark pages."""


def _rows(path: Path, kind: str) -> list[tuple[list[str], list[str]]]:
    """(head, row) of each line of a page's tables that is about this algorithm."""
    found: list[tuple[list[str], list[str]]] = []
    head: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [one.strip() for one in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif "algorithm" in head and cells[head.index("algorithm")].strip("`") == kind:
            found.append((head, cells))
    return found


def measured(kind: str, picture: bool) -> list[str]:
    """What the benchmark pages say of this algorithm."""
    page = "../benchmarks/image_algorithms.md" if picture else "../benchmarks.md#text-algorithms-side-by-side"
    tasks = ("glyphs", "shapes") if picture else ()
    found = _rows(_PICTURES if picture else _TEXTS, kind)
    lines = [
        "",
        "## Measured here",
        "",
        f"Hardware, command, what the columns are, and all the others: [benchmarks]({page}).",
    ]
    for number, (head, row) in enumerate(found):
        if picture and number < len(tasks):
            head, row = ["task", *head], [tasks[number], *row]
        keep = [place for place, name in enumerate(head) if name != "algorithm"]
        lines += ["", *table([head[place] for place in keep], [[row[place] for place in keep]])]
    return lines


def algorithm_page(config: type[Any]) -> str:
    """One algorithm's page."""
    kind = str(tag(config))
    picture = config in IMAGE_ALGORITHMS
    source = (inspect.getdoc(sys.modules[config.__module__]) or "").splitlines()
    found: Classes = {}
    fields = [(name, field) for name, field in config.model_fields.items() if name != "type"]
    lines = [f"# {kind}", "", f'`[algorithm] type = "{kind}"`, for {"pictures" if picture else "texts"}.']
    lines += [f"[All algorithms side by side](../algorithms.md#{'pictures' if picture else 'texts'})."]
    lines += ["", "## When", "", WHEN[kind], "", "## What it computes", "", "```text", *source, "```"]
    lines += ["", "## Keys and defaults", "", *key_table(fields, found)]
    for title, model in list(found.items()):
        lines += ["", f"### {title}", *section(model, found)]
    return "\n".join([*lines, *measured(kind, picture)]) + "\n"


def algorithm_pages() -> dict[str, str]:
    """Every algorithm's page, by path below `docs/`."""
    configs = [*IMAGE_ALGORITHMS, *TEXT_ALGORITHMS]
    return {f"algorithms/{tag(config)}.md": algorithm_page(config) for config in configs}
