"""Reference pages of every configuration key, read from the classes that check them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.generator.text import cell, code, paragraph, table
from raylign.samplers import IMAGE_SAMPLERS, TOKEN_SAMPLERS

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
_PLAIN = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "none", Any: "any"}
Classes = dict[str, type[BaseModel]]
"""Tables that a page has still to describe, by the heading they get."""
ELSEWHERE = dict.fromkeys([*IMAGE_SAMPLERS, *TOKEN_SAMPLERS], "[sampler](samplers.md)")
"""Tables with a page of their own, which other pages only link."""


def unwrapped(annotation: Any) -> Any:
    """The type inside `Annotated`."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def members(annotation: Any) -> tuple[Any, ...]:
    """What a union is of; another type alone."""
    inner = unwrapped(annotation)
    if get_origin(inner) in (Union, types.UnionType):
        return tuple(one for argument in get_args(inner) for one in members(argument))
    return (inner,)


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes that a value of this type is."""
    return [one for one in members(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]


def tag(model: type[BaseModel]) -> str | None:
    """The `type` that chooses this class, if it has one."""
    kind = model.model_fields.get("type")
    return str(get_args(kind.annotation)[0]) if kind is not None and get_args(kind.annotation) else None


def title_of(model: type[BaseModel]) -> str:
    """A table's heading."""
    kind = tag(model)
    return model.__name__ if kind is None else f'{model.__name__}, type = "{kind}"'


def anchor(title: str) -> str:
    """The name of a heading's place in its page."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def type_text(annotation: Any, found: Classes) -> str:
    """A type in words; configuration classes in it are added to `found`, to be described on their own."""
    parts: list[str] = []
    for one in members(annotation):
        origin, arguments = get_origin(one), get_args(one)
        if isinstance(one, type) and one in ELSEWHERE:
            if (link := f"as {ELSEWHERE[one]}") not in parts:
                parts.append(link)
        elif isinstance(one, type) and issubclass(one, BaseModel):
            found.setdefault(title_of(one), one)
            parts.append(f"[{title_of(one)}](#{anchor(title_of(one))})")
        elif origin is Literal:
            parts += [code(f'"{value}"' if isinstance(value, str) else str(value)) for value in arguments]
        elif origin in (tuple, list):
            inner = [type_text(argument, found) for argument in arguments if argument is not Ellipsis]
            parts.append(f"list of {inner[0]}" if Ellipsis in arguments or origin is list else f"({', '.join(inner)})")
        elif (origin is not None and issubclass(origin, dict)) or getattr(origin, "__name__", "") == "Mapping":
            parts.append(f"table of {type_text(arguments[1], found)}")
        else:
            parts.append(_PLAIN.get(one, getattr(one, "__name__", str(one))))
    return ", ".join(parts[:-1]) + (" or " if len(parts) > 1 else "") + parts[-1]


def bounds(field: FieldInfo) -> str:
    """A number's limits, "" where there are none."""
    limits = [
        f"{sign} {getattr(one, name):g}"
        for one in field.metadata
        for name, sign in _BOUNDS.items()
        if hasattr(one, name)
    ]
    return f" {', '.join(limits)}" if limits else ""


def value_text(value: Any) -> str:
    """A default as one would write it in TOML."""
    if isinstance(value, BaseModel):
        kind = tag(type(value))
        return "its own" if kind is None else code(f'type = "{kind}"')
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return ", ".join(value_text(one) for one in value)
    if isinstance(value, (tuple, list)):
        return code("[" + ", ".join(value_text(one).strip("`") for one in value) + "]")
    if isinstance(value, bool):
        return code(str(value).lower())
    return "–" if value is None or value == {} else code(f'"{value}"' if isinstance(value, str) else f"{value}")


def default_text(field: FieldInfo) -> str:
    """What a key is when it is not given."""
    if field.default is not PydanticUndefined:
        return value_text(field.default)
    return "**needed**" if field.default_factory is None else value_text(field.default_factory())  # type: ignore[call-arg]


def meaning(field: FieldInfo) -> str:
    """A key's docstring, or its class's."""
    if field.description:
        return paragraph(field.description)
    kinds = models_of(field.annotation)
    if len(kinds) == 1:
        return paragraph(inspect.getdoc(kinds[0]) or "")
    return "Chosen by `type`." if kinds else ""


def key_table(fields: Iterable[tuple[str, FieldInfo]], found: Classes) -> list[str]:
    """The Markdown table of some keys."""
    rows = [
        (code(name), type_text(field.annotation, found) + bounds(field), default_text(field), meaning(field))
        for name, field in fields
    ]
    return table(("key", "takes", "default", "meaning"), [tuple(map(cell, row)) for row in rows])


def section(model: type[BaseModel], found: Classes, known: Sequence[str] = ()) -> list[str]:
    """One class: its docstring and its keys, but for those in `known`."""
    fields = [(name, field) for name, field in model.model_fields.items() if name != "type" and name not in known]
    text = ["", paragraph(inspect.getdoc(model) or ""), ""]
    return [*text, *(key_table(fields, found) if fields else ["No keys of its own."])]


def shared_keys(models: Sequence[type[BaseModel]]) -> list[str]:
    """Keys that every class of a union has, with the same type, default and meaning."""
    first, *rest = models

    def same(name: str) -> bool:
        mine = first.model_fields[name]
        fields = [other.model_fields.get(name) for other in rest]
        return all(
            one is not None
            and (one.annotation, one.description, repr(one.default), repr(one.metadata))
            == (mine.annotation, mine.description, repr(mine.default), repr(mine.metadata))
            for one in fields
        )

    return [name for name in first.model_fields if name != "type" and rest and same(name)]


def _remaining(found: Classes, done: set[str], level: str) -> list[str]:
    """The tables that keys led to, and those that these lead to."""
    lines: list[str] = []
    while left := [title for title in found if title not in done]:
        done.add(left[0])
        lines += ["", f"{level} {left[0]}", *section(found[left[0]], found)]
    return lines


def union_page(title: str, introduction: str, models: Sequence[type[BaseModel]]) -> str:
    """The page of a table that is of one of several types."""
    found: Classes = {title_of(model): model for model in models}
    done, shared = set(found), shared_keys(models)
    lines = [f"# {title}", "", introduction]
    if shared:
        fields = [(name, models[0].model_fields[name]) for name in shared]
        lines += ["", "## Keys of every type", "", *key_table(fields, found)]
    for model in models:
        lines += ["", f"## {title_of(model)}", *section(model, found, shared)]
    return "\n".join([*lines, *_remaining(found, done, "##")]) + "\n"


def run_page(title: str, introduction: str, model: type[BaseModel], pages: dict[str, str]) -> str:
    """The page of a whole configuration; `pages` are tables that have pages of their own, by key."""
    found: Classes = {}
    lines = [f"# {title}", "", introduction, "", "## Keys of the file itself", ""]
    plain = [(name, field) for name, field in model.model_fields.items() if not _is_table(field)]
    tables = [(name, field) for name, field in model.model_fields.items() if _is_table(field)]
    lines += key_table(plain, found)
    done: set[str] = set()
    for name, field in tables:
        heading = f"[[{name}]]" if get_origin(unwrapped(field.annotation)) is tuple else f"[{name}]"
        lines += ["", f"## {heading}"]
        if name in pages:
            lines += ["", f"By default {default_text(field)}. Every type and its keys: [{name}]({pages[name]})."]
            continue
        kinds = models_of(field.annotation)
        done |= {title_of(kind) for kind in kinds}
        if len(kinds) > 1:
            lines += ["", f"Of one of these types; by default {default_text(field)}."]
        for kind in kinds:
            lines += [*(["", f"### {title_of(kind)}"] if len(kinds) > 1 else []), *section(kind, found)]
    return "\n".join([*lines, *_remaining(found, done, "##")]) + "\n"


def _is_table(field: FieldInfo) -> bool:
    inner = unwrapped(field.annotation)
    arguments = get_args(inner) if get_origin(inner) is tuple else (inner,)
    return any(models_of(argument) for argument in arguments)
