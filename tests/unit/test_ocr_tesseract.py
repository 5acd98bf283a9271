"""The tesseract engine: the real program where it is installed, and what any program may do in its place."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from raylign.errors import ConfigError, ModelError
from rewards import OcrConfig, OcrReward
from rewards.reading.similarity import normalise_clean
from rewards.reading.tesseract import TesseractReader

FONT = Path(__file__).parents[2] / "raylign" / "assets" / "fonts" / "DejaVuSansMono-Bold.ttf"
GREY = np.full((40, 120, 3), 128, np.uint8)
needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="the program tesseract is not here")


def _sign(text: str) -> np.ndarray:
    image = Image.new("RGB", (400, 120), (250, 250, 250))
    font = ImageFont.truetype(str(FONT), 48)
    ImageDraw.Draw(image).text((200, 60), text, font=font, fill=(10, 10, 10), anchor="mm")
    return np.array(image)


def _program(folder: Path, body: str) -> str:
    """A stand-in that answers --version as tesseract does and else runs `body`."""
    path = folder / "tesseract"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "tesseract 5.9.9"; exit; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def _reader(program: str, timeout_s: float = 20.0, language: str = "eng", num_threads: int = 1) -> TesseractReader:
    return TesseractReader(program, language, 7, num_threads, timeout_s)


@needs_tesseract
@pytest.mark.parametrize("word", ["HELLO", "Raylign 2026"])
def test_the_program_reads_a_clean_line(word: str) -> None:
    reader = _reader("tesseract")
    reader.load()
    assert reader.read(_sign(word)) == word
    assert reader.version[0].isdigit()
    assert len(reader.fingerprint) == 64


@needs_tesseract
def test_the_program_finds_no_letter_in_nothing() -> None:
    """In line mode it may see dashes where nothing is; the clean mode drops punctuation."""
    assert normalise_clean(_reader("tesseract").read(GREY)) == ""


@needs_tesseract
def test_a_language_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(
        ModelError, match=r"tesseract has no language xyz; apt-get install tesseract-ocr-xyz, or .* eng"
    ):
        _reader("tesseract", language="eng+xyz").load()


@needs_tesseract
def test_the_reward_names_the_program_and_how_it_is_used() -> None:
    reward = OcrReward(OcrConfig(engine="tesseract"))
    assert f"tesseract-{_reader('tesseract').version}/psm7" in reward.version
    reward.load()
    assert len(reward.fingerprint) == 64


def test_what_the_program_is_given_and_what_its_lines_become(tmp_path: Path) -> None:
    program = _program(
        tmp_path, f'cat > {tmp_path}/in.png\nprintf "%s|" "$@" "$OMP_THREAD_LIMIT"\nprintf "\\n B \\n\\f"'
    )
    assert _reader(program, language="eng+deu", num_threads=3).read(GREY) == "stdin|stdout|-l|eng+deu|--psm|7|3|B"
    with Image.open(tmp_path / "in.png") as given:
        np.testing.assert_array_equal(np.array(given), GREY)


def test_a_program_that_fails_says_why_in_the_log_only(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="exit code 3: no such leptonica"):
        _reader(_program(tmp_path, "echo no such leptonica >&2; exit 3")).read(GREY)


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    reader = _reader(_program(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait"), timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"more than 0.5 s"):
        reader.read(GREY)
    assert time.monotonic() - started < 10
    child = (tmp_path / "child").read_text().strip()
    deadline = time.monotonic() + 5
    while (status := Path("/proc", child, "status")).exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_an_absent_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs the program '/none/tesseract', which is not here; apt-get install"):
        _reader("/none/tesseract")
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    with pytest.raises(ConfigError, match="it is no tesseract"):
        _reader(str(other))
