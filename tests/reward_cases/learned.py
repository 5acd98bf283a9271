"""Learned picture scorers on random checkpoints in their real file formats."""

import functools

import numpy as np
import torch

from raylign.types import Prompt, RewardSample
from rewards.aesthetic import AestheticConfig
from rewards.clip_score import ClipScoreConfig
from rewards.hps import HpsConfig
from rewards.imagereward import ImageRewardConfig
from rewards.pickscore import PickScoreConfig
from tests.reward_cases.case import Case
from tests.reward_cases.pictures import BAD_PICTURES, BLACK
from tests.tiny_blip import blip_tokenizer_folder, imagereward_files
from tests.tiny_clip import EMBEDDING, clip_folder, head_state, scratch_folder
from tests.tiny_open_clip import open_clip_file

CAT = Prompt("cat", "a red cat")
BAD_PROMPTS = [RewardSample("empty prompt", Prompt("q", ""), BLACK), RewardSample("blank", Prompt("q", " \n"), BLACK)]


def pictures(count: int) -> list[RewardSample]:
    """Pictures of noise of different brightness for two prompts, one of them longer than the tiny model reads."""
    images = np.random.default_rng(0).integers(0, 256, (count, 40, 64, 3), dtype=np.uint8)
    prompts = [CAT, Prompt("long", "a cat on a table beside a window")]
    return [RewardSample(f"s{i}", prompts[i % 2], image // (i + 1)) for i, image in enumerate(images)]


@functools.cache
def aesthetic_file() -> str:
    """The predictor's weights as published: ten tensors, by layer."""
    file = scratch_folder() / "linearMSE.pth"
    torch.save(head_state(EMBEDDING), file)
    return str(file)


CLIP_SCORE = ClipScoreConfig(path=clip_folder())
PICKSCORE = PickScoreConfig(path=clip_folder(), processor_path=None)
HPS = HpsConfig(path=open_clip_file(), base_path=clip_folder("gelu"))
WEIGHTS, SETTINGS = imagereward_files()
IMAGEREWARD = ImageRewardConfig(path=WEIGHTS, config_path=SETTINGS, tokenizer_path=blip_tokenizer_folder())
AESTHETIC = AestheticConfig(path=clip_folder(), head_path=aesthetic_file())
CASES = [
    Case(CLIP_SCORE, pictures, [*BAD_PICTURES, *BAD_PROMPTS], prompt=CAT),
    Case(PICKSCORE, pictures, [*BAD_PICTURES, *BAD_PROMPTS], prompt=CAT),
    Case(HPS, pictures, [*BAD_PICTURES, *BAD_PROMPTS], prompt=CAT),
    Case(IMAGEREWARD, pictures, [*BAD_PICTURES, *BAD_PROMPTS], prompt=CAT),
    Case(AESTHETIC, pictures, BAD_PICTURES, prompt=CAT),
]
