"""The program of a math worker: compares answers with Math-Verify, one line of JSON per task.

Run as a file by `rewards/math_answer.py`, so it imports nothing of this package. Math-Verify's own time limits stay
off: they need SIGALRM for themselves and turn a timeout into "wrong". Instead the process as a whole dies of SIGALRM
(its default action, which also interrupts C code) or by its owner's hand.

Golds are parsed leniently (malformed fractions and stray full stops are the data set's fault), answers as Math-Verify's
authors advise for rewards: units on; malformed operators, nits and equations off; the box first.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 4 * 2**30


def _config(lenient: bool) -> list[LatexExtractionConfig]:
    normalization = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=lenient, nits=lenient, boxed="last", equations=False
    )
    return [
        LatexExtractionConfig(
            try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=normalization
        )
    ]


_LENIENT, _STRICT = _config(lenient=True), _config(lenient=False)


def _parse(content: str, config: list[LatexExtractionConfig]) -> list[Any]:
    """What the content of one box means; empty if it means nothing to the parser."""
    try:
        # A limit of 0 is none.
        return parse(
            f"\\boxed{{{content}}}", config, fallback_mode="no_fallback", extraction_mode="first_match",
            parsing_timeout=0, raise_on_error=True,
        )  # fmt: skip
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # the parser raises what it likes on what it cannot read
        return []


@functools.lru_cache(maxsize=1024)
def _parse_gold(content: str) -> tuple[Any, ...]:
    return tuple(_parse(content, _LENIENT))


def _equal(gold: Any, answer: Any) -> bool:
    """Gold first: the comparison is not symmetric."""
    try:
        return verify(gold, answer, timeout_seconds=0, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # sympy cannot compare them; the library calls that unequal, too
        return False


def compare(gold: str, answer: str) -> dict[str, bool]:
    """Whether either is readable, and whether they are the same."""
    golds, answers = _parse_gold(gold), _parse(answer, _STRICT)
    correct = any(_equal(g, a) for g in golds for a in answers)
    return {"gold_readable": bool(golds), "answer_readable": bool(answers), "correct": correct}


def main() -> None:
    """Answer tasks until the input ends. Out of memory, the process ends; its owner starts another."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Whatever a library prints must not look like an answer.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    compare("\\frac{1}{2}", "0.5")  # builds the grammar's tables before the first task's time runs
    answers.write(b"{}\n")
    for line in sys.stdin.buffer:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, task["limit_s"])
        answer = compare(task["gold"], task["answer"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
