"""Pre-trains the embedded `shapes` model: a tiny SD3 that draws the coloured shapes it is asked for, not too well.

As for `glyphs`, clean pictures first and a short last stage on data as a web crawl has it. What that stage spoils,
reinforcement learning repairs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from raylign.models.tiny_sd3 import TinySD3Config, build_tiny_sd3
from raylign.pretrain.flow_training import (
    Batches,
    FlowTrainingConfig,
    OnProgress,
    StageConfig,
    save,
    stack_pictures,
    train_decoder,
    train_stage,
    train_vae,
)
from raylign.pretrain.shape_examples import SIDE, draw_example
from raylign.pretrain.shape_prompts import CHARACTERS, PROMPT_WORDS, write_prompt_files

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

VAE_FLAWED_SHARE = 0.3
"""The VAE must be able to show what the scraped stage teaches."""
MODEL = TinySD3Config(height=SIDE, width=SIDE, latent_channels=16, fine_decoder_blocks=1, max_prompt_tokens=12)
"""Corners of a few pixels need more latents and a sharper decoder than letters do."""
DECODER_NOISE = 0.2
"""On the latents, in their standard deviations, when the decoder is trained on alone."""


class ShapesStage(StageConfig):
    """One stretch of training, and which pictures it sees."""

    flawed_share: float = 0.0
    tidy: bool = True
    """Few layouts and colours where the prompt leaves them open."""


class ShapesConfig(FlowTrainingConfig):
    """Everything that decides the resulting weights; the defaults made the embedded model."""

    batch_size: int = 32
    decoder_steps: int = 2000
    model: TinySD3Config = MODEL
    stages: tuple[ShapesStage, ...] = (
        ShapesStage(name="varied", num_steps=2500, lr=1e-3, lr_end=1e-4, tidy=False),
        ShapesStage(name="tidy", num_steps=1200, lr=1e-3, lr_end=1e-4),
        ShapesStage(name="settled", num_steps=1600, lr=1e-3, lr_end=5e-5),
        ShapesStage(name="firm", num_steps=1800, lr=1e-3, lr_end=5e-5),
        ShapesStage(name="scraped", num_steps=200, lr=5e-4, lr_end=3e-4, warmup_steps=20, flawed_share=0.6),
    )


def pretrain(out_dir: Path, config: ShapesConfig, on_progress: OnProgress | None = None) -> dict[str, float]:
    """Trains from nothing and saves the pipeline directory with its prompt files; returns last losses and seconds."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # see shards.py
    progress = on_progress or (lambda *_: None)
    pipe = build_tiny_sd3(PROMPT_WORDS, CHARACTERS, config.seed, config.model)
    vae_batches = picture_batches((config.seed, 1), VAE_FLAWED_SHARE, config.batch_size, tidy=False)
    vae = cast("AutoencoderTiny", pipe.vae)
    summary = {"vae_loss": train_vae(vae, config, vae_batches, progress)}
    batches = picture_batches((config.seed, 4), VAE_FLAWED_SHARE, config.batch_size, tidy=False)
    summary["decoder_loss"] = train_decoder(vae, config, config.decoder_steps, DECODER_NOISE, batches, progress)
    for index, stage in enumerate(config.stages):
        batches = picture_batches((config.seed, 2, index), stage.flawed_share, config.batch_size, stage.tidy)
        summary[f"{stage.name}_loss"] = train_stage(pipe, config, stage, index, batches, progress)
    save(pipe, out_dir)
    write_prompt_files(out_dir)
    return summary | {"seconds": time.perf_counter() - started}


def picture_batches(key: tuple[int, ...], flawed_share: float, batch_size: int, tidy: bool = True) -> Batches:
    """Endless batches of prompts and pictures; held-out prompts never occur."""
    rng = np.random.default_rng(key)
    while True:
        examples = [draw_example(rng, flawed_share, tidy) for _ in range(batch_size)]
        yield [example.task.text for example in examples], stack_pictures([example.picture for example in examples])
