"""The OCR scorer's numbers, worked out by hand; flow_grpo's are those that its own code gives."""

import pytest

from rewards.reading.similarity import (
    clean_similarity,
    edit_distance,
    exact,
    flow_grpo_similarity,
    normalise_clean,
    quoted_target,
)


@pytest.mark.parametrize(
    ("target", "recognised", "expected"),
    [
        ("Hello World", "Hello World", 1.0),
        # helloworld (10) against helloworl: one deletion.
        ("Hello World", "HELLO WORL", 0.9),
        # The target occurs, so everything around it is free: the published loophole.
        ("Hello World", "xx Hello World Hello World q Hello World Hello World Hello World", 1.0),
        # 20 surplus letters are 20 insertions or more, cut to the target's 10.
        ("Hello World", "Hello Worl" + "z" * 20, 0.0),
        # Swapped halves: 8 edits of 10.
        ("Hello World", "WorldHello", 0.2),
        # hello,world! (12): 0 for o, no comma.
        ("Hello, World!", "Hell0 World!", 10 / 12),
        ("Hello World", "", 0.0),
    ],
)
def test_flow_grpo_similarity(target: str, recognised: str, expected: float) -> None:
    assert flow_grpo_similarity(target, recognised) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("target", "recognised", "expected"),
    [
        ("Hello World", "hello  WORLD!", 1.0),
        ("Hello World", "HELLO WORL", 0.9),
        # Five copies: 40 surplus letters of 50. The loophole is closed.
        ("Hello World", "Hello World" * 5, 0.2),
        # helloworl + 20 z has 29 letters; d into one z and drop 19: 20 of 29.
        ("Hello World", "Hello Worl" + "z" * 20, 1 - 20 / 29),
        # Swapped halves: 8 edits of 10, as in the published mode.
        ("Hello World", "WorldHello", 0.2),
        # helloworld (10), the comma and the mark being nothing: one substitution.
        ("Hello, World!", "Hell0 World!", 0.9),
        ("Hello World", "", 0.0),
        # Full-width letters are the same letters, and sharp s folds to ss.
        ("ABC", "\uff21\uff22\uff23", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("12", "\uff121", 0.0),
    ],
)
def test_clean_similarity(target: str, recognised: str, expected: float) -> None:
    assert clean_similarity(target, recognised) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("similarity", [flow_grpo_similarity, clean_similarity])
def test_a_target_without_content_is_refused(similarity) -> None:
    with pytest.raises(ValueError, match="is empty"):
        similarity("  ", "anything")


def test_exact_ignores_what_the_clean_mode_ignores() -> None:
    assert exact("It's", "ITS")
    assert not exact("ITS", "IT")
    assert not exact("!", "?")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("prompt", "curly", "target"),
    [
        ('a sign "ONE" and "TWO"', True, "ONE"),
        ("a sign “ONE” here", True, "ONE"),
        ("a sign “ONE” here", False, None),
        ('an "" empty "TWO"', True, ""),
        ('only "one quote', True, None),
        ("it's 'single'", True, None),
    ],
)
def test_quoted_target(prompt: str, curly: bool, target: str | None) -> None:
    assert quoted_target(prompt, curly) == target


def test_normalising_keeps_symbols_that_carry_meaning() -> None:
    assert normalise_clean(" A+B = 5$ — ok…\t") == "a+b=5$ok"
