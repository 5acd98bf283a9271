"""Pictures to and from bytes. Decoding treats its input as hostile: allowed formats only, size before pixels."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any, Literal

from raylign.types import RewardFailure

if TYPE_CHECKING:
    import numpy as np

FORMATS = {"image/png": "PNG", "image/webp": "WEBP", "image/jpeg": "JPEG"}
"""Pillow's name of each media type that is accepted. JPEG loses detail that rewards may see."""
ImageFormat = Literal["png", "webp"]
"""What the client sends; both are lossless."""
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def decode_image(
    data: bytes,
    mime: str,
    max_pixels: int,
    sha256: str | None = None,
    width: int | None = None,
    height: int | None = None,
) -> np.ndarray | RewardFailure:
    """RGB uint8 (height, width, 3), turned upright as its EXIF says, or why not. Transparency is dropped.

    `sha256`, `width` and `height` are what the sender says of the file; a file that differs is refused.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
        return _refused(f"the image has {len(data)} bytes that do not hash to its sha256")
    if mime not in FORMATS:
        return _refused(f"image type {mime!r} is not one of {', '.join(FORMATS)}")
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with _open(data, mime) as image:
            got_width, got_height = image.size
            if got_width * got_height > max_pixels:
                return _refused(f"the image has {got_width}x{got_height} pixels; at most {max_pixels} are read")
            if (width or got_width, height or got_height) != image.size:
                said = f"{width or 'any'}x{height or 'any'}"
                return _refused(f"the image has {got_width}x{got_height} pixels, and is said to have {said}")
            if getattr(image, "n_frames", 1) > 1:
                return _refused("the image is animated; send one frame")
            if image.mode not in _EIGHT_BIT_MODES:
                return _refused(f"the image has pixels of kind {image.mode!r}; send 8-bit RGB")
            upright = ImageOps.exif_transpose(image)
            return np.array(upright if upright.mode == "RGB" else _to_rgb(upright), dtype=np.uint8)
    except Image.DecompressionBombError:
        return _refused(f"the image has more pixels than the {max_pixels} that are read")
    except Exception:  # noqa: BLE001  a damaged file makes Pillow's plugins raise nearly anything; it is bad input
        return _refused(f"the {len(data)} bytes are not a readable {FORMATS[mime]} image")


def encode_image(image_HWC: np.ndarray, image_format: ImageFormat = "png") -> bytes:
    """A lossless file of an RGB uint8 picture; lightly compressed, since it goes over a fast network once.

    Raises ValueError for an array that is no such picture.
    """
    if image_HWC.dtype.name != "uint8" or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise ValueError(f"the image must be uint8 (height, width, 3), got {image_HWC.dtype.name} {image_HWC.shape}")
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(image_HWC)
    if image_format == "png":
        image.save(buffer, format="PNG", compress_level=1)
    else:
        # `exact` keeps colours under full transparency; `method` 0 is the fastest, and lossless like the others.
        image.save(buffer, format="WEBP", lossless=True, exact=True, quality=0, method=0)
    return buffer.getvalue()


def encode_png(image_HWC: np.ndarray) -> bytes:
    """The picture as a PNG file; see `encode_image`."""
    return encode_image(image_HWC, "png")


def _open(data: bytes, mime: str) -> Any:
    """The file's header, read by the one plugin that is asked for.

    `PIL.Image.open` would add a limit of its own, of which it warns once per process. The limit here is ours.
    """
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    plugins = {
        "image/png": PngImagePlugin.PngImageFile,
        "image/webp": WebPImagePlugin.WebPImageFile,
        "image/jpeg": JpegImagePlugin.JpegImageFile,
    }
    return plugins[mime](io.BytesIO(data))


def _to_rgb(image: Any) -> Any:
    # Pillow wants a palette with transparency to pass through RGBA.
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _refused(message: str) -> RewardFailure:
    return RewardFailure("invalid_input", message)
