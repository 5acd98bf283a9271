"""Trains a tiny SD3 from nothing: the VAE, then the velocity model together with the text encoders, in stages.

What the pictures show is the caller's: every function takes an endless iterator of (prompts, pictures) batches. A
stage depends on the weights it finds, on its batches and its place in the list, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict

from raylign.models.tiny_sd3 import VAE_FACTOR, TinySD3Config
from raylign.pretrain.null_tokens import train_with_null_tokens
from raylign.pretrain.shards import ShardedBackward

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with (stage, step, num_steps, metrics) every few steps."""
PROGRESS_EVERY = 20
Batches = Iterator[tuple[list[str], torch.Tensor]]
"""Endless prompts and pictures B,3,H,W in [-1, 1]."""


class StageConfig(BaseModel):
    """One stretch of velocity-model training; a task adds what its pictures are like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_steps: int
    lr: float
    lr_end: float
    """The learning rate goes from `lr` to `lr_end` along a half cosine."""
    warmup_steps: int = 100


class FlowTrainingConfig(BaseModel):
    """What decides the resulting weights besides pictures and stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    num_shards: int = 2
    """Threads that share a batch. More is no use on two cores; the number changes rounding, hence the weights."""
    batch_size: int = 64
    vae_steps: int = 1500
    vae_lr: float = 2e-3
    ema_decay: float = 0.995
    prompt_dropout: float = 0.08
    """Share of prompts replaced by the empty one, so that classifier-free guidance has its other half."""
    max_null_tokens: int = 256
    """The number of zero tokens after the prompt is drawn between 1 and this (diffusers' default is 256)."""
    model: TinySD3Config = TinySD3Config()


def save(pipe: StableDiffusion3Pipeline, out_dir: Path) -> None:
    """A diffusers directory; the transformer, which is nearly all of it, in half precision."""
    pipe.transformer.half()
    pipe.save_pretrained(out_dir, safe_serialization=True)
    pipe.transformer.float()


def stack_pictures(pictures: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Pictures H,W,3 as a batch B,3,H,W in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def train_vae(vae: AutoencoderTiny, config: FlowTrainingConfig, batches: Batches, progress: OnProgress) -> float:
    """Trains encoder and decoder, then records the latents' scale in the VAE's config; returns the last loss.

    Noise on the latents makes the decoder forgiving (six Euler steps land near a latent, not on it); the moment
    penalty keeps channels centred and of one size, since SD3 has one scale and one shift for all of them.
    """
    draws = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.vae_lr)
    backward = ShardedBackward(vae.parameters(), config.num_shards)
    loss = math.nan
    for step in range(config.vae_steps):
        set_lr(optimizer, cosine(step / config.vae_steps, config.vae_lr, config.vae_lr / 50))
        images = next(batches)[1].chunk(config.num_shards)
        noise_seed = int(torch.randint(2**62, (), generator=draws))
        loss = backward(lambda shard, images=images, seed=noise_seed: vae_loss(vae, images[shard], seed + shard))
        optimizer.step()
        report(progress, "vae", step, config.vae_steps, loss)
    with torch.no_grad():
        latents = torch.cat([encode_images(vae, next(batches)[1]) for _ in range(16)])
    vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())
    vae.requires_grad_(False)
    return loss


def train_decoder(
    vae: AutoencoderTiny,
    config: FlowTrainingConfig,
    num_steps: int,
    noise_std: float,
    batches: Batches,
    progress: OnProgress,
) -> float:
    """Trains the decoder alone, on latents with noise as a hurried sampler leaves it; returns the last loss.

    The encoder stays, hence also the latents that the velocity model learns: the two trainings need not wait for
    each other.
    """
    parameters = list(vae.decoder.requires_grad_(True).parameters())
    draws = torch.Generator().manual_seed(int(np.random.default_rng((config.seed, 5)).integers(2**62)))
    optimizer = torch.optim.Adam(parameters, lr=config.vae_lr)
    backward = ShardedBackward(parameters, config.num_shards)
    loss = math.nan
    for step in range(num_steps):
        warmup = min(1.0, (step + 1) / 50)
        set_lr(optimizer, warmup * cosine(step / num_steps, config.vae_lr, config.vae_lr / 50))
        images = next(batches)[1]
        with torch.no_grad():
            latents = encode_images(vae, images)
        noisy = latents + noise_std * torch.randn(latents.shape, generator=draws)
        shards = list(zip(noisy.chunk(config.num_shards), images.chunk(config.num_shards), strict=True))
        loss = backward(lambda shard, shards=shards: picture_loss(vae, *shards[shard]))
        optimizer.step()
        report(progress, "decoder", step, num_steps, loss)
    vae.requires_grad_(False)
    return loss


def picture_loss(vae: AutoencoderTiny, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """How far the pictures of raw latents are from pictures B,3,H,W in [-1, 1]."""
    errors = vae.decode(latents, return_dict=False)[0] - images
    return errors.square().mean() + 0.2 * errors.abs().mean()


def encode_images(vae: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Pictures B,3,H,W in [-1, 1] to raw latents B,C,H/4,W/4."""
    return vae.encode(images, return_dict=False)[0]


def vae_loss(vae: AutoencoderTiny, images: torch.Tensor, noise_seed: int) -> torch.Tensor:
    """Reconstruction of pictures B,3,H,W through noisy latents, plus the moment penalty."""
    latents = encode_images(vae, images)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(noise_seed))
    picture = picture_loss(vae, latents + 0.1 * noise, images)
    moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
    return picture + 0.05 * moments


def train_stage(
    pipe: StableDiffusion3Pipeline,
    config: FlowTrainingConfig,
    stage: StageConfig,
    index: int,
    batches: Batches,
    progress: OnProgress,
) -> float:
    """Flow matching through one stage, which leaves its averaged weights in `pipe`. Returns the last loss.

    Optimiser, average and draws start anew; the draws are keyed by the stage's place `index` in the list.
    """
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    backward = ShardedBackward(modules.parameters(), config.num_shards)
    average = {name: p.detach().clone() for name, p in modules.named_parameters()}
    draws = torch.Generator().manual_seed(int(np.random.default_rng((config.seed, 3, index)).integers(2**62)))
    loss = math.nan
    with train_with_null_tokens(pipe.transformer, config.max_null_tokens) as draw_num_null_tokens:
        for step in range(stage.num_steps):
            warmup = min(1.0, (step + 1) / stage.warmup_steps)
            set_lr(optimizer, warmup * cosine(step / stage.num_steps, stage.lr, stage.lr_end))
            draw_num_null_tokens(draws)
            prompts, images = next(batches)
            prompts = drop_prompts(prompts, config.prompt_dropout, draws)
            shards = FlowBatch.draw(pipe, prompts, images, draws).shards(config.num_shards)
            loss = backward(lambda shard, shards=shards: flow_loss(pipe, shards[shard]))
            torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            update_average(average, modules, config.ema_decay)
            report(progress, stage.name, step, stage.num_steps, loss)
    with torch.no_grad():
        for name, p in modules.named_parameters():
            p.copy_(average[name])
    modules.eval()
    return loss


@dataclass(frozen=True)
class FlowBatch:
    """What the velocity model trains on; everything random is drawn here, before the batch goes to threads."""

    images: torch.Tensor
    """B,3,H,W in [-1, 1]."""
    tokens: tuple[torch.Tensor, torch.Tensor]
    """B,L for each CLIP."""
    eps: torch.Tensor
    """Noise, in the shape of the latents."""
    t: torch.Tensor
    """B, uniform in [0, 1]; 1 is noise."""

    @classmethod
    def draw(
        cls, pipe: StableDiffusion3Pipeline, prompts: list[str], images: torch.Tensor, draws: torch.Generator
    ) -> FlowBatch:
        num, _, height, width = images.shape
        latent_shape = (num, pipe.transformer.config.in_channels, height // VAE_FACTOR, width // VAE_FACTOR)
        return cls(
            images=images,
            tokens=tokenize(pipe, prompts),
            eps=torch.randn(latent_shape, generator=draws),
            t=torch.rand(num, generator=draws),
        )

    def shards(self, num_shards: int) -> list[FlowBatch]:
        """Equal consecutive parts."""
        parts = zip(*(x.chunk(num_shards) for x in (self.images, *self.tokens, self.eps, self.t)), strict=True)
        return [FlowBatch(images, (one, two), eps, t) for images, one, two, eps, t in parts]


def flow_loss(pipe: StableDiffusion3Pipeline, batch: FlowBatch) -> torch.Tensor:
    """Mean squared error of the predicted velocity against eps - x0."""
    with torch.no_grad():
        latents = encode_images(cast("AutoencoderTiny", pipe.vae), batch.images)
        clean = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    states, pooled = encode_tokens(pipe, batch.tokens)
    t_wide = batch.t[:, None, None, None]
    velocity = pipe.transformer(
        hidden_states=(1 - t_wide) * clean + t_wide * batch.eps,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=1000 * batch.t,
        return_dict=False,
    )[0]
    return (velocity - (batch.eps - clean)).square().mean()


def drop_prompts(prompts: list[str], share: float, draws: torch.Generator) -> list[str]:
    """Every prompt is replaced by the empty one with probability `share`."""
    dropped = torch.rand(len(prompts), generator=draws) < share
    return ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]


def tokenize(pipe: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """B,L token ids for each of the two CLIPs."""
    one, two = (
        tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    )
    return one, two


def encode_tokens(
    pipe: StableDiffusion3Pipeline, tokens: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """SD3's prompt states B,L+1,D (the CLIPs side by side, then one zero token) and pooled vector B,D, with gradient.

    The pipeline's own `encode_prompt` with `max_sequence_length=1` gives the same numbers (tested).
    """
    outputs = [
        encoder(ids, output_hidden_states=True)
        for encoder, ids in zip((pipe.text_encoder, pipe.text_encoder_2), tokens, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.nn.functional.pad(states, (0, 0, 0, 1)), pooled


def report(progress: OnProgress, stage: str, step: int, num_steps: int, loss: float) -> None:
    """Calls `progress` now and then, and at the end of a stage."""
    if step % PROGRESS_EVERY == 0 or step == num_steps - 1:
        progress(stage, step + 1, num_steps, {"loss": loss})


def cosine(fraction: float, start: float, end: float) -> float:
    """Half a cosine from `start` at 0 to `end` at 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], modules: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of every parameter, in place."""
    live = dict(modules.named_parameters())
    for name, mean in average.items():
        mean.lerp_(live[name], 1 - decay)
