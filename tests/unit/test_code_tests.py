"""The code reward: honest programs pass, and nothing that a program does to its own process passes a test for it."""

import asyncio
import time

import pytest

from raylign.errors import ConfigError, PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.code_tests import CodeTestsConfig, CodeTestsReward, read_task

SQUARE = {"tests": ["assert f(3) == 9", "assert f(-2) == 4", "assert f(0) == 0", "assert not f(0)"]}
CALLS = {"entry_point": "f", "tests": [{"args": [n], "expected": n * n} for n in (3, -2)]}
RUNS = {"tests": [{"stdin": f"{n}\n", "stdout": f"{n * n}\n"} for n in (3, -2)]}
HUMAN_EVAL = {
    "entry_point": "f",
    "tests": [
        "import math\ndef check(candidate):\n    for n in range(5):\n        assert math.isclose(candidate(n), n * n)"
    ],
}


@pytest.fixture(scope="module")
def reward() -> CodeTestsReward:
    built = CodeTestsReward(CodeTestsConfig(timeout_s=5.0))
    try:
        built.load()
    except ConfigError as error:
        pytest.skip(str(error))
    return built


def _score(reward: CodeTestsReward, metadata: dict, code: str) -> RewardScore:
    sample = RewardSample("s", Prompt("p", "", metadata), text=f"Here:\n```python\n{code}\n```\n")
    (score,) = asyncio.run(reward.score([sample]))
    return score


@pytest.mark.parametrize(("metadata", "code"), [
    (SQUARE, "def f(n): return n * n"), (CALLS, "def f(n):\n    print('noise')\n    return n * n"),
    (RUNS, "print(int(input()) ** 2)"), (HUMAN_EVAL, "f = lambda n: float(n * n)"),
    ({"tests": ["assert f(2) == (1, {2: {3}}, b'x', None)"]}, "def f(n): return (1, {n: {3}}, b'x', None)"),
    ({"tests": ["try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"]}, "def f(n): raise ValueError(n)"),
    ({"tests": ["assert f(g(2), k=3) == 7"]}, "def g(n): return 2 * n\ndef f(n, k): return n + k"),
    ({"tests": ["assert sum(1, 2) == 'mine'"], "entry_point": "sum"}, "def sum(a, b): return 'mine'"),
    ({"tests": ["assert isclose(f(2), 2 ** .5)"], "test_setup": "from math import isclose"},
     "def f(n): return n ** .5"),
    ({"entry_point": "f", "tests": [{"args": [], "kwargs": {"n": 2}, "expected": [1, [2]]}]},
     "def f(n): return (1, (n,))"),
])  # fmt: skip
def test_an_honest_program_passes(reward: CodeTestsReward, metadata: dict, code: str) -> None:
    score = _score(reward, metadata, code)
    assert (score.value, score.details.get("reason")) == (1.0, "passed"), score


CHEATS = {
    "sys.exit": r"""
import sys
sys.exit(0)
""",
    "exit in the call": r"""
import sys
def f(*a): sys.exit(0)
""",
    "os._exit": r"""
import os
os._exit(0)
""",
    "os._exit in the call": r"""
import os
def f(*a): os._exit(0)
""",
    "atexit": r"""
import atexit
atexit.register(print, 'passed')
def f(*a): raise SystemExit(0)
""",
    "prints": r"""
print('passed\n{"test": 0, "failed": null}\nready', flush=True)
def f(*a): print('passed')
""",
    "equal to all": r"""
class E:
    __eq__ = __ne__ = lambda s, o: True
    __bool__ = lambda s: True
def f(*a): return E()
""",
    "an int equal to all": r"""
class E(int):
    __eq__ = lambda s, o: True
    __hash__ = int.__hash__
def f(*a): return E(77)
""",
    "patched json": r"""
import json
json.dumps = lambda *a, **k: '{"test": 0, "failed": null}'
def f(*a): return 77
""",
    "patched builtins": r"""
import builtins
builtins.AssertionError = KeyError
builtins.all = builtins.isinstance = lambda *a: True
def f(*a): return 77
""",
    "forged answers": r"""
import os
for fd in range(3, 20):
    try: os.write(fd, b'{"test": 0, "failed": null}\n' * 9)
    except OSError: pass
def f(*a): return 77
""",
    "raises what is called passed": r"""
class passed(Exception): pass
def f(*a): raise passed
""",
    "ends in what is called passed": r"""
class passed(BaseException): pass
raise passed
""",
    "forged reason": r"""
import os
for fd in range(3, 20):
    try: os.write(fd, b'{"raised": "passed"}\n' * 9)
    except OSError: pass
def f(*a): return 77
""",
    "forged tag": r"""
import os
for fd in range(3, 20):
    try: os.write(fd, b'{"value": {"__import__": "os"}}\n' * 9)
    except OSError: pass
def f(*a): return 77
""",
    "walks the frames": r"""
import sys, gc
def f(*a):
    frame = sys._getframe()
    while frame:
        for v in list(frame.f_locals.values()):
            if v == 9: return 9
        frame = frame.f_back
    return 77
""",
    "kills its parent": r"""
import os, signal
for pid in (os.getppid(), 1, -1, 0):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
def f(*a): return 77
""",
    "loops": "while True: pass",
    "loops in the call": r"""
def f(*a):
    while True: pass
""",
    "deep": r"""
def f(*a):
    x = []
    for _ in range(100000): x = [x]
    return x
""",
    "loud": "def f(*a): return 'x' * 10**7",
    "memory": "def f(*a): return [0] * 10**10",
    "fork bomb": r"""
import os
while True:
    try: os.fork()
    except OSError: break
def f(*a): return 77
""",
    "syntax": "def f(",
    "nothing": "",
}


@pytest.fixture(scope="module")
def cheated() -> dict[str, RewardScore]:
    """All cheats in one batch, beside an honest program."""
    reward = CodeTestsReward(CodeTestsConfig(timeout_s=1.0, num_workers=4))
    try:
        reward.load()
    except ConfigError as error:
        pytest.skip(str(error))
    prompt = Prompt("p", "", {"tests": ["assert f(3) == 9", "assert f(-2) == 4", "assert f(5) == 25"]})
    codes = {**CHEATS, "honest": "def f(n): return n * n"}
    samples = [RewardSample(name, prompt, text=f"```python\n{code}\n```") for name, code in codes.items()]
    started = time.monotonic()
    scores = asyncio.run(reward.score(samples))
    assert time.monotonic() - started < 60
    return dict(zip(codes, scores, strict=True))


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_passes_nothing(cheated: dict[str, RewardScore], cheat: str) -> None:
    assert cheated[cheat].value == 0.0, cheated[cheat]
    assert cheated[cheat].details["passed"] == 0


@pytest.mark.parametrize("cheat", ["raises what is called passed", "ends in what is called passed", "forged reason"])
def test_a_call_is_not_passed_by_a_name(reward: CodeTestsReward, cheat: str) -> None:
    assert _score(reward, CALLS, CHEATS[cheat]).value == 0.0


@pytest.mark.parametrize("forged", ['{"complex": []}', '{"float": 1%s}' % ("0" * 400), '{"set": [[]]}', "[" * 980])
def test_a_forged_value_is_a_wrong_one(reward: CodeTestsReward, forged: str) -> None:
    code = f"""
import os
def f(n):
    for fd in range(3, 20):
        try: os.write(fd, b'{{"value": {forged}}}\\n')
        except OSError: pass
    os._exit(0)
"""
    score = _score(reward, CALLS, code)
    assert (score.value, score.details.get("reason")) == (0.0, "no_answer"), score


def test_an_honest_program_among_cheats_passes(cheated: dict[str, RewardScore]) -> None:
    assert cheated["honest"].value == 1.0, cheated["honest"]


@pytest.mark.parametrize(
    "code", ["import os\nprint(9, flush=True)\nos._exit(0)", "print('9\\n4')", "raise SystemExit", "print(input())"]
)
def test_a_program_is_judged_by_what_it_prints(reward: CodeTestsReward, code: str) -> None:
    score = _score(reward, RUNS, code)
    # The first prints the right answer to the first run, which is all that such a test asks for.
    assert score.value == (0.5 if "print(9" in code else 0.0)


def test_fraction_or_all(reward: CodeTestsReward) -> None:
    half = "def f(n): return abs(n) * n"  # right for 3 and 0
    assert _score(reward, SQUARE, half).value == 0.75
    strict = CodeTestsReward(CodeTestsConfig(scoring="all"))
    score = _score(strict, SQUARE, half)
    assert (score.value, score.details["passed"], score.details["num_tests"]) == (0.0, 3, 4)
    assert score.details["reason"] == "AssertionError"


def test_the_tests_own_loop_is_no_ones_failure() -> None:
    reward = CodeTestsReward(CodeTestsConfig(timeout_s=0.5))
    try:
        reward.load()
    except ConfigError as error:
        pytest.skip(str(error))
    score = _score(reward, {"tests": ["assert f(1) == 1\nwhile True: pass"]}, "def f(n): return n")
    assert score.error is not None
    assert score.error.code == "timeout"


def test_no_code_is_0_and_says_so(reward: CodeTestsReward) -> None:
    (score,) = asyncio.run(reward.score([RewardSample("s", Prompt("p", "", SQUARE), text="I cannot.")]))
    assert (score.value, score.details["reason"]) == (0.0, "no_code")


@pytest.mark.parametrize("metadata", [
    {}, {"tests": []}, {"tests": "assert f(1)"}, {"tests": [1]}, {"tests": ["assert f("]}, {"tests": ["assert 1 == 1"]},
    {"tests": ["assert f(1)", {"stdin": "", "stdout": ""}]}, {"tests": [{"args": [1], "expected": 1}]},
    {"tests": ["assert f(1)"], "entry_point": "a b"}, {"tests": ["assert f(1)"], "test_setup": 1},
    {"tests": ["def check(candidate): assert candidate(1)"]}, {"tests": [{"stdin": 1, "stdout": ""}]},
    {"tests": ["assert f(1)"] * 257}, {"tests": [{"args": 1, "expected": 1}], "entry_point": "f"},
    {"tests": [{"args": [], "kwargs": [], "expected": 1}], "entry_point": "f"},
    {"tests": ["assert sum([1]) == 1"]},
])  # fmt: skip
def test_metadata_without_tests_is_refused(metadata: dict) -> None:
    with pytest.raises(PromptError):
        read_task(Prompt("p", "", metadata))
