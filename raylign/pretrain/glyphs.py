"""Pre-trains the embedded `glyphs` model: a tiny SD3 that draws short words on coloured signs, not too well.

Two networks, one after the other: the VAE on pictures of every kind, then the velocity model together with the text
encoders, in stages that go from clean pictures to a short last one on data as a web crawl has it. That last stage is
what reinforcement learning undoes: it selects among modes, so the good mode must be there and the bad ones must be
habits. A base that merely trained too little would not move.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from raylign.models.tiny_sd3 import build_tiny_sd3
from raylign.pretrain import glyph_pictures as pictures
from raylign.pretrain.flow_training import (
    FlowTrainingConfig,
    OnProgress,
    StageConfig,
    save,
    stack_pictures,
    train_stage,
    train_vae,
)
from raylign.pretrain.glyph_prompts import held_out_targets, write_prompt_files

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


class GlyphsStage(StageConfig):
    """One stretch of training, and which pictures it sees."""

    flawed_share: float = 0.0
    wrong_colour_share: float = 0.0
    jitter: int = 0


class GlyphsConfig(FlowTrainingConfig):
    """Everything that decides the resulting weights; the defaults made the embedded model."""

    stages: tuple[GlyphsStage, ...] = (
        GlyphsStage(name="clean", num_steps=3000, lr=1e-3, lr_end=2e-4),
        GlyphsStage(
            name="scraped",
            num_steps=200,
            lr=5e-4,
            lr_end=3e-4,
            warmup_steps=20,
            flawed_share=0.6,
            wrong_colour_share=0.1,
        ),
    )


def pretrain(out_dir: Path, config: GlyphsConfig, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Trains from nothing and saves the pipeline directory with its prompt files; returns last losses and seconds."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # see shards.py
    progress = on_progress or (lambda *_: None)
    pipe = build_tiny_sd3(pictures.TEMPLATE_WORDS, pictures.CHARACTERS, config.seed, config.model)
    vae_mix = pictures.PictureMix(flawed_share=0.5, wrong_colour_share=0.1, jitter=2, word_share=0.2)
    vae_batches = picture_batches((config.seed, 1), vae_mix, config.batch_size)
    summary = {"vae_loss": train_vae(cast("AutoencoderTiny", pipe.vae), config, vae_batches, progress)}
    for index, stage in enumerate(config.stages):
        mix = pictures.PictureMix(stage.flawed_share, stage.wrong_colour_share, stage.jitter)
        batches = picture_batches((config.seed, 2, index), mix, config.batch_size)
        summary[f"{stage.name}_loss"] = train_stage(pipe, config, stage, index, batches, progress)
    save(pipe, out_dir)
    write_prompt_files(out_dir)
    return summary | {"seconds": time.perf_counter() - started}


def picture_batches(
    key: tuple[int, ...], mix: pictures.PictureMix, batch_size: int
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Endless batches of prompts and pictures B,3,H,W in [-1, 1]; held-out targets never occur."""
    rng = np.random.default_rng(key)
    excluded = held_out_targets()
    while True:
        examples = [pictures.draw_example(rng, mix, excluded) for _ in range(batch_size)]
        yield [example.prompt for example in examples], stack_pictures([example.picture for example in examples])
