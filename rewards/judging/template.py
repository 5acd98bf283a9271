"""The questions that a judge of pictures is asked, as versioned data.

A template is one TOML file in `rewards/judging/templates/`. Every one holds `{caption}`: a judge that does not know
what was asked for rates beauty and calls it alignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from raylign.types import JsonValue
from rewards.judging.engine import JudgeMessage
from rewards.judging.guard import sanitise
from rewards.judging.library import Entry, find, read_entry, read_folder
from rewards.judging.marks import HIGHEST, LOWEST, REASONING

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["yes_no", "aspects", "pairwise"]
CAPTION = "{caption}"


class JudgeTemplate(Entry):
    """One question."""

    kind: Kind
    """What is asked: the first of two labels, marks for aspects, or which of two pictures."""
    system: str = ""
    """System message; none when empty."""
    user: str = Field(min_length=1)
    """User message, after the pictures; {caption} stands for the prompt."""
    first: str = ""
    """The label that is good (yes_no), or that names the first picture (pairwise)."""
    second: str = ""
    """The other label."""
    aspects: tuple[str, ...] = ()
    """What is marked from 1 to 5 (aspects); keys of the answer."""

    @model_validator(mode="after")
    def _complete(self) -> JudgeTemplate:
        if CAPTION not in self.user:
            raise ValueError(f"the user message must hold {CAPTION}; the judge has to know what was asked for")
        has_labels = bool(self.first.strip()) and bool(self.second.strip())
        if self.kind == "aspects" and (not self.aspects or REASONING in self.aspects):
            raise ValueError(f"a template for aspects names them in `aspects`, and {REASONING!r} is none")
        if self.kind != "aspects" and (not has_labels or self.first.casefold() == self.second.casefold()):
            raise ValueError(f"a {self.kind} template needs two different labels, `first` and `second`")
        return self

    def messages(self, caption: str, images_HWC: tuple[np.ndarray, ...]) -> tuple[JudgeMessage, ...]:
        """The chat that asks about pictures for a caption."""
        system = (JudgeMessage("system", self.system),) if self.system else ()
        return *system, JudgeMessage("user", self.user.replace(CAPTION, sanitise(caption).strip()), images_HWC)

    def answer_schema(self) -> Mapping[str, JsonValue]:
        """JSON schema of an answer with aspects."""
        marks = {aspect: {"type": "number", "minimum": LOWEST, "maximum": HIGHEST} for aspect in self.aspects}
        return {
            "type": "object",
            "properties": {REASONING: {"type": "string"}, **marks},
            "required": [REASONING, *self.aspects],
            "additionalProperties": False,
        }


@cache
def library() -> Mapping[str, JudgeTemplate]:
    """The templates that come with the package, by name."""
    return read_folder("templates", JudgeTemplate)


def library_template(name: str) -> JudgeTemplate:
    """A template of the library by name. Raises ConfigError with the nearest name."""
    return find(name, library(), "judge template")


def load_template(name_or_path: str) -> JudgeTemplate:
    """A template of the library, or an operator's own from a path that ends in .toml. Raises ConfigError."""
    is_path = name_or_path.endswith(".toml")
    return read_entry(Path(name_or_path), JudgeTemplate) if is_path else library_template(name_or_path)
