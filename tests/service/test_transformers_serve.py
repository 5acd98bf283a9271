"""The judge's client against a real server without log-probs: `transformers serve` on a tiny LLaVA."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from raylign.types import RewardFailure
from rewards.judging.engine import JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.engines import DecisionEngineConfig, OpenAIEngineConfig, make_engine
from rewards.judging.openai_engine import Flavour, OpenAIEngine, chat_body
from tests.judge_servers import JudgeServer, free_port, judge_server
from tests.tiny_judges import write_llava_judge

RED_HWC = np.full((40, 48, 3), (255, 0, 0), np.uint8)
QUESTION = JudgeRequest((JudgeMessage("user", "Is it red?", (RED_HWC,)),), max_tokens=6)
START_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_judge(tmp_path_factory.mktemp("judges") / "llava")


def serve(checkpoint: Path, folder: Path, port: int) -> Any:
    home = folder / "hub-home"
    (home / "hub").mkdir(parents=True, exist_ok=True)  # /v1/models answers 500 without it
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(checkpoint)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return judge_server(command, port, environment, folder / f"serve-{port}.log", START_S)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeServer]:
    with serve(checkpoint, tmp_path_factory.mktemp("serve"), free_port()) as running:
        yield running


def client(url: str, checkpoint: Path, **keys: Any) -> OpenAIEngine:
    return OpenAIEngine(OpenAIEngineConfig(base_url=url, model=str(checkpoint), flavour="transformers", **keys))


def test_a_picture_and_a_text_are_judged(server: JudgeServer, checkpoint: Path) -> None:
    engine = client(server.url, checkpoint)
    engine.load()
    assert len(engine.fingerprint) == 16

    async def ask(image_HWC: np.ndarray, question: str) -> str:
        reply = await engine.ask(replace(QUESTION, messages=(JudgeMessage("user", question, (image_HWC,)),)))
        assert isinstance(reply, JudgeReply), reply
        assert reply.finish_reason == "length"
        assert reply.model == "llava@main"
        assert reply.tokens == ()
        return reply.content

    async def all_of_them() -> list[str]:
        asked = [(RED_HWC, "Is it red?"), (RED_HWC, "Is it red?"), (RED_HWC[:, :, ::-1], "Is it red?"), (RED_HWC, "5")]
        return [await ask(image_HWC, question) for image_HWC, question in asked]

    first, again, other_picture, other_question = asyncio.run(all_of_them())
    assert first == again
    assert first not in (other_picture, other_question)


def test_the_server_and_the_process_generate_the_same(server: JudgeServer, checkpoint: Path) -> None:
    here = asyncio.run(make_engine(DecisionEngineConfig(model=str(checkpoint))).ask(QUESTION))
    there = asyncio.run(client(server.url, checkpoint).ask(QUESTION))
    assert isinstance(here, JudgeReply)
    assert isinstance(there, JudgeReply)
    assert (there.content, there.finish_reason) == (here.content, here.finish_reason)


def test_label_probabilities_come_from_the_process_where_the_server_gives_none(
    server: JudgeServer, checkpoint: Path
) -> None:
    refused = asyncio.run(client(server.url, checkpoint).label_logprobs(QUESTION, ("yes", "no")))
    assert isinstance(refused, RewardFailure)
    assert "engine.type = 'decision'" in refused.message
    decided = asyncio.run(
        make_engine(DecisionEngineConfig(model=str(checkpoint))).label_logprobs(QUESTION, ("yes", "no"))
    )
    assert isinstance(decided, LabelLogprobs)
    assert set(decided.logprob_by_label) == {"yes", "no"}


@pytest.mark.parametrize(("flavour", "status"), [("transformers", 200), ("vllm", 422)])
def test_the_flavour_leaves_out_what_the_server_would_refuse(
    server: JudgeServer, checkpoint: Path, flavour: Flavour, status: int
) -> None:
    rich = replace(QUESTION, top_k=20, choices=("yes", "no"), top_logprobs=5, thinking=False)
    body = {"model": str(checkpoint), **chat_body(rich, flavour)}
    assert httpx2.post(f"{server.url}/chat/completions", json=body, timeout=60).status_code == status


def test_a_server_killed_in_the_middle_is_a_failure_and_its_successor_answers(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    endless = replace(QUESTION, max_tokens=1900)

    async def killed(server: JudgeServer, engine: OpenAIEngine) -> JudgeReply | RewardFailure:
        pending = asyncio.create_task(engine.ask(endless))
        await asyncio.sleep(0.5)
        assert not pending.done()
        await asyncio.to_thread(server.kill)
        return await pending

    with serve(checkpoint, tmp_path, port) as server:
        engine = client(server.url, checkpoint, max_attempts=1)
        assert isinstance(asyncio.run(engine.ask(QUESTION)), JudgeReply)
        lost = asyncio.run(killed(server, engine))
        assert isinstance(lost, RewardFailure)
        assert (lost.code, lost.retryable) == ("model_error", True)
        assert isinstance(asyncio.run(engine.ask(QUESTION)), RewardFailure)
    with serve(checkpoint, tmp_path, port):
        assert isinstance(asyncio.run(engine.ask(QUESTION)), JudgeReply)
