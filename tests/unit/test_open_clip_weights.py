"""open_clip's file layout against a second implementation of its network, written from its description."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raylign.errors import ModelError
from rewards.vision.clip_model import ClipModel
from tests.tiny_clip import CONTEXT, SIDE, clip_folder, tokenizer
from tests.tiny_open_clip import OpenClip, random_open_clip


@pytest.fixture(scope="module")
def published() -> OpenClip:
    return random_open_clip()


@pytest.mark.parametrize("wrapper", ["state_dict", None])
def test_the_file_gives_the_published_networks_vectors(
    published: OpenClip, tmp_path: Path, wrapper: str | None
) -> None:
    state = published.state_dict()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    clip = ClipModel(str(file), processor_path=clip_folder("gelu"))

    image_HWC = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.tensor(((image_HWC / 255 - mean) / deviation).transpose(2, 0, 1)[None]).float()
    tokens = tokenizer()("a red cube")["input_ids"]
    padded = torch.tensor([[*tokens, *[0] * (CONTEXT - len(tokens))]])
    with torch.inference_mode():
        picture, text = published.visual(pixels)[0], published.encode_text(padded, len(tokens) - 1)[0]

    np.testing.assert_allclose(clip.embed_images([image_HWC])[0], picture / picture.norm(), atol=2e-6)
    np.testing.assert_allclose(clip.embed_texts(["a red cube"])[0], text / text.norm(), atol=2e-6)
    assert clip.logit_scale == pytest.approx(np.exp(3.0), rel=1e-6)


def test_the_activation_is_the_architectures(published: OpenClip, tmp_path: Path) -> None:
    """The same file under QuickGELU gives other vectors: the comparison above would notice."""
    torch.save(published.state_dict(), tmp_path / "w.pt")
    texts = [ClipModel(str(tmp_path / "w.pt"), processor_path=clip_folder(a)).embed_texts(["cube"]) for a in
             ("gelu", "quick_gelu")]  # fmt: skip
    assert np.abs(texts[0] - texts[1]).max() > 1e-4


def test_a_saved_causal_mask_is_no_weight(published: OpenClip, tmp_path: Path) -> None:
    torch.save(published.state_dict() | {"attn_mask": torch.zeros(CONTEXT, CONTEXT)}, tmp_path / "w.pt")
    ClipModel(str(tmp_path / "w.pt"), processor_path=clip_folder("gelu")).load()


def test_tensors_that_lack_or_fit_nothing_are_named(published: OpenClip, tmp_path: Path) -> None:
    state = dict(published.state_dict())
    state["region_predictor.weight"] = state.pop("visual.proj")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"missing: visual_projection.weight; 1 unknown: region_predictor.weight"):
        ClipModel(str(tmp_path / "w.pt"), processor_path=clip_folder("gelu")).load()
    torch.save(published.state_dict() | {"visual.proj": torch.zeros(32, 5)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"visual_projection.weight \(5, 32\), not \(768, 32\)"):
        ClipModel(str(tmp_path / "w.pt"), processor_path=clip_folder("gelu")).load()


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="is no file of tensors"):
        ClipModel(str(tmp_path / "w.pt"), processor_path=clip_folder("gelu")).load()
    assert not (tmp_path / "sprung").exists()
