"""Score pictures by a running reward service.

raylign serve-rewards rewards_cpu
python examples/reward_client.py docs/images/sign.png --prompt 'a sign that says "HELLO"'
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import numpy as np
from PIL import Image

from raylign.types import Prompt, RewardSample
from rewards.remote import RewardClient


async def score(url: str, prompt: str, paths: list[Path]) -> None:
    """Print one line per picture and reward: a value, or the error in its place."""
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    samples = [RewardSample(path.name, Prompt("p", prompt), image) for path, image in zip(paths, pictures, strict=True)]
    async with RewardClient(url) as client:  # retries, and a bound on what is in flight, are its business
        for path, breakdown in zip(paths, await client.score(samples), strict=True):
            for one in breakdown.scores:
                told = f"{one.value:.3f}" if one.value is not None else f"{one.error and one.error.code}"
                print(f"{path.name}  {one.name}  {told}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--prompt", required=True, help="what the pictures were drawn for")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service listens")
    options = parser.parse_args(arguments)
    asyncio.run(score(options.url, options.prompt, options.pictures))


if __name__ == "__main__":
    main()
