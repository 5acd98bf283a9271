"""Text recognition by PaddleOCR, the engine behind most published OCR rewards. It brings its own framework and
downloads its models when first used.

Version 2 and version 3 differ in how they are built, called and answered; both are known here. Neither looks for
turned text, as in flow_grpo (paddleocr 2.9.1). Version 2 drops lines of less confidence than 0.5 by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from raylign.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


class PaddleReader:
    """Detection, then recognition; lines in PaddleOCR's order with confidence above 0, joined without a separator."""

    fingerprint = ""

    def __init__(self, language: str, num_threads: int) -> None:
        """Raises ConfigError when PaddleOCR is not installed."""
        try:
            self.version = metadata.version("paddleocr")
        except metadata.PackageNotFoundError:
            raise ConfigError(
                "reward 'ocr' with engine 'paddleocr' needs PaddleOCR, which is not installed; "
                "pip install paddlepaddle paddleocr"
            ) from None
        self._language = language
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._ocr: Any = None

    def load(self) -> None:
        """Build the models, once."""
        with self._lock:
            self._load()

    def read(self, image_HWC: np.ndarray) -> str:
        """The text in an RGB uint8 picture; empty when there is none."""
        import numpy as np

        image_bgr = np.ascontiguousarray(image_HWC[:, :, ::-1])
        with self._lock:
            self._load()
            if self._is_version_2():
                lines = lines_of_version_2(self._ocr.ocr(image_bgr, cls=False))
            else:
                lines = lines_of_version_3(self._ocr.predict(image_bgr))
        return "".join(text for text, confidence in lines if confidence > 0)

    def _load(self) -> None:
        if self._ocr is not None:
            return
        from paddleocr import PaddleOCR  # type: ignore[import-not-found]  # optional, in nobody's requirements

        if self._is_version_2():
            self._ocr = PaddleOCR(
                use_angle_cls=False,
                lang=self._language,
                use_gpu=False,
                show_log=False,
                cpu_threads=self._num_threads,
            )
        else:
            self._ocr = PaddleOCR(
                lang=self._language,
                device="cpu",
                cpu_threads=self._num_threads,
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=False,
            )

    def _is_version_2(self) -> bool:
        return self.version.startswith("2.")


def lines_of_version_2(result: Sequence[Any]) -> list[tuple[str, float]]:
    """(text, confidence) of [[[box, (text, confidence)], ...]]; a picture without text is [None] or [[]]."""
    return [(str(text), float(confidence)) for _, (text, confidence) in result[0] or ()]


def lines_of_version_3(result: Sequence[Any]) -> list[tuple[str, float]]:
    """(text, confidence) of [{"rec_texts": [...], "rec_scores": [...], ...}]."""
    return [
        (str(text), float(confidence))
        for page in result
        for text, confidence in zip(page["rec_texts"], page["rec_scores"], strict=True)
    ]
