"""Form rewards: the published patterns in linear time, and the configurable ones."""

import asyncio
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raylign.types import Prompt, RewardSample
from rewards.format_tags import FormatTagsConfig, FormatTagsReward, soft_format, strict_format, tags_in_order
from rewards.text.answers import after_last_tag, last_answer, last_boxed, last_code

PIECES = st.lists(st.sampled_from([
    "<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "x", "\\boxed{", "}", "{", "\\}", "```",
]), max_size=14).map("".join)  # fmt: skip
STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", re.DOTALL)
SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)


@given(PIECES)
def test_the_d1_forms_are_the_published_patterns(text: str) -> None:
    framed = f"<reasoning>\n{text}\n</reasoning>\n<answer>\n{text}\n</answer>\n"
    for candidate in (text, framed, framed + "\n", framed[:-1], framed + text):
        assert strict_format(candidate) == (0.5 if STRICT.match(candidate) else 0.0)
        assert soft_format(candidate) == (0.5 if SOFT.match(candidate) else 0.0)


@given(PIECES)
def test_the_last_answer_is_the_last_match_of_the_published_pattern(text: str) -> None:
    matches = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert last_answer(text) == (matches[-1].strip() if matches else None)
    assert after_last_tag(text) == text.split("<answer>")[-1].split("</answer>")[0].strip()


@pytest.mark.parametrize(("text", "content"), [
    (r"so \boxed{42}", "42"), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\fbox{ 3 }", "3"), (r"\boxed {4}", "4"), ("none", None),
    (r"\boxed{1", None), (r"\boxed 7", None), (r"\boxed{3} and \boxed{2", "3"), (r"\boxedx{3}", None),
    (r"\boxed{a \boxed{b}}", r"a \boxed{b}"), (r"\boxed{}", ""),
    (r"write \boxed{ and it is \boxed{4}.", "4"), (r"\boxed{1 \boxed{2}", "2"), (r"{ \boxed{\text{a}} }}", r"\text{a}"),
    (r"\boxed{a \\}", r"a \\"), (r"\\boxed{4}", "4"),
])  # fmt: skip
def test_the_last_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(("text", "code"), [
    ("```python\na = 1\n```", "a = 1\n"), ("```\nb\n```\n```python\na\n```\n```\nc\n```", "a\n"),
    ("```py\na\n```\n```python\nb\n```", "b\n"), ("```\nb\n```", "b\n"), ("no code", None), ("```python\nopen", None),
    ("```bash\nls\n```", None), ("say ```python a``` inline", None), ("```python\n```", ""),
])  # fmt: skip
def test_the_last_code(text: str, code: str | None) -> None:
    assert last_code(text) == code


@pytest.mark.parametrize("find", [last_answer, last_boxed, last_code, strict_format, soft_format])
@pytest.mark.parametrize(
    "piece", ["<answer>", "\\boxed{", "```\n", "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n"]
)
def test_finding_takes_linear_time(find, piece: str) -> None:
    text = "<reasoning>\n" + piece * (200_000 // len(piece))
    started = time.perf_counter()
    find(text)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("text", ["```" + " " * 200_000 + "!", " " * 200_000 + "!", "```" + "a" * 200_000 + "!"])
def test_a_long_line_that_is_no_fence_takes_linear_time(text: str) -> None:
    started = time.perf_counter()
    assert last_code(text) is None
    assert time.perf_counter() - started < 1.0


def test_tags_in_order() -> None:
    tags = ("think", "answer")
    assert tags_in_order("<think>a</think><answer>b</answer>", tags) == ["think", "answer"]
    assert tags_in_order("<answer>b</answer><think>a</think>", tags) == ["think"]
    assert tags_in_order("<think><answer>b</answer></think>", tags) == ["think"]
    assert tags_in_order("<answer>b</answer><answer>c</answer>", tags) == []


def _score(text: str, **config) -> tuple[float | None, dict]:
    reward = FormatTagsReward(FormatTagsConfig(**config))
    (score,) = asyncio.run(reward.score([RewardSample("s", Prompt("p", ""), text=text)]))
    return score.value, dict(score.details)


def test_each_rule_scores_and_says_what_it_found() -> None:
    good = "<reasoning>\na\n</reasoning>\n<answer>\n1\n</answer>\n"
    assert _score(good) == (1.0, {"found": ["reasoning", "answer"]})
    assert _score("<answer>1</answer>") == (0.5, {"found": ["answer"]})
    assert _score("ab\nc", rule="regex", pattern="a.*c") == (1.0, {"regex": 1.0})
    assert _score("abd", rule="regex", pattern="a.*c") == (0.0, {"regex": 0.0})
    assert _score(good, rule="d1") == (1.5, {"strict": 0.5, "soft": 0.5, "xml": 0.5})


@pytest.mark.parametrize("config", [
    {"rule": "regex"}, {"pattern": "a"}, {"rule": "regex", "pattern": "("}, {"tags": ()}, {"tags": ("a", "a")},
    {"tags": ("<a>",)},
])  # fmt: skip
def test_a_rule_that_cannot_be_applied_is_refused(config: dict) -> None:
    with pytest.raises(ValidationError):
        FormatTagsConfig(**config)
