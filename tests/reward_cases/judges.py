"""Judges around an engine that answers from a script."""

import hashlib
import json
import math
from collections.abc import Callable

import numpy as np

from raylign.types import Prompt, RewardFailure, RewardSample
from rewards.judging.engine import JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.r3_judge import R3Config
from rewards.r3 import R3Reward
from rewards.vlm_judge import VlmJudgeConfig, VlmJudgeReward
from tests.reward_cases.case import Case

Answer = JudgeReply | RewardFailure | str
QUESTION = Prompt("q", "What is 2 + 2?")


class ScriptedEngine:
    """Answers every request by a function of it, and remembers them all."""

    fingerprint = "scripted"

    def __init__(
        self,
        answer: Callable[[JudgeRequest], Answer] | None = None,
        labels: Callable[[JudgeRequest, tuple[str, ...]], LabelLogprobs | RewardFailure] | None = None,
    ) -> None:
        self.requests: list[JudgeRequest] = []
        self.num_loads = 0
        self._answer = answer
        self._labels = labels

    def load(self) -> None:
        self.num_loads += 1

    async def ask(self, request: JudgeRequest) -> JudgeReply | RewardFailure:
        self.requests.append(request)
        assert self._answer is not None, "this script has no answers"
        answer = self._answer(request)
        return JudgeReply(answer) if isinstance(answer, str) else answer

    async def label_logprobs(self, request: JudgeRequest, labels: tuple[str, ...]) -> LabelLogprobs | RewardFailure:
        self.requests.append(request)
        assert self._labels is not None, "this script has no labels"
        return self._labels(request, labels)


def verdict(score: object, explanation: str = "because") -> str:
    """An answer as R3 gives it."""
    return json.dumps({"explanation": explanation, "score": score})


def said(request: JudgeRequest) -> str:
    """Everything that a request says to the judge."""
    return "\n".join(message.text for message in request.messages)


def bits(request: JudgeRequest) -> int:
    """A number that depends on all that a judge is shown, and on the seed."""
    pictures = b"".join(image_HWC.tobytes() for message in request.messages for image_HWC in message.images_HWC)
    return int.from_bytes(hashlib.sha256(f"{said(request)}{request.seed}".encode() + pictures).digest()[:4], "big")


def texts(count: int) -> list[RewardSample]:
    """Answers to one question."""
    return [RewardSample(f"s{i}", QUESTION, text=f"It is {i}.", seed=i) for i in range(count)]


def pictures(count: int) -> list[RewardSample]:
    """Pictures for one caption."""
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [RewardSample(f"s{i}", Prompt("p", "a red cube"), image_HWC, seed=i) for i, image_HWC in enumerate(images)]


BAD_TEXTS = [
    RewardSample("nothing", QUESTION),
    RewardSample("empty prompt", Prompt("e", "  "), text="It is 4."),
    RewardSample("too long", QUESTION, text="word " * 20_000),
    RewardSample("grey", QUESTION, np.zeros((8, 8), np.uint8), text="It is 4."),
]


BAD_PICTURES = [
    RewardSample("nothing", Prompt("p", "a red cube")),
    RewardSample("empty prompt", Prompt("e", ""), np.zeros((16, 16, 3), np.uint8)),
    RewardSample("long prompt", Prompt("l", "very " * 5000), np.zeros((16, 16, 3), np.uint8)),
    RewardSample("grey", Prompt("p", "a red cube"), np.zeros((16, 16), np.uint8)),
    RewardSample("text", Prompt("p", "a red cube"), text="a red cube"),
]


def label_logprobs(**probability_by_label: float) -> LabelLogprobs:
    """An answer with these probabilities; labels may start with an underscore to be names."""
    logprobs = {label.removeprefix("_"): math.log(p) for label, p in probability_by_label.items()}
    return LabelLogprobs(logprobs, "logprobs")


def make_r3(config: R3Config) -> R3Reward:
    """An R3 reward whose judge marks by a hash of what it is shown."""
    return R3Reward(config, ScriptedEngine(lambda request: verdict(1 + bits(request) % 5)))


def make_vlm_judge(config: VlmJudgeConfig) -> VlmJudgeReward:
    """A judge of pictures whose P(yes) is a hash of what it is shown."""

    def labels(request: JudgeRequest, asked: tuple[str, ...]) -> LabelLogprobs:
        share = (1 + bits(request) % 98) / 100
        return LabelLogprobs({asked[0]: math.log(0.9 * share), asked[1]: math.log(0.9 * (1 - share))}, "logprobs")

    return VlmJudgeReward(config, ScriptedEngine(labels=labels))


CASES = [
    Case(
        VlmJudgeConfig(repeatable=True),
        pictures,
        BAD_PICTURES,
        make_vlm_judge,  # type: ignore[arg-type]
        Prompt("p", "a red cube"),
    ),
    Case(R3Config(num_samples=2, repeatable=True), texts, BAD_TEXTS, make_r3, QUESTION),  # type: ignore[arg-type]
]
