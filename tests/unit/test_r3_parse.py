"""R3 answers and what becomes of them. The golden table is the published parser's; the last column is ours."""

import json

import pytest

from rewards.judging.engine import JudgeReply
from rewards.judging.r3_parse import NoVerdict, Verdict, parse_content, parse_reply

GOOD = '{"explanation": "ok", "score": 4}'
GOLDEN = [
    # what the judge wrote                                             published          ours
    ('{"explanation":"ok","score":4}', 4, 4),
    ('{"explanation":"ok","score":4.7}', 4, "unparseable"),
    ('{"explanation":"ok","score":10}', 10, "out_of_range"),
    ('{"explanation":"ok","score":-1}', None, "out_of_range"),
    ('{"explanation":"ok","score":"5/5"}', None, "unparseable"),
    ("Score: 4", None, "unparseable"),
    ('<think>maybe "score": 2</think>{"explanation":"ok","score": 5}', 2, 5),
    (json.dumps({"explanation": 'one would say "score": 1 first', "score": 5}), 1, 5),
    ("underscore: 7", 7, "unparseable"),
    ('```json\n{"explanation":"ok","score": 3}\n```', 3, 3),
]


def _outcome(result: Verdict | NoVerdict) -> int | bool | str:
    return result.score if isinstance(result, Verdict) else result.code


@pytest.mark.parametrize(("text", "published", "ours"), GOLDEN)
def test_golden_table(text, published, ours) -> None:
    outcome = _outcome(parse_reply(JudgeReply(text), "r3", "point"))
    assert outcome == ours
    assert outcome == published or outcome == 5 or isinstance(outcome, str), "the published number is the wrong one"


@pytest.mark.parametrize(
    ("text", "won"),
    [('"Response 1"', True), ('"response 1"', True), ('" RESPONSE  2 "', False), ('"Response 3"', None), ("1", None)],
)
def test_labels_of_a_pair_are_read_whatever_their_case(text, won) -> None:
    result = parse_content(f'{{"explanation": "", "score": {text}}}', "r3", "pair")
    assert _outcome(result) == ("unparseable" if won is None else won)


def test_each_layout_has_its_own_labels() -> None:
    answer = '{"explanation": "", "score": "Assistant B"}'
    assert _outcome(parse_content(answer, "mr3", "pair")) is False
    assert _outcome(parse_content(answer, "r3", "pair")) == "unparseable"


@pytest.mark.parametrize(
    ("text", "truth"),
    [("true", True), ("false", False), ('"True"', True), ("1", None), ('"yes"', None), ("null", None)],
)
def test_binary_scores_are_true_or_false(text, truth) -> None:
    result = parse_content(f'{{"explanation": "", "score": {text}}}', "r3", "binary")
    assert _outcome(result) == ("unparseable" if truth is None else truth)


@pytest.mark.parametrize(
    ("raw", "half", "expected"),
    [
        ("4.0", "reject", 4), ('"4"', "reject", 4), ("4.5", "reject", "unparseable"), ("4.5", "down", 4),
        ("4.5", "up", 5), ("4.7", "up", "unparseable"), ("5.5", "down", "out_of_range"), ("0.5", "up", "out_of_range"),
        ("0", "reject", "out_of_range"), ("6", "reject", "out_of_range"), ("true", "reject", "unparseable"),
        ("null", "reject", "unparseable"), ("[4]", "reject", "unparseable"), ("NaN", "up", "unparseable"),
        ("Infinity", "up", "unparseable"), ("1e400", "up", "unparseable"), ('"4 of 5"', "reject", "unparseable"),
        ("9" * 5000, "reject", "unparseable"),
    ],
)  # fmt: skip
def test_marks_are_whole_numbers_on_the_scale(raw, half, expected) -> None:
    assert _outcome(parse_content(f'{{"explanation": "", "score": {raw}}}', "r3", "point", half)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Here is my verdict. {GOOD}", 4),
        (f"{GOOD} I hope that this helps!", 4),
        ('A draft: {"explanation": "", "score": 2}. On reflection: {"explanation": "", "score": 3}', 3),
        ('Set {x} then {"explanation": "", "score": 3}', 3),
        # A quotation inside a broken explanation is not the verdict.
        ('{"explanation": "they wrote {"score": 1} and are right", "score": 5}', "unparseable"),
        ('{"explanation": "they wrote {"score": 1}', "unparseable"),
        (f'{GOOD} {{"explanation": "cut', "unparseable"),
        ('{"score": 1, "explanation": "", "score": 5}', "unparseable"),
        ('{"explanation": "no score"}', "unparseable"),
        ('[{"explanation": "", "score": 4}', 4),
        ("4", "unparseable"),
        ("", "unparseable"),
        ("[" * 100_000, "unparseable"),
        ('{"a":' * 50_000, "unparseable"),
        ("{" * 100_000 + "}" * 100_000, "unparseable"),
    ],
)
def test_only_one_place_holds_the_verdict(text, expected) -> None:
    assert _outcome(parse_content(text, "r3", "point")) == expected


def test_what_was_cut_off_is_never_read() -> None:
    for reply in (
        JudgeReply(GOOD, finish_reason="length"),
        JudgeReply(f"<think>surely {GOOD}"),
        JudgeReply("", thinking=f"surely {GOOD}", finish_reason="length"),
    ):
        result = parse_reply(reply, "r3", "point")
        assert isinstance(result, NoVerdict)
        assert result.code == "truncated"


def test_thinking_is_kept_apart_whoever_takes_it_off() -> None:
    by_engine = parse_reply(JudgeReply(GOOD, thinking="hm"), "r3", "point")
    by_us = parse_reply(JudgeReply(f"hm</think>\n\n{GOOD}"), "r3", "point")
    assert by_engine == by_us == Verdict(4, "ok", "hm")
