"""Mask2Former's output is read in the picture's own pixels: padding, ratio and scale undone, boxes as known."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from raylign.errors import ModelError
from rewards.scenes.detector import (
    DEVIATION,
    MEAN,
    Mask2FormerConfig,
    Mask2FormerDetector,
    fitted,
    prepare,
    read_instances,
)
from tests.tiny_clip import scratch_folder

DOG, TV = 16, 62
NUM_CLASSES = 80


def tiny_mask2former(num_labels: int = NUM_CLASSES) -> Any:
    """The published architecture, Swin backbone and all, a few thousand times smaller, with random weights."""
    from transformers import Mask2FormerConfig as Architecture
    from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

    backbone: Any = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=32
    )  # fmt: skip
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Architecture(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=12,
        id2label={i: f"LABEL_{i}" for i in range(num_labels)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mask2FormerForUniversalSegmentation(config).eval()


@functools.cache
def tiny_folder(num_labels: int = NUM_CLASSES) -> str:
    """That model as `save_pretrained` writes it."""
    folder = scratch_folder() / f"mask2former_{num_labels}"
    tiny_mask2former(num_labels).save_pretrained(folder)
    return str(folder)


def _class_logits(*rows: dict[int, float]) -> torch.Tensor:
    """Logits whose softmax gives each row's classes these probabilities, and "no object" the rest."""
    probabilities = torch.full((len(rows), NUM_CLASSES + 1), 1e-9)
    for row, given in zip(probabilities, rows, strict=True):
        row[NUM_CLASSES] = 1 - sum(given.values())
        for label, probability in given.items():
            row[label] = probability
    return probabilities.log()


def _mask_logits(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """A rectangle of +10 in -10 for each box [left, top, right, bottom]."""
    logits = torch.full((len(boxes), height, width), -10.0)
    for mask, (left, top, right, bottom) in zip(logits, boxes, strict=True):
        mask[top:bottom, left:right] = 10.0
    return logits


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),  # 800 / 512
        ((480, 640), (800, 1067)),  # 800 / 480 = 1.667, 640 * 1.667 = 1066.7
        ((1024, 2048), (667, 1333)),  # 1333 / 2048 = 0.651, 1024 * 0.651 = 666.5, rounded up
        ((1600, 800), (1333, 667)),  # 1333 / 1600 = 0.833, 800 * 0.833 = 666.5
    ],
)
def test_a_picture_is_fitted_as_mmdetection_does(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(*size) == expected


def test_the_input_is_normalised_and_padded_with_zero() -> None:
    colour = np.array([200, 100, 50], np.uint8)
    pixels, resized = prepare(np.broadcast_to(colour, (480, 640, 3)).copy())
    assert resized == (800, 1067)
    assert pixels.shape == (1, 3, 800, 1088)
    expected = (colour - np.array(MEAN)) / np.array(DEVIATION)
    np.testing.assert_allclose(pixels[0, :, 799, 1066], expected, rtol=1e-5)
    assert not pixels[..., 1067:].any()


def test_boxes_come_back_in_the_picture() -> None:
    # 60 x 100 (height x width), drawn twice as large inside a padded 128 x 224, masks at a quarter of that.
    # The mask's cells 5 to 9 by 10 to 19 are padded pixels 20..40 by 40..80, hence 10..20 by 20..40 in the picture.
    found = read_instances(
        _class_logits({DOG: 0.9}),
        _mask_logits(32, 56, (10, 5, 20, 10)),
        padded=(128, 224),
        resized=(120, 200),
        picture=(60, 100),
        threshold=0.3,
    )
    assert [one.name for one in found] == ["dog"]
    assert found[0].box == (20.0, 10.0, 40.0, 20.0)
    assert found[0].mask_HW is not None
    assert found[0].mask_HW.shape == (60, 100)
    assert found[0].mask_HW.sum() == 10 * 20


def test_a_mask_in_the_padding_is_no_object() -> None:
    # The picture's 100 columns end at cell 50 of 56.
    seen = functools.partial(
        read_instances, _class_logits({DOG: 0.9}), padded=(128, 224), resized=(120, 200), picture=(60, 100)
    )
    assert seen(_mask_logits(32, 56, (51, 0, 56, 32)), threshold=0.3) == []
    assert [one.box for one in seen(_mask_logits(32, 56, (40, 0, 56, 32)), threshold=0.3)] == [(80.0, 0.0, 100.0, 60.0)]


def test_the_score_is_class_probability_times_confidence_inside_the_mask() -> None:
    logits = torch.full((1, 8, 8), -4.0)
    logits[0, 2:6, 2:6] = 1.0
    sizes = {"padded": (8, 8), "resized": (8, 8), "picture": (8, 8)}
    found = read_instances(_class_logits({DOG: 0.8}), logits, **sizes, threshold=0.0)
    # sigmoid(1) = 0.7310586 in all of the mask; outside does not count.
    assert found[0].score == pytest.approx(0.8 * 0.7310586, rel=1e-5)
    assert read_instances(_class_logits({DOG: 0.8}), logits, **sizes, threshold=0.6) == []


def test_one_query_may_be_two_things_and_the_best_pairs_win() -> None:
    sizes = {"padded": (8, 8), "resized": (8, 8), "picture": (8, 8)}
    masks = _mask_logits(8, 8, (0, 0, 4, 4), (4, 4, 8, 8))
    # Two queries, so two pairs: dog and tv of the first; the second's 0.35 is third.
    found = read_instances(_class_logits({DOG: 0.5, TV: 0.4}, {DOG: 0.35}), masks, **sizes, threshold=0.3)
    assert [(one.name, one.box) for one in found] == [("dog", (0.0, 0.0, 4.0, 4.0)), ("tv", (0.0, 0.0, 4.0, 4.0))]
    assert read_instances(_class_logits({DOG: 0.9}), torch.full((1, 8, 8), -1.0), **sizes, threshold=0.3) == []


def test_a_shape_keeps_its_ratio_through_a_wide_picture() -> None:
    # A 512 x 256 picture (4 by 2 cells of 128 px), its lower right cell marked, sent the way the detector sends it.
    picture = (256, 512)
    resized = fitted(*picture)
    pixels, _ = prepare(np.zeros((*picture, 3), np.uint8))
    padded = (pixels.shape[2], pixels.shape[3])
    marked = torch.full((1, 1, *picture), -10.0)
    marked[..., 128:256, 384:512] = 10.0
    canvas = torch.full((1, 1, *padded), -10.0)
    canvas[..., : resized[0], : resized[1]] = interpolate(marked, size=resized, mode="bilinear", align_corners=False)
    logits = interpolate(canvas, size=(padded[0] // 4, padded[1] // 4), mode="bilinear", align_corners=False)[0]
    (found,) = read_instances(
        _class_logits({TV: 0.95}), logits, padded=padded, resized=resized, picture=picture, threshold=0.3
    )
    assert np.abs(np.array(found.box) - (384, 128, 512, 256)).max() <= 1


def test_a_tiny_model_sees_the_same_twice() -> None:
    detector = Mask2FormerDetector(Mask2FormerConfig(path=tiny_folder()))
    assert detector.fingerprint == ""
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    first, second = detector.detect(image, 0.0), detector.detect(image, 0.0)
    assert first
    assert len(first) <= 12
    assert [(one.name, one.score, one.box) for one in first] == [(one.name, one.score, one.box) for one in second]
    for one in first:
        assert 0 < one.score < 1
        assert one.mask_HW is not None
        assert one.mask_HW.shape == (40, 64)
    assert len(detector.fingerprint) == 64


def test_a_wrong_checkpoint_is_refused() -> None:
    with pytest.raises(ModelError, match="tells 133 classes apart, not the 80 of COCO"):
        Mask2FormerDetector(Mask2FormerConfig(path=tiny_folder(133))).load()
    with pytest.raises(ModelError, match="no model directory"):
        Mask2FormerDetector(Mask2FormerConfig(path="/nowhere/at/all")).load()
