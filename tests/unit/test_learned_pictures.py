"""The learned picture scorers around random checkpoints: their formulas by hand from the model's own vectors."""

import asyncio
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raylign.errors import ModelError, PromptError
from raylign.types import Prompt, RewardSample
from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.clip_score import ClipScoreConfig, ClipScoreReward
from rewards.hps import HpsConfig, HpsReward, letterbox
from rewards.pickscore import PickScoreConfig, PickScoreReward
from rewards.vision.clip_model import ClipModel
from rewards.vision.learned import HEAD_WIDTHS
from tests.reward_cases.learned import AESTHETIC, CLIP_SCORE, HPS, PICKSCORE, aesthetic_file, pictures
from tests.tiny_clip import CONTEXT, clip_folder, head_state

PAPER: Literal["clipscore_2.5"] = "clipscore_2.5"
SAMPLES = pictures(4)
IMAGES_HWC = [sample.image_HWC for sample in SAMPLES if sample.image_HWC is not None]


def _values(reward, samples=SAMPLES) -> list[float]:
    scores = asyncio.run(reward.score(samples))
    assert [score.error for score in scores] == [None] * len(samples)
    return [score.value for score in scores]


def _cosines(clip: ClipModel, images_HWC=IMAGES_HWC) -> np.ndarray:
    text_ND = clip.embed_texts([sample.prompt.text for sample in SAMPLES])
    return (text_ND.astype(float) * clip.embed_images(images_HWC)).sum(axis=1)


def test_clip_score_is_the_cosine_of_each_pair() -> None:
    cosines = _cosines(ClipModel(clip_folder()))
    assert (cosines > 0).any()
    np.testing.assert_allclose(_values(ClipScoreReward(CLIP_SCORE)), cosines, atol=1e-12)


def test_the_papers_clip_score_is_two_and_a_half_times_it_and_never_negative(tmp_path: Path) -> None:
    """Turning the projection of pictures round turns every cosine's sign."""
    folder = Path(shutil.copytree(clip_folder(), tmp_path / "turned"))
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] *= -1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    raw, turned = (
        np.array([_values(ClipScoreReward(ClipScoreConfig(path=path, scale=scale))) for scale in ("raw", PAPER)])
        for path in (clip_folder(), str(folder))
    )
    np.testing.assert_allclose(turned[0], -raw[0], atol=1e-12)
    for values in (raw, turned):
        np.testing.assert_allclose(values[1], 2.5 * np.maximum(values[0], 0), atol=1e-12)
    assert ClipScoreReward(ClipScoreConfig(scale=PAPER)).range == (0.0, 2.5)


def test_pickscore_is_scaled_by_what_the_checkpoint_learned() -> None:
    """The tiny model's scale is 1 / 0.07 = 14.2857."""
    cosines = _cosines(ClipModel(clip_folder()))
    raw = PickScoreReward(PICKSCORE.model_copy(update={"scale": "raw"}))
    np.testing.assert_allclose(_values(raw), cosines / 0.07, rtol=1e-4)
    np.testing.assert_allclose(_values(PickScoreReward(PICKSCORE)), cosines / 0.07 / 26, rtol=1e-4)


def test_hps_is_the_plain_cosine_of_the_letterboxed_picture() -> None:
    clip = ClipModel(HPS.path, processor_path=HPS.base_path)
    boxed = [letterbox(image, clip.image_size) for image in IMAGES_HWC]
    np.testing.assert_allclose(_values(HpsReward(HPS)), _cosines(clip, boxed), atol=1e-12)
    cropped = HpsReward(HPS.model_copy(update={"fit": "crop"}))
    np.testing.assert_allclose(_values(cropped), _cosines(clip), atol=1e-12)
    assert _values(cropped) != _values(HpsReward(HPS))


def test_a_letterbox_holds_the_whole_picture_in_its_middle() -> None:
    boxed = letterbox(np.full((20, 40, 3), 200, np.uint8), 32)
    assert boxed.shape == (32, 32, 3)
    assert not boxed[:8].any()
    assert not boxed[24:].any()
    assert (boxed[8:24] == 200).all()
    square = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(letterbox(square, 32), square)
    assert letterbox(np.full((1, 64, 3), 9, np.uint8), 32).any()


def test_the_aesthetic_score_is_five_linear_layers_on_the_unit_vector() -> None:
    """Without activations five layers are one: W5 W4 W3 W2 W1 x + what the biases become."""
    state = {name: tensor.double().numpy() for name, tensor in head_state(768).items()}
    matrix, offset = np.eye(768), np.zeros(768)
    for layer in (0, 2, 4, 6, 7):
        weight = state[f"layers.{layer}.weight"]
        matrix, offset = weight @ matrix, weight @ offset + state[f"layers.{layer}.bias"]
    assert matrix.shape == (HEAD_WIDTHS[-1], 768)
    image_ND = ClipModel(clip_folder()).embed_images(IMAGES_HWC)
    np.testing.assert_allclose(_values(AestheticReward(AESTHETIC)), image_ND @ matrix[0] + offset[0], atol=1e-5)


def test_the_aesthetic_score_needs_no_prompt() -> None:
    reward = AestheticReward(AESTHETIC)
    reward.check(Prompt("p", ""))
    assert _values(reward, [RewardSample("s", Prompt("p", ""), IMAGES_HWC[0])]) == _values(reward)[:1]


@pytest.mark.parametrize(
    "reward",
    [ClipScoreReward(CLIP_SCORE), PickScoreReward(PICKSCORE), HpsReward(HPS)],
    ids=lambda reward: reward.name,
)
def test_what_is_said_beside_the_value(reward) -> None:
    short, longer = asyncio.run(reward.score(SAMPLES[:2]))
    assert (short.details["truncated"], longer.details["truncated"]) == (False, True)
    assert len(SAMPLES[1].prompt.text.replace(" ", "")) > CONTEXT
    assert len(short.fingerprint) == 64
    with pytest.raises(PromptError, match="prompt 'p' is empty; give it the text"):
        reward.check(Prompt("p", " "))


def test_versions_tell_apart_what_scores_apart() -> None:
    def versions(**update) -> set[str]:
        return {ClipScoreReward(c).version for c in (CLIP_SCORE, CLIP_SCORE.model_copy(update=update))}

    assert "torch-" in next(iter(versions(weight=2.0)))
    assert len(versions(weight=2.0)) == 1
    for update in ({"scale": "clipscore_2.5"}, {"dtype": "bfloat16"}, {"device": "cuda:1"}, {"batch_size": 2}):
        assert len(versions(**update)) == 2


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save(head_state(512), tmp_path / "head.pth")
    with pytest.raises(ModelError, match=r"layers.0.weight \(1024, 512\), not \(1024, 768\)"):
        AestheticReward(AESTHETIC.model_copy(update={"head_path": str(tmp_path / "head.pth")})).load()


def test_the_heads_content_is_in_the_fingerprint(tmp_path: Path) -> None:
    torch.save({name: 2 * tensor for name, tensor in head_state(768).items()}, tmp_path / "linearMSE.pth")
    rewards = [
        AestheticReward(AestheticConfig(path=clip_folder(), head_path=path))
        for path in (aesthetic_file(), str(tmp_path / "linearMSE.pth"))
    ]
    for reward in rewards:
        reward.load()
    assert len({reward.fingerprint for reward in rewards} | {""}) == 3


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (ClipScoreReward(ClipScoreConfig(path="/none")), "no model directory '/none'; give the directory or hub name"),
        (PickScoreReward(PickScoreConfig(path="/none", processor_path=None)), "no model directory '/none'"),
        (HpsReward(HpsConfig(path="/none.pt", base_path=clip_folder())), "no model file '/none.pt'; download"),
        (
            AestheticReward(AestheticConfig(path=clip_folder(), head_path="/none.pth")),
            r"no model file '/none.pth'; download sac\+logos",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_absent_files_are_named_when_loading(reward, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        reward.load()


def test_a_model_that_gives_no_number_fails_the_sample(tmp_path: Path) -> None:
    torch.save(head_state(768) | {"layers.7.bias": torch.tensor([torch.nan])}, tmp_path / "head.pth")
    reward = AestheticReward(AESTHETIC.model_copy(update={"head_path": str(tmp_path / "head.pth")}))
    (score,) = asyncio.run(reward.score(SAMPLES[:1]))
    assert score.error is not None
    assert score.error.code == "model_error"
