"""Answer a prompt with an exported Dream model and transformers alone; nothing of Raylign is imported.

    raylign export runs/RUN my_model
    python examples/answer_with_transformers.py my_model "What is 7 times 8?" --canvas 64

An export has the checkpoint's own names, so Dream's weights are Qwen2's: the network is transformers' Qwen2 under full
attention, and position k is read at k - 1. A LLaDA export loads with the code that its checkpoint brings,
`AutoModel.from_pretrained(model, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


def canvas_logits(model: Any, tokens_L: torch.Tensor, canvas: int) -> torch.Tensor:
    """Logits of the last `canvas` positions, (canvas, V): every position sees every other."""
    length = len(tokens_L)
    everyone = torch.zeros(1, 1, length, length)  # added to the scores: nobody is hidden
    answer = model(tokens_L[None], attention_mask=everyone, position_ids=torch.arange(length)[None], use_cache=False)
    return answer.logits[0, length - canvas - 1 : -1]


@torch.no_grad()
def write(model: Any, prompt_P: torch.Tensor, mask_id: int, canvas: int) -> torch.Tensor:
    """Fill a canvas of masks behind the prompt, one token per call, the surest first; the canvas's tokens."""
    tokens_L = torch.cat([prompt_P, torch.full((canvas,), mask_id)])
    for _ in range(canvas):
        logits = canvas_logits(model, tokens_L, canvas)
        logits[:, mask_id] = -torch.inf
        sureness, chosen = logits.softmax(dim=-1).max(dim=-1)
        sureness[tokens_L[-canvas:] != mask_id] = -1.0
        place = int(sureness.argmax())
        tokens_L[len(prompt_P) + place] = chosen[place]
    return tokens_L[-canvas:]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what `raylign export` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--canvas", type=int, default=64, help="tokens of the answer")
    options = parser.parse_args(arguments)

    described = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    tokenizer: Any = Qwen2Tokenizer.from_pretrained(options.model)
    model = Qwen2ForCausalLM.from_pretrained(options.model).eval()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": options.prompt}], add_generation_prompt=True)
    prompt_P = torch.tensor(asked["input_ids"] if not isinstance(asked, list) else asked)
    answer = write(model, prompt_P, described["mask_token_id"], options.canvas).tolist()
    end = answer.index(described["eos_token_id"]) if described["eos_token_id"] in answer else len(answer)
    print(tokenizer.decode(answer[:end]))


if __name__ == "__main__":
    main()
