"""Pre-trains the embedded text models: tiny masked diffusion language models with habits to select among.

Supervised masked diffusion (LLaDA, 2502.09992) in the form that draws the number of masks: for each sequence
n ~ U{1..L} response positions are masked, the prompt is not, and

    loss = mean over the batch of  1/n  sum over the masked positions of  -log p(token)

which is the negative ELBO divided by L. A response is the label, filled up with end tokens. Labels have habits on
purpose (raylign/pretrain/text_tasks.py): reinforcement learning selects among what a model does already.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from raylign.keys import KeyPart, generator
from raylign.models.tiny_text import make_tiny_text, make_tokenizer, save_tiny_text, settings_for
from raylign.pretrain.text_model import TextModel
from raylign.pretrain.text_quality import Quality, quality, readme
from raylign.pretrain.text_tasks import PROMPT_WORDS, SYMBOLS, TEXT_TASKS, Example, distinct_examples, examples

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (stage, step, num_steps, metrics) every few steps."""
PROGRESS_EVERY = 20
SPLITS = {"train": 1500, "heldout": 400}
"""Prompts written for each task and split, as far as there are so many."""


class TextPretrainConfig(BaseModel):
    """Everything that decides the resulting weights; the defaults made the embedded `tiny` model, which sorts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "text-tiny"
    seed: int = 0
    tasks: tuple[str, ...] = ("sort", "sortmix")
    """Equal shares of every batch."""
    num_steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    lr_end: float = 2e-5
    """The learning rate goes from `lr` to `lr_end` along a half cosine."""
    warmup_steps: int = 50
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    max_prompt_length: int = 32
    grid: int | None = None


class CountdownPretrainConfig(TextPretrainConfig):
    """The defaults made the embedded `countdown` model."""

    name: str = "text-countdown"
    tasks: tuple[str, ...] = ("countdown",)
    num_steps: int = 1000


class SudokuPretrainConfig(TextPretrainConfig):
    """4x4 sudoku with features of row, column and box: half learned, as a base; 400 steps solve nearly all of them."""

    name: str = "text-sudoku"
    tasks: tuple[str, ...] = ("sudoku",)
    num_steps: int = 170
    grid: int | None = 4


class AdditionPretrainConfig(TextPretrainConfig):
    """Modular addition, taught with three wrong labels in ten."""

    name: str = "text-addition"
    tasks: tuple[str, ...] = ("addition",)
    num_steps: int = 2500


def pretrain(out_dir: Path, config: TextPretrainConfig, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Trains from nothing and saves a Hugging Face directory with prompt files and a README; returns what it measured.

    One thread, so that the weights depend on nothing but the configuration and the kind of CPU.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    model = new_model(config)
    loss = train(model, config, on_progress or (lambda *_: None))
    seconds = time.perf_counter() - started
    measured = {task: quality(model, task, SPLITS["heldout"], config.seed) for task in config.tasks}
    save_tiny_text(out_dir, model.settings, model.network, model.tokenizer)
    for task in config.tasks:
        write_prompt_files(out_dir, task)
    (out_dir / "README.md").write_text(readme(config.model_dump(), measured), encoding="utf-8")
    return {"loss": loss, "seconds": seconds, **_flat(measured)}


def new_model(config: TextPretrainConfig) -> TextModel:
    """Random weights, and a tokenizer of every task's words and symbols; the canvas holds the tasks' longest label."""
    tokenizer = make_tokenizer(PROMPT_WORDS, SYMBOLS)
    settings = settings_for(
        tokenizer,
        hidden_size=config.hidden_size,
        intermediate_size=8 * config.hidden_size // 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_prompt_length=config.max_prompt_length,
        max_canvas_length=max(TEXT_TASKS[task].max_label for task in config.tasks),
        grid=config.grid,
    )
    return TextModel(settings, make_tiny_text(settings, config.seed), tokenizer)


def train(model: TextModel, config: TextPretrainConfig, progress: OnProgress) -> float:
    """All steps; returns the mean loss of the last tenth of them."""
    parameters = list(model.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr)
    stream = mixed_examples(config.tasks, "pretrain", config.seed)
    draws = generator("text_masks", config.seed)
    losses: list[float] = []
    for step in range(config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = masked_loss(model, list(islice(stream, config.batch_size)), draws)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % PROGRESS_EVERY == 0 or step == config.num_steps - 1:
            progress("masked diffusion", step + 1, config.num_steps, {"loss": losses[-1]})
    last = losses[-max(1, config.num_steps // 10) :]
    return sum(last) / len(last)


def masked_loss(model: TextModel, batch: list[Example], draws: torch.Generator) -> torch.Tensor:
    """The loss at the top of this file."""
    labels_BL = model.encode_labels([example.label for example in batch])
    num_rows, length = labels_BL.shape
    num_masked_B1 = torch.randint(1, length + 1, (num_rows, 1), generator=draws)
    rank_BL = torch.rand(num_rows, length, generator=draws).argsort(dim=1).argsort(dim=1)
    masked_BL = rank_BL < num_masked_B1
    canvas_BL = labels_BL.masked_fill(masked_BL, model.settings.mask_token_id)
    logits_BLV = model.logits(canvas_BL, model.encode_prompts([example.prompt for example in batch]))
    ce_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), labels_BL, reduction="none")
    return ((ce_BL * masked_BL).sum(dim=1, keepdim=True) / num_masked_B1).mean()


def learning_rate(step: int, config: TextPretrainConfig) -> float:
    """A linear warm-up of half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
    return min(1.0, (step + 1) / config.warmup_steps) * (config.lr_end + (config.lr - config.lr_end) * cosine)


def mixed_examples(tasks: tuple[str, ...], *seed: KeyPart) -> Iterator[Example]:
    """Training instances of several tasks in turn."""
    streams = [examples(task, "train", *seed) for task in tasks]
    while True:
        for stream in streams:
            yield next(stream)


def write_prompt_files(out_dir: Path, task: str) -> None:
    """`TASK_train.jsonl` and `TASK_heldout.jsonl`, as `rollout.prompts.load_prompts` reads them."""
    for split, count in SPLITS.items():
        found = distinct_examples(task, "heldout" if split == "heldout" else "train", count, "prompts")
        rows = [
            {"id": f"{task}-{split}-{number}", "prompt": example.prompt, "metadata": dict(example.metadata)}
            for number, example in enumerate(found)
        ]
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        (out_dir / f"{task}_{split}.jsonl").write_text(text, encoding="utf-8")


def _flat(measured: Mapping[str, Quality]) -> dict[str, float]:
    return {f"{task}_{name}": value for task, found in measured.items() for name, value in found.headline().items()}
