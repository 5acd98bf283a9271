"""Scenes of plain shapes, right and wrong ones, for the GenEval reward."""

import numpy as np

from raylign.pretrain.shape_pictures import Group, compose, render
from raylign.types import Prompt, RewardSample
from rewards.geneval import GenevalConfig
from tests.reward_cases.case import Case
from tests.reward_cases.pictures import BAD_PICTURES, BLACK

PROMPT = Prompt(
    "g",
    "a photo of a red star left of a circle",
    {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1},
            {"class": "star", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
    },
)


def scenes(count: int) -> list[RewardSample]:
    """Pictures that fulfil the prompt more or less."""
    rng = np.random.default_rng(0)
    wanted = [
        [Group("circle"), Group("star", 1, "red", "left of", 0)],
        [Group("circle"), Group("star", 1, "blue", "left of", 0)],
        [Group("circle"), Group("star", 1, "red", "below", 0)],
        [Group("circle", 3), Group("star", 1, "red")],
        [Group("heart", 2)],
    ]
    pictures = [render(compose(rng, wanted[i % len(wanted)], 48, 64)) for i in range(count)]
    return [RewardSample(f"s{i}", PROMPT, picture) for i, picture in enumerate(pictures)]


BAD_TASKS = [
    RewardSample(name, Prompt("b", "a photo", metadata), BLACK)
    for name, metadata in {
        "no task": {},
        "unknown tag": {**PROMPT.metadata, "tag": "colour"},
        "unknown class": {"tag": "colors", "include": [{"class": "dragon", "count": 1}]},
        "no clauses": {"tag": "colors", "include": []},
        "count nan": {"tag": "colors", "include": [{"class": "star", "count": float("nan")}]},
    }.items()
]
CASES = [Case(GenevalConfig(), scenes, [*(bad for bad in BAD_PICTURES), *BAD_TASKS], prompt=PROMPT)]
