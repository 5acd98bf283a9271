"""The base of every configuration class, and the reader that turns TOML and dotted overrides into one.

A configuration is frozen and rejects unknown keys; the error names the key, where it is, and the nearest known
one. Importing this module loads neither torch nor Ray, so `raylign --help` and config errors are quick.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from raylign.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base class: frozen, strict about keys, defaults checked like given values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_default_types(cls, data: Any) -> Any:
        """A table without `type` is of its default's type, so that `--sampler.num_steps 8` is enough."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            table, default_type = filled.get(name), getattr(field.default, "type", None)
            if isinstance(table, dict) and "type" not in table and default_type is not None:
                filled[name] = {"type": default_type, **table}
        return filled


def load_config(
    cls: type[ConfigT],
    path: Path | Sequence[Path] | None,
    overrides: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Read TOML files (or none: all defaults), apply dotted overrides, and validate.

    Of several files a later one is laid over the earlier: key by key, but a table of another `type` replaces the
    whole table. `overrides` maps dotted keys to TOML values as typed ("learner.lr" → "1e-4", "rewards.0.weight" → "2").
    `base` holds values below the file's. Raises ConfigError naming file, key, value got and what to do.
    """
    paths = [path] if isinstance(path, Path) else list(path or ())
    data: dict[str, Any] = {}
    for one in paths:
        data = lay_over(data, _read_toml(one))
    source = " + ".join(map(str, paths)) or "the defaults"
    for dotted, text in (overrides or {}).items():
        _assign(data, dotted, _parse_value(text))
    return parse_config(cls, {**(base or {}), **data}, source)


def parse_config(cls: type[ConfigT], data: Mapping[str, Any], source: str) -> ConfigT:
    """Validate plain data; every problem in one ConfigError."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_describe(cls, problem)}" for problem in error.errors(include_url=False))
        raise ConfigError(f"{source} has {error.error_count()} problem(s):\n{problems}") from None


def with_overrides(config: ConfigT, overrides: Mapping[str, str]) -> ConfigT:
    """The configuration with dotted keys set. A table that is given another `type` begins anew, with its defaults.

    Raises ConfigError naming key, value got and what to do.
    """
    data = config.model_dump(mode="json", exclude_none=True)
    for dotted in sorted(overrides, key=lambda key: key.rpartition(".")[2] != "type"):
        value, (table, _, last) = _parse_value(overrides[dotted]), dotted.rpartition(".")
        if last == "type" and _look_up(data, dotted) not in (None, value):
            _assign(data, table, {})
        _assign(data, dotted, value)
    return parse_config(type(config), data, "the configuration with what was set after it")


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with both as plain JSON; None stands for a key that is not set there."""
    before, after = leaves(old), leaves(new)
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def leaves(config: Config) -> dict[str, Any]:
    """Every key that is set, dotted (`rewards.0.type`), with its value as plain JSON."""
    return _flatten(config.model_dump(mode="json", exclude_none=True), "")


def covers(name: str, key: str) -> bool:
    """Whether `name` is the dotted key itself or a table that it is in; `*` in a name is any one part."""
    parts, whole = name.split("."), key.split(".")
    return len(parts) <= len(whole) and all(part in ("*", one) for part, one in zip(parts, whole, strict=False))


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: tables key by key, unless they are of different `type`; all else replaces."""
    laid = dict(below)
    for key, value in above.items():
        mine: Any = laid.get(key)
        if (
            isinstance(value, dict)
            and isinstance(mine, dict)
            and value.get("type", mine.get("type")) == mine.get("type")
        ):
            laid[key] = lay_over(mine, value)
        else:
            laid[key] = value
    return laid


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; see `configs/` for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _parse_value(text: str) -> Any:
    """A command-line value: TOML where it parses (numbers, booleans, arrays, quoted text), else the bare text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in nested dicts and lists, making tables on the way."""
    *parents, last = dotted.split(".")
    node: Any = data
    for depth, key in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, key, dotted)
            continue
        if key in node and not isinstance(node[key], (dict, list)):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"--{dotted}: {where} is the value {node[key]!r}, not a table")
        node = node.setdefault(key, {})
    if isinstance(node, list):
        _item(node, last, dotted)
        node[int(last)] = value
    else:
        node[last] = value


def _look_up(data: Any, dotted: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in dotted.split("."):
        if isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data


def _flatten(value: Any, name: str) -> dict[str, Any]:
    """Leaves by dotted name. A list of tables is walked by index, any other list is a leaf."""
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = {str(place): one for place, one in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{name}.{key}" if name else str(key))
    return flat


def _item(items: list[Any], key: str, dotted: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"--{dotted}: {key!r} is no index of a list of {len(items)}")
    return items[int(key)]


def _describe(cls: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One line for one pydantic problem: the dotted key, what is wrong, the nearest known key."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "the configuration"
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(cls, location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        choices = [choice.strip().strip("'") for choice in str(context["expected_tags"]).split(",")]
        near = difflib.get_close_matches(str(context["tag"]), choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}.type: no such type {context['tag']!r}{hint} (one of: {', '.join(choices)})"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, (dict, BaseModel)) else f" (got {value!r})"
    return f"{key}: {message}{shown}"


def _known_keys(cls: type[BaseModel], location: Sequence[str]) -> set[str]:
    """The field names at a location inside nested models, unions and lists."""
    models: set[type[BaseModel]] = {cls}
    for part in location:
        inner: set[type[BaseModel]] = set()
        for model in models:
            if part in model.model_fields:
                inner |= _models_in(model.model_fields[part].annotation)
        # An index into a list or the tag of a discriminated union leaves the candidates as they are.
        tagged = {m for m in models if _tag(m) == part}
        models = inner or tagged or models
    return {name for model in models for name in model.model_fields}


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("type")
    tags = get_args(kind.annotation) if kind is not None else ()
    return str(tags[0]) if len(tags) == 1 else None


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    found: set[type[BaseModel]] = set()
    for argument in get_args(annotation):
        found |= _models_in(argument)
    return found
