"""open_clip's network once more, written from its description: what its files must mean.

Names and shapes of the parameters are those of mlfoundations/open_clip; sizes are those of `tests.tiny_clip`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tests.tiny_clip import CONTEXT, EMBEDDING, LETTERS, SIDE, scratch_folder

PATCH = 8


class Block(nn.Module):
    """Pre-norm attention and a GELU perceptron, under open_clip's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads=2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 96), "c_proj": nn.Linear(96, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def tower(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList([Block(width), Block(width)])})


def run(blocks: nn.ModuleDict, x: Tensor, mask: Tensor | None = None) -> Tensor:
    for block in blocks["resblocks"].children():
        x = block(x, mask)
    return x


class Visual(nn.Module):
    """The vision tower: patches, a class token first, a projection of what becomes of it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((SIDE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = tower(width)
        self.proj = nn.Parameter(torch.empty(width, EMBEDDING))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(run(self.transformer, x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Both towers; texts are padded with 0 and read causally, the end token's place is projected."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = tower(width)
        self.token_embedding = nn.Embedding(2 + 2 * len(LETTERS), width)
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens: Tensor, end: int) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        return self.ln_final(run(self.transformer, x, mask))[:, end] @ self.text_projection


def random_open_clip() -> OpenClip:
    """Weights larger than at the start of training, so that nothing is lost in rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = OpenClip()
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.data.normal_(0.0, 0.2)
    return model.eval()


@functools.cache
def open_clip_file() -> str:
    """A file as HPSv2 publishes it: the weights under "state_dict"."""
    file = scratch_folder() / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": random_open_clip().state_dict()}, file)
    return str(file)
