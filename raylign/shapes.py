"""The one legend of tensor-name suffixes, and the check that holds names to it.

    B  batch: samples of any prompts        C  channels
    P  prompts                              H  height, image or latent
    G  group: samples of one prompt         W  width, image or latent
    S  denoising steps (S1: S + 1 states)   L  sequence length
    N  items of a micro-batch               D  embedding width
    V  vocabulary

`x_BCHW` is a four-dimensional tensor: batch, channels, height, width. Scalars per item carry one letter
(`sigma_B`). A name without a suffix is a Python number or not a tensor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from raylign.errors import ShapeError

if TYPE_CHECKING:
    import torch

LEGEND = "BPGSCHWLNDV"
_AXIS = re.compile(rf"[{LEGEND}]1?")


def axes(name: str) -> tuple[str, ...]:
    """The axis letters of a suffixed name: `states_GS1CHW` gives ("G", "S1", "C", "H", "W")."""
    _, _, suffix = name.rpartition("_")
    letters = tuple(_AXIS.findall(suffix))
    if not suffix or "".join(letters) != suffix:
        raise ShapeError(f"{name!r} has no shape suffix; its letters must come from {LEGEND}")
    return letters


def check_shape(tensor: torch.Tensor, name: str, **sizes: int) -> torch.Tensor:
    """Return `tensor` if its rank fits the suffix of `name` and each given axis has its size.

    Example: `check_shape(x, "x_BCHW", C=16)`.
    Raises ShapeError with the shape got and the shape wanted.
    """
    letters = axes(name)
    wanted = tuple(sizes.get(letter) for letter in letters)
    got = tuple(tensor.shape)
    fits = len(got) == len(letters) and all(w is None or w == g for w, g in zip(wanted, got, strict=True))
    if not fits:
        spelled = ", ".join(f"{a}={w}" if w is not None else a for a, w in zip(letters, wanted, strict=True))
        raise ShapeError(f"{name} must be ({spelled}), got {got}")
    return tensor
