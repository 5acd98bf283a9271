"""ImageReward's network: BLIP with a text encoder that looks at the picture, and what its state dict calls things.

    picture ─▶ ViT ─▶ one vector per patch ─┐
    prompt ─▶ BERT layers, each with attention to those ─▶ vector of [CLS]

Layout: THUDM/ImageReward, ImageReward/ImageReward.py and models/BLIP (vit.py in timm's names, med.py in BERT's). The
file names no architecture for the ViT, so it is read off the tensors; every published ViT has heads of 64. The text
encoder's is in `med_config.json`. Pictures pass one at a time unless `batch_size` says otherwise, texts always do.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylign.errors import ModelError
from rewards.vision import checkpoints
from rewards.vision.clip_model import quiet
from rewards.vision.learned import LinearHead

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

HEAD_DIM = 64
MAX_TOKENS = 35
"""What the model was trained to read of a prompt, [CLS] and [SEP] among them."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PARTS = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
"""BLIP's contrastive projections, which no score passes through, and a constant."""
_DOWNLOAD = "download ImageReward.pt and med_config.json of THUDM/ImageReward from the model hub and give their paths"
_TOKENIZER = "give the directory or hub name of BERT's tokenizer, such as google-bert/bert-base-uncased"


class ImageRewardModel:
    """The published weights, loaded once when first needed; calls from several threads wait for each other."""

    def __init__(
        self,
        path: str,
        config_path: str,
        tokenizer_path: str,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 1,
    ) -> None:
        self.fingerprint = ""
        """sha256 over weights, text architecture and tokenizer; known after `load`."""
        self._path = path
        self._config_path = config_path
        self._tokenizer_path = tokenizer_path
        self._device = device
        self._dtype = dtype
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._head: LinearHead | None = None
        self._vision: Any = None
        self._text: Any = None
        self._tokenizer: Any = None
        self._processor: Any = None

    def load(self) -> None:
        """Read the checkpoint, unless it was. Raises ModelError with the path and the remedy."""
        with self._lock:
            self._loaded()

    def is_truncated(self, text: str) -> bool:
        """Whether the model reads only the beginning of a text."""
        with self._lock:
            self._loaded()
            return len(self._tokenizer(text, verbose=False)["input_ids"]) > MAX_TOKENS

    def rate(self, texts: Sequence[str], images_HWC: Sequence[np.ndarray]) -> list[float]:
        """What the linear head makes of each text and its own picture, not yet standardised."""
        import torch
        from PIL import Image

        values: list[float] = []
        with self._lock, torch.inference_mode():
            head = self._loaded()
            for start in range(0, len(texts), self._batch_size):
                pictures = [Image.fromarray(image) for image in images_HWC[start : start + self._batch_size]]
                pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
                patches_BLD = self._vision(pixel_values=pixels.to(self._device, self._vision.dtype)).last_hidden_state
                for text, patches_LD in zip(texts[start : start + self._batch_size], patches_BLD, strict=True):
                    tokens = self._tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
                    read = self._text(
                        input_ids=tokens["input_ids"].to(self._device), encoder_hidden_states=patches_LD[None]
                    )
                    values.append(head(read.last_hidden_state[0, 0].float().cpu().numpy()))
        return values

    def _loaded(self) -> LinearHead:
        if self._head is not None:
            return self._head
        from transformers import AutoTokenizer, BlipTextModel, BlipVisionModel, CLIPImageProcessorPil

        quiet()
        checkpoints.check_device(self._device)
        file = checkpoints.find_file(self._path, _DOWNLOAD)
        settings = checkpoints.find_file(self._config_path, _DOWNLOAD)
        words = checkpoints.find_directory(self._tokenizer_path, _TOKENIZER, weights=False)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{str(words)!r} has no tokenizer ({type(error).__name__}); {_TOKENIZER}") from error
        vision, text, linear = split_state(file, checkpoints.read_state(file))
        vision_config = _vision_config(file, vision)
        text_config = _text_config(settings, vision_config.hidden_size)
        size = vision_config.image_size
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        self._vision = self._built(BlipVisionModel, vision_config, file, vision)
        self._text = self._built(BlipTextModel, text_config, file, text, add_pooling_layer=False)
        self.fingerprint = checkpoints.hash_files([file, settings, *checkpoints.small_files(words)])
        self._head = LinearHead(file, linear, text_config.hidden_size)
        return self._head

    def _built(self, kind: Any, config: Any, file: Path, state: Mapping[str, Tensor], **options: Any) -> Any:
        import torch

        with torch.device("meta"):
            wanted = kind(config, **options).state_dict()
        checkpoints.check_fit(file, state, wanted)
        model = kind.from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.float32, **options)
        return model.requires_grad_(False).to(self._device, getattr(torch, self._dtype)).eval()


def split_state(
    file: Path, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """ImageReward.pt as (ViT in the names of BlipVisionModel, text encoder of BlipTextModel, linear head).

    Raises ModelError for a tensor that is none of these.
    """
    used = {name: tensor for name, tensor in state.items() if not _UNUSED.match(name)}
    checkpoints.check_complete(file, [], [name for name in used if not name.startswith(_PARTS)])
    vision, text, linear = (
        {name.removeprefix(part): tensor for name, tensor in used.items() if name.startswith(part)} for part in _PARTS
    )
    return {_vision_name(name): tensor for name, tensor in vision.items()}, text, linear


def _vision_name(name: str) -> str:
    if name in _VISION:
        return _VISION[name]
    block = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if block is None or block.group(2) not in _VISION:
        return name
    layer = f"encoder.layers.{block.group(1)}." if block.group(1) else ""
    return f"{layer}{_VISION[block.group(2)]}.{block.group(3)}"


def _vision_config(file: Path, vision: Mapping[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig

    try:
        width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
        positions = vision["embeddings.position_embedding"].shape[1]
        inner = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{str(file)!r} has no BLIP vision tower in it; {_DOWNLOAD}") from error
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len({name.split(".")[2] for name in vision if name.startswith("encoder.layers.")}),
        num_attention_heads=max(1, width // HEAD_DIM),
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(file: Path, vision_width: int) -> Any:
    from transformers import BlipTextConfig

    needed = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
        "hidden_act",
        "layer_norm_eps",
    )
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        settings = {name: given[name] for name in needed}
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{str(file)!r} is no med_config.json ({type(error).__name__}: {error}); it must have {', '.join(needed)}"
        ) from error
    # is_decoder makes transformers build the attention to the picture; reading stays in both directions.
    return BlipTextConfig(**settings, encoder_hidden_size=vision_width, is_decoder=True)
