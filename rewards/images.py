"""Pictures to and from bytes. Decoding treats its input as hostile: allowed formats only, size before pixels."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

from raylign.types import RewardFailure

if TYPE_CHECKING:
    import numpy as np

FORMATS = {"image/png": "PNG", "image/webp": "WEBP", "image/jpeg": "JPEG"}
"""Pillow's name of each media type that is accepted. JPEG loses detail that rewards may see."""
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode_image(data: bytes, mime: str, max_pixels: int, sha256: str | None = None) -> np.ndarray | RewardFailure:
    """RGB uint8 (height, width, 3), turned upright as its EXIF says, or why not. Transparency is dropped."""
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
        return RewardFailure("invalid_input", f"the image has {len(data)} bytes that do not hash to its sha256")
    if mime not in FORMATS:
        return RewardFailure("invalid_input", f"image type {mime!r} is not one of {', '.join(FORMATS)}")
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=[FORMATS[mime]]) as image:
            width, height = image.size
            if width * height > max_pixels:
                return RewardFailure(
                    "invalid_input", f"the image has {width}x{height} pixels; at most {max_pixels} are read"
                )
            if getattr(image, "n_frames", 1) > 1:
                return RewardFailure("invalid_input", "the image is animated; send one frame")
            if image.mode not in _EIGHT_BIT_MODES:
                return RewardFailure("invalid_input", f"the image has pixels of kind {image.mode!r}; send 8-bit RGB")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)
    except Image.DecompressionBombError:
        return RewardFailure("invalid_input", f"the image has more pixels than the {max_pixels} that are read")
    except Exception:  # noqa: BLE001  a damaged file makes Pillow's plugins raise nearly anything; it is bad input
        return RewardFailure("invalid_input", f"the {len(data)} bytes are not a readable {FORMATS[mime]} image")


def encode_png(image_HWC: np.ndarray) -> bytes:
    """A lossless file of an RGB uint8 picture; lightly compressed, since it goes over a fast network once."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
