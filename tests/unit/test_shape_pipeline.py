"""The embedded `shapes` model: made reproducibly from nothing, and the trained one that is shipped."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import raylign
from raylign.models.tiny_sd3 import TinySD3Config, build_tiny_sd3
from raylign.pretrain.flow_training import stack_pictures, train_decoder
from raylign.pretrain.shape_examples import SIDE, draw_picture
from raylign.pretrain.shape_prompts import CHARACTERS, PROMPT_WORDS, TAGS, ShapeTask, split_tasks, write_prompt_files
from raylign.pretrain.shapes import ShapesConfig, ShapesStage, picture_batches, pretrain
from raylign.types import Prompt, RewardSample
from rewards.geneval import GenevalConfig, GenevalReward

SHAPES = Path(raylign.__file__).parent / "assets" / "shapes"
SMALL = TinySD3Config(height=SIDE, width=SIDE, num_layers=2, num_heads=2, head_dim=16, text_dim=32)
MEMBERS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shipped():
    from diffusers import StableDiffusion3Pipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = StableDiffusion3Pipeline.from_pretrained(SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rewards_of(tasks: list[ShapeTask], pictures: np.ndarray) -> list[float]:
    """The `geneval` reward of pictures B,H,W,3 in [0, 1]."""
    samples = [
        RewardSample(str(i), Prompt(str(i), task.text, task.metadata), (picture * 255).round().astype(np.uint8))
        for i, (task, picture) in enumerate(zip(tasks, pictures, strict=True))
    ]
    scores = asyncio.run(GenevalReward(GenevalConfig()).score(samples))
    return [score.value for score in scores if score.value is not None]


def test_pretraining_is_reproducible_and_reports_its_stages(tmp_path: Path) -> None:
    stages = (
        ShapesStage(name="clean", num_steps=2, lr=1e-3, lr_end=1e-4, warmup_steps=2),
        ShapesStage(name="scraped", num_steps=1, lr=1e-3, lr_end=1e-4, flawed_share=0.5),
    )
    config = ShapesConfig(batch_size=4, vae_steps=2, decoder_steps=1, model=SMALL, stages=stages)
    seen: list[tuple[str, int, int]] = []
    first = pretrain(tmp_path / "one", config, lambda name, step, total, _: seen.append((name, step, total)))
    second = pretrain(tmp_path / "two", config)
    assert seen == [
        ("vae", 1, 2),
        ("vae", 2, 2),
        ("decoder", 1, 1),
        ("clean", 1, 2),
        ("clean", 2, 2),
        ("scraped", 1, 1),
    ]
    assert first["scraped_loss"] == second["scraped_loss"]
    for member in MEMBERS:
        (one,), (two,) = ((tmp_path / run / member).glob("*.safetensors") for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert len((tmp_path / "one" / "prompts_heldout.jsonl").read_text().splitlines()) == 64


def test_training_the_decoder_leaves_the_latents_alone() -> None:
    config = ShapesConfig(batch_size=4, model=SMALL)
    vae = build_tiny_sd3(PROMPT_WORDS, CHARACTERS, 0, SMALL).vae
    images = next(picture_batches((1,), 0.0, 4))[1]

    def through() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = vae.encode(images).latents
            return latents, vae.decode(latents).sample

    latents, before = through()
    train_decoder(vae, config, 3, 0.2, picture_batches((2,), 0.0, 4), lambda *_: None)
    latents_after, after = through()
    assert torch.equal(latents, latents_after)
    assert not torch.equal(before, after)


def test_shipped_directory_is_small_and_holds_no_pickle() -> None:
    files = [path for path in SHAPES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 7_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md"}
    assert "torch_dtype" not in json.loads((SHAPES / "transformer" / "config.json").read_text())


def test_shipped_prompt_files_are_what_the_code_makes(tmp_path: Path) -> None:
    write_prompt_files(tmp_path)
    for name in ("prompts_train.jsonl", "prompts_heldout.jsonl"):
        assert (SHAPES / name).read_text() == (tmp_path / name).read_text()


def test_shipped_vae_gives_back_what_the_reward_reads(shipped) -> None:
    rng = np.random.default_rng(0)
    tasks = [task for tag in TAGS for task in split_tasks()[1][tag]]
    images = stack_pictures([draw_picture(rng, task.groups) for task in tasks])
    with torch.no_grad():
        latents = shipped.vae.encode(images).latents
        back = shipped.vae.decode(latents).sample
    scaled = (latents - shipped.vae.config.shift_factor) * shipped.vae.config.scaling_factor
    assert 0.5 < scaled.std().item() < 2.0
    read = rewards_of(tasks, (back.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    assert len(read) == len(tasks)
    assert np.mean(read) > 0.9


def test_shipped_pipeline_does_held_out_prompts_half_way(shipped) -> None:
    tasks = [task for tag in TAGS for task in split_tasks()[1][tag]]
    output = shipped(
        [task.text for task in tasks],
        num_inference_steps=6,
        guidance_scale=1.0,
        height=SIDE,
        width=SIDE,
        max_sequence_length=1,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    )
    assert output.images.shape == (64, SIDE, SIDE, 3)
    assert 0.3 < np.mean(rewards_of(tasks, output.images)) < 0.7
