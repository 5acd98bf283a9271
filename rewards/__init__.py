"""Rewards. To add one: a file with its config and class, and a row here.

Importing this reads no model library; engines import theirs when they are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.base import Reward, RewardConfig
from rewards.brightness import BrightnessConfig, BrightnessReward
from rewards.clip_score import ClipScoreConfig, ClipScoreReward
from rewards.code_tests import CodeTestsConfig, CodeTestsReward
from rewards.countdown import CountdownConfig, CountdownReward
from rewards.exact_answer import ExactAnswerConfig, ExactAnswerReward
from rewards.format_tags import FormatTagsConfig, FormatTagsReward
from rewards.geneval import GenevalConfig, GenevalReward
from rewards.glyph_pixels import GlyphPixelsConfig, GlyphPixelsReward
from rewards.hps import HpsConfig, HpsReward
from rewards.imagereward import ImageRewardConfig, ImageRewardReward
from rewards.jpeg import JpegConfig, JpegReward
from rewards.judging.r3_judge import R3Config
from rewards.math_answer import MathAnswerConfig, MathAnswerReward
from rewards.mix import RewardMix, check_names, mix
from rewards.ocr import OcrConfig, OcrReward
from rewards.palette import PaletteConfig, PaletteReward
from rewards.pickscore import PickScoreConfig, PickScoreReward
from rewards.r3 import R3Reward
from rewards.remote_reward import RemoteConfig, RemoteReward
from rewards.sharpness import SharpnessConfig, SharpnessReward
from rewards.sudoku import SudokuConfig, SudokuReward
from rewards.vlm_judge import VlmJudgeConfig, VlmJudgeReward

AnyRewardConfig = (
    OcrConfig
    | JpegConfig
    | GlyphPixelsConfig
    | PaletteConfig
    | SharpnessConfig
    | BrightnessConfig
    | GenevalConfig
    | ClipScoreConfig
    | PickScoreConfig
    | HpsConfig
    | ImageRewardConfig
    | AestheticConfig
    | CountdownConfig
    | SudokuConfig
    | ExactAnswerConfig
    | MathAnswerConfig
    | CodeTestsConfig
    | FormatTagsConfig
    | R3Config
    | RemoteConfig
    | VlmJudgeConfig
)  # fmt: skip
RewardUnion = Annotated[AnyRewardConfig, Field(discriminator="type")]
REWARDS = {
    OcrConfig: OcrReward,
    JpegConfig: JpegReward,
    GlyphPixelsConfig: GlyphPixelsReward,
    PaletteConfig: PaletteReward,
    SharpnessConfig: SharpnessReward,
    BrightnessConfig: BrightnessReward,
    GenevalConfig: GenevalReward,
    ClipScoreConfig: ClipScoreReward,
    PickScoreConfig: PickScoreReward,
    HpsConfig: HpsReward,
    ImageRewardConfig: ImageRewardReward,
    AestheticConfig: AestheticReward,
    CountdownConfig: CountdownReward,
    SudokuConfig: SudokuReward,
    ExactAnswerConfig: ExactAnswerReward,
    MathAnswerConfig: MathAnswerReward,
    CodeTestsConfig: CodeTestsReward,
    FormatTagsConfig: FormatTagsReward,
    R3Config: R3Reward,
    RemoteConfig: RemoteReward,
    VlmJudgeConfig: VlmJudgeReward,
}


def make_reward(config: AnyRewardConfig) -> Reward:
    """The reward a configuration describes; models are loaded by its `load` or first `score`."""
    return REWARDS[type(config)](config)  # type: ignore[arg-type]  # the table pairs them


def make_mix(configs: Sequence[AnyRewardConfig]) -> RewardMix:
    """The in-process scorer of a run's rewards. Raises ConfigError for no reward or a repeated name."""
    return RewardMix([(config, make_reward(config)) for config in configs])


__all__ = [
    "REWARDS",
    "AestheticConfig",
    "AestheticReward",
    "AnyRewardConfig",
    "BrightnessConfig",
    "BrightnessReward",
    "ClipScoreConfig",
    "ClipScoreReward",
    "CodeTestsConfig",
    "CodeTestsReward",
    "CountdownConfig",
    "CountdownReward",
    "ExactAnswerConfig",
    "ExactAnswerReward",
    "FormatTagsConfig",
    "FormatTagsReward",
    "GenevalConfig",
    "GenevalReward",
    "GlyphPixelsConfig",
    "GlyphPixelsReward",
    "HpsConfig",
    "HpsReward",
    "ImageRewardConfig",
    "ImageRewardReward",
    "JpegConfig",
    "JpegReward",
    "MathAnswerConfig",
    "MathAnswerReward",
    "OcrConfig",
    "OcrReward",
    "PaletteConfig",
    "PaletteReward",
    "PickScoreConfig",
    "PickScoreReward",
    "R3Config",
    "R3Reward",
    "RemoteConfig",
    "RemoteReward",
    "Reward",
    "RewardConfig",
    "RewardMix",
    "RewardUnion",
    "SharpnessConfig",
    "SharpnessReward",
    "SudokuConfig",
    "SudokuReward",
    "VlmJudgeConfig",
    "VlmJudgeReward",
    "check_names",
    "make_mix",
    "make_reward",
    "mix",
]
