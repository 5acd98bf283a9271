"""The client of judge servers against a scripted server: what is sent, and what becomes of every kind of answer."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from raylign.config import load_config
from raylign.errors import ConfigError, ModelError
from raylign.types import RewardFailure
from rewards.judging.chat_text import check_labels, content_tokens, shown_name, split_thinking, sum_labels
from rewards.judging.engine import JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs, TokenAlternatives
from rewards.judging.engines import DecisionEngineConfig, OpenAIEngineConfig, make_engine
from rewards.judging.openai_engine import OpenAIEngine, chat_body
from rewards.retry import RetryPolicy
from services.reward_config import RewardServerConfig

ROOT = Path(__file__).parents[2]
QUESTION = JudgeRequest((JudgeMessage("user", "Is it?"),), max_tokens=8)
MODELS = {"data": [{"id": "judge", "root": "/models/judge"}]}
Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and a body: JSON, text, or None for a connection that breaks off."""


class ScriptedServer:
    """Answers each path by its function of the request's body; keeps what it was asked."""

    def __init__(self, routes: dict[str, Callable[[Any], Answer]]) -> None:
        self.routes = {"/v1/models": lambda _: (200, {}, MODELS), **routes}
        self.asked: list[tuple[str, Any]] = []
        self.authorisations: set[str | None] = set()
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                script.answer(self, body)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self._lock:
            self.asked.append((handler.path, body))
            self.authorisations.add(handler.headers.get("Authorization"))
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            status, headers, content = self.routes[handler.path](body)
        finally:
            # Before the reply leaves: whoever reads it may have the next question here at once.
            with self._lock:
                self.busy -= 1
        if content is None:
            return
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def chats(self) -> list[Any]:
        return [body for path, body in self.asked if path.endswith("/chat/completions")]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def server(chat: Callable[[Any], Answer], **routes: Callable[[Any], Answer]) -> Generator[ScriptedServer]:
    script = ScriptedServer({"/v1/chat/completions": chat, **{f"/{name}": route for name, route in routes.items()}})
    try:
        yield script
    finally:
        script.close()


async def no_wait(_: float) -> None: ...


def engine(script: ScriptedServer, **keys: Any) -> OpenAIEngine:
    config = OpenAIEngineConfig(base_url=script.url, **keys)
    return OpenAIEngine(config, RetryPolicy(config.max_attempts, sleep=no_wait))


def chat(content: str | None, finish_reason: str = "stop", logprobs: Any = None, **message: Any) -> Answer:
    choice = {"message": {"content": content, **message}, "finish_reason": finish_reason, "logprobs": logprobs}
    return 200, {}, {"choices": [choice], "model": "judge", "usage": {"total_tokens": 3}}


def listed(*places: dict[str, float]) -> Any:
    """Log-probs in OpenAI's form; the first token of each place is the generated one."""
    return {
        "content": [
            {
                "token": next(iter(place)),
                "logprob": next(iter(place.values())),
                "bytes": None,
                "top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in place.items()],
            }
            for place in places
        ]
    }


# --- what is sent


def test_only_vllm_gets_vllms_extensions() -> None:
    request = JudgeRequest(
        (JudgeMessage("system", "Judge."), JudgeMessage("user", "Is it?")),
        max_tokens=8,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=0.0,
        seed=7,
        json_schema={"type": "object"},
        top_logprobs=50,
        thinking=True,
        thinking_budget=100,
    )
    common = {
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Is it?"}],
        "max_tokens": 8,
        "temperature": 0.6,
        "top_p": 0.95,
        "seed": 7,
    }
    logprobs = {"logprobs": True, "top_logprobs": 20}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True}}
    assert chat_body(request, "vllm") == {
        **common,
        **logprobs,
        **thinking,
        "top_k": 20,
        "min_p": 0.0,
        "thinking_token_budget": 100,
        "structured_outputs": {"json": {"type": "object"}},
    }
    assert chat_body(request, "openai") == {**common, **logprobs, "response_format": schema}
    assert chat_body(request, "transformers") == {**common, **thinking}
    choices = replace(request, json_schema=None, choices=("yes", "no"))
    assert chat_body(choices, "vllm")["structured_outputs"] == {"choice": ["yes", "no"]}


def test_what_is_not_asked_for_is_not_sent() -> None:
    keys = {"messages", "max_tokens", "temperature", "top_p", "seed"}
    assert all(set(chat_body(QUESTION, flavour)) == keys for flavour in ("vllm", "openai", "transformers"))


def test_pictures_travel_inside_the_request_before_the_text() -> None:
    image_HWC = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    message = JudgeMessage("user", "What is it?", (image_HWC, 255 - image_HWC))
    body: Any = chat_body(JudgeRequest((message,), 8), "vllm")
    *pictures, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    for picture, expected_HWC in zip(pictures, message.images_HWC, strict=True):
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert np.array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), expected_HWC)


async def _ask(asked: OpenAIEngine, request: JudgeRequest = QUESTION) -> JudgeReply | RewardFailure:
    return await asked.ask(request)


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    with server(lambda _: chat("yes")) as script:
        assert isinstance(asyncio.run(_ask(engine(script, token_env="JUDGE_TOKEN"))), JudgeReply)
        assert script.authorisations == {"Bearer secret"}
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(ConfigError, match="JUDGE_TOKEN"):
        make_engine(OpenAIEngineConfig(token_env="JUDGE_TOKEN"))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://me:secret@host/v1", "http://host/v1?key=1", "http:///v1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        OpenAIEngineConfig(base_url=url)


# --- which model


def test_the_only_model_is_taken_and_named_by_a_fingerprint_that_shows_no_path() -> None:
    with server(lambda _: chat("yes")) as script:
        asked = engine(script)
        assert asked.fingerprint == ""
        asked.load()
        fingerprint = asked.fingerprint
        assert len(fingerprint) == 16
        other = engine(script, revision="abc123")
        other.load()
        assert other.fingerprint != fingerprint
        assert isinstance(asyncio.run(_ask(asked)), JudgeReply)
        assert script.chats()[0]["model"] == "judge"


def test_a_model_that_is_not_offered_is_refused_with_the_names_that_are() -> None:
    with server(lambda _: chat("yes")) as script:
        asked = engine(script, model="jugde")
        with pytest.raises(ModelError, match=r"offers 'judge', and engine.model is 'jugde'"):
            asked.load()
        reply = asyncio.run(_ask(asked))
    assert isinstance(reply, RewardFailure)
    assert not reply.retryable


def test_a_server_that_is_away_is_an_error_when_loading_and_a_retryable_failure_when_asking() -> None:
    with server(lambda _: chat("yes")) as script:
        asked = engine(script)
    with pytest.raises(ModelError, match=script.url):
        asked.load()
    reply = asyncio.run(_ask(asked))
    assert isinstance(reply, RewardFailure)
    assert reply.retryable
    assert reply.code == "model_error"


def test_loading_works_inside_an_event_loop() -> None:
    async def start() -> str:
        asked.load()
        return asked.fingerprint

    with server(lambda _: chat("yes")) as script:
        asked = engine(script)
        assert asyncio.run(start())


# --- what comes back


@pytest.mark.parametrize(
    ("message", "content", "thinking"),
    [
        ({"content": "4"}, "4", ""),
        ({"content": "4", "reasoning": "Hm."}, "4", "Hm."),
        ({"content": "4", "reasoning_content": "Hm."}, "4", "Hm."),
        ({"content": "4", "reasoning_content": None}, "4", ""),
        ({"content": "<think>\nHm.\n</think>\n\n4"}, "4", "Hm."),
        ({"content": "Hm.\n</think>\n\n4"}, "4", "Hm."),
        ({"content": "<think>\nHm, so"}, "", "Hm, so"),
        ({"content": None, "reasoning": "Hm, so"}, "", "Hm, so"),
    ],
)
def test_thinking_is_kept_apart_from_content(message: dict[str, Any], content: str, thinking: str) -> None:
    with server(lambda _: chat(message.pop("content", None), "length", **message)) as script:
        reply = asyncio.run(_ask(engine(script)))
    assert reply == JudgeReply(content, thinking, "length", (), "judge")


def test_alternatives_are_those_of_the_content() -> None:
    said = ("<think>", "4", "</think>", "\n\n", "4", "<end>")
    places = [{token: -0.1, "5": -3.0} for token in said]
    with server(lambda _: chat("4", logprobs=listed(*places), reasoning="4")) as script:
        reply = asyncio.run(_ask(engine(script), replace(QUESTION, top_logprobs=2)))
    assert isinstance(reply, JudgeReply)
    assert reply.tokens == (TokenAlternatives("4", {"4": -0.1, "5": -3.0}),)


@pytest.mark.parametrize(("flavour", "fails"), [("vllm", True), ("openai", False)])
def test_a_vllm_that_leaves_out_likely_tokens_is_a_failure(flavour: Any, fails: bool) -> None:
    with server(lambda _: chat("45", logprobs=listed({"4": -0.1, "5": -3.0}, {"5": -0.1}))) as script:
        reply = asyncio.run(_ask(engine(script, flavour=flavour), replace(QUESTION, top_logprobs=2)))
    assert isinstance(reply, RewardFailure) is fails


def test_content_that_cannot_be_found_in_its_tokens_keeps_them_all() -> None:
    tokens = (TokenAlternatives("\ufffd", {}), TokenAlternatives("\ufffd", {}))
    assert content_tokens(tokens, "é") == tokens
    assert content_tokens(tokens, "") == ()
    spread = tuple(TokenAlternatives(text, {}) for text in ("a", "yes", ", it", " is", "!"))
    assert [token.token for token in content_tokens(spread, "yes, it is")] == ["yes", ", it", " is"]


@pytest.mark.parametrize(
    "body",
    [
        "no JSON",
        "[]",
        "{}",
        {"choices": []},
        {"choices": [{"message": {"content": 4}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "4"}}]},
        {"choices": [{"message": {"content": "4"}, "finish_reason": None}]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"message": "4", "finish_reason": "stop"}]},
        chat("4", logprobs={"content": [{"token": "4", "logprob": "-1"}]})[2],
        chat("4", logprobs={"content": [{"token": "4", "logprob": math.nan}]})[2],
        chat("4", logprobs={"content": [{"token": "4", "logprob": -math.inf}]})[2],
        chat("4", logprobs={"content": [{"token": "4", "logprob": 2.0}]})[2],
        chat("4", logprobs={"content": [{"logprob": -1.0}]})[2],
    ],
)
def test_an_answer_that_breaks_the_api_is_a_failure(body: Any, caplog: pytest.LogCaptureFixture) -> None:
    with server(lambda _: (200, {}, body)) as script:
        reply = asyncio.run(_ask(engine(script)))
    assert isinstance(reply, RewardFailure)
    assert (reply.code, reply.retryable) == ("model_error", False)
    assert reply.message.rpartition(" ")[2] in caplog.text


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "invalid_input", False),
        (422, "invalid_input", False),
        (401, "model_error", False),
        (429, "overloaded", True),
        (500, "model_error", True),
        (503, "overloaded", True),
    ],
)
def test_a_refusal_is_a_failure_and_its_words_go_to_the_log(
    status: int, code: str, retryable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with server(lambda _: (status, {}, "Traceback: /srv/secret.py")) as script:
        reply = asyncio.run(_ask(engine(script, max_attempts=2)))
        assert len(script.chats()) == (2 if retryable else 1)
    assert isinstance(reply, RewardFailure)
    assert (reply.code, reply.retryable) == (code, retryable)
    assert "secret" not in reply.message
    assert "secret" in caplog.text


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    answers = [(503, {"Retry-After": "7"}, "busy"), (200, {}, None), chat("yes")]
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    with server(lambda _: answers.pop(0)) as script:
        config = OpenAIEngineConfig(base_url=script.url)
        reply = asyncio.run(_ask(OpenAIEngine(config, RetryPolicy(3, sleep=wait))))
    assert reply == JudgeReply("yes", model="judge")
    assert len(waits) == 2
    assert 7.0 <= waits[0] <= 7.25, "never before the time it names, and not all at once"


def test_a_server_that_comes_back_is_asked_for_its_model_again() -> None:
    broken = [(200, {}, None)]
    models = [MODELS, {"data": [{"id": "other"}]}]
    with server(
        lambda _: broken.pop() if broken else chat("yes"), **{"v1/models": lambda _: (200, {}, models.pop(0))}
    ) as script:
        asked = engine(script, max_attempts=1)
        first = asyncio.run(_ask(asked))
        before = asked.fingerprint
        second = asyncio.run(_ask(asked))
        assert [body["model"] for body in script.chats()] == ["judge", "other"]
    assert isinstance(first, RewardFailure)
    assert first.retryable
    assert isinstance(second, JudgeReply)
    assert asked.fingerprint != before


def test_a_slow_server_is_a_timeout() -> None:
    def slow(_: Any) -> Answer:
        time.sleep(0.4)
        return chat("yes")

    with server(slow) as script:
        reply = asyncio.run(_ask(engine(script, timeout_s=0.1, max_attempts=1)))
    assert isinstance(reply, RewardFailure)
    assert (reply.code, reply.retryable) == ("timeout", True)


def test_only_so_many_questions_are_with_the_server_in_any_event_loop() -> None:
    def slow(_: Any) -> Answer:
        time.sleep(0.02)
        return chat("yes")

    async def many() -> list[JudgeReply | RewardFailure]:
        return await asyncio.gather(*(asked.ask(QUESTION) for _ in range(8)))

    with server(slow) as script:
        asked = engine(script, max_in_flight=2)
        replies = asyncio.run(many()) + asyncio.run(many())
        assert script.busiest == 2
    assert replies == [JudgeReply("yes", model="judge")] * 16


# --- labels


async def _labels(asked: OpenAIEngine, *labels: str) -> LabelLogprobs | RewardFailure:
    return await asked.label_logprobs(replace(QUESTION, json_schema={}, choices=("a",), thinking=True), labels)


def test_spellings_of_a_label_are_summed_and_a_label_nobody_lists_is_absent() -> None:
    first = {"Yes": math.log(0.4), " yes": math.log(0.2), "no": math.log(0.1), "Well": math.log(0.05)}
    with server(lambda _: chat("Yes", "length", listed(first))) as script:
        answer = asyncio.run(_labels(engine(script, flavour="openai"), "yes", "No", "maybe"))
        sent = script.chats()[0]
    assert isinstance(answer, LabelLogprobs)
    assert answer.source == "logprobs"
    assert answer.logprob_by_label == pytest.approx({"yes": math.log(0.6), "No": math.log(0.1)})
    assert sent["max_tokens"] == 1
    assert sent["top_logprobs"] == 20
    assert not {"response_format", "logprob_token_ids"} & set(sent)


def test_vllm_is_asked_for_exactly_the_labels_tokens_as_many_at_a_time_as_it_lists() -> None:
    tokens = {text: index for index, text in enumerate(["yes", " yes", "Yes", " Yes", "YES", "no", "No", " no", "No "])}
    labels = ("yes", "no", *(f"w{number}" for number in range(20)))

    def tokenize(body: Any) -> Answer:
        text = body["prompt"]
        word = [100 + int(text[1:])] if text.startswith("w") else [1, 2]
        return 200, {}, {"tokens": [tokens[text]] if text in tokens else word, "count": 1}

    def answer(body: Any) -> Answer:
        ids = body["logprob_token_ids"]
        spelt = {index: text for text, index in tokens.items()}
        return chat("", "length", listed({"<end>": -0.5} | {spelt.get(i, f"w{i - 100}"): -float(i + 1) for i in ids}))

    with server(answer, tokenize=tokenize) as script:
        asked = engine(script)
        first = asyncio.run(_labels(asked, *labels))
        tokenized = sum(path == "/tokenize" for path, _ in script.asked)
        assert asyncio.run(_labels(asked, *labels)) == first
        assert sum(path == "/tokenize" for path, _ in script.asked) == tokenized
        chats = script.chats()
    # yes has 5 tokens, no has 3 ("No " is no spelling), each w one.
    assert [len(body["logprob_token_ids"]) for body in chats] == [20, 8, 20, 8]
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in chats)
    assert not any("structured_outputs" in body for body in chats)
    assert isinstance(first, LabelLogprobs)
    assert first.logprob_by_label["yes"] == pytest.approx(math.log(sum(math.exp(-n) for n in (1, 2, 3, 4, 5))))
    assert first.logprob_by_label["w19"] == -120.0


@pytest.mark.parametrize(("flavour", "asks"), [("transformers", 0), ("openai", 1)])
def test_a_server_without_logprobs_is_a_failure_that_says_what_to_use(flavour: Any, asks: int) -> None:
    with server(lambda _: chat("Yes")) as script:
        answer = asyncio.run(_labels(engine(script, flavour=flavour), "yes", "no"))
        assert len(script.chats()) == asks
    assert isinstance(answer, RewardFailure)
    assert not answer.retryable
    assert "engine.type = 'decision'" in answer.message


@pytest.mark.parametrize("labels", [(), ("yes", " YES"), ("yes", " ")])
def test_labels_that_cannot_be_told_apart_are_a_mistake(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="labels must"):
        check_labels(labels)


def test_a_sum_of_probabilities_is_never_above_one() -> None:
    assert sum_labels({"yes": 1e-4, "Yes": -1e-3}, ["yes"]) == {"yes": 0.0}


def test_split_thinking_takes_the_first_closing_tag() -> None:
    assert split_thinking("a</think>b</think>c") == ("a", "b</think>c")
    assert split_thinking(" 4 ") == ("", " 4 ")


def test_a_folder_is_shown_by_its_last_part() -> None:
    assert [shown_name(name) for name in ("/srv/models/r3/", "./r3", "Qwen/Qwen3-8B")] == ["r3", "r3", "Qwen/Qwen3-8B"]


# --- what is documented


def _documented_keys(page: str, heading: str) -> dict[str, str]:
    section = page.split(f'## `type = "{heading}"`\n')[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section.split("\n\nThe")[0].split("\n\nIt")[0], re.MULTILINE))


@pytest.mark.parametrize(
    ("heading", "config"), [("openai", OpenAIEngineConfig()), ("decision", DecisionEngineConfig())]
)
def test_every_key_is_documented_with_its_default(heading: str, config: Any) -> None:
    page = (ROOT / "docs" / "judge_engine.md").read_text(encoding="utf-8")
    defaults = {name: value for name, value in config.model_dump().items() if name != "type"}
    documented = _documented_keys(page, heading)
    assert set(documented) == set(defaults)
    for name, shown in documented.items():
        if shown != "(required)":
            assert type(defaults[name])(shown.strip('`"')) == defaults[name]


def test_the_documented_reward_service_parses(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "judge_engine.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    path = tmp_path / "rewards.toml"
    path.write_text(block, encoding="utf-8")
    settings = load_config(RewardServerConfig, path)
    assert [reward.type for reward in settings.rewards] == ["r3", "vlm_judge"]
