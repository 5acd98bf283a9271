"""The in-process judge on tiny checkpoints: its label probabilities against the softmax worked out in full."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.errors import ConfigError, ModelError
from raylign.types import RewardFailure
from rewards.judging.engine import JudgeEngine, JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.engines import DecisionEngineConfig, make_engine
from tests.tiny_judges import write_llava_judge, write_text_judge

QUESTION = JudgeRequest((JudgeMessage("system", "Judge."), JudgeMessage("user", "Is it red?")), max_tokens=6)
RED_HWC = np.full((40, 48, 3), (255, 0, 0), np.uint8)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_judge(tmp_path_factory.mktemp("judges") / "text")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> JudgeEngine:
    return make_engine(DecisionEngineConfig(model=str(write_llava_judge(tmp_path_factory.mktemp("judges") / "llava"))))


@pytest.fixture(scope="module")
def text(text_folder: Path) -> JudgeEngine:
    return make_engine(DecisionEngineConfig(model=str(text_folder)))


def labels_of(engine: JudgeEngine, request: JudgeRequest, *labels: str) -> dict[str, float]:
    answer = asyncio.run(engine.label_logprobs(request, labels))
    assert isinstance(answer, LabelLogprobs), answer
    assert answer.source == "decision"
    return dict(answer.logprob_by_label)


def failure_of(answer: Any) -> RewardFailure:
    assert isinstance(answer, RewardFailure)
    return answer


def test_a_labels_probability_is_the_softmax_over_the_whole_vocabulary(text: JudgeEngine, text_folder: Path) -> None:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(text_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(text_folder)
    prompt = (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nIs it red?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    with torch.inference_mode():
        logits_V = model(torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])).logits[0, -1]
    probs_V = torch.softmax(logits_V.double(), dim=0)
    expected = {
        label: math.log(sum(float(p) for i, p in enumerate(probs_V) if tokenizer.decode([i]).strip().lower() == label))
        for label in ("yes", "no", "5")
    }
    assert labels_of(text, QUESTION, "Yes", "no", "5", "perhaps") == pytest.approx(
        {"Yes": expected["yes"], "no": expected["no"], "5": expected["5"]}, abs=1e-5
    )


def test_the_question_and_the_picture_decide(llava: JudgeEngine) -> None:
    def probability(image_HWC: np.ndarray, question: str) -> float:
        request = replace(QUESTION, messages=(JudgeMessage("user", question, (image_HWC,)),))
        return labels_of(llava, request, "yes")["yes"]

    first = probability(RED_HWC, "Is it red?")
    assert probability(RED_HWC, "Is it red?") == first
    assert probability(RED_HWC[:, :, ::-1], "Is it red?") != first
    assert probability(RED_HWC, "Is it blue?") != first


def test_many_questions_at_once_are_answered_like_one(text: JudgeEngine) -> None:
    requests = [replace(QUESTION, messages=(JudgeMessage("user", "word " * n),)) for n in range(1, 5)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(text.label_logprobs(request, ("yes", "no")) for request in requests))

    alone = [labels_of(text, request, "yes", "no") for request in requests]
    assert [dict(answer.logprob_by_label) for answer in asyncio.run(together())] == alone


def test_a_generated_answer_follows_its_seed_and_leaves_the_global_generator_alone(text: JudgeEngine) -> None:
    drawn = replace(QUESTION, temperature=1.5, top_k=50, seed=1)
    state = torch.get_rng_state()
    first, again, other = (asyncio.run(text.ask(replace(drawn, seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(first, JudgeReply)
    assert first.finish_reason == "length"
    assert first == again != other
    assert asyncio.run(text.ask(QUESTION)) == asyncio.run(text.ask(replace(QUESTION, seed=9)))


def test_pictures_for_a_model_that_reads_only_are_a_failure(text: JudgeEngine) -> None:
    request = replace(QUESTION, messages=(JudgeMessage("user", "Is it red?", (RED_HWC,)),))
    assert "reads text only" in failure_of(asyncio.run(text.ask(request))).message


def test_a_question_that_is_too_long_is_refused(text_folder: Path) -> None:
    short = make_engine(DecisionEngineConfig(model=str(text_folder), max_prompt_tokens=10))
    failure = failure_of(asyncio.run(short.label_logprobs(QUESTION, ("yes",))))
    assert failure.code == "invalid_input"
    assert "at most 10" in failure.message


def test_a_picture_that_the_model_chokes_on_fails_alone(llava: JudgeEngine, caplog: pytest.LogCaptureFixture) -> None:
    broken = replace(QUESTION, messages=(JudgeMessage("user", "Is it red?", (np.zeros((0, 4, 3), np.uint8),)),))
    failure = failure_of(asyncio.run(llava.label_logprobs(broken, ("yes",))))
    assert failure.message == "the in-process judge failed; see the log"
    assert "Traceback" in caplog.text
    assert labels_of(llava, QUESTION, "yes")


def test_a_checkpoint_that_is_none_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    absent = make_engine(DecisionEngineConfig(model=str(tmp_path)))
    with pytest.raises(ModelError, match=r"engine\.model"):
        absent.load()
    assert str(tmp_path) not in failure_of(asyncio.run(absent.ask(QUESTION))).message
    assert str(tmp_path) in caplog.text
    with pytest.raises(ConfigError, match=r"engine\.model"):
        make_engine(DecisionEngineConfig())


def test_the_fingerprint_is_of_the_files(text: JudgeEngine, tmp_path: Path) -> None:
    text.load()
    same, other = (make_engine(DecisionEngineConfig(model=str(write_text_judge(tmp_path / str(n), n)))) for n in (0, 1))
    same.load()
    other.load()
    assert text.fingerprint == same.fingerprint != other.fingerprint
