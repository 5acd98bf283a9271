"""From the files of a request to samples for the backend; a picture that cannot be read costs its sample only."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import numpy as np

from raylign.types import Prompt, RewardFailure, RewardSample
from rewards.images import decode_image
from rewards.wire import Candidate, InlineImage, PartImage, ScoreGroupRequest, ScoreRequest, ScoreSample
from services.reward_api.refusals import ApiError, malformed
from services.reward_config import ServiceConfig


def samples_of(wire: ScoreRequest | ScoreGroupRequest) -> list[ScoreSample]:
    """The samples, or a group's candidates as samples of one prompt."""
    if isinstance(wire, ScoreRequest):
        return list(wire.samples)
    return [_as_sample(candidate, wire) for candidate in wire.candidates]


def check_parts(samples: Sequence[ScoreSample], parts: Mapping[str, bytes]) -> None:
    """Raise ApiError 400 unless the parts that are sent are those that samples name."""
    named = {image.part: sample.id for sample in samples for image in sample.all_images if isinstance(image, PartImage)}
    for part in named.keys() - parts.keys():
        raise malformed(f"sample {named[part]!r} names the part {part!r}, which is not sent")
    unused = sorted(parts.keys() - named.keys())
    if unused:
        raise malformed(f"no sample names the part(s) {', '.join(unused[:10])}")


def read_samples(
    samples: Sequence[ScoreSample], parts: Mapping[str, bytes], limits: ServiceConfig
) -> list[RewardSample | RewardFailure]:
    """Each sample with its pictures decoded, or why they are not. Raises ApiError 413 for too many pixels in all."""
    num_pixels = 0
    read: list[RewardSample | RewardFailure] = []
    for sample in samples:
        pictures: list[np.ndarray] = []
        problem: RewardFailure | None = None
        for image in sample.all_images:
            picture = _decode(image, parts, limits.max_image_pixels)
            if isinstance(picture, RewardFailure):
                problem = picture
                break
            num_pixels += picture.shape[0] * picture.shape[1]
            if num_pixels > limits.max_request_pixels:
                message = f"a request may have {limits.max_request_pixels} pixels in all; send fewer samples at once"
                raise ApiError(413, "too_large", message)
            pictures.append(picture)
        read.append(problem or _reward_sample(sample, pictures))
    return read


def _as_sample(candidate: Candidate, wire: ScoreGroupRequest) -> ScoreSample:
    # Nothing to validate again: candidate and request have been.
    return ScoreSample.model_construct(
        **dict(candidate),
        prompt=wire.prompt,
        metadata=wire.metadata,
        reference=wire.reference,
        group_id=wire.request_id or "group",
    )


def _decode(image: InlineImage | PartImage, parts: Mapping[str, bytes], max_pixels: int) -> np.ndarray | RewardFailure:
    if isinstance(image, PartImage):
        data = parts[image.part]
    else:
        try:
            data = base64.b64decode(image.data, validate=True)
        except (binascii.Error, ValueError):
            return RewardFailure("invalid_input", "the image is not valid base64 (standard alphabet, padded, one line)")
    return decode_image(data, image.mime, max_pixels, image.sha256, image.width, image.height)


def _reward_sample(sample: ScoreSample, pictures: Sequence[np.ndarray]) -> RewardSample:
    return RewardSample(
        id=sample.id,
        prompt=Prompt(sample.group_id or sample.id, sample.prompt, sample.metadata),
        image_HWC=pictures[0] if pictures else None,
        text=sample.text,
        seed=sample.seed,
        reference=sample.reference,
        group_id=sample.group_id,
        more_images_HWC=tuple(pictures[1:]),
    )
