"""ImageReward's file layout and formula against a second implementation of its network."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.errors import ModelError
from raylign.types import Prompt, RewardSample
from rewards.imagereward import ImageRewardConfig, ImageRewardReward
from rewards.vision.blip import MAX_TOKENS
from tests.reward_cases.learned import IMAGEREWARD as CONFIG
from tests.tiny_blip import SIDE, WORDS, Reference, imagereward_state

IMAGES_HWC = np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
TEXTS = ["a cat", "a red cube on a", "z"]
SAMPLES = [RewardSample(f"s{i}", Prompt(t, t), x) for i, (t, x) in enumerate(zip(TEXTS, IMAGES_HWC, strict=True))]


def _tokens(text: str) -> list[int]:
    """[CLS], the first letter of each word, its others with ##, [SEP]."""
    pieces = [letter if i == 0 else f"##{letter}" for word in text.split() for i, letter in enumerate(word)]
    return [WORDS.index(piece) for piece in ["[CLS]", *pieces[: MAX_TOKENS - 2], "[SEP]"]]


def _pixels(image_HWC: np.ndarray) -> torch.Tensor:
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.tensor(((image_HWC / 255 - mean) / deviation).transpose(2, 0, 1)[None])


def _values(config: ImageRewardConfig, samples=SAMPLES) -> list[float]:
    scores = asyncio.run(ImageRewardReward(config).score(samples))
    assert [score.error for score in scores] == [None] * len(samples)
    return [score.value for score in scores if score.value is not None]


def test_scores_are_the_published_networks_standardised() -> None:
    reference = Reference(imagereward_state())
    rated = [reference.rate(_tokens(text), _pixels(image)) for text, image in zip(TEXTS, IMAGES_HWC, strict=True)]
    assert np.ptp(rated) > 0.01
    expected = (np.array(rated) - 0.16717) / 1.03334
    np.testing.assert_allclose(_values(CONFIG), expected, atol=1e-5)


def test_a_batch_gives_the_same_scores_up_to_rounding() -> None:
    np.testing.assert_allclose(_values(CONFIG.model_copy(update={"batch_size": 2})), _values(CONFIG), atol=1e-5)


def test_a_long_prompt_is_cut_at_35_tokens_and_says_so() -> None:
    long = "a" * 50
    sample = RewardSample("s", Prompt("p", long), IMAGES_HWC[0])
    (score,) = asyncio.run(ImageRewardReward(CONFIG).score([sample]))
    expected = Reference(imagereward_state()).rate(_tokens(long), _pixels(IMAGES_HWC[0]))
    assert score.value == pytest.approx((expected - 0.16717) / 1.03334, abs=1e-5)
    assert score.details["truncated"] is True
    (fits,) = asyncio.run(ImageRewardReward(CONFIG).score([RewardSample("s", Prompt("p", "a" * 33), IMAGES_HWC[0])]))
    assert fits.details["truncated"] is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blip.visual_encoder.blocks.1.norm1.bias": None}, "1 tensors missing: encoder.layers.1.layer_norm1.bias"),
        ({"blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": None}, "crossattention.self.key.weight"),
        ({"mlp.layers.7.bias": None}, "1 tensors missing: layers.7.bias"),
        ({"blip.text_decoder.x": torch.zeros(1)}, "1 unknown: blip.text_decoder.x"),
        ({"blip.visual_encoder.patch_embed.proj.weight": None}, "no BLIP vision tower in it; download"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 9)}, r"layers.0.weight \(1024, 9\), not \(1024, 48\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, says: str, tmp_path: Path) -> None:
    state = imagereward_state() | change
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=says):
        ImageRewardReward(CONFIG.model_copy(update={"path": str(tmp_path / "w.pt")})).load()


def test_absent_files_are_named_when_loading(tmp_path: Path) -> None:
    (tmp_path / "med.json").write_text('{"hidden_size": 48}')
    for key, path, says in (
        ("path", "/none.pt", "no model file '/none.pt'; download ImageReward.pt"),
        ("config_path", "/none.json", "no model file '/none.json'; download"),
        ("config_path", str(tmp_path / "med.json"), r"is no med_config.json \(KeyError: 'intermediate_size'\)"),
        ("tokenizer_path", "/none", "no model directory '/none'; give .* BERT's tokenizer"),
    ):
        with pytest.raises(ModelError, match=says):
            ImageRewardReward(CONFIG.model_copy(update={key: path})).load()
