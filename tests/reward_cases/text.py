"""Rewards that judge a text by rules."""

import numpy as np

from raylign.types import Prompt, RewardSample
from rewards.code_tests import CodeTestsConfig
from rewards.countdown import CountdownConfig
from rewards.exact_answer import ExactAnswerConfig
from rewards.format_tags import FormatTagsConfig
from rewards.math_answer import MathAnswerConfig
from rewards.sudoku import SudokuConfig
from tests.reward_cases.case import Case

PICTURE = np.zeros((8, 8, 3), np.uint8)
COUNTDOWN = Prompt("c", "make 24 of 4, 6, 1", {"numbers": [4, 6, 1], "target": 24})
SUDOKU = Prompt("s", "solve", {"puzzle": "1200340021434321", "solution": "1234341221434321"})
MATH = Prompt("m", "what is 6 times 7?", {"answer": "42"})
SORT = Prompt("e", "sort 3 1 2", {"answer": "123"})
CODE = Prompt("k", "write f, which squares", {"tests": ["assert f(3) == 9", "assert f(-1) == 1"]})
PLAIN = Prompt("f", "think, then answer")


def _texts(prompt: Prompt, *texts: str):
    def good(count: int) -> list[RewardSample]:
        return [RewardSample(f"s{i}", prompt, text=texts[i % len(texts)] + " " * i) for i in range(count)]

    return good


def _bad(prompt: Prompt, *metadata: dict) -> list[RewardSample]:
    """No text, a picture, too long a text, and each bad metadata."""
    return [
        RewardSample("no text", prompt),
        RewardSample("picture", prompt, PICTURE),
        RewardSample("picture and text", prompt, PICTURE, text="<answer>1</answer>"),
        RewardSample("long", prompt, text="x" * (2**18 + 1)),
        *(RewardSample(f"metadata {i}", Prompt("q", "", m), text="1") for i, m in enumerate(metadata)),
    ]


CASES = [
    Case(
        CountdownConfig(),
        _texts(COUNTDOWN, "<answer>4*6*1</answer>", "<answer>4+6+1</answer>", "none", "<answer>4**9</answer>"),
        _bad(COUNTDOWN, {}, {"numbers": [1], "target": None}, {"numbers": {"a": 1}, "target": 2}),
        prompt=COUNTDOWN,
    ),
    Case(
        SudokuConfig(),
        _texts(SUDOKU, "<answer>1234341221434321</answer>", "<answer>1234344121434321</answer>", "none"),
        _bad(SUDOKU, {}, {"puzzle": 12, "solution": 12}, {"puzzle": "0" * 16, "solution": "1" * 16}),
        prompt=SUDOKU,
    ),
    Case(
        ExactAnswerConfig(),
        _texts(SORT, "123", "1 2 3", "132", "", "<answer>123</answer>", "1234"),
        _bad(SORT, {}, {"answer": ["1"]}, {"answer": " "}, {"answer": True}, {"answer": 1.5}),
        prompt=SORT,
    ),
    Case(
        MathAnswerConfig(num_workers=1),
        _texts(
            MATH, r"\boxed{42}", r"\boxed{84/2}", r"\boxed{41}", "none", r"\boxed{9^{9^9}}", "<answer>42.0</answer>"
        ),
        _bad(MATH, {}, {"answer": ["42"]}, {"answer": ""}),
        prompt=MATH,
    ),
    Case(
        CodeTestsConfig(unsafe_local_exec=True),  # isolated where that is possible
        _texts(CODE, "```python\ndef f(n): return n * n\n```", "```python\ndef f(n): return 9\n```", "none"),
        _bad(CODE, {}, {"tests": []}, {"tests": ["1 +"]}, {"tests": [{"stdin": 1}]}),
        prompt=CODE,
    ),
    Case(
        FormatTagsConfig(),
        _texts(PLAIN, "<reasoning>a</reasoning><answer>1</answer>", "<answer>", ""),
        _bad(PLAIN),
        prompt=PLAIN,
    ),
]
