"""R3's and mR3's prompts against hashes of what the published code makes of the same inputs."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from rewards.judging.r3_prompts import Question, answer_schema, messages, mr3_prompts, option_order, r3_prompt

POINT = Question("T", "I", ("R",), dict(zip("12345", "abcde", strict=True)))
PAIR = Question("T", "I", ("R1", "R2"), {"Response 1": "a", "Response 2": "b"})
BINARY = Question("T", "I", ("R",), {"true": "yes", "false": "no"})


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("mode", "question", "expected"),
    [("point", POINT, "35220187eb7d0728"), ("pair", PAIR, "5fcf2d6d3dedebe4"), ("binary", BINARY, "2deea7826ef89b74")],
)
def test_r3_prompts_are_the_published_ones_byte_for_byte(mode, question, expected) -> None:
    """Hashes of the output of rubricreward/r3 6a9558e:src/dataset_gen/rubrics_gen/prompts.py under outlines 0.1.14."""
    assert _hash(r3_prompt(mode, question)) == expected


def test_mr3_prompts_are_the_published_ones_byte_for_byte() -> None:
    """Hashes of what rubricreward/mr3:src/evaluation/dataset_gen.py (pair data, English, Qwen3) builds for row
    I, R1, R2 with task T and options a, b in this order."""
    question = Question("T", "I", ("R1", "R2"), {"Assistant A": "a", "Assistant B": "b"})
    system, user = mr3_prompts("pair", question, input_tag="Input (User's Prompt)")
    assert (_hash(system), _hash(user)) == ("7c62813dddf49ec1", "ba4ff643964aeb56")


def test_r3_is_one_user_message_and_mr3_is_two_with_pictures_at_the_user() -> None:
    picture_HWC = np.zeros((2, 2, 3), np.uint8)
    (only,) = messages("r3", "point", POINT, (picture_HWC,))
    assert (only.role, only.text, len(only.images_HWC)) == ("user", r3_prompt("point", POINT), 1)
    system, user = messages("mr3", "binary", BINARY, (picture_HWC,))
    assert (system.role, len(system.images_HWC), user.role, len(user.images_HWC)) == ("system", 0, "user", 1)
    assert "true: yes\nfalse: no\n" in system.text
    assert "    R\n" in user.text


def test_text_with_braces_and_percent_signs_stays_as_it_is() -> None:
    odd = "{{ task }} {0} %s {input}"
    prompt = r3_prompt("point", Question(odd, odd, (odd,), POINT.options))
    assert prompt.count(odd) == 3


def test_the_order_of_options_depends_on_the_key_and_on_nothing_else() -> None:
    labels = ["Assistant A", "Assistant B"]
    orders = [tuple(option_order(labels, f"row {i}")) for i in range(200)]
    assert {frozenset(order) for order in orders} == {frozenset(labels)}
    assert 60 < orders.count(("Assistant A", "Assistant B")) < 140
    code = (
        "from rewards.judging.r3_prompts import option_order;"
        "print([option_order(['Assistant A', 'Assistant B'], f'row {i}')[0][-1] for i in range(20)])"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == str([order[0][-1] for order in orders[:20]])


@pytest.mark.parametrize("layout", ["r3", "mr3"])
@pytest.mark.parametrize("mode", ["point", "pair", "binary"])
def test_answers_are_constrained_to_explanation_then_score(layout, mode) -> None:
    schema = answer_schema(layout, mode)
    assert list(schema["properties"]) == schema["required"] == ["explanation", "score"]  # type: ignore[index,call-overload]
    assert schema["additionalProperties"] is False
