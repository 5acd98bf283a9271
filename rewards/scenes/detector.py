"""Mask2Former through transformers, read as the official evaluation reads mmdetection's.

The library's own post-processing is not used: it thresholds masks at 384x384 whatever the picture's shape, knows
nothing of the padding, and returns no boxes. Here, after mmdet 2.x (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco):

    picture ── bilinear by OpenCV, ratio kept, to fit 1333x800 ── ImageNet mean and deviation
            ── padded with 0 at right and bottom to multiples of 32 ── model
    class logits ── softmax, best `num_queries` of all (query, class) pairs, "no object" left out
    mask logits ── bilinear to the padded size ── padding cut ── bilinear to the picture's size ── > 0
    score = class probability × mean of sigmoid(mask logits) inside the mask;  empty masks are dropped
    box = [left, top, right + 1, bottom + 1] of the mask

That boxes equal those of mmdet's weights on the same pictures is not shown.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raylign.config import Config
from raylign.errors import ModelError
from rewards.scenes.rules import Detection, box_of
from rewards.scenes.task import COCO_OBJECTS
from rewards.vision import checkpoints

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

VERSION = "1"
"""Counts changes to how a picture is prepared or the model's output is read."""
LONGEST, SHORTEST = 1333, 800
"""The picture is made as large as fits with its longer and its shorter side."""
DIVISOR = 32
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's, of RGB from 0 to 255."""


class Mask2FormerConfig(Config):
    """Instance segmentation of the 80 objects of COCO."""

    type: Literal["mask2former"] = "mask2former"
    path: str = "facebook/mask2former-swin-small-coco-instance"
    """Checkpoint: a directory in the layout of transformers, or a name on the model hub."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda or cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model; in bfloat16 objects near a threshold may come or go."""


class Mask2FormerDetector:
    """One picture at a time, so that nothing depends on its neighbours; calls from several threads wait."""

    names: Sequence[str] = COCO_OBJECTS

    def __init__(self, config: Mask2FormerConfig) -> None:
        self.fingerprint = ""
        libraries = checkpoints.library_versions("torch", "transformers", "opencv-python-headless")
        place = f"{config.dtype}-{config.device.partition(':')[0]}"
        self.version = f"mask2former-{VERSION}-{place}/{libraries}"
        self._config = config
        self._lock = threading.Lock()
        self._model: Any = None

    def load(self) -> None:
        """Read the checkpoint, unless it was. Raises ModelError with the path and the remedy."""
        with self._lock:
            self._load()

    def detect(self, image_HWC: npt.NDArray[np.uint8], threshold: float) -> list[Detection]:
        """The objects that score above the threshold."""
        import torch

        with self._lock, torch.inference_mode():
            self._load()
            pixels_1CHW, resized = prepare(image_HWC)
            output = self._model(pixel_values=pixels_1CHW.to(self._config.device, self._model.dtype))
            return read_instances(
                output.class_queries_logits[0].float(),
                output.masks_queries_logits[0].float(),
                padded=(pixels_1CHW.shape[2], pixels_1CHW.shape[3]),
                resized=resized,
                picture=(image_HWC.shape[0], image_HWC.shape[1]),
                threshold=threshold,
            )

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        from transformers import Mask2FormerForUniversalSegmentation

        remedy = "give the directory or hub name of a checkpoint such as facebook/mask2former-swin-small-coco-instance"
        directory = checkpoints.find_directory(self._config.path, remedy)
        try:
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{str(directory)!r} is no Mask2Former that transformers can read: {error}") from error
        model, info = loaded
        missing, unexpected = (
            {key for key in info[kind] if not _is_derived(key)} for kind in ("missing_keys", "unexpected_keys")
        )
        checkpoints.check_complete(directory, missing, unexpected)
        if model.config.num_labels != len(COCO_OBJECTS):
            raise ModelError(
                f"{str(directory)!r} tells {model.config.num_labels} classes apart, not the {len(COCO_OBJECTS)} "
                f"of COCO instance segmentation; {remedy}"
            )
        model.requires_grad_(False)
        self._model = model.to(self._config.device, getattr(torch, self._config.dtype)).eval()
        self.fingerprint = checkpoints.hash_files(checkpoints.described_by(directory))


def fitted(height: int, width: int) -> tuple[int, int]:
    """Height and width of the picture as the model sees it, before padding."""
    scale = min(LONGEST / max(height, width), SHORTEST / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def prepare(image_HWC: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The model's input, (1, 3, H, W) with H and W multiples of 32, and the size of the picture inside it."""
    import cv2
    import torch

    height, width = fitted(*image_HWC.shape[:2])
    resized = cv2.resize(image_HWC, (width, height), interpolation=cv2.INTER_LINEAR)
    normal = (np.asarray(resized, np.float32) - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
    padded = np.zeros((-(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR, 3), np.float32)
    padded[:height, :width] = normal
    return torch.from_numpy(padded).permute(2, 0, 1)[None].contiguous(), (height, width)


def read_instances(
    class_logits_QK: torch.Tensor,
    mask_logits_QHW: torch.Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    picture: tuple[int, int],
    threshold: float,
) -> list[Detection]:
    """The objects in a model's output for one picture.

    class_logits_QK: one row per query, "no object" last. mask_logits_QHW: at any size, covering the padded input.
    padded, resized, picture: heights and widths of the model's input, of the picture inside it, and of the picture.
    """
    probabilities_QK = class_logits_QK.softmax(-1)[:, :-1]
    num_queries, num_classes = probabilities_QK.shape
    best, places = probabilities_QK.flatten().topk(min(num_queries, num_queries * num_classes))
    detections: list[Detection] = []
    masks: dict[int, tuple[npt.NDArray[np.bool_], float]] = {}
    for probability, place in zip(best.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, num_classes)
        # A mask's confidence is at most 1, so these cannot pass; most queries end here, before the costly part.
        if probability <= threshold:
            break
        if query not in masks:
            masks[query] = _mask(mask_logits_QHW[query], padded, resized, picture)
        mask_HW, confidence = masks[query]
        if confidence * probability > threshold and mask_HW.any():
            detections.append(Detection(COCO_OBJECTS[label], confidence * probability, box_of(mask_HW), mask_HW))
    return detections


def _mask(
    logits_HW: torch.Tensor, padded: tuple[int, int], resized: tuple[int, int], picture: tuple[int, int]
) -> tuple[npt.NDArray[np.bool_], float]:
    """A query's mask in the picture, and the mean of its probabilities inside; 0 when it is empty."""
    from torch.nn.functional import interpolate

    whole = interpolate(logits_HW[None, None], size=padded, mode="bilinear", align_corners=False)
    inner = whole[..., : resized[0], : resized[1]]
    logits_HW = interpolate(inner, size=picture, mode="bilinear", align_corners=False)[0, 0]
    mask_HW = logits_HW > 0
    if not bool(mask_HW.any()):
        return mask_HW.cpu().numpy(), 0.0
    return mask_HW.cpu().numpy(), float(logits_HW[mask_HW].sigmoid().mean())


def _is_derived(key: str) -> bool:
    """Buffers that older files carry and the model computes itself; the loss's weights, which only training uses."""
    return key.endswith("relative_position_index") or key.startswith("criterion.")
