"""Which words and numbers the embedded model is asked for: a training list and a held-out list.

Held-out targets are drawn neither in pre-training nor in reinforcement learning, so a score on them measures
spelling and not memory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from raylign.pretrain.glyph_pictures import (
    COLOURS,
    DIGITS,
    MAX_LENGTH,
    MIN_LENGTH,
    TEMPLATE_WORDS,
    TEMPLATES,
    prompt_for,
)
from raylign.pretrain.words import WORDS

NUM_HELD_OUT_WORDS, NUM_HELD_OUT_NUMBERS = 40, 24
NUM_TRAIN_NUMBERS = 160
SPLIT_SEED = 20260
"""Fixed, not a setting: a model and the prompts it is tested on must agree on what was held out."""


@cache
def split_targets() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(training targets, held-out targets): words and numbers, disjoint."""
    rng = np.random.default_rng(SPLIT_SEED)
    words = [word for word in WORDS if word.lower() not in TEMPLATE_WORDS]
    words = [words[i] for i in rng.permutation(len(words))]
    numbers: list[str] = []
    while len(numbers) < NUM_HELD_OUT_NUMBERS + NUM_TRAIN_NUMBERS:
        length = rng.integers(MIN_LENGTH, MAX_LENGTH + 1)
        number = "".join(DIGITS[i] for i in rng.integers(len(DIGITS), size=length))
        if number not in numbers:
            numbers.append(number)
    held_out = words[:NUM_HELD_OUT_WORDS] + numbers[:NUM_HELD_OUT_NUMBERS]
    train = words[NUM_HELD_OUT_WORDS:] + numbers[NUM_HELD_OUT_NUMBERS:]
    return tuple(train), tuple(held_out)


@cache
def held_out_targets() -> frozenset[str]:
    """What pre-training must never ask for nor draw."""
    return frozenset(split_targets()[1])


def make_prompts(targets: tuple[str, ...], seed: int) -> list[str]:
    """One prompt per target, colours and templates at random."""
    rng = np.random.default_rng((SPLIT_SEED, seed))
    order = [targets[i] for i in rng.permutation(len(targets))]
    colours = list(COLOURS)
    return [
        prompt_for(target, colours[rng.integers(len(colours))], int(rng.integers(len(TEMPLATES)))) for target in order
    ]


def write_prompt_files(out_dir: Path) -> None:
    """`prompts_train.txt` and `prompts_heldout.txt`, one prompt per line."""
    for name, targets, seed in zip(("train", "heldout"), split_targets(), (1, 2), strict=True):
        path = out_dir / f"prompts_{name}.txt"
        path.write_text("\n".join(make_prompts(targets, seed)) + "\n", encoding="utf-8")
