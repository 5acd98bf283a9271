"""CLIP checkpoints through transformers: texts and pictures become vectors of length 1.

Pictures are prepared as the checkpoint's `preprocessor_config.json` says, by Pillow (never torchvision, whose resize
gives other pixels), and pass through the model one at a time unless `batch_size` says otherwise: then no vector
depends on its neighbours. A text is not padded, so its vector cannot depend on neighbours either.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylign.errors import ModelError
from rewards.vision import checkpoints, open_clip

if TYPE_CHECKING:
    import numpy as np

_REMEDY = "give the directory or hub name of a CLIP checkpoint, such as openai/clip-vit-large-patch14"
Precision = Literal["float32", "bfloat16"]


class ClipModel:
    """A CLIP checkpoint, loaded once when first needed; calls from several threads wait for each other.

    `path`: a directory or hub name in the layout of transformers, or one file of weights in the layout of open_clip.
    `processor_path`: where tokenizer and preprocessing are, if not in `path`; for a file also the architecture.
    """

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        dtype: Precision = "float32",
        processor_path: str | None = None,
        batch_size: int = 1,
    ) -> None:
        self.fingerprint = ""
        """sha256 over weights, architecture, tokenizer and preprocessing; known after `load`."""
        self._path = path
        self._processor_path = processor_path or path
        self._device = device
        self._dtype = dtype
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._model: Any = None
        self._tokenizer: Any = None
        self._processor: Any = None

    def load(self) -> None:
        """Read the checkpoint, unless it was. Raises ModelError with the path and the remedy."""
        with self._lock:
            self._load()

    @property
    def logit_scale(self) -> float:
        """The learned temperature as used, exp(logit_scale) of the file: 100 in OpenAI's models."""
        with self._lock:
            self._load()
            return float(self._model.logit_scale.detach().float().exp())

    @property
    def size(self) -> int:
        """Length of the vectors."""
        with self._lock:
            self._load()
            return int(self._model.config.projection_dim)

    @property
    def image_size(self) -> int:
        """Side of the square that the model looks at, in pixels."""
        with self._lock:
            self._load()
            return int(self._model.config.vision_config.image_size)

    def is_truncated(self, text: str) -> bool:
        """Whether the model reads only the beginning of a text (77 tokens in all published models)."""
        with self._lock:
            self._load()
            return len(self._tokenizer(text, verbose=False)["input_ids"]) > self._context()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32, rows of length 1; what is beyond the model's context is cut. Equal texts cost once."""
        import numpy as np
        import torch

        rows: dict[str, np.ndarray] = {}
        with self._lock, torch.inference_mode():
            self._load()
            for text in dict.fromkeys(texts):
                tokens = self._tokenizer(text, truncation=True, max_length=self._context(), return_tensors="pt")
                output = self._model.get_text_features(input_ids=tokens["input_ids"].to(self._device))
                rows[text] = _unit_rows(output.pooler_output)[0]
        return np.stack([rows[text] for text in texts]) if texts else np.zeros((0, self.size), np.float32)

    def embed_images(self, images_HWC: Sequence[np.ndarray]) -> np.ndarray:
        """(N, D) float32, rows of length 1, of RGB uint8 pictures of any size."""
        import numpy as np
        import torch
        from PIL import Image

        parts: list[np.ndarray] = []
        with self._lock, torch.inference_mode():
            self._load()
            for start in range(0, len(images_HWC), self._batch_size):
                # As Pillow images: in an array of 3 rows the processor would take the height for the channels.
                pictures = [Image.fromarray(image) for image in images_HWC[start : start + self._batch_size]]
                pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
                pixels = pixels.to(self._device, self._model.dtype)
                parts.append(_unit_rows(self._model.get_image_features(pixel_values=pixels).pooler_output))
        return np.concatenate(parts) if parts else np.zeros((0, self.size), np.float32)

    def _context(self) -> int:
        return int(self._model.config.text_config.max_position_embeddings)

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        quiet()
        checkpoints.check_device(self._device)
        one_file = Path(self._path).suffix in (".pt", ".pth", ".bin", ".safetensors")
        words = checkpoints.find_directory(
            self._processor_path, _REMEDY, weights=not one_file and self._processor_path == self._path
        )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
            self._processor = CLIPImageProcessorPil.from_pretrained(words)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{str(words)!r} lacks a tokenizer or preprocessor_config.json ({type(error).__name__}); give the "
                "directory of the checkpoint's processor as processor_path"
            ) from error
        if one_file:
            file = checkpoints.find_file(self._path, "download the weights and give their path")
            model, files = _from_open_clip(file, words), [file, *checkpoints.small_files(words)]
        else:
            home = checkpoints.find_directory(self._path, _REMEDY)
            model, files = _from_directory(home), checkpoints.described_by(home)
            if words != home:
                files += checkpoints.small_files(words)
        model.requires_grad_(False)
        self._model = model.to(self._device, getattr(torch, self._dtype)).eval()
        self.fingerprint = checkpoints.hash_files(files)


def quiet() -> None:
    """No loading bars or advice from the library: a service has its own log, and every replica would repeat them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _from_directory(directory: Path) -> Any:
    import torch
    from transformers import CLIPModel

    try:
        loaded: Any = CLIPModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{str(directory)!r} is no CLIP checkpoint that transformers can read: {error}") from error
    model, info = loaded
    # Old files carry the positions as a buffer, which says nothing.
    unexpected = {key for key in info["unexpected_keys"] if not key.endswith("position_ids")}
    checkpoints.check_complete(directory, info["missing_keys"], unexpected)
    return model


def _from_open_clip(file: Path, architecture: Path) -> Any:
    import torch
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig.from_pretrained(architecture)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{str(architecture)!r} lacks the config.json of a CLIP ({type(error).__name__}); give the directory of "
            f"the model that {file.name} was tuned from"
        ) from error
    with torch.device("meta"):
        wanted = CLIPModel(config).state_dict()
    state = open_clip.to_transformers(checkpoints.read_state(file))
    checkpoints.check_fit(file, state, wanted)
    return CLIPModel.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _unit_rows(vectors: Any) -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
