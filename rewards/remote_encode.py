"""From samples to the bytes of a request, in either wire form. A sample that cannot be sent fails alone."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from pydantic import JsonValue, ValidationError
from pydantic_core import PydanticSerializationError

from raylign.types import RewardFailure, RewardSample
from rewards.images import ImageFormat, encode_image
from rewards.wire import REQUEST_PART, InlineImage, PartImage, RequestHead, ScoreSample, plain_json

Form = Literal["multipart", "json"]
_MIMES: dict[ImageFormat, Literal["image/png", "image/webp"]] = {"png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Samples as they are sent, in order, or why they cannot be; and the files beside the JSON."""

    samples: list[ScoreSample | RewardFailure] = field(default_factory=list[ScoreSample | RewardFailure])
    files: list[tuple[str, str, bytes]] = field(default_factory=list[tuple[str, str, bytes]])
    """Name, media type and content of each part."""

    @property
    def sent(self) -> list[ScoreSample]:
        """Those that can be sent."""
        return [sample for sample in self.samples if isinstance(sample, ScoreSample)]


def split(samples: Sequence[RewardSample], max_samples: int, max_bytes: int) -> list[Sequence[RewardSample]]:
    """Runs of samples of at most that many, and at most so many bytes of raw pixels and text; at least one each."""
    runs: list[Sequence[RewardSample]] = []
    start, num_bytes = 0, 0
    for place, sample in enumerate(samples):
        size = _raw_bytes(sample)
        if place > start and (place - start == max_samples or num_bytes + size > max_bytes):
            runs.append(samples[start:place])
            start, num_bytes = place, 0
        num_bytes += size
    return [*runs, samples[start:]] if samples else []


def encode(samples: Sequence[RewardSample], form: Form, image_format: ImageFormat) -> Encoded:
    """Every sample and its pictures as files. Ids that the wire does not take, or that repeat, become numbers."""
    ids = [sample.id for sample in samples]
    usable = len(set(ids)) == len(ids) and all(0 < len(sample_id) <= 200 for sample_id in ids)
    encoded = Encoded()
    for number, sample in enumerate(samples):
        try:
            wired, files = _encode_one(sample, sample.id if usable else str(number), number, form, image_format)
        except (UnicodeError, PydanticSerializationError):
            encoded.samples.append(RewardFailure("invalid_input", "the sample cannot be sent: its text is not Unicode"))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]
            encoded.samples.append(RewardFailure("invalid_input", f"the sample cannot be sent: {problem}"))
        except ValueError as error:
            encoded.samples.append(RewardFailure("invalid_input", f"the sample cannot be sent: {error}"))
        else:
            encoded.samples.append(wired)
            encoded.files.extend(files)
    return encoded


def body_of(request: RequestHead, files: Sequence[tuple[str, str, bytes]], form: Form) -> tuple[bytes, str]:
    """The request's bytes and their media type; the same bytes serve every attempt."""
    head = request.model_dump_json().encode()
    if form == "json":
        return head, "application/json"
    boundary = f"raylign-{uuid.uuid4().hex}"
    pieces: list[bytes] = []
    for name, mime, data in ((REQUEST_PART, "application/json", head), *files):
        disposition = f'form-data; name="{name}"; filename="{name}"'
        lines = f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: {mime}\r\n\r\n"
        pieces += [lines.encode(), data, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return b"".join(pieces), f"multipart/form-data; boundary={boundary}"


def _encode_one(
    sample: RewardSample, wire_id: str, number: int, form: Form, image_format: ImageFormat
) -> tuple[ScoreSample, list[tuple[str, str, bytes]]]:
    """Raises ValueError, of which pydantic's is one, for what the wire does not take."""
    mime = _MIMES[image_format]
    files: list[tuple[str, str, bytes]] = []
    images: list[InlineImage | PartImage] = []
    for view, image_HWC in enumerate(_images(sample)):
        data = encode_image(image_HWC, image_format)
        if form == "json":
            encoded = base64.b64encode(data).decode("ascii")
            images.append(InlineImage(encoding="base64", mime=mime, data=encoded))
        else:
            part = f"image-{number}-{view}"
            files.append((part, mime, data))
            images.append(PartImage(encoding="part", mime=mime, part=part))
    wired = ScoreSample(
        id=wire_id,
        group_id=sample.group_id,
        prompt=sample.prompt.text,
        metadata=cast("dict[str, JsonValue]", plain_json(sample.prompt.metadata, as_is=True)),
        image=images[0] if len(images) == 1 else None,
        images=tuple(images) if len(images) > 1 else None,
        text=sample.text,
        reference=sample.reference,
        seed=sample.seed,
    )
    wired.model_dump_json(exclude={"image", "images"})  # half of a surrogate pair passes until it is written
    return wired, files


def _images(sample: RewardSample) -> list[np.ndarray]:
    return [] if sample.image_HWC is None else [sample.image_HWC, *sample.more_images_HWC]


def _raw_bytes(sample: RewardSample) -> int:
    return sum(image_HWC.nbytes for image_HWC in _images(sample)) + len(sample.text or "") + len(sample.prompt.text)
