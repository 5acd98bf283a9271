"""Making a tiny text model: the loss, what a folder holds, and how good the shipped ones are."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from raylign.assets import resolve
from raylign.keys import generator
from raylign.models import load_policy
from raylign.models.tiny_text import TinyTextConfig
from raylign.models.tokens import join_prompts
from raylign.pretrain import PRETRAINERS
from raylign.pretrain.text_quality import quality
from raylign.pretrain.text_tasks import TEXT_TASKS, distinct_examples
from raylign.pretrain.text_tiny import (
    AdditionPretrainConfig,
    CountdownPretrainConfig,
    SudokuPretrainConfig,
    TextPretrainConfig,
    learning_rate,
    masked_loss,
    mixed_examples,
    new_model,
    pretrain,
    train,
)
from raylign.samplers import EntropyBoundedConfig, LowConfidenceConfig, make_token_sampler
from raylign.types import Needs, Prompt, RewardSample, SampleKey
from rewards import make_reward
from rewards.countdown import CountdownConfig
from rewards.exact_answer import ExactAnswerConfig
from rollout.prompts import load_prompts, refuse_overlap
from rollout.texts import TokenSetup, unmask

SMALL = TextPretrainConfig(num_steps=20, batch_size=16, hidden_size=32, num_layers=2, warmup_steps=5, lr=3e-3)


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
    config = TextPretrainConfig(num_steps=100, warmup_steps=10, lr=1.0, lr_end=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(50, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)


def test_every_row_names_a_configuration_with_its_own_name() -> None:
    for config in (TextPretrainConfig(), CountdownPretrainConfig(), SudokuPretrainConfig(), AdditionPretrainConfig()):
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


def _answers(config: TinyTextConfig, prompts: Sequence[Prompt], gamma: float | None = None) -> tuple[list[str], float]:
    """One answer to each prompt as rollouts draw them, and the mean number of calls."""
    policy = load_policy(config, "rollout")
    sampler = make_token_sampler(
        LowConfidenceConfig() if gamma is None else EntropyBoundedConfig(), config.canvas_length
    )
    told = join_prompts([policy.encode(prompt.text) for prompt in prompts])
    keys = [SampleKey(0, prompt.id, -1, 0) for prompt in prompts]
    drawn = unmask(policy, TokenSetup(sampler, Needs.FINAL), told, keys, gamma)
    return policy.decode(drawn.tokens_GL), drawn.nfe_G.float().mean().item()


def test_the_shipped_sorter_can_sort_and_has_a_habit_to_lose() -> None:
    config = TinyTextConfig(path="asset:text/tiny")
    prompts = [*load_prompts(resolve("asset:text/tiny/sort_heldout.jsonl"))[:100]]
    texts, calls = _answers(config, prompts)
    answers = [str(prompt.metadata["answer"]) for prompt in prompts]
    ascending = sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(prompts)
    either = sum(text in (answer, answer[::-1]) for text, answer in zip(texts, answers, strict=True)) / len(prompts)
    assert calls <= 8
    assert either >= 0.85
    assert 0.05 <= ascending <= 0.45
    bounded, fewer = _answers(config, prompts, gamma=0.5)
    assert fewer < 4
    assert sum(text == answer for text, answer in zip(bounded, answers, strict=True)) / len(prompts) <= 0.45


def test_the_shipped_countdown_model_finds_some_expressions() -> None:
    prompts = load_prompts(resolve("asset:text/countdown/countdown_heldout.jsonl"))[:100]
    texts, _ = _answers(TinyTextConfig(path="asset:text/countdown", canvas_length=5), prompts)
    reward = make_reward(CountdownConfig(answer_in="text"))
    samples = [RewardSample(p.id, p, text=text) for p, text in zip(prompts, texts, strict=True)]
    exact = [score.details["exact"] for score in asyncio.run(reward.score(samples))]
    assert 0.2 <= sum(map(bool, exact)) / len(exact) <= 0.7


@pytest.mark.parametrize(("folder", "task"), [("tiny", "sort"), ("tiny", "sortmix"), ("countdown", "countdown")])
def test_shipped_prompts_are_those_that_the_task_draws(folder: str, task: str) -> None:
    heldout, trained = (load_prompts(resolve(f"asset:text/{folder}/{task}_{s}.jsonl")) for s in ("heldout", "train"))
    refuse_overlap(trained, heldout)
    assert [p.text for p in heldout] == [e.prompt for e in distinct_examples(task, "heldout", 400, "prompts")]
    assert [p.text for p in trained[:50]] == [e.prompt for e in distinct_examples(task, "train", 50, "prompts")]


def test_what_ships_is_small() -> None:
    sizes = {path: path.stat().st_size for path in resolve("asset:text").rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.suffix == ".safetensors") < 4e6
    assert sum(size for path, size in sizes.items() if path.suffix == ".jsonl") < 1e6
