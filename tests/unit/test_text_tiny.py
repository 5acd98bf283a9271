"""Making a tiny text model: the loss, what a folder holds, and how good the shipped ones are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raylign.keys import generator
from raylign.pretrain import PRETRAINERS
from raylign.pretrain.text_quality import quality
from raylign.pretrain.text_tasks import TEXT_TASKS
from raylign.pretrain.text_tiny import (
    TextAdditionConfig,
    TextCountdownConfig,
    TextSudokuConfig,
    TextTinyConfig,
    learning_rate,
    masked_loss,
    mixed_examples,
    new_model,
    pretrain,
    train,
)
from rewards import make_reward
from rewards.exact_answer import ExactAnswerConfig
from rollout.prompts import load_prompts, refuse_overlap

SMALL = TextTinyConfig(num_steps=20, batch_size=16, hidden_size=32, num_layers=2, warmup_steps=5, lr=3e-3)


def test_twenty_steps_lower_the_loss_and_repeat_themselves() -> None:
    batch = [next(mixed_examples(SMALL.tasks, "test")) for _ in range(64)]

    def after() -> tuple[float, float, torch.Tensor]:
        model = new_model(SMALL)
        before = masked_loss(model, batch, generator("masks")).item()
        told: list[int] = []
        train(model, SMALL, lambda stage, step, num_steps, metrics: told.append(step))
        assert told == [1, 20]
        return before, masked_loss(model, batch, generator("masks")).item(), model.network.lm_head.weight.detach()

    before, loss, weight = after()
    assert before == pytest.approx(math.log(21), abs=0.1)  # every token but the mask is as likely
    assert loss < before - 0.3
    assert torch.equal(weight, after()[2])


def test_the_loss_is_the_mean_over_masked_positions_only() -> None:
    model = new_model(SMALL)
    seen: list[torch.Tensor] = []

    class Uniform:
        """Says every token is as likely, and remembers what it was shown."""

        settings, encode_labels, encode_prompts = model.settings, model.encode_labels, model.encode_prompts

        def logits(self, canvas_BL: torch.Tensor, prompts: object) -> torch.Tensor:
            seen.append(canvas_BL)
            return torch.zeros(*canvas_BL.shape, model.settings.vocab_size)

    batch = [next(mixed_examples(("sortmix",), "test", n)) for n in range(200)]
    loss = masked_loss(Uniform(), batch, generator("masks"))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(math.log(model.settings.vocab_size), rel=1e-5)
    masked_BL = seen[0] == model.settings.mask_token_id
    assert set(masked_BL.sum(dim=1).tolist()) == set(range(1, 9))
    labels_BL = model.encode_labels([one.label for one in batch])
    assert torch.equal(seen[0][~masked_BL], labels_BL[~masked_BL])
    assert (labels_BL[:, 6:] == model.settings.eos_token_id).all()


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    config = TextTinyConfig(num_steps=100, warmup_steps=10, lr=1.0, lr_end=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(50, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)


def test_every_row_names_a_configuration_with_its_own_name() -> None:
    for config in (TextTinyConfig(), TextCountdownConfig(), TextSudokuConfig(), TextAdditionConfig()):
        assert PRETRAINERS[config.name] == ("raylign.pretrain.text_tiny", "pretrain", type(config).__name__)
        assert set(config.tasks) <= set(TEXT_TASKS)
        longest = max(len(one.prompt.split()) for one in [next(mixed_examples(config.tasks, n)) for n in range(50)])
        assert longest <= config.max_prompt_length


def test_a_folder_holds_the_model_its_prompts_and_what_was_measured(tmp_path: Path) -> None:
    told = pretrain(tmp_path / "m", SMALL.model_copy(update={"num_steps": 2, "tasks": ("sort",)}))
    assert 0 <= told["sort_exact"] <= told["sort_either"] <= 1
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "sort_train.jsonl", "sort_heldout.jsonl",
    }  # fmt: skip
    assert f"| sort | one token per call | {told['sort_exact']:.3f} |" in (tmp_path / "m" / "README.md").read_text()
    train_prompts, heldout = (load_prompts(tmp_path / "m" / f"sort_{split}.jsonl") for split in ("train", "heldout"))
    refuse_overlap(train_prompts, heldout)
    assert (len(train_prompts), len(heldout)) == (1500, 400)
    for prompt in heldout:
        make_reward(ExactAnswerConfig()).check(prompt)


def test_an_answer_ends_at_its_end_token_and_calls_are_counted_per_row() -> None:
    model = new_model(SMALL)
    found = quality(model, "sort", 16, seed=0)
    assert [point.calls for point in found.points[:1]] == [8.0]
    calls = [point.calls for point in found.points]
    assert calls == sorted(calls, reverse=True)
    assert calls[-1] >= 1
