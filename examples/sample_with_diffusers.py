"""Draw from an exported picture model with diffusers alone; nothing of Raylign is imported.

raylign export runs/RUN my_model
python examples/sample_with_diffusers.py my_model 'a red sign that says "KITE"' --height 24 --width 80
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what `raylign export` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    pipeline: Any = DiffusionPipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        options.prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    picture.save(options.out)
    print(f"{options.out}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
