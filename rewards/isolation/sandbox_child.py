"""Stage two inside a sandbox: limit this process, say `ready`, then run what arrives. Given as source, stdlib only.

    program   run a program on the rest of the standard input
    serve     load a module; answer calls of its functions with plain data
    judge     run tests; what they call is asked of another process, which alone has seen the code under test

Nothing that the code under test could learn decides its verdict: a serving child sees arguments, never an expected
value, and a judging child sees no code but the tests'. Between them travels plain data (`encode`), which cannot
override `==`.
"""

import ast
import builtins
import importlib.util
import json
import math
import os
import resource
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY = b"ready"
BIG_INT = 2**53


class OpaqueError(Exception):
    """A value that is no plain data."""


class CandidateError(Exception):
    """The code under test gave no value: it raised what is no built-in exception, was too late, or is gone."""


def encode(value: Any) -> Any:
    """Plain data as JSON; subclasses become what they extend. Raises OpaqueError for anything else."""
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < BIG_INT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    raise OpaqueError(type(value).__name__)


def decode(data: Any) -> Any:
    """The plain data that `encode` wrote; every object is of a built-in type. Raises ValueError, TypeError."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("an encoded value has one tag")
    ((tag, inner),) = data.items()
    return _DECODERS[tag](inner) if tag in _DECODERS else _unknown(tag)


def _unknown(tag: str) -> Any:
    raise ValueError(f"no such tag: {tag[:20]}")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda inner: int(inner, 16),
    "float": float,
    "dict": lambda inner: {decode(key): decode(item) for key, item in inner},
    "tuple": lambda inner: tuple(decode(item) for item in inner),
    "set": lambda inner: {decode(item) for item in inner},
    "frozenset": lambda inner: frozenset(decode(item) for item in inner),
    "bytes": bytes.fromhex,
    "complex": lambda inner: complex(float(inner[0]), float(inner[1])),
}


class Channel:
    """Lines of JSON to and from the owner, on descriptors that ordinary reading and printing does not touch."""

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        quiet = os.open(os.devnull, os.O_RDWR)
        os.dup2(quiet, 0)
        os.dup2(quiet, 1)

    def __iter__(self) -> Iterator[Any]:
        return (json.loads(line) for line in self._in)

    def say(self, message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._out, line) :]

    def ask(self, message: Any) -> Any:
        self.say(message)
        return next(iter(self))


def called_names(test: str, entry_point: str) -> list[str]:
    """What a test reads, does not define itself and Python does not bring: the functions under test.

    The entry point is one of them even if Python has a function of that name.
    """
    tree = ast.parse(test)
    read = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    defined = set(dir(builtins)) | {"__name__", "__file__"}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                defined.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.ExceptHandler(name=str(name)):
                defined.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                defined |= {alias.asname or alias.name.split(".")[0] for alias in names}
            case _:
                pass
    return sorted(set(read) - (defined - {entry_point}))


def _program(code: str) -> None:
    for name in ("exit", "quit"):  # the site module brings them elsewhere
        setattr(builtins, name, sys.exit)
    path = Path("program.py")
    path.write_text(code, encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")


def _serve(code: str, channel: Channel) -> None:
    path = Path("solution.py").absolute()
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("solution", path)
    if spec is None or spec.loader is None:
        raise ImportError("a file that ends in .py has a loader")
    module = importlib.util.module_from_spec(spec)
    sys.modules["solution"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # noqa: BLE001  # whatever it raises, SystemExit too, it is not loaded
        channel.say({"not_loaded": type(error).__name__})
        return
    channel.say({"loaded": True})
    for ask in channel:
        channel.say(_answer(module, ask))


def _answer(module: Any, ask: Any) -> Any:
    try:
        function = getattr(module, ask["call"])
        return {"value": encode(function(*decode(ask["args"]), **decode(ask["kwargs"])))}
    except BaseException as error:  # noqa: BLE001  # the function's own business, which the test judges
        return {"raised": type(error).__name__}


def _judge(tests: list[str], entry_point: str, channel: Channel) -> None:
    for index, test in enumerate(tests):
        path = Path(f"test_{index}.py")
        path.write_text(test, encoding="utf-8")
        proxies = {name: _proxy(name, channel) for name in called_names(test, entry_point)}
        try:
            runpy.run_path(str(path), init_globals=proxies, run_name="test")
            failed = None
        except BaseException as error:  # noqa: BLE001  # a test that does not run through has failed
            failed = str(error) if isinstance(error, CandidateError) else type(error).__name__
        channel.say({"test": index, "failed": failed})


def _proxy(name: str, channel: Channel) -> Callable[..., Any]:
    """Stands for a function of the code under test."""

    def ask(*args: Any, **kwargs: Any) -> Any:
        reply = channel.ask({"call": name, "args": encode(list(args)), "kwargs": encode(kwargs)})
        if "value" in reply:
            return decode(reply["value"])
        raised = str(reply.get("raised", "no_answer"))
        kind = getattr(builtins, raised, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(f"raised by {name}")
        raise CandidateError(raised)

    return ask


def main() -> None:
    """`sys.argv[1]` is JSON: limits by the names of the resource module. The order comes with its length before it."""
    for name, value in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    sys.dont_write_bytecode = True
    os.write(1, READY + b"\n")
    # Standard error shared the pipe until here, so that the owner reads why a sandbox does not start.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    length = b""
    while not length.endswith(b"\n"):
        length += os.read(0, 1)
    text = b""
    while len(text) < int(length):
        text += os.read(0, int(length) - len(text))
    order = json.loads(text)
    if order["mode"] == "program":
        _program(order["code"])
    elif order["mode"] == "serve":
        _serve(order["code"], Channel())
    else:
        _judge(order["tests"], order["entry_point"], Channel())


if __name__ == "__main__":
    main()
