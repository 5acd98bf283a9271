"""The code reward: does the program in a completion pass its prompt's tests, run in isolation (`sandbox.py`)?

The code is the last Python fence of the text. Three kinds of test, one kind per prompt:

    "assert f(3) == 9"                 any test code, MBPP's asserts or HumanEval's `def check(candidate)`
    {"args": [3], "expected": 9}       a call of the prompt's `entry_point`
    {"stdin": "3\\n", "stdout": "9\\n"}  a run of the whole program; white space at line ends is not compared

The verdict is computed where the code cannot reach. Its process gets arguments and gives plain data back; expected
values stay out of it. Test code runs in a second sandbox that has never seen the code under test: there, every
function that it calls and does not define is asked of the first by name. So exit(), a patched builtin, an object
whose `==` is always true, or output that looks like a verdict win nothing. What does not travel as plain data (a class
of the solution's, a generator, a change of an argument in place) cannot be tested this way and fails.

The value is the share of the tests passed, or 1 for all of them and else 0. A sandbox that does not start is an error.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field

from raylign.errors import PromptError
from raylign.types import JsonValue, Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.isolation.child_process import Child, ChildEndedError, ChildError, ChildTimeoutError
from rewards.isolation.sandbox import Limits, Sandbox, SandboxError
from rewards.isolation.sandbox_child import called_names, decode, encode
from rewards.text.answers import last_code
from rewards.text.rule import NoVerdict, Verdict, score_texts, verdict

logger = logging.getLogger(__name__)

RULE_VERSION = "2"
MAX_TESTS = 256


class CodeTestsConfig(RewardConfig):
    """The share of its tests that a program passes."""

    type: Literal["code_tests"] = "code_tests"
    scoring: Literal["fraction", "all"] = "fraction"
    """fraction: passed tests over tests. all: 1 if every test passes, else 0."""
    timeout_s: float = Field(default=10.0, gt=0, le=300)
    """Wall clock for all tests of one sample; what has not passed by then has failed."""
    memory_mb: int = Field(default=512, ge=64)
    """Address space of a process."""
    num_workers: int = Field(default=2, ge=1, le=64)
    """Samples tested side by side; each has up to two sandboxes at a time."""
    unsafe_local_exec: bool = False
    """Run code also where it cannot be isolated. It can then do all that this process can."""


@dataclass(frozen=True, slots=True)
class TestCode:
    """A piece of test code; complete, its set-up and the call of `check` included."""

    __test__ = False
    source: str


@dataclass(frozen=True, slots=True)
class TestCall:
    """A call of the entry point and the value it should give."""

    __test__ = False
    args: Sequence[JsonValue]
    kwargs: Mapping[str, JsonValue]
    expected: JsonValue


@dataclass(frozen=True, slots=True)
class TestRun:
    """A run of the program and what it should print."""

    __test__ = False
    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Task:
    """The tests of one prompt, all of one kind."""

    tests: Sequence[TestCode] | Sequence[TestCall] | Sequence[TestRun]
    entry_point: str


class CodeTestsReward:
    """Runs the last Python fence of a completion against the prompt's tests."""

    modality: Modality = "text"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = False  # a clock decides, and programs may draw
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {
        "tests": "test code as texts, or {args, kwargs, expected} calls, or {stdin, stdout} runs",
        "entry_point": "the function that calls, or a test's own `check(candidate)`, are about",
        "test_setup": "code before each test, such as imports; may be missing",
    }

    def __init__(self, config: CodeTestsConfig) -> None:
        self.name = config.name
        self._config = config
        self._limits = Limits(memory_bytes=config.memory_mb * 2**20, cpu_s=config.timeout_s)
        self._sandbox: Sandbox | None = None
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix=f"{config.name}-code")
        self.version = (
            f"{RULE_VERSION}/{config.scoring}/{config.timeout_s}s/python-{sys.version_info[0]}.{sys.version_info[1]}"
        )

    def load(self) -> None:
        """Find a way to isolate code. Raises ConfigError if there is none and `unsafe_local_exec` is off."""
        if self._sandbox is None:
            self._sandbox = Sandbox.choose(self._limits, self._config.unsafe_local_exec)
            if self._sandbox.engine == "unsafe":
                logger.warning("reward %r runs code WITHOUT isolation: unsafe_local_exec is set", self.name)

    def probe(self) -> RewardSample:
        prompt = Prompt("probe", "", {"tests": ["assert one() == 1"]})
        return RewardSample("probe", prompt, text="```python\ndef one():\n    return 1\n```")

    def check(self, prompt: Prompt) -> None:
        read_task(prompt)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        await asyncio.to_thread(self.load)
        return await score_texts(self, samples, self._judge, self._threads)

    def _judge(self, sample: RewardSample, text: str) -> Verdict | NoVerdict:
        task, code = read_task(sample.prompt), last_code(text)
        if self._sandbox is None:
            raise RuntimeError("a reward is loaded before it scores")
        if code is None:
            return verdict(0.0, None, "no_code", passed=0, num_tests=len(task.tests))
        try:
            outcomes = run_tests(self._sandbox, code, task, self._config.timeout_s)
        except JudgeError as error:
            logger.warning(
                "reward %r: the tests of prompt %r did not run through: %s", self.name, sample.prompt.id, error
            )
            return NoVerdict("timeout", "the tests themselves did not run through in time")
        except SandboxError as error:
            logger.error("reward %r: a sandbox did not start: %s", self.name, error)
            return NoVerdict("model_error", "a sandbox did not start; see the scorer's log", retryable=True)
        passed = outcomes.count(None)
        share = passed / len(outcomes)
        value = share if self._config.scoring == "fraction" else float(passed == len(outcomes))
        reason = next((why for why in outcomes if why is not None), "passed")
        return verdict(value, code, reason, passed=passed, num_tests=len(outcomes))


class JudgeError(Exception):
    """The test code took too long by itself, or ended its process; that says nothing of the code under test."""


def run_tests(sandbox: Sandbox, code: str, task: Task, timeout_s: float) -> list[str | None]:
    """Why each test failed, in order; None where it passed, which no name that the code gives can spell.

    Raises SandboxError and JudgeError.
    """
    clock = Clock(timeout_s)
    match task.tests[0]:
        case TestRun():
            return [_run_program(sandbox, code, cast(TestRun, test), clock) for test in task.tests]
        case TestCall():
            with sandbox.start({"mode": "serve", "code": code}) as child:
                candidate = Candidate(child, clock)
                return [_compare(candidate, task.entry_point, cast(TestCall, test)) for test in task.tests]
        case TestCode():
            sources = [cast(TestCode, test).source for test in task.tests]
            with sandbox.start({"mode": "serve", "code": code}) as child:
                candidate = Candidate(child, clock)
                with sandbox.start({"mode": "judge", "tests": sources, "entry_point": task.entry_point}) as judge:
                    return _hear(judge, candidate, len(sources), timeout_s)


class Clock:
    """Time that is left to a candidate over all its tests; it runs only while one is waited for."""

    def __init__(self, seconds: float) -> None:
        self.left_s = seconds

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.left_s -= time.monotonic() - self._started


class Candidate:
    """The process that holds the code under test. Whatever it does, it answers with a line that is safe to pass on."""

    def __init__(self, child: Child, clock: Clock) -> None:
        self._child = child
        self._clock = clock
        self._gone = ""
        loaded = self._receive()
        if not self._gone and loaded.get("loaded") is not True:
            self._gone = str(loaded.get("not_loaded", "no_answer"))[:100]

    def call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`{"value": …}` or `{"raised": name}`."""
        if self._gone:
            return {"raised": self._gone}
        self._child.send(json.dumps(message).encode() + b"\n")
        reply = self._receive()
        if "value" in reply:
            return {"value": reply["value"]}
        return {"raised": str(reply.get("raised", "no_answer"))[:100]}

    def _receive(self) -> dict[str, Any]:
        """Its next line; a child that does not answer with JSON is asked no more."""
        try:
            with self._clock:
                reply = json.loads(self._child.read_line(self._clock.left_s))
            if isinstance(reply, dict):
                return cast(dict[str, Any], reply)
            self._gone = "no_answer"
        except ChildError as error:
            self._gone = _outcome(error)
        except (ValueError, RecursionError):
            self._gone = "no_answer"
        return {"raised": self._gone}


def _hear(judge: Child, candidate: Candidate, num_tests: int, timeout_s: float) -> list[str | None]:
    """Carry the judge's calls to the candidate until each test has its outcome. Raises JudgeError."""
    outcomes: list[str | None] = []
    clock = Clock(timeout_s)
    while len(outcomes) < num_tests:
        try:
            with clock:
                message = json.loads(judge.read_line(clock.left_s))
        except ChildError as error:
            raise JudgeError(type(error).__name__) from None
        if "call" in message:
            judge.send(json.dumps(candidate.call(message)).encode() + b"\n")
        else:
            outcomes.append(message["failed"])
    return outcomes


def _compare(candidate: Candidate, entry_point: str, test: TestCall) -> str | None:
    reply = candidate.call({"call": entry_point, "args": encode(list(test.args)), "kwargs": encode(dict(test.kwargs))})
    if "value" not in reply:
        return str(reply["raised"])
    try:
        equal = as_json(decode(reply["value"])) == as_json(test.expected)
    except Exception:  # noqa: BLE001  # whatever breaks on a forged answer is the fault of the code that forged it
        return "no_answer"
    return None if equal else "wrong_value"


def as_json(value: Any) -> Any:
    """Tuples as lists, which is all that JSON can expect of them; a truth value is no number."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in cast(Sequence[Any], value)]
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in cast(Mapping[Any, Any], value).items()}
    return ("truth", value) if isinstance(value, bool) else value


def _run_program(sandbox: Sandbox, code: str, test: TestRun, clock: Clock) -> str | None:
    if clock.left_s <= 0:
        return "timeout"
    with sandbox.start({"mode": "program", "code": code}) as child:
        child.send(test.stdin.encode())
        try:
            with clock:
                printed = child.read_rest(clock.left_s)
        except ChildError as error:
            return _outcome(error)
    same = _lines(printed.decode(errors="replace")) == _lines(test.stdout)
    return None if same else "wrong_output"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _outcome(error: ChildError) -> str:
    reasons: dict[type[ChildError], str] = {ChildTimeoutError: "timeout", ChildEndedError: "ended"}
    return reasons.get(type(error), "too_much_output")


def read_task(prompt: Prompt) -> Task:
    """The prompt's tests. Raises PromptError."""
    tests, entry_point = prompt.metadata.get("tests"), prompt.metadata.get("entry_point", "")
    setup = prompt.metadata.get("test_setup", "")
    if not isinstance(tests, list | tuple) or not 1 <= len(tests) <= MAX_TESTS:
        raise PromptError(f"prompt {prompt.id!r} needs metadata.tests, a list of 1 to {MAX_TESTS} tests")
    if not isinstance(entry_point, str) or (entry_point and not entry_point.isidentifier()):
        raise PromptError(f"prompt {prompt.id!r} has metadata.entry_point {str(entry_point)[:80]!r}; it must be a name")
    if not isinstance(setup, str):
        raise PromptError(f"prompt {prompt.id!r} has a metadata.test_setup that is no text")
    try:
        read = [_read_test(test, entry_point, setup) for test in tests]
    except ValueError as error:
        raise PromptError(f"prompt {prompt.id!r} has a bad test: {error}") from None
    if len({type(test) for test in read}) != 1:
        raise PromptError(f"prompt {prompt.id!r} mixes kinds of tests; give code, calls or runs only")
    return Task(cast(Sequence[TestCode], read), entry_point)


def _read_test(test: JsonValue, entry_point: str, setup: str) -> TestCode | TestCall | TestRun:
    """Raises ValueError with the reason."""
    match test:
        case str():
            return TestCode(_complete(test, entry_point, setup))
        case {"stdin": str(stdin), "stdout": str(stdout), **rest} if not rest:
            return TestRun(stdin, stdout)
        case {"args": list() | tuple() as args, "expected": expected, **rest} if not rest.keys() - {"kwargs"}:
            kwargs = rest.get("kwargs", {})
            if not entry_point:
                raise ValueError("calls need metadata.entry_point")
            if not isinstance(kwargs, Mapping):
                raise ValueError("kwargs must be a table")
            return TestCall(args, kwargs, expected)
        case _:
            raise ValueError("a test is code, or {args, expected}, or {stdin, stdout}")


def _complete(test: str, entry_point: str, setup: str) -> str:
    """Set-up, test, and the call of HumanEval's `check`. Raises ValueError if that tests nothing."""
    source = f"{setup}\n{test}"
    try:
        tree = ast.parse(source)
        defines_check = any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body)
        if defines_check:
            if not entry_point:
                raise ValueError("check(candidate) needs metadata.entry_point")
            source += f"\ncheck({entry_point})\n"
        names = called_names(source, entry_point)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is no Python") from None
    if not names:
        raise ValueError("it calls nothing but its own and Python's functions; name an entry_point that it calls")
    return source
