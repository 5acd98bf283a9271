"""CLIP through transformers on random weights: vectors, what cannot change them, and every way not to load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.errors import ModelError
from rewards.vision.clip_model import ClipModel
from tests.tiny_clip import CONTEXT, EMBEDDING, SIDE, clip_folder, clip_model, tokenizer

RNG = np.random.default_rng(0)
IMAGES_HWC = [RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(24, 80), (SIDE, SIDE), (3, 9), (90, 40)]]


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return ClipModel(clip_folder())


def test_vectors_are_the_models_own_scaled_to_length_one(clip: ClipModel) -> None:
    """One text and one picture of the model's size by hand: pixels / 255, less the mean, over the deviation."""
    model, words = clip_model(), tokenizer()
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = (IMAGES_HWC[1] / 255 - mean) / deviation
    with torch.inference_mode():
        text = model.get_text_features(**words("a cat", return_tensors="pt")).pooler_output
        picture = model.get_image_features(torch.tensor(pixels.transpose(2, 0, 1)[None]).float()).pooler_output
    np.testing.assert_allclose(clip.embed_texts(["a cat"]), text / text.norm(), atol=1e-6)
    np.testing.assert_allclose(clip.embed_images([IMAGES_HWC[1]]), picture / picture.norm(), atol=1e-6)
    assert clip.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert (clip.size, clip.image_size) == (EMBEDDING, SIDE)


def test_no_vector_depends_on_its_neighbours(clip: ClipModel) -> None:
    texts = ["a cat", "dog", "a cat", "something quite long"]
    np.testing.assert_array_equal(clip.embed_texts(texts), np.concatenate([clip.embed_texts([t]) for t in texts]))
    apart = np.concatenate([clip.embed_images([image]) for image in IMAGES_HWC])
    np.testing.assert_array_equal(clip.embed_images(IMAGES_HWC), apart)
    assert np.unique(apart, axis=0).shape[0] == len(IMAGES_HWC)


def test_a_batch_gives_the_same_vectors_up_to_rounding(clip: ClipModel) -> None:
    batched = ClipModel(clip_folder(), batch_size=3)
    np.testing.assert_allclose(batched.embed_images(IMAGES_HWC), clip.embed_images(IMAGES_HWC), atol=1e-6)


def test_a_long_text_is_cut_at_the_context_and_keeps_its_end(clip: ClipModel) -> None:
    fits, longer = "a" * (CONTEXT - 2), "a" * CONTEXT
    assert [clip.is_truncated(text) for text in (fits, longer, "")] == [False, True, False]
    # The last letter of a word is a token of its own, so the cut text ends in another letter than `fits`.
    cut = tokenizer()(longer, truncation=True, max_length=CONTEXT)["input_ids"]
    assert len(cut) == CONTEXT
    with torch.inference_mode():
        expected = clip_model().get_text_features(torch.tensor([cut])).pooler_output[0].numpy()
    np.testing.assert_allclose(clip.embed_texts([longer])[0], expected / np.linalg.norm(expected), atol=1e-6)


def test_nothing_gives_no_rows(clip: ClipModel) -> None:
    assert clip.embed_texts([]).shape == clip.embed_images([]).shape == (0, EMBEDDING)


def test_bfloat16_is_near_and_float32_comes_out(clip: ClipModel) -> None:
    half = ClipModel(clip_folder(), dtype="bfloat16")
    near = half.embed_images(IMAGES_HWC[:1])
    assert near.dtype == np.float32
    assert not np.array_equal(near, clip.embed_images(IMAGES_HWC[:1]))
    np.testing.assert_allclose(near, clip.embed_images(IMAGES_HWC[:1]), atol=0.02)


def test_the_fingerprint_is_of_the_content(clip: ClipModel, tmp_path: Path) -> None:
    clip.load()
    copy = Path(shutil.copytree(clip_folder(), tmp_path / "copy"))
    other, same = ClipModel(clip_folder(seed=1)), ClipModel(str(copy))
    assert same.fingerprint == ""
    for model in (other, same):
        model.load()
    assert clip.fingerprint == same.fingerprint != other.fingerprint
    cropped = copy / "preprocessor_config.json"
    cropped.write_text(cropped.read_text().replace('"do_center_crop": true', '"do_center_crop": false'))
    changed = ClipModel(str(copy))
    changed.load()
    assert changed.fingerprint != clip.fingerprint


def test_a_processor_may_live_elsewhere(clip: ClipModel, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(Path(clip_folder()) / name, weights)
    with pytest.raises(ModelError, match=r"weights' lacks a tokenizer or preprocessor_config.json .* processor_path"):
        ClipModel(str(weights)).load()
    elsewhere = ClipModel(str(weights), processor_path=clip_folder())
    np.testing.assert_array_equal(elsewhere.embed_texts(["cat"]), clip.embed_texts(["cat"]))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model directory '.*nowhere'; give the directory or hub name"):
        ClipModel(str(tmp_path / "nowhere")).load()
    with pytest.raises(ModelError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        ClipModel(str(tmp_path)).load()
    with pytest.raises(ModelError, match=r"there is no model file '.*x.pt'; download"):
        ClipModel(str(tmp_path / "x.pt"), processor_path=clip_folder()).load()


def test_preprocessing_may_be_written_in_the_old_way(clip: ClipModel, tmp_path: Path) -> None:
    """As openai/clip-vit-large-patch14 has it: sizes are one number, the class is called a feature extractor."""
    folder = Path(shutil.copytree(clip_folder(), tmp_path / "old"))
    old = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": SIDE}
    old |= {"crop_size": SIDE, "feature_extractor_type": "CLIPFeatureExtractor"}
    old |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    np.testing.assert_array_equal(ClipModel(str(folder)).embed_images(IMAGES_HWC), clip.embed_images(IMAGES_HWC))


def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(ModelError, match=r"device 'cuda:99' is not here: PyTorch sees \d+ CUDA devices; set device"):
        ClipModel(clip_folder(), device="cuda:99").load()


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(clip_folder(), tmp_path / "torn"))
    state = load_file(folder / "model.safetensors")
    state["stranger"] = state.pop("visual_projection.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors missing: visual_projection.weight; 1 unknown: stranger"):
        ClipModel(str(folder)).load()
