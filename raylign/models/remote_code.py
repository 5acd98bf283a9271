"""A checkpoint's own modelling code as a text policy's network, for those who set `trust_remote_code`.

The class is the one that config.json's `auto_map` names. It is constructed where its tensors have storage, because
published code computes rotary frequencies while it is constructed and not when it is loaded, and filled by the
published names. It is asked the simplest thing that all such code answers, `module(input_ids)`, and never with
padding: LLaDA's code ignores the attention mask, Dream's wants one of its own kind. So a padded batch is read in parts
of equally long rows, and a row computes what it computes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raylign.errors import ModelError

OWN_PREFIX = "remote."
"""Leading part of a `RemoteNetwork`'s names; behind it they are the checkpoint's."""
NATIVE = "model.trust_remote_code = false for the native network"
_MODELS = ("AutoModel", "AutoModelForCausalLM")


class RemoteNetwork(nn.Module):
    """Foreign code behind what `TextPolicy` asks of a network; without caches and without recomputed activations."""

    def __init__(self, remote: Any) -> None:
        super().__init__()
        self.remote = remote
        self.hidden_size = int(remote.get_input_embeddings().weight.shape[1])
        self.eval()

    def read(
        self, ids_BL: torch.Tensor, real_BL: torch.Tensor, num_prompt: int, span: slice, shift: int, cache: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the canvas positions in `span`, (B, span, V), and the prompt's last hidden states, (B, P, D).

        Hidden states of padding are 0. shift: how far to the left of a position its logits are. cache: None always.
        """
        padding_B = (~real_BL).sum(dim=1)
        order: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []
        hidden: list[torch.Tensor] = []
        for count in padding_B.unique().tolist():
            rows_B = (padding_B == count).nonzero()[:, 0]
            ids = ids_BL[rows_B, count:]
            answer = self.remote(input_ids=ids, use_cache=False, output_hidden_states=True, return_dict=True)
            start = num_prompt - count - shift + span.start
            order.append(rows_B)
            logits.append(answer.logits[:, start : start + span.stop - span.start])
            prompt_BLD = answer.hidden_states[-1][:, : num_prompt - count].detach()
            hidden.append(nn.functional.pad(prompt_BLD, (0, 0, count, 0)))
        back_B = torch.cat(order).argsort()
        return torch.cat(logits)[back_B], torch.cat(hidden)[back_B]

    def own_targets(self, targets: Iterable[str]) -> tuple[str, ...]:
        """Full names of the linear layers that LoRA targets mean; all but the output layer when none are given.

        Raises ModelError for a target that means none.
        """
        output = self.remote.get_output_embeddings()
        linears = [name for name, m in self.named_modules() if isinstance(m, nn.Linear) and m is not output]
        return match_linears(linears, targets)


def match_linears(names: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """The names that targets, given in full or by their endings, match; all when there are no targets.

    Raises ModelError for a target that matches nothing.
    """
    names, found = list(names), list[str]()
    for target in targets:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ModelError(f"LoRA target {target!r} matches no linear layer; names end in {endings}")
        found += matches
    return tuple(found) or tuple(names)


def check_remote(folder: Path, described: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of the embedding and the longest sequence, by config.json; runs none of the checkpoint's code.

    Raises ModelError for a checkpoint without code of its own, KeyError for a gap.
    """
    reference = _reference(described)
    if reference is None:
        raise ModelError(f"{folder}/config.json names no code for {' or '.join(_MODELS)} in auto_map; set {NATIVE}")
    file = folder / f"{reference.partition('.')[0]}.py"
    if "--" in reference or not file.is_file():
        raise ModelError(f"{folder} lacks the code {reference!r} that its auto_map names; download it, or set {NATIVE}")
    positions = described.get("max_sequence_length") or described["max_position_embeddings"]
    return described.get("embedding_size") or described["vocab_size"], positions


def build_remote(folder: Path, device: str, dtype: torch.dtype) -> RemoteNetwork:
    """Run the checkpoint's code: a network whose values are not loaded yet.

    Raises ModelError for code that fails, as code for older releases of transformers does.
    """
    import transformers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what old code does in an old way is not the user's doing
            config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
            kind = next(name for name in _MODELS if name in config.auto_map)
            remote = getattr(transformers, kind).from_config(config, trust_remote_code=True, dtype=dtype)
        return RemoteNetwork(remote.to(device))
    except Exception as error:  # foreign code may raise anything
        raise ModelError(
            f"{folder}: the checkpoint's own code does not run with transformers {transformers.__version__}: "
            f"{type(error).__name__}: {error}; set {NATIVE}"
        ) from error


def _reference(described: Mapping[str, Any]) -> str | None:
    """`modeling_x.X`, as `auto_map` names the model's class."""
    named = described.get("auto_map") or {}
    return next((named[name] for name in _MODELS if name in named), None)
