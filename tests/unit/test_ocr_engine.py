"""The real engines on rendered words: the short way reads what RapidOCR's own recogniser reads."""

from importlib import resources
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards.ocr_engine import LineReader, PageReader, make_engine

WORDS = """APPLE BREAD CHAIR DANCE EAGLE FLAME GRAPE HOUSE IVORY JOKER KNIFE LEMON MOUSE NIGHT OCEAN PIANO QUEEN RIVER
SUGAR TIGER UNCLE VOICE WATER XENON YOUTH ZEBRA ANT BOX CAT DOG EGG FIG GUN HAT INK JAM KEY LOG MAP NUT OAK PEN 123
4567 80 2026 31415""".split()


def _render(text: str, height: int, width: int, size: int) -> np.ndarray:
    font_file = resources.files("raylign") / "assets" / "fonts" / "DejaVuSansMono-Bold.ttf"
    image = Image.new("RGB", (width, height), (40, 150, 70))
    with resources.as_file(font_file) as path:
        font = ImageFont.truetype(path, size)
    ImageDraw.Draw(image).text((width / 2, height / 2), text, font=font, fill=(250, 250, 250), anchor="mm")
    return np.array(image)


@pytest.fixture(scope="module")
def line_reader() -> LineReader:
    reader = LineReader(num_threads=1)
    reader.load()
    return reader


def test_lines_read_as_rapidocr_reads_them(line_reader: LineReader) -> None:
    from rapidocr import RapidOCR

    ocr: Any = RapidOCR(params={"Global.log_level": "error", "Global.use_det": False, "Global.use_cls": False})
    images = [_render(word, 32, 96, 28) for word in WORDS]
    assert len(images) >= 40
    theirs = [ocr(image[:, :, ::-1].copy()).txts[0] for image in images]
    assert [line_reader.read(image) for image in images] == theirs
    assert [text.upper() for text in theirs] == WORDS


def test_nothing_drawn_is_nothing_read(line_reader: LineReader) -> None:
    assert line_reader.read(np.full((24, 80, 3), 128, np.uint8)) == ""


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 64, 3), (64, 1, 3), (3, 5, 3)])
def test_odd_sizes_are_read_too(line_reader: LineReader, shape: tuple[int, int, int]) -> None:
    assert isinstance(line_reader.read(np.zeros(shape, np.uint8)), str)


def test_how_the_pixels_lie_in_memory_does_not_matter(line_reader: LineReader) -> None:
    """Pictures from Ray's object store are read-only."""
    image = _render("HELLO", 32, 96, 28)
    image.flags.writeable = False
    assert line_reader.read(image) == line_reader.read(np.asfortranarray(image)) == "HELLO"


def test_a_page_is_searched_for_lines() -> None:
    reader = make_engine("rapidocr", num_threads=1)
    assert isinstance(reader, PageReader)
    page = np.concatenate([_render("HELLO", 80, 320, 40), _render("WORLD", 80, 320, 40)])
    assert reader.read(page) == "HELLOWORLD"
    assert reader.read(np.full((160, 320, 3), 128, np.uint8)) == ""
