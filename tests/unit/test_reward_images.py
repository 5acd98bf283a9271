"""Pictures from strangers: what is read, what is refused, and that reading back is exact. And JPEG sizes."""

import asyncio
import hashlib
import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raylign.types import Prompt, RewardFailure, RewardSample
from rewards import JpegConfig, JpegReward
from rewards.images import ImageFormat, decode_image, encode_image, encode_png
from rewards.jpeg import jpeg_bytes

IMAGE_HWC = np.random.default_rng(0).integers(0, 256, (24, 80, 3), dtype=np.uint8)


def _file(image: Image.Image, format_name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def _refusal(data: bytes, mime: str = "image/png", max_pixels: int = 10_000, sha256: str | None = None) -> str:
    result = decode_image(data, mime, max_pixels, sha256)
    assert isinstance(result, RewardFailure)
    assert result.code == "invalid_input"
    return result.message


def test_lossless_files_come_back_bit_for_bit() -> None:
    png = encode_png(IMAGE_HWC)
    webp = _file(Image.fromarray(IMAGE_HWC), "WEBP", lossless=True)
    for data, mime in ((png, "image/png"), (webp, "image/webp")):
        decoded = decode_image(data, mime, 24 * 80, hashlib.sha256(data).hexdigest())
        assert isinstance(decoded, np.ndarray)
        np.testing.assert_array_equal(decoded, IMAGE_HWC)


def test_jpeg_is_read_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    decoded = decode_image(_file(Image.fromarray(IMAGE_HWC), "JPEG", exif=exif), "image/jpeg", 10_000)
    assert isinstance(decoded, np.ndarray)
    assert decoded.shape == (80, 24, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_pixel_kinds_become_rgb(mode: str) -> None:
    decoded = decode_image(_file(Image.fromarray(IMAGE_HWC).convert(mode), "PNG"), "image/png", 10_000)
    assert isinstance(decoded, np.ndarray)
    assert (decoded.shape, decoded.dtype) == ((24, 80, 3), np.uint8)


def test_what_is_refused_says_why() -> None:
    png = encode_png(IMAGE_HWC)
    frames = [Image.fromarray(IMAGE_HWC), Image.fromarray(255 - IMAGE_HWC)]
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    assert "not a readable PNG" in _refusal(b"not a picture")
    assert "not a readable PNG" in _refusal(png[:200])
    assert "not a readable WEBP" in _refusal(png, mime="image/webp")
    assert "80x24 pixels; at most 1919" in _refusal(png, max_pixels=1919)
    assert "not one of" in _refusal(png, mime="image/gif")
    assert "do not hash" in _refusal(png, sha256="0" * 64)
    assert "animated" in _refusal(_file(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    assert "kind 'I;16'" in _refusal(_file(deep, "PNG"))


def _claiming(side: int) -> bytes:
    """An 8x8 PNG whose header claims another size."""
    data = bytearray(_file(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("side", [5_000, 10_000, 20_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    assert f"{side}x{side} pixels" in _refusal(_claiming(side), max_pixels=2**24)


def test_a_webp_bomb_is_refused_before_its_canvas_is_made() -> None:
    canvas = (20_000 - 1).to_bytes(3, "little") * 2
    chunk = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + canvas
    data = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
    assert _refusal(data, "image/webp", max_pixels=2**24)


@pytest.mark.parametrize(
    ("said", "fits"), [((80, 24), True), ((80, None), True), ((24, 80), False), ((None, 25), False)]
)
def test_the_size_that_was_said_is_checked(said: tuple, fits: bool) -> None:
    result = decode_image(encode_png(IMAGE_HWC), "image/png", 10_000, None, *said)
    assert isinstance(result, np.ndarray) is fits
    if isinstance(result, RewardFailure):
        assert "80x24 pixels, and is said to have" in result.message


def test_a_cmyk_jpeg_and_a_palette_with_transparency_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = red.quantize(4)
    for data, mime in (
        (_file(red.convert("CMYK"), "JPEG"), "image/jpeg"),
        (_file(palette, "PNG", transparency=bytes([128, 255, 255, 255])), "image/png"),
    ):
        decoded = decode_image(data, mime, 10_000)
        assert isinstance(decoded, np.ndarray)
        assert decoded.shape == (8, 8, 3)
        assert np.abs(decoded.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_what_the_client_sends_is_lossless(image_format: ImageFormat) -> None:
    decoded = decode_image(encode_image(IMAGE_HWC, image_format), f"image/{image_format}", 10_000)
    np.testing.assert_array_equal(decoded, IMAGE_HWC)
    for bad in (IMAGE_HWC[:0], IMAGE_HWC[..., 0], IMAGE_HWC.astype(np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 \(height, width, 3\)"):
            encode_image(bad, image_format)


@pytest.mark.parametrize(("direction", "scale"), [("incompress", 1.0), ("compress", -1 / 500)])
def test_jpeg_reward_is_kilobytes_at_quality_95(direction, scale: float) -> None:
    size = len(_file(Image.fromarray(IMAGE_HWC), "JPEG", quality=95))
    (score,) = asyncio.run(
        JpegReward(JpegConfig(direction=direction)).score([RewardSample("s", Prompt("p", "x"), IMAGE_HWC)])
    )
    assert score.value == pytest.approx(size / 1000 * scale, abs=1e-15)
    assert score.details["kilobytes"] == size / 1000


def test_noise_is_larger_than_a_plain_colour() -> None:
    assert jpeg_bytes(IMAGE_HWC, 95) > 2 * jpeg_bytes(np.full_like(IMAGE_HWC, 90), 95)


FILES = [
    (encode_image(IMAGE_HWC, "png"), "image/png"),
    (encode_image(IMAGE_HWC, "webp"), "image/webp"),
    (_file(Image.fromarray(IMAGE_HWC), "JPEG"), "image/jpeg"),
    (_file(Image.fromarray(IMAGE_HWC).quantize(8), "PNG"), "image/png"),
]


@settings(max_examples=150, deadline=None)
@given(
    file=st.sampled_from(FILES),
    cut=st.integers(0, 2000),
    flips=st.dictionaries(st.integers(0, 400), st.integers(0, 255)),
)
def test_a_damaged_file_is_a_picture_or_a_refusal(file: tuple[bytes, str], cut: int, flips: dict[int, int]) -> None:
    data, mime = file
    damaged = bytearray(data[: len(data) - cut] if cut % 2 else data)
    for place, byte in flips.items():
        if place < len(damaged):
            damaged[place] = byte
    result = decode_image(bytes(damaged), mime, 24 * 80)
    if isinstance(result, RewardFailure):
        assert result.code == "invalid_input"
    else:
        assert result.dtype == np.uint8
        assert result.shape[0] * result.shape[1] <= 24 * 80
