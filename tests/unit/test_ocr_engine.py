"""The real engines on rendered words: the short way reads what RapidOCR's own recogniser reads."""

import asyncio
from importlib import resources
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from raylign.types import Prompt, RewardSample
from rewards import OcrConfig, OcrReward
from rewards.reading.engine import LineReader, OcrEngine, PageReader, make_engine

WORDS = """APPLE BREAD CHAIR DANCE EAGLE FLAME GRAPE HOUSE IVORY JOKER KNIFE LEMON MOUSE NIGHT OCEAN PIANO QUEEN RIVER
SUGAR TIGER UNCLE VOICE WATER XENON YOUTH ZEBRA ANT BOX CAT DOG EGG FIG GUN HAT INK JAM KEY LOG MAP NUT OAK PEN 123
4567 80 2026 31415""".split()

MODES: tuple[Literal["clean", "flow_grpo"], ...] = ("clean", "flow_grpo")


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


class ReadsOnce:
    """An engine that looks at a picture the first time it is asked about it."""

    def __init__(self, engine: OcrEngine) -> None:
        self.version, self.fingerprint = engine.version, engine.fingerprint
        self.load = engine.load
        self._engine = engine
        self._text_by_picture: dict[bytes, str] = {}

    def read(self, image_HWC: np.ndarray) -> str:
        key = image_HWC.tobytes()
        if key not in self._text_by_picture:
            self._text_by_picture[key] = self._engine.read(image_HWC)
        return self._text_by_picture[key]


@pytest.fixture(scope="module")
def page_reader() -> PageReader:
    reader = make_engine("rapidocr", num_threads=1)
    assert isinstance(reader, PageReader)
    return reader


@pytest.mark.parametrize("engine", ["rapidocr_rec", "rapidocr"])
def test_both_modes_score_what_either_engine_reads(
    engine: Literal["rapidocr_rec", "rapidocr"], line_reader: LineReader, page_reader: PageReader
) -> None:
    """The picture says HELLO twice: all of a published target is there, half of it is too much in the clean mode."""
    reader = ReadsOnce(line_reader if engine == "rapidocr_rec" else page_reader)
    # A page is scaled until its shorter side has 736 pixels: a flat one costs four times as much as a square one.
    picture = _render("HELLOHELLO", 80 if engine == "rapidocr_rec" else 320, 320, 40)
    samples = [RewardSample(name, Prompt(name, f'a "{name}"'), picture) for name in ("Hello", "HELLO HELLO", "xyzzy")]
    values = {
        mode: [
            score.value for score in asyncio.run(OcrReward(OcrConfig(engine=engine, mode=mode), reader).score(samples))
        ]
        for mode in MODES
    }
    assert values == {"clean": [0.5, 1.0, 0.0], "flow_grpo": [1.0, 1.0, 0.0]}


def test_a_page_is_searched_for_lines(page_reader: PageReader) -> None:
    page = np.concatenate([_render("HELLO", 80, 160, 40), _render("WORLD", 80, 160, 40)])
    assert page_reader.read(page) == "HELLOWORLD"
    assert page_reader.read(np.full((160, 160, 3), 128, np.uint8)) == ""
