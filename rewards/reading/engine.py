"""What reads the text in a picture. RapidOCR is here: its models are inside its wheel, so nothing is downloaded.

Engines import their libraries when they load, not when a configuration is read.
"""

from __future__ import annotations

import threading
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol

from raylign.errors import ConfigError
from rewards.reading.paddle import PaddleReader
from rewards.reading.tesseract import TesseractReader

if TYPE_CHECKING:
    import numpy as np

EngineName = Literal["rapidocr_rec", "rapidocr", "paddleocr", "tesseract"]


class OcrEngine(Protocol):
    """Reads one picture. Calls from several threads are allowed; they may wait for each other."""

    @property
    def version(self) -> str:
        """Of the library or program."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of model files that the version does not settle, known after `load`; empty without any."""
        ...

    def load(self) -> None:
        """Build the models, once."""
        ...

    def read(self, image_HWC: np.ndarray) -> str:
        """The text in an RGB uint8 picture; empty when there is none.

        Raises TimeoutError when it takes too long, and whatever else the model raises.
        """
        ...


class LineReader:
    """Recognition alone: the whole picture is taken for one line of text.

    The line is scaled to the recogniser's 48 px of height and not padded to its usual 320 px of width, and pictures
    are read one at a time. On a thread this is 2 to 3 times as fast for small pictures, a batch is not faster, and
    no score depends on its neighbours.
    """

    fingerprint = ""

    def __init__(self, num_threads: int) -> None:
        """Raises ConfigError when RapidOCR is not installed."""
        self.version = _rapidocr_version()
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._recogniser: Any = None

    def load(self) -> None:
        with self._lock:
            self._load()

    def read(self, image_HWC: np.ndarray) -> str:
        from rapidocr.ch_ppocr_rec import TextRecInput

        with self._lock:
            self._load()
            texts = self._recogniser(TextRecInput(img=[_bgr(image_HWC)])).txts
        return str(texts[0])

    def _load(self) -> None:
        if self._recogniser is not None:
            return
        import numpy as np

        # A "usual" width of one height switches the padding off for everything at least as wide as high.
        ocr = _build(self._num_threads, {"Global.use_det": False, "Rec.rec_img_shape": [3, 48, 48]})
        ocr(np.zeros((48, 48, 3), np.uint8))
        self._recogniser = ocr.text_rec


class PageReader:
    """Detection, then recognition of each line found; lines in reading order, joined without a separator.

    No line is dropped for low confidence, as in flow_grpo (confidence > 0).
    """

    fingerprint = ""

    def __init__(self, num_threads: int) -> None:
        """Raises ConfigError when RapidOCR is not installed."""
        self.version = _rapidocr_version()
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._ocr: Any = None

    def load(self) -> None:
        with self._lock:
            self._load()

    def read(self, image_HWC: np.ndarray) -> str:
        with self._lock:
            self._load()
            texts = self._ocr(_bgr(image_HWC)).txts
        # A picture without text gives None.
        return "".join(texts or ())

    def _load(self) -> None:
        if self._ocr is None:
            self._ocr = _build(self._num_threads, {"Global.text_score": 0.0})


def make_engine(
    name: EngineName,
    num_threads: int,
    *,
    language: str | None = None,
    tesseract_path: str = "tesseract",
    page_mode: int = 7,
    timeout_s: float = 20.0,
) -> OcrEngine:
    """The engine of that name; no model is loaded yet. Raises ConfigError when it is not installed."""
    match name:
        case "rapidocr_rec":
            return LineReader(num_threads)
        case "rapidocr":
            return PageReader(num_threads)
        case "paddleocr":
            return PaddleReader(language or "en", num_threads)
        case "tesseract":
            return TesseractReader(tesseract_path, language or "eng", page_mode, num_threads, timeout_s)


def _rapidocr_version() -> str:
    try:
        return metadata.version("rapidocr")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "reward 'ocr' needs RapidOCR, which is not installed; pip install rapidocr onnxruntime"
        ) from None


def _build(num_threads: int, params: dict[str, Any]) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            **params,
        }
    )


def _bgr(image_HWC: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(image_HWC[:, :, ::-1])
