"""A judge behind any server that speaks the OpenAI chat API: vLLM, transformers serve, or others.

Pictures travel inside the request as PNG data URLs; the server is never asked to fetch anything. What a server
cannot do is left out of the request and said in the failure: see `Flavour`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, TypeVar

import httpx2
from pydantic import BaseModel, Field, ValidationError, field_validator

from raylign.config import Config
from raylign.errors import ConfigError, ModelError
from raylign.types import JsonValue, RewardFailure
from rewards.images import encode_png
from rewards.judging.chat_text import check_labels, spellings, sum_labels
from rewards.judging.engine import JudgeMessage, JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.openai_wire import ChatAnswer, Model, ModelList, Tokens, listed_tokens, lists_as_many, reply_of
from rewards.retry import RetryPolicy, post_with_retries

logger = logging.getLogger(__name__)

RULE_VERSION = "1"
"""Counts changes to how a request is put and an answer is read."""
MAX_TOP_LOGPROBS = 20
"""What OpenAI and vLLM (`--max-logprobs`) allow by default."""
CONNECT_TIMEOUT_S = 10.0
_SERVER = "the judge server"
_NO_LOGPROBS = "gave no log-probs; use a server that does, or engine.type = 'decision'"

Flavour = Literal["vllm", "openai", "transformers"]
"""Which fields beyond the common ones a server takes.

vllm: `structured_outputs`, `logprob_token_ids`, `thinking_token_budget`, `chat_template_kwargs`, `top_k`, `min_p`.
openai: `response_format` for a JSON schema, `top_logprobs`; nothing else.
transformers: `chat_template_kwargs`; no log-probs, and an unknown field is refused with 422.
"""
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class OpenAIEngineConfig(Config):
    """A judge that some server runs; see docs/judge_engine.md for starting one."""

    type: Literal["openai"] = "openai"
    base_url: str = "http://127.0.0.1:8000/v1"
    """Address of the API, its `/v1` included."""
    model: str = ""
    """Name that the server knows the model by; empty takes the only one it offers."""
    flavour: Flavour = "vllm"
    """Which extensions may be sent."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token; empty sends none."""
    revision: str = ""
    """Which weights the server loaded, as its operator knows it (a commit of the model repository). It is part of the
    fingerprint: remembered scores of other weights are not taken for this one's."""
    timeout_s: float = Field(default=120.0, gt=0)
    """For one attempt, waiting in the server's queue included."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a question is put when the server is busy, broken or away."""
    max_in_flight: int = Field(default=32, ge=1)
    """Questions that are with the server at a time; the others wait here."""

    @field_validator("base_url")
    @classmethod
    def _plain_http_url(cls, value: str) -> str:
        url = httpx2.URL(value)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ValueError(
                "must be http(s)://host[:port]/v1 without a user, a query or a fragment; a token goes into the "
                "environment variable that `token_env` names"
            )
        return value.rstrip("/")

    @property
    def version(self) -> str:
        """What of the engine itself decides an answer; the model is in the fingerprint."""
        return f"openai-{self.flavour}-{RULE_VERSION}"


class OpenAIEngine:
    """Asks over HTTP. It may be used from any event loop: each question has a connection of its own, which costs about
    a millisecond and leaves nothing to close."""

    def __init__(self, config: OpenAIEngineConfig, retry: RetryPolicy | None = None) -> None:
        """`retry` replaces the waits between attempts. Raises ConfigError when there is no token in `token_env`."""
        self._config = config
        self._headers = _authorisation(config.token_env)
        self._retry = retry or RetryPolicy(config.max_attempts)
        self._ssl = httpx2.create_ssl_context() if config.base_url.startswith("https:") else False
        self._model = ""
        self._fingerprint = ""
        self._label_ids: dict[str, tuple[int, ...]] = {}
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def load(self) -> None:
        """Ask the server which model it runs. Raises ModelError when it is away, or has no model of that name."""
        with ThreadPoolExecutor(1) as thread:  # the caller may be inside an event loop already
            offered = thread.submit(lambda: asyncio.run(self._offered())).result()
        if isinstance(offered, RewardFailure):
            raise ModelError(
                f"{offered.message}; is a judge server up, and engine.base_url = {self._config.base_url!r} its address?"
            )
        self._take(offered)

    async def ask(self, request: JudgeRequest) -> JudgeReply | RewardFailure:
        body = await asyncio.to_thread(chat_body, request, self._config.flavour)
        async with self._in_flight():
            answer = await self._chat(body)
        if isinstance(answer, RewardFailure):
            return answer
        if self._config.flavour == "vllm" and not lists_as_many(answer, min(request.top_logprobs, MAX_TOP_LOGPROBS)):
            # vLLM 0.32 lists chosen tokens only, for all of a batch, if any question in it has `logprob_token_ids`.
            message = f"{_SERVER} left out likely tokens: label questions beside this one; give each kind a server"
            return RewardFailure("model_error", message, retryable=True)
        return reply_of(answer)

    async def label_logprobs(self, request: JudgeRequest, labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        """The spellings of a label (case, a leading space) are summed over what the server lists at the first token.

        A vLLM server lists exactly their tokens, however unlikely; others their 20 likeliest ones.
        """
        check_labels(labels)
        if self._config.flavour == "transformers":
            return RewardFailure("model_error", f"transformers serve {_NO_LOGPROBS}")
        plain = replace(request, json_schema=None, choices=None, thinking=False, thinking_budget=None, temperature=0.0)
        one_token = replace(plain, max_tokens=1, top_logprobs=MAX_TOP_LOGPROBS)
        body = await asyncio.to_thread(chat_body, one_token, self._config.flavour)
        async with self._in_flight():
            return await self._labelled(body, labels)

    def _in_flight(self) -> asyncio.Semaphore:
        """The running loop's own semaphore: one that was waited for in another loop cannot be used in this one."""
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(self._config.max_in_flight))
        return self._gate[1]

    async def _met(self) -> RewardFailure | None:
        """Load if nobody did, or if the server was away since."""
        if self._model:
            return None
        offered = await self._offered()
        if isinstance(offered, RewardFailure):
            return offered
        try:
            self._take(offered)
        except ModelError as error:
            return RewardFailure("model_error", f"{_SERVER} has not the configured model; see {_log(str(error))}")
        return None

    async def _offered(self) -> Sequence[Model] | RewardFailure:
        answer = await self._call("GET", f"{self._config.base_url}/models", None, ModelList)
        return answer if isinstance(answer, RewardFailure) else answer.data

    def _take(self, offered: Sequence[Model]) -> None:
        """Settle on the configured model. Raises ModelError when it is not offered."""
        wanted = self._config.model
        if self._config.flavour == "transformers" and wanted:
            offered = [Model(id=wanted)]  # it serves any checkpoint by name, and lists those of its download cache
        fitting = [model for model in offered if model.id == wanted or (not wanted and len(offered) == 1)]
        if not fitting:
            names = ", ".join(repr(model.id) for model in offered[:10]) or "nothing"
            raise ModelError(f"the judge server offers {names}, and engine.model is {wanted!r}; set it to one of those")
        # Name and root may be paths of the server's machine: hashed, they may travel.
        named = json.dumps([fitting[0].id, fitting[0].root, self._config.revision])
        self._fingerprint = hashlib.sha256(named.encode()).hexdigest()[:16]
        self._label_ids.clear()
        self._model = fitting[0].id

    async def _chat(self, body: Mapping[str, JsonValue]) -> ChatAnswer | RewardFailure:
        failure = await self._met()
        if failure is not None:
            return failure
        url = f"{self._config.base_url}/chat/completions"
        return await self._call("POST", url, {"model": self._model, **body}, ChatAnswer)

    async def _labelled(self, body: Mapping[str, JsonValue], labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        token_ids = await self._tokens_of(labels) if self._config.flavour == "vllm" else []
        if isinstance(token_ids, RewardFailure):
            return token_ids
        logprob_by_token: dict[str, float] = {}
        # vLLM lists as many chosen tokens as likely ones, so many labels take more than one question.
        for start in range(0, max(1, len(token_ids)), MAX_TOP_LOGPROBS):
            chosen = {"logprob_token_ids": token_ids[start : start + MAX_TOP_LOGPROBS]} if token_ids else {}
            answer = await self._chat({**body, **chosen})
            if isinstance(answer, RewardFailure):
                return answer
            tokens = listed_tokens(answer)
            if not tokens:
                return RewardFailure("model_error", f"{_SERVER} {_NO_LOGPROBS}")
            logprob_by_token |= tokens[0].logprob_by_token
        return LabelLogprobs(sum_labels(logprob_by_token, labels), "logprobs")

    async def _tokens_of(self, labels: tuple[str, ...]) -> Sequence[int] | RewardFailure:
        """The single tokens that spell the labels; asked of the server once per label."""
        failure = await self._met()
        if failure is not None:
            return failure
        url = f"{self._config.base_url.removesuffix('/v1')}/tokenize"
        for label in labels:
            if label in self._label_ids:
                continue
            ids: set[int] = set()
            for text in spellings(label):
                body = {"model": self._model, "prompt": text, "add_special_tokens": False}
                answer = await self._call("POST", url, body, Tokens)
                if isinstance(answer, RewardFailure):
                    return answer
                ids.update(answer.tokens if len(answer.tokens) == 1 else ())
            self._label_ids[label] = tuple(sorted(ids))
        return [token_id for label in labels for token_id in self._label_ids[label]]

    async def _call(
        self, method: str, url: str, body: Mapping[str, JsonValue] | None, answer_type: type[AnswerT]
    ) -> AnswerT | RewardFailure:
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        response = await post_with_retries(lambda: self._send(method, url, content), self._retry, _SERVER)
        if isinstance(response, RewardFailure):
            if response.retryable:
                self._model = ""  # a server that comes back may run another model
            return response
        try:
            return answer_type.model_validate_json(response.content)
        except ValidationError as error:
            entry = _log(f"{error.error_count()} problem(s) in {response.text[:2000]!r}")
            return RewardFailure("model_error", f"{_SERVER}'s answer breaks the API; see {entry}")

    async def _send(self, method: str, url: str, content: bytes | None) -> httpx2.Response:
        """One attempt. What a refusal says goes to the log: it may quote the prompt or the server's insides."""
        headers = {**self._headers, "Content-Type": "application/json"}
        timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            async with (
                asyncio.timeout(self._config.timeout_s),
                httpx2.AsyncClient(verify=self._ssl, headers=headers, timeout=timeout) as client,
            ):
                response = await client.request(method, url, content=content)
        except TimeoutError:
            raise httpx2.ReadTimeout(f"no answer in {self._config.timeout_s} s") from None
        if response.is_success:
            return response
        entry = _log(f"{response.status_code}: {response.text[:2000]!r}")
        retry_after = {name: value for name, value in response.headers.items() if name == "retry-after"}
        return httpx2.Response(response.status_code, headers=retry_after, text=f"see {entry}")


def chat_body(request: JudgeRequest, flavour: Flavour) -> Mapping[str, JsonValue]:
    """The request's JSON without the model's name. What the flavour has no field for is left out."""
    body: dict[str, JsonValue] = {
        "messages": [_message(message) for message in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    if flavour != "transformers" and request.top_logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = min(request.top_logprobs, MAX_TOP_LOGPROBS)
    if flavour != "openai" and request.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": request.thinking}
    if flavour == "openai" and request.json_schema is not None:
        schema = {"name": "answer", "schema": request.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {**body, **(_vllm_fields(request) if flavour == "vllm" else {})}


def _vllm_fields(request: JudgeRequest) -> Mapping[str, JsonValue]:
    given: dict[str, JsonValue] = {
        "top_k": request.top_k,
        "min_p": request.min_p,
        "thinking_token_budget": request.thinking_budget,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    if request.choices is not None:
        fields["structured_outputs"] = {"choice": list(request.choices)}
    elif request.json_schema is not None:
        fields["structured_outputs"] = {"json": request.json_schema}
    return fields


def _message(message: JudgeMessage) -> JsonValue:
    if not message.images_HWC:
        return {"role": message.role, "content": message.text}
    pictures = [base64.b64encode(encode_png(image_HWC)).decode("ascii") for image_HWC in message.images_HWC]
    parts: list[JsonValue] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pictures
    ]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


def _authorisation(token_env: str) -> dict[str, str]:
    if not token_env:
        return {}
    token = os.environ.get(token_env, "")
    if not token:
        raise ConfigError(
            f"engine.token_env is {token_env!r}, which the environment does not have; export it or leave the key out"
        )
    return {"Authorization": f"Bearer {token}"}


def _log(said: str) -> str:
    """Log what the server said, and return what names the entry."""
    log_id = uuid.uuid4().hex[:12]
    logger.warning("%s: %s (log id %s)", _SERVER, said, log_id)
    return f"the log, id {log_id}"
