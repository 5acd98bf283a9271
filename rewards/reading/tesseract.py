"""Text recognition by the `tesseract` program, one process per picture that dies when its time is up.

Made for scanned pages: it reads clean rendered text, and little of text that is turned, blurred or on a busy ground.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from raylign.errors import ConfigError, ModelError
from rewards.vision import checkpoints

if TYPE_CHECKING:
    import numpy as np

_VERSION_TIMEOUT_S = 20.0


class TesseractReader:
    """Reads a picture by `tesseract stdin stdout`; lines are joined without a separator."""

    def __init__(self, program: str, language: str, page_mode: int, num_threads: int, timeout_s: float) -> None:
        """Raises ConfigError when there is no such program."""
        found = shutil.which(program)
        if found is None:
            raise ConfigError(
                f"reward 'ocr' needs the program {program!r}, which is not here; apt-get install tesseract-ocr, or "
                "give its path as tesseract_path"
            )
        self._command = [found, "stdin", "stdout", "-l", language, "--psm", str(page_mode)]
        self._language = language
        self._environment = {**os.environ, "OMP_THREAD_LIMIT": str(num_threads)}
        self._timeout_s = timeout_s
        self.version = self._ask_version(found)
        self.fingerprint = ""

    def load(self) -> None:
        """Find the languages. Raises ModelError when one is not installed."""
        listed = self._run([self._command[0], "--list-langs"], b"", _VERSION_TIMEOUT_S)
        folder = re.search(r'"(.+)"', listed)
        files = [Path(folder.group(1) if folder else "") / f"{name}.traineddata" for name in self._language.split("+")]
        missing = [file.stem for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"tesseract has no language {', '.join(missing)}; apt-get install tesseract-ocr-{missing[0]}, or set "
                f"language to one of {', '.join(listed.split()[-8:])}"
            )
        self.fingerprint = checkpoints.hash_files(files)

    def read(self, image_HWC: np.ndarray) -> str:
        """The text in an RGB uint8 picture. Raises TimeoutError, or OSError when the program fails."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, format="PNG")
        text = self._run(self._command, buffer.getvalue(), self._timeout_s)
        return "".join(line.strip() for line in text.splitlines())

    def _ask_version(self, program: str) -> str:
        try:
            words = self._run([program, "--version"], b"", _VERSION_TIMEOUT_S).split()
        except (OSError, TimeoutError) as error:
            raise ConfigError(f"{program!r} does not answer --version; it is no tesseract") from error
        return words[1] if len(words) > 1 else "unknown"

    def _run(self, command: list[str], given: bytes, timeout_s: float) -> str:
        # In a session of its own, so that what it may have started dies with it and nobody holds its pipes open.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        try:
            output, complaint = process.communicate(given, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"tesseract took more than {timeout_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        if process.returncode:
            said = complaint.decode("utf-8", "replace")[-500:]
            raise OSError(f"tesseract ended with exit code {process.returncode}: {said}")
        return output.decode("utf-8", "replace")
