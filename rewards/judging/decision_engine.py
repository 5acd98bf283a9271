"""A judge inside this process: a checkpoint that transformers loads, asked by one forward pass.

P(label) is read from the logits after the chat prompt, over the full vocabulary and without generating: exact where
a server reports its 20 likeliest tokens. transformers' `pipeline("decision")` answers the same question, but words
it itself and normalises over the labels alone, which hides how little mass they may have together.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from raylign.config import Config
from raylign.errors import ConfigError, ModelError
from raylign.types import RewardFailure
from rewards.judging.chat_text import canonical, check_labels, shown_name, split_thinking
from rewards.judging.engine import JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")
RULE_VERSION = "1"
"""Counts changes to how a question is put and an answer is read."""


class DecisionEngineConfig(Config):
    """A judge that this process runs; for small models, and where no server is wanted."""

    type: Literal["decision"] = "decision"
    model: str = ""
    """Folder of the checkpoint, or its name on the model hub (which is offline unless HF_HUB_OFFLINE=0)."""
    revision: str = ""
    """Commit of the model hub's repository; empty for a folder, or to take the newest."""
    device: str = "cpu"
    """Where it runs: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What it computes in."""
    max_prompt_tokens: int = Field(default=8192, ge=1)
    """A longer question, pictures included, is refused."""

    @property
    def version(self) -> str:
        """What of the engine itself decides an answer; the model is in the fingerprint."""
        return f"decision-{self.dtype}-{RULE_VERSION}-transformers-{metadata.version('transformers')}"


class DecisionEngine:
    """Asks one question at a time, in a thread of its own; nothing is padded, so no answer depends on another."""

    def __init__(self, config: DecisionEngineConfig) -> None:
        """Loads nothing yet. Raises ConfigError without a model."""
        if not config.model:
            raise ConfigError("engine.type = 'decision' needs engine.model: the folder or the hub name of a checkpoint")
        self._config = config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._model: Any = None
        self._processor: Any = None
        self._tokenizer: Any = None
        self._takes_pictures = False
        self._ids_by_spelling: dict[str, list[int]] = {}
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def load(self) -> None:
        """Load the checkpoint, once. Raises ModelError naming what is missing."""
        self._thread.submit(self._load).result()

    async def ask(self, request: JudgeRequest) -> JudgeReply | RewardFailure:
        """A generated answer. It is not constrained to a schema or to choices, and thinking has no budget here."""
        return await self._in_thread(lambda: self._generate(request))

    async def label_logprobs(self, request: JudgeRequest, labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        check_labels(labels)
        return await self._in_thread(lambda: self._decide(request, labels))

    async def _in_thread(self, answer: Callable[[], AnswerT | RewardFailure]) -> AnswerT | RewardFailure:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._guarded(answer))

    def _guarded(self, answer: Callable[[], AnswerT | RewardFailure]) -> AnswerT | RewardFailure:
        """One question; whatever the model raises is a failure of this question alone."""
        try:
            self._load()
            return answer()
        except ModelError as error:
            logger.error("%s", error)
            return RewardFailure("model_error", "the judge's checkpoint cannot be loaded; see the log")
        except Exception:  # a model on hostile pictures and texts raises what it likes; the question has no answer then
            logger.exception("the in-process judge failed")
            return RewardFailure("model_error", "the in-process judge failed; see the log")

    def _load(self) -> None:
        if self._model is not None:
            return
        import torch
        import transformers

        config = self._config
        where = {"revision": config.revision} if config.revision else {}
        try:
            kind = transformers.AutoConfig.from_pretrained(config.model, **where)
            pictures = type(kind) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            loader = transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
            reader = transformers.AutoProcessor if pictures else transformers.AutoTokenizer
            processor = reader.from_pretrained(config.model, **where)
            model: Any = loader.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype), use_safetensors=True, **where
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"engine.model = {config.model!r} cannot be loaded: {error}") from error
        tokenizer: Any = processor.tokenizer if pictures else processor
        if not processor.chat_template:
            raise ModelError(f"engine.model = {config.model!r} has no chat template; take a checkpoint tuned to chat")
        for token_id, text in enumerate(tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])):
            self._ids_by_spelling.setdefault(canonical(text), []).append(token_id)
        self._fingerprint = _fingerprint(config.model, config.revision or getattr(kind, "_commit_hash", None) or "")
        self._processor = processor
        self._takes_pictures = pictures
        self._tokenizer = tokenizer
        self._model = model.to(config.device).eval()

    def _decide(self, request: JudgeRequest, labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        import torch

        inputs = self._inputs(request, thinking=False)
        if isinstance(inputs, RewardFailure):
            return inputs
        with torch.inference_mode():
            logits_V = self._model(**inputs, logits_to_keep=1).logits[0, -1].float()
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        found: dict[str, float] = {}
        for label in labels:
            ids = self._ids_by_spelling.get(canonical(label))
            if ids:
                found[label] = min(0.0, float(torch.logsumexp(logprobs_V[ids], dim=0)))
        if not all(math.isfinite(value) for value in found.values()):
            return RewardFailure("model_error", "the in-process judge's logits are not finite")
        return LabelLogprobs(found, "decision")

    def _generate(self, request: JudgeRequest) -> JudgeReply | RewardFailure:
        import torch

        inputs = self._inputs(request, thinking=request.thinking)
        if isinstance(inputs, RewardFailure):
            return inputs
        drawn = {"temperature": request.temperature, "top_p": request.top_p}
        drawn |= {"top_k": request.top_k or 0, "min_p": request.min_p}
        # transformers draws from the global generators only; they are put back, so nobody else's draws move.
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(request.seed)
            ids_BL = self._model.generate(
                **inputs,
                max_new_tokens=request.max_tokens,
                do_sample=request.temperature > 0,
                **(drawn if request.temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}),
            )
        new_L = ids_BL[0, inputs["input_ids"].shape[1] :]
        stops = self._model.generation_config.eos_token_id
        ended = int(new_L[-1]) in (stops if isinstance(stops, list) else [stops])
        thinking, content = split_thinking(self._tokenizer.decode(new_L, skip_special_tokens=True))
        return JudgeReply(content, thinking, "stop" if ended else "length", model=shown_name(self._config.model))

    def _inputs(self, request: JudgeRequest, thinking: bool | None) -> dict[str, torch.Tensor] | RewardFailure:
        """The tensors of one chat, ending where the judge's answer begins; or why it cannot be asked."""
        images = [_picture(image_HWC) for message in request.messages for image_HWC in message.images_HWC]
        if images and not self._takes_pictures:
            return RewardFailure("model_error", "the judge's model reads text only; configure one that sees pictures")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        text = self._processor.apply_chat_template(
            [_turn(message, self._takes_pictures) for message in request.messages],
            tokenize=False,
            add_generation_prompt=True,
            **switch,
        )
        # The template has written the special tokens that open a text.
        if self._takes_pictures:
            inputs = self._processor(text=[text], images=images or None, add_special_tokens=False, return_tensors="pt")
        else:
            inputs = self._tokenizer([text], add_special_tokens=False, return_tensors="pt")
        num_tokens = inputs["input_ids"].shape[1]
        if num_tokens > self._config.max_prompt_tokens:
            return RewardFailure(
                "invalid_input",
                f"the question has {num_tokens} tokens; at most {self._config.max_prompt_tokens} are read",
            )
        return {name: value.to(self._model.device) for name, value in inputs.items()}


def _turn(message: JudgeMessage, takes_pictures: bool) -> dict[str, Any]:
    """A message as chat templates take it: parts for a model that sees, plain text for one that only reads."""
    if not takes_pictures:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image"} for _ in message.images_HWC]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}


def _picture(image_HWC: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image_HWC)


def _fingerprint(model: str, commit: str) -> str:
    """Hash of the checkpoint's files in a folder; of name and commit for one of the model hub."""
    digest = hashlib.sha256()
    folder = Path(model)
    if not folder.is_dir():
        digest.update(f"{model}@{commit}".encode())
        return digest.hexdigest()[:16]
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
