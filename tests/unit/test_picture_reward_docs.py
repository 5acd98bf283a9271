"""The pages of the picture rewards say every key with its default, and their examples parse."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from rewards import REWARDS, RewardConfig, RewardUnion

PAGES = Path(__file__).parents[2] / "docs" / "rewards"
PICTURES = ("ocr", "jpeg", "clip_score", "pickscore", "hps", "imagereward", "aesthetic")
CONFIGS = {config.model_fields["type"].default: config for config in REWARDS}


@pytest.mark.parametrize("name", PICTURES)
def test_the_example_is_a_configuration(name: str) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (table,) = tomllib.loads(example)["rewards"]
    assert TypeAdapter[RewardConfig](RewardUnion).validate_python(table).name == name


@pytest.mark.parametrize("name", PICTURES)
def test_every_key_is_named_with_its_default(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    own = CONFIGS[name].model_fields.keys() - RewardConfig.model_fields.keys() - {"type"}
    assert own
    for key in own:
        default = CONFIGS[name].model_fields[key].default
        shown = f"{default:g}" if isinstance(default, float) else f'"{default}"' if isinstance(default, str) else None
        rows = [line for line in page.splitlines() if f"`{key}`" in line]
        assert rows, key
        assert shown is None or any(shown in row for row in rows), (key, shown)
