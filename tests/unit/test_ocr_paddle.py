"""The PaddleOCR adapter against packages that are built, called and answer as versions 2.9 and 3.x document."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from raylign.errors import ConfigError
from rewards.reading.engine import make_engine

IMAGE_HWC = np.zeros((4, 8, 3), np.uint8)
IMAGE_HWC[:, :, 0] = 200
VERSION_2 = """
class PaddleOCR:
    def __init__(self, use_angle_cls, lang, use_gpu, show_log, cpu_threads):
        assert (use_angle_cls, use_gpu, show_log) == (False, False, False), "as flow_grpo builds it"
        self.built = f"{lang}{cpu_threads}"

    def ocr(self, img, det=True, rec=True, cls=True):
        assert not cls
        if img[0, 0].tolist() == [0, 0, 0]:
            return [None]
        corner = [[0.0, 0.0], [9.0, 0.0], [9.0, 3.0], [0.0, 3.0]]
        colour = "-".join(map(str, img[0, 0].tolist()))
        return [[[corner, (self.built, 0.91)], [corner, ("zero", 0.0)], [corner, (colour, 0.2)]]]
"""
VERSION_3 = """
class PaddleOCR:
    def __init__(self, lang, device, cpu_threads, **options):
        assert device == "cpu"
        names = ("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation")
        assert options == dict.fromkeys(names, False)
        self.built = f"{lang}{cpu_threads}"

    def predict(self, input):
        if input[0, 0].tolist() == [0, 0, 0]:
            return [{"rec_texts": [], "rec_scores": []}]
        colour = "-".join(map(str, input[0, 0].tolist()))
        return [{"rec_texts": [self.built, "zero", colour], "rec_scores": [0.91, 0.0, 0.2], "rec_polys": []}]
"""


@pytest.mark.parametrize(("version", "source"), [("2.9.1", VERSION_2), ("3.2.0", VERSION_3)])
def test_both_versions_give_their_lines_joined(
    version: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of confidence 0 is none; the library expects blue first."""
    (tmp_path / "paddleocr.py").write_text(source)
    about = tmp_path / f"paddleocr-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: paddleocr\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "paddleocr", raising=False)
    engine = make_engine("paddleocr", 2)
    engine.load()
    assert engine.version == version
    assert engine.read(IMAGE_HWC) == "en20-0-200"
    assert make_engine("paddleocr", 1, language="french").read(IMAGE_HWC) == "french10-0-200"
    assert engine.read(np.zeros_like(IMAGE_HWC)) == ""
    monkeypatch.delitem(sys.modules, "paddleocr")


@pytest.mark.skipif(find_spec("paddleocr") is not None, reason="PaddleOCR is installed")
def test_an_absent_package_is_named_with_its_command() -> None:
    with pytest.raises(ConfigError, match="is not installed; pip install paddlepaddle paddleocr"):
        make_engine("paddleocr", 1)
